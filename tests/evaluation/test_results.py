"""Scores as a table and in scores.json, with the names that metrics had before."""

import json

import pytest

from jax_diffusion.evaluation import results
from jax_diffusion.evaluation.results import Score, Scores


def test_scores_are_a_list_that_prints_as_a_table_with_aligned_columns():
    scores = Scores(
        [Score("fid_n2000", 31.4159265, 2000), Score("kid", -1e-7, 10, 0.5)],
        {"seconds": {"samples": 12.34, "kid": 0.1}},
    )
    assert scores[0].value == 31.4159265 and len(scores) == 2
    head, fid, kid, seconds = str(scores).splitlines()
    assert head.split() == ["metric", "value", "+-", "images"]
    assert fid.split() == ["fid_n2000", "31.4159", "2000"]
    assert kid.split() == ["kid", "-1e-07", "0.5000", "10"]
    assert len({len(head), len(fid), len(kid)}) == 1
    assert seconds == "seconds: samples 12.3, kid 0.1"
    assert repr(scores) == str(scores)  # as notebooks show it


def test_records_are_appended_and_those_before_keep_their_bytes(tmp_path):
    path = tmp_path / "new" / "scores.json"
    assert results.read_records(path) == []
    first = {"scores": {"ode_bits_per_dim": 3.5}, "ode": {"steps": 9}, "seed": 1}
    for record in (first, {"scores": {"fid": 2.0}}):
        results.append_record(path, record)
    assert json.loads(path.read_text())["evaluations"][0] == first
    assert [path.name] == [p.name for p in path.parent.iterdir()]


def test_scores_that_were_written_with_old_names_of_metrics_are_read(tmp_path):
    old = {
        "pixel_distance": 1.0,
        "pixel_distance_of_data": 2.0,
        "fid_n100_of_data": 3.0,
        "classifier_distance": 4.0,
        "classifier_distance_of_data": 5.0,
        "classifier_score": 6.0,
        "classifier_kernel": 7.0,
        "classifier_precision": 0.8,
        "classifier_recall": 0.9,
        "ode_bits_per_dim": 10.0,
        "ode_step_error": 11.0,
        "ode_probe_error": 12.0,
        "precision": 0.1,
    }
    entry = {"scores": old, "errors": {"classifier_score": 0.1}, "ode": {"steps": 9}}
    entry["images"] = dict.fromkeys(old, 100)
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"evaluations": [entry]}))
    (record,) = results.read_records(path)
    assert record["scores"] == {
        "pixel_distance": 1.0,
        "pixel_distance_real_vs_real": 2.0,
        "fid_n100_real_vs_real": 3.0,
        "cnn_fd": 4.0,
        "cnn_fd_real_vs_real": 5.0,
        "cnn_is": 6.0,
        "cnn_kid": 7.0,
        "cnn_precision": 0.8,
        "cnn_recall": 0.9,
        "nll_ode": 10.0,
        "nll_ode_step_error": 11.0,
        "nll_ode_probe_error": 12.0,
        "precision": 0.1,
    }
    assert record["images"].keys() == record["scores"].keys()
    assert record["errors"] == {"cnn_is": 0.1} and record["nll_ode"] == {"steps": 9}


@pytest.mark.parametrize("text", ["[]", "{", '{"evaluations": 3}', "{}"])
def test_another_file_in_the_place_of_scores_json_is_refused(text, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(text)
    for call in (results.read_records, lambda p: results.append_record(p, {})):
        with pytest.raises(ValueError, match="an object with a list `evaluations`"):
            call(path)
    assert path.read_text() == text
