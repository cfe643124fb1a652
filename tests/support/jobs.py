"""Training runs on fake devices: here, or as programs of one process or several."""

import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
from support import programs, tiny

from jax_diffusion import config as settings
from jax_diffusion.runtime import checkpoint, logs

LONG = "--config.total_steps=100000"
NO_SAMPLES = "--config.sample_every=0"  # a sampler takes long to compile


def train_here(workdir, *options, **how):
    """A run of the tiny network by this process, on all of its eight devices."""
    config = settings.load_config(tiny.CONFIG, [NO_SAMPLES, *options])
    return programs.train.train(config, workdir, **how)


class Job:
    """A training run, or another program on it, by one or several processes."""

    def __init__(
        self, workdir, *options, processes=1, devices=4, program="train", last=()
    ):
        env = os.environ | {
            "PYTHONPATH": "tests",  # of the network
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices // processes),
        }
        command = [sys.executable, "-m", f"jax_diffusion.{program}"]
        command += ["--workdir", str(workdir)]
        if program == "train":
            command += ["--config", tiny.CONFIG, NO_SAMPLES]
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
        assert not any(status), self.said()

    def said(self):
        return "\n".join(log.read_text() for log in self.logs)

    def kill(self):
        """Without warning, as a machine that is taken away."""
        self.processes[0].kill()
        self.wait()

    def wait_for(self, what, timeout=200):
        """Until `what()` holds, while the run goes on."""
        begun = time.monotonic()
        while not what():
            running = [process.poll() is None for process in self.processes]
            assert all(running) and time.monotonic() - begun < timeout, self.said()
            time.sleep(0.01)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def saved(workdir):
    return checkpoint.latest_step(workdir) or 0


def sealed(workdir, step):
    path = workdir / "checkpoints" / str(step) / "record" / "metadata"
    return json.loads(path.read_text())


def lines_of(workdir):
    """metrics.jsonl without the timings."""
    timings = ("images_per_second", "seconds_per_step")
    return [
        {k: v for k, v in r.items() if k not in timings and not k.endswith("_share")}
        for r in logs.read_metrics(workdir)
    ]


def evaluations(workdir):
    """The records of evaluate."""
    path = workdir / "evaluation" / "scores.json"
    return json.loads(path.read_text())["evaluations"]


def losses(workdir):
    return {row["step"]: row["loss"] for row in logs.read_metrics(workdir)}


def assert_same_losses(workdir, other, rtol):
    rows, others = losses(workdir), losses(other)
    assert rows.keys() == others.keys() and len(rows) == 6
    for step, loss in rows.items():
        np.testing.assert_allclose(loss, others[step], rtol=rtol)
