"""Hundreds of wrong files of others: each is refused in one sentence, quickly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import strange_files
from support.tiny_files import tiny_run

from jax_diffusion import export
from jax_diffusion.interop import exporting

ROOT = Path(__file__).parents[2]
SECONDS = 30  # of one file are a hang


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What came of every file, in one process of its own."""
    folder = tmp_path_factory.mktemp("files")
    run = tiny_run()
    exporting.export_run(run, "safetensors", folder / "run.safetensors")
    exporting.export_run(run, "diffusers", folder / "hub")

    def draw(params, seed, ids, label):
        return params["a"] * ids.reshape(-1, 1, 1, 1).astype("float32")

    weights = {"a": run.params["conv_in"]["bias"][0]}
    export.write(folder / "export", draw, weights, beside=True, num_labels=3)
    good = [folder / name for name in ("run.safetensors", "hub", "export")]
    cases = strange_files.make(folder / "wrong", *good)
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, strange_files.__file__]
    subprocess.run(
        [*command, folder / "cases.json", folder / "found.json", good[-1]],
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"},
        timeout=400,
    )
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_every_wrong_file_is_refused_in_one_sentence_and_nothing_is_written(refusals):
    assert len(refusals) >= 150
    wrong = []
    for found in refusals:
        error = found["error"]
        sentence = error.startswith("error: ") and error[-2:] in (".\n", "?\n")
        if found["code"] != 2 or not sentence or error.count("\n") != 1:
            wrong.append((found["case"], found["code"], error[-300:]))
        if found["written"]:
            wrong.append((found["case"], "has written something"))
    assert wrong == []


@pytest.mark.slow
def test_no_wrong_file_hangs_or_takes_much_memory(refusals):
    slow = [(f["case"], f["seconds"]) for f in refusals if f["seconds"] > SECONDS]
    assert slow == []
    grown = (refusals[-1]["peak"] - refusals[0]["peak"]) * 1024
    assert grown < strange_files.LIMIT
