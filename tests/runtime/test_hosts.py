"""Two real processes of two devices each, beside this one, through JAX's runtime."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from support.jobs import Job, assert_same_losses, evaluations, train_here
from support.programs import evaluate, run_main, sample

from jax_diffusion.runtime import checkpoint, logs

SCORE = "pixel_distance_n64_0.99"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(folder):
    """Two processes of two devices, split over all four; with scores and a grid."""
    options = ("--config.mesh.fsdp=4", "--config.eval_every=6")
    options += ("--config.evaluation.n=64", "--config.evaluation.steps=3")
    options += ("--config.sample_every=100",)
    job = Job(folder / "two", *options, processes=2)
    job.finish()
    return job


def test_two_processes_train_as_one(two, alone):
    assert_same_losses(two.workdir, alone, rtol=1e-6)


def test_the_history_of_losses_is_that_of_one_process(two, alone):
    def history(workdir):
        path = workdir / "checkpoints" / "12" / "state"
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), tree)
            state = reader.restore(path, restore_args=as_numpy)
        return jax.tree.leaves(state["timestep_state"])

    for a, b in zip(history(two.workdir), history(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_the_first_process_alone_writes_and_speaks(two):
    assert "step 12 of 12" in two.logs[0].read_text()
    assert "step" not in two.logs[1].read_text()
    steps = [row["step"] for row in logs.read_metrics(two.workdir)]
    assert steps == [2, 4, 6, 8, 10, 12]
    (start,) = json.loads((two.workdir / "run.json").read_text())["starts"]
    assert start["hardware"]["processes"] == 2 and start["hardware"]["devices"] == 4
    assert "--process-id 0" in start["command"]


# 64 pixels of 64 images are too few for a score, not for a comparison.
@pytest.mark.filterwarnings("ignore:a Frechet distance of")
def test_two_processes_draw_and_score_as_one(two, folder, monkeypatch):
    here, drawn = ("--workdir", two.workdir), {}
    for processes in (1, 2):
        out = folder / f"drawn_{processes}.npz"
        options = ("--out", str(out), "--n", "6", "--steps", "3")
        if processes == 1:
            run_main(monkeypatch, sample, *here, *options)
        else:
            Job(two.workdir, *options, program="sample", processes=2).finish()
        drawn[processes] = np.load(out)["arr_0"].astype(int)
    difference = np.abs(drawn[1] - drawn[2])
    assert drawn[1].shape == (6, 8, 8, 1) and drawn[1].std() > 0
    assert difference.max() <= 1 and difference.mean() < 0.01  # roundings tip a few
    options = ("--metrics", "pixel_distance,bpd", "--n", "64", "--steps", "3")
    options = (*options, "--batch-size", "32", "--bits-images", "60")
    job = Job(two.workdir, *options, program="evaluate", processes=2)
    job.finish()
    run_main(monkeypatch, evaluate, *here, *options)
    several, alone = (found["scores"] for found in evaluations(two.workdir))
    rows = {row["step"]: row for row in logs.read_metrics(two.workdir)}
    scored = {step for step, row in rows.items() if SCORE in row}
    assert scored == {6, 12}  # while training, by both processes
    np.testing.assert_allclose(rows[12][SCORE], alone["pixel_distance"], rtol=1e-5)
    best = checkpoint.load_record(two.workdir / "best")["best"]
    assert best["value"] == rows[best["step"]][f"{best['metric']}_{best['ema']}"]
    assert several.keys() == alone.keys() and len(several) == 6
    for name, value in several.items():  # the prior is a difference of larger numbers
        np.testing.assert_allclose(value, alone[name], rtol=1e-6, atol=1e-8)


def test_processes_with_different_configs_stop_at_once(folder):
    job = Job(folder / "quarrel", processes=2, last=["--config.optimizer.lr=1.0"])
    assert job.wait() == [2, 2]
    assert "must be given one config" in job.logs[0].read_text()
    assert not (folder / "quarrel").exists()


def test_two_processes_fine_tune_and_change_as_one(alone, folder):
    """Split over all devices, with a row of labels that is drawn anew."""
    one, several = folder / "tuned_1", folder / "tuned_2"
    options = ("--config.label_dropout=0.1", "--config.mesh.fsdp=4")
    train_here(one, *options, init_from=alone)
    Job(several, *options, "--init-from", str(alone), processes=2).finish()
    assert_same_losses(several, one, rtol=1e-5)
    change = ("--config.total_steps=14", "--config.optimizer.lr=1e-4")
    change += ("--allow-change", "optimizer.lr")
    Job(several, *options, *change, processes=2).finish()
    records = [checkpoint.load_record(workdir) for workdir in (one, several)]
    for name in ("init_from", "data_digest"):
        assert records[0][name] == records[1][name]
    assert records[1]["init_from"]["anew"] == ["label/embedding of (hidden)"]
    assert records[1]["changes"][0]["step"] == 12


@pytest.mark.parametrize("devices", [1, 8])
def test_what_two_processes_saved_another_number_of_devices_continues(
    two, alone, folder, devices
):
    workdir = folder / f"continued_{devices}"
    shutil.copytree(two.workdir, workdir)
    for step in (8, 12):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    if devices == 8:
        train_here(workdir)
    else:
        Job(workdir, devices=devices).finish()
    assert_same_losses(workdir, alone, rtol=1e-5)
