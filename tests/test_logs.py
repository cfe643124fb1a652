"""Metrics on disk: there after every write, and resumed without doubles."""

import importlib.util
import json
import math
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jax_diffusion import logs


def run(workdir, steps, *, start=0):
    """A run that had made `start` updates before."""
    writer = logs.MetricWriter(workdir, start)
    for step in steps:
        writer.write(step, {"loss": 1 / step})
    writer.close()


def logged(workdir):
    return [row["step"] for row in logs.read_metrics(workdir)]


def events(workdir):
    """What TensorBoard would read, of all files in order."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):  # length, its checksum, event, its checksum
            (length,) = struct.unpack_from("<Q", content, at)
            yield Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4


def scalars(workdir):
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(workdir)
        for value in event.summary.value
    ]


def test_every_write_is_one_line_of_json_at_once(tmp_path):
    workdir = tmp_path / "new" / "run"
    writer = logs.MetricWriter(workdir, 0)
    for step, metrics in [(1, {"loss": 0.5, "lr": 1e-3}), (2, {"loss": 0.25})]:
        writer.write(step, metrics)
        *_, last = (workdir / "metrics.jsonl").read_text().splitlines()
        assert json.loads(last) == {"step": step} | metrics
    writer.close()
    assert logged(workdir) == [1, 2]


def test_numbers_are_kept_to_the_last_bit(tmp_path):
    run(tmp_path, [3])
    assert logs.read_metrics(tmp_path) == [{"step": 3, "loss": 1 / 3}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(tmp_path, value):
    writer = logs.MetricWriter(tmp_path, 0)
    writer.write(1, {"loss": value, "lr": 0.5})
    writer.close()
    line = '{"step": 1, "loss": null, "lr": 0.5}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == line


def test_resumed_run_drops_later_lines_and_doubles_nothing(tmp_path):
    run(tmp_path, [1, 2, 3, 4, 5])
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    logs.MetricWriter(tmp_path, 3).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before[:3]
    run(tmp_path, [4, 5, 6], start=3)
    assert logged(tmp_path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("cut", ["{", '{"step": 3', '{"step": 3, "loss": 1.0}'])
def test_resumed_run_drops_a_last_line_that_was_cut_off(tmp_path, cut):
    run(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    run(tmp_path, [4], start=3)
    assert logged(tmp_path) == [1, 2, 4]


def test_new_run_in_an_old_folder_starts_from_nothing(tmp_path):
    run(tmp_path, [1, 2])
    run(tmp_path, [1])
    assert logged(tmp_path) == [1]


def test_tensorboard_holds_every_number(tmp_path):
    run(tmp_path, [1, 2, 4])
    assert scalars(tmp_path) == [(1, "loss", 1), (2, "loss", 0.5), (4, "loss", 0.25)]


def test_tensorboard_is_told_to_forget_what_a_resumed_run_writes_again(tmp_path):
    run(tmp_path, [1, 2, 4])
    run(tmp_path, [4], start=3)
    starts = [
        event.step
        for event in events(tmp_path)
        if event.session_log.status == SessionLog.START
    ]
    assert starts[-1] == 4


def test_metrics_are_written_without_tensorboard_too(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run(tmp_path, [1, 2])
    assert logged(tmp_path) == [1, 2]
    assert not (tmp_path / "tensorboard").exists()


def test_reading_says_where_metrics_are_missing(tmp_path):
    with pytest.raises(
        ValueError, match=r"^workdir must hold metrics\.jsonl, and .* is"
    ):
        logs.read_metrics(tmp_path)
