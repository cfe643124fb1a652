"""Thousands of wrong values of config fields: a sentence for each, nothing written."""

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `train` says to each value of `support.config_values`, in one process."""
    folder = tmp_path_factory.mktemp("values")
    script = "tests/support/config_values.py"
    done = subprocess.run(
        [sys.executable, script, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_wrong_value_is_refused_in_one_sentence_that_names_its_field(found):
    *rows, _ = found
    assert len(rows) >= 400
    wrong = []
    for row in rows:
        *_, field = row["field"].split(".")
        sentence = row["said"].strip()
        told = sentence.startswith("error: ") and "\n" not in sentence
        told = told and "config." in sentence and field in sentence
        told = told and sentence.endswith((".", "?")) and len(sentence) < 500
        if row["status"] != 2 or not told:
            wrong.append(f"{row['case']}: {row['status']}, {sentence}")
    assert wrong == []


@pytest.mark.slow
def test_wrong_values_write_nothing_and_neither_hang_nor_take_memory(found):
    *rows, memory = found
    assert [row["case"] for row in rows if row["left"]] == []
    assert [row["case"] for row in rows if row["seconds"] > 30] == []  # a hang
    assert memory["mebibytes"] < 1024
