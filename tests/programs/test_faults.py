"""Disks that fill, workdirs that vanish, two at once: a sentence, and nothing lost."""

import errno
import json
import os
import shutil
import sys

import jax
import numpy as np
import pytest
from support import tiny
from support.programs import evaluate, sample, train
from support.tiny_runs import make_run

from jax_diffusion import cli, plotting
from jax_diffusion import config as configs
from jax_diffusion.runtime import checkpoint, locks, logs
from jax_diffusion.runtime.resumable_npz import ResumableNpz
from jax_diffusion.training.reporting import Reporter

MODEL = "--config.model.name=support.networks:Tiny"
COMMAND = ["--config", tiny.CONFIG, "--config.sample_every=6", MODEL]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The digests of a run that met no fault."""
    workdir = tmp_path_factory.mktemp("whole")
    train.train(configs.load_config(COMMAND[1], COMMAND[2:]), workdir)
    return digests_of(workdir)


def digests_of(workdir):
    path = workdir / "checkpoints" / "12" / "record" / "metadata"
    return json.loads(path.read_text())["digests"]


@pytest.fixture
def ends(monkeypatch, capsys):
    """Runs a program that must end in one sentence; returns status and sentence."""

    def run(program, *flags):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, flags)])
        with pytest.raises(SystemExit) as info:
            cli.run_program(program.main)
        lines = capsys.readouterr().err.splitlines()
        told = [line for line in lines if line.startswith("error: ")]
        assert len(told) == 1 and told[0] == lines[-1] and told[0].endswith(".")
        assert not any(line.startswith("Traceback") for line in lines)
        return info.value.code, told[0]

    return run


def after(number, function, act):
    """A function that does something else from its call `number` on."""
    calls = []

    def instead(*args, **keywords):
        calls.append(1)
        return (act if len(calls) >= number else function)(*args, **keywords)

    return instead


def full(*args, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")


WRITERS = {  # what fills the disk: where it is written, and at which call
    "log": (logs.MetricWriter, "write", 4),
    "picture": (plotting, "save_png", 2),
    "checkpoint": (checkpoint.ocp.CheckpointManager, "save", 2),
    "loss curve": (plotting, "save_loss_curve", 1),
    "description": (logs, "write_description", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_fills_in_training_is_a_sentence_and_the_run_goes_on(
    writer, whole, ends, tmp_path, monkeypatch
):
    where, name, number = WRITERS[writer]
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(where, name, after(number, getattr(where, name), full))
        status, sentence = ends(train, *COMMAND, "--workdir", workdir)
    assert status == 1 and "No space left on device" in sentence
    newest = {"checkpoint": 4, "log": 8, "picture": 12, "loss curve": 12}.get(writer)
    assert checkpoint.latest_step(workdir) == newest
    assert not (workdir / ".lock").exists()
    train.train(configs.load_config(COMMAND[1], COMMAND[2:]), workdir)
    assert digests_of(workdir) == whole


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fate", ["removed", "taken over"])
def test_a_workdir_that_is_lost_in_mid_run_is_noticed(
    fate, ends, tmp_path, monkeypatch
):
    workdir, add = tmp_path / "run", Reporter.add

    def lose(self, metrics):
        add(self, metrics)
        if fate == "removed":
            shutil.rmtree(workdir)
        else:
            (workdir / locks.NAME).write_text('{"word": "theirs"}')

    monkeypatch.setattr(Reporter, "add", after(5, add, lose))
    status, sentence = ends(train, *COMMAND, "--workdir", workdir)
    words = "was removed" if fate == "removed" else "is another process's"
    assert status == 1 and f"workdir '{workdir}' {words}" in sentence
    # Of the save that was under way, Orbax may leave a part; nothing new is written.
    assert (workdir / "metrics.jsonl").exists() == (fate == "taken over")
    assert checkpoint.latest_step(workdir) == (4 if fate == "taken over" else None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir that a disk must not have lost."""
    return make_run(tmp_path_factory.mktemp("run") / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("out", "where", "name"),
    [("a.npz", np, "savez"), ("new", plotting, "save_png"), ("a.npz", os, "replace")],
)
def test_a_disk_that_fills_while_images_are_drawn_is_a_sentence(
    out, where, name, run, ends, tmp_path, monkeypatch
):
    flags = ["--workdir", run, "--out", tmp_path / out, "--n", 3, "--steps", 2]
    with monkeypatch.context() as patch:
        patch.setattr(where, name, full)
        status, sentence = ends(sample, *flags, "--batch-size", 2)
    assert status == 1 and "No space left on device" in sentence
    assert not (tmp_path / "a.npz").exists()
    assert not [*tmp_path.rglob("*.lock"), *tmp_path.rglob("*.tmp")]


def test_a_second_program_on_one_output_is_a_sentence(run, ends, tmp_path):
    flags = ["--workdir", run, "--n", 2, "--steps", 2]
    for program, out, kind in (
        (sample, tmp_path / "a.npz", "file"),
        (sample, tmp_path / "folder", "folder"),
        (evaluate, tmp_path / "scores", "folder"),
    ):
        with locks.hold("out", out, kind):
            status, sentence = ends(program, *flags, "--out", out)
        assert status == 2 and "--out must not be in use" in sentence
        assert f"process {os.getpid()} on" in sentence


def test_a_second_trainer_on_one_workdir_is_a_sentence(ends, tmp_path):
    with locks.hold("workdir", tmp_path / "run"):
        status, sentence = ends(train, *COMMAND, "--workdir", tmp_path / "run")
    assert status == 2 and "--workdir must not be in use" in sentence


def test_several_hosts_are_one_owner(tmp_path, monkeypatch):
    """The first process holds the lock, and the others go on without."""
    with locks.hold("workdir", tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_index", lambda: 1)
            with locks.hold("workdir", tmp_path):
                locks.check(tmp_path)
        assert (tmp_path / locks.NAME).exists()


def test_a_job_whose_parts_were_exchanged_is_a_sentence(run, ends, tmp_path):
    out = tmp_path / "a.npz"
    flags = ["--workdir", run, "--out", out, "--n", 4, "--steps", 2]
    flags += ["--batch-size", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResumableNpz, "join", full)
        ends(sample, *flags)
    first, second = sorted(out.with_suffix(".parts").glob("0*.npz"))
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    status, sentence = ends(sample, *flags)
    assert status == 2 and "must be the part of this job" in sentence
    first.unlink()
    assert "got 00000002.npz after 0 images: put" in ends(sample, *flags)[1]
    first.write_bytes(contents[0])
    second.write_bytes(contents[1])
    (out.with_suffix(".parts") / "record.json").unlink()
    assert "record.json must be there" in ends(sample, *flags)[1]
