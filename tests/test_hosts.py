"""Two real processes of two devices each, beside one of four; and what both survive.

All runs are programs of their own, on fake CPU devices, through JAX's own runtime.
"""

import functools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jax_diffusion import checkpoint, logs

# smoke.py, smaller still, with its loss-aware sampler; dropout too.
SMALL = (
    *("--config.model.multipliers=(1,)", "--config.model.attention_resolutions=(8,)"),
    *("--config.schedule.num_steps=10", "--config.timesteps.history=1"),
    *("--config.model.channels=32", "--config.sampling.n=4"),
    *("--config.sampling.steps=2", "--config.total_steps=12", "--config.log_every=2"),
    *("--config.save_every=4", "--config.sample_every=100", "--config.keep=10"),
)
LONG = "--config.total_steps=100000"


class Job:
    """A training run, or another program on it, by one or several processes."""

    def __init__(
        self, workdir, *options, processes=1, devices=4, program="train", last=()
    ):
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices // processes),
        }
        command = [sys.executable, "-m", f"jax_diffusion.{program}"]
        command += ["--workdir", str(workdir)]
        if program == "train":
            command += ["--config", "configs/smoke.py", *SMALL]
        command += options
        self.workdir, self.processes = workdir, []
        self.logs = [
            workdir.parent / f"{workdir.name}.{i}.log" for i in range(processes)
        ]
        port = free_port()
        for i, log in enumerate(self.logs):
            told = ["--coordinator", f"localhost:{port}", "--num-processes", processes]
            told += ["--process-id", i]
            told = [*map(str, told if processes > 1 else ())]
            told += last if i == processes - 1 else ()
            with log.open("w") as out:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *told], env=env, stdout=out, stderr=subprocess.STDOUT
                    )
                )

    def wait(self, timeout=300):
        """Exit statuses."""
        return [process.wait(timeout) for process in self.processes]

    def finish(self):
        status = self.wait()
        assert not any(status), "\n".join(log.read_text() for log in self.logs)

    def kill(self, which=0):
        """Without warning, as a machine that is taken away."""
        self.processes[which].kill()
        self.wait()

    def wait_for(self, what, timeout=200):
        """Until `what()` holds, while the run goes on."""
        begun = time.monotonic()
        while not what():
            running = [process.poll() is None for process in self.processes]
            text = "\n".join(log.read_text() for log in self.logs)
            assert all(running) and time.monotonic() - begun < timeout, text
            time.sleep(0.01)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def saved(workdir):
    return checkpoint.latest_step(workdir) or 0


def saves_after(workdir, step):
    """Whether it is in the midst of a save, or just after one."""
    return any(workdir.glob("checkpoints/*tmp*")) or saved(workdir) > step


def sealed(workdir, step):
    path = workdir / "checkpoints" / str(step) / "record" / "metadata"
    return json.loads(path.read_text())


def losses(workdir):
    return {row["step"]: row["loss"] for row in logs.read_metrics(workdir)}


def assert_same_losses(workdir, other, rtol):
    rows, others = losses(workdir), losses(other)
    assert rows.keys() == others.keys() and len(rows) == 6
    for step, loss in rows.items():
        np.testing.assert_allclose(loss, others[step], rtol=rtol)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def four(folder):
    """One process of four devices."""
    Job(folder / "four").finish()
    return folder / "four"


@pytest.fixture(scope="module")
def two(folder):
    """Two processes of two devices, parameters split over all four."""
    job = Job(folder / "two", "--config.mesh.fsdp=4", processes=2)
    job.finish()
    return job


def test_two_processes_train_as_one(two, four):
    assert_same_losses(two.workdir, four, rtol=1e-6)


def test_the_history_of_losses_is_that_of_one_process(two, four):
    def history(workdir):
        path = workdir / "checkpoints" / "12" / "state"
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), tree)
            state = reader.restore(path, restore_args=as_numpy)
        return jax.tree.leaves(state["timestep_state"])

    for a, b in zip(history(two.workdir), history(four), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_the_first_process_alone_writes_and_speaks(two):
    assert "step 12 of 12" in two.logs[0].read_text()
    assert "step" not in two.logs[1].read_text()
    steps = [row["step"] for row in logs.read_metrics(two.workdir)]
    assert steps == [2, 4, 6, 8, 10, 12]
    (start,) = json.loads((two.workdir / "run.json").read_text())["starts"]
    assert start["hardware"]["processes"] == 2 and start["hardware"]["devices"] == 4
    assert "--process-id 0" in start["command"]


def test_two_processes_draw_and_score_as_one(two, four, folder):
    drawn = {}
    for processes in (1, 2):
        out = folder / f"drawn_{processes}.npz"
        options = ("--out", str(out), "--n", "6", "--steps", "3")
        Job(two.workdir, *options, program="sample", processes=processes).finish()
        drawn[processes] = np.load(out)["arr_0"].astype(int)
    difference = np.abs(drawn[1] - drawn[2])
    assert drawn[1].shape == (6, 8, 8, 1) and drawn[1].std() > 0
    assert difference.max() <= 1 and difference.mean() < 0.01  # roundings tip a few
    options = ("--metrics", "bpd")
    job = Job(two.workdir, *options, program="evaluate", processes=2)
    job.finish()
    several = json.loads((two.workdir / "evaluation" / "scores.json").read_text())
    Job(two.workdir, *options, program="evaluate").finish()
    alone = json.loads((two.workdir / "evaluation" / "scores.json").read_text())
    np.testing.assert_allclose(
        several["bits_per_dim"], alone["bits_per_dim"], rtol=1e-6
    )


def test_processes_with_different_configs_stop_at_once(folder):
    job = Job(folder / "quarrel", processes=2, last=["--config.optimizer.lr=1.0"])
    assert job.wait() == [2, 2]
    assert "must be given one config" in job.logs[0].read_text()
    assert not (folder / "quarrel").exists()


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_what_two_processes_saved_another_number_of_devices_continues(
    two, four, folder, devices
):
    workdir = folder / f"continued_{devices}"
    shutil.copytree(two.workdir, workdir)
    for step in (8, 12):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    Job(workdir, devices=devices).finish()
    assert_same_losses(workdir, four, rtol=1e-5)


def test_sigterm_to_one_process_makes_both_save_one_step_and_exit(folder, four):
    workdir = folder / "stopped"
    job = Job(workdir, LONG, processes=2)
    job.wait_for(lambda: saved(workdir) >= 4)
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.wait() == [0, 0]
    assert f"SIGTERM: saved step {saved(workdir)}" in job.logs[0].read_text()
    before = saved(workdir)
    job = Job(workdir, f"--config.total_steps={before + 2}", processes=2)
    job.finish()
    assert saved(workdir) == before + 2


def test_a_lost_process_ends_the_others_and_the_job_continues(folder, four):
    workdir = folder / "lost"
    job = Job(workdir, LONG, processes=2)
    job.wait_for(lambda: saved(workdir) >= 4)
    job.processes[1].kill()
    begun = time.monotonic()
    assert job.wait()[0] != 0 and time.monotonic() - begun < 60
    assert "another task died" in job.logs[0].read_text()
    total = max(12, saved(workdir) + 4)
    Job(workdir, f"--config.total_steps={total}", processes=2).finish()
    assert saved(workdir) == total
    for step, loss in losses(four).items():
        np.testing.assert_allclose(losses(workdir)[step], loss, rtol=1e-5)


def test_ten_kills_change_nothing(folder, four):
    """Between steps, before the first checkpoint, and in the midst of saves."""
    workdir, rng = folder / "killed", random.Random(0)
    for i in range(10):
        job = Job(workdir)
        if i == 0:  # at any time, nothing saved yet
            time.sleep(rng.uniform(1, 4))
        elif i < 4:
            job.wait_for(functools.partial(saves_after, workdir, saved(workdir)))
        else:
            time.sleep(rng.uniform(2, 8))
        if job.processes[0].poll() is None:
            job.kill()
    Job(workdir).finish()
    assert sealed(workdir, 12)["digests"] == sealed(four, 12)["digests"]
    assert_same_losses(workdir, four, rtol=0)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, truncate, pathlib.Path.unlink])
def test_a_damaged_checkpoint_changes_nothing(folder, four, damage):
    """The newest is damaged in one file after the other, and the run goes on."""
    intact = folder / f"intact_{damage.__name__}"
    shutil.copytree(four, intact)
    shutil.rmtree(intact / "checkpoints" / "12")
    newest = intact / "checkpoints" / "8"
    files = [p for p in newest.rglob("*") if p.is_file()]
    files.sort(key=lambda p: p.stat().st_size, reverse=True)
    record = newest / "record" / "metadata"
    for file in {*files[:2], record, files[-1]}:
        workdir = folder / f"{damage.__name__}_{len(list(folder.iterdir()))}"
        shutil.copytree(intact, workdir)
        damage(workdir / file.relative_to(intact))
        job = Job(workdir)
        job.finish()
        assert sealed(workdir, 12)["digests"] == sealed(four, 12)["digests"]
        assert_same_losses(workdir, four, rtol=0)
