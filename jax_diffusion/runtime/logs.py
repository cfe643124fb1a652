"""Logging: metrics (JSON lines, TensorBoard, W&B) and a description of every start.

WORKDIR/metrics.jsonl has one JSON object a line, means over the updates since the line
before; TensorBoard and W&B get the same numbers if `config.log_to` names them. Numbers
that are not finite are null. The fields:

    step                     number of updates made
    loss, mse, vlb, ...      the loss, and its terms; of a classifier its accuracy, too
    loss_q0 ... loss_q3      the loss of examples with t in each quarter of [0, T);
                             so for every term
    grad_norm, param_norm,   global norms of gradient, parameters and update
    update_norm
    lr                       the learning rate
    skipped                  updates that changed nothing, because the loss or a
                             gradient was not finite; config.max_skipped in a row end
                             the run
    damaged_images           images replaced since this start because they could not be
                             decoded; see on_error of `data.load`
    seconds_per_step,        wall-clock time, previews and checkpoints left out
    images_per_second
    data_share,              where that time went: the next batch, the call of the step,
    dispatch_share,          waiting for the device, the rest (see `clock.StepClock`)
    device_share,
    other_share
    roofline_share           share of the devices' peak FLOP/s, if `device_peaks` knows
                             them
    samples_mean_0,          where a grid was drawn: mean and standard deviation of each
    data_std_0, ...          channel, of samples and of data
    pixel_distance_n1000_0.9999, ...
                             where averages were evaluated (config.eval_every): metric,
                             number of samples, average

WORKDIR/run.json has a list `starts` with an entry for every start of the run: when, the
command, the config, the commit, versions of the libraries, and the hardware; see
`describe`.

The loop waits for the device at lines of the log, grids and checkpoints only; nothing
here does, as numbers come as floats.
"""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import secrets
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jax_diffusion.runtime import cpu
from jax_diffusion.runtime.files import json_text, write_atomic

WRITERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # name: its package


def check_writers(writers: Sequence[str]) -> None:
    """Checks names of writers.

    Args:
        writers: keys of `WRITERS`, of config.log_to.

    Raises:
        ValueError: for another name, or if the package of a writer is not installed.
    """
    for name in writers:
        if name not in WRITERS:
            raise ValueError(f"log_to must be some of {[*WRITERS]}, got {name!r}.")
        spec = importlib.util.find_spec(WRITERS[name])
        if spec is None or spec.origin is None:  # a folder wandb/ is no package
            raise ValueError(
                f"writer {name!r} must be installed to be used: pip install "
                f"{WRITERS[name]}."
            )


class MetricWriter:
    """Writes metrics to WORKDIR/metrics.jsonl, and to TensorBoard and W&B on request.

    TensorBoard's files are in WORKDIR/tensorboard, W&B's in WORKDIR/wandb. The file
    WORKDIR/wandb_id holds the id of the W&B run, which a resumed run continues;
    project, name, mode and key come from W&B's environment variables and settings.

    Args:
        workdir: the folder of the run, made if need be.
        step: number of updates already made. A run that was cut off may have written
            lines after its last checkpoint: lines of later steps are removed, as the
            resumed run writes them again.
        writers: keys of `WRITERS`.
        config: plain JSON values, which W&B shows beside the numbers.

    Raises:
        ValueError: as `check_writers`, before anything is written; or if W&B cannot
            start, such as without a key.
    """

    def __init__(
        self,
        workdir: str | Path,
        step: int,
        *,
        writers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ):
        check_writers(writers)
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # not cut by a kill
            kept = [line for line in whole if json.loads(line)["step"] <= step]
            write_atomic(self._path, "".join(kept))
        self._others = []
        if "tensorboard" in writers:
            self._others.append(_TensorBoard(workdir, step))
        if "wandb" in writers:
            self._others.append(_WeightsAndBiases(workdir, step, config))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line; numbers that are not finite become null, as JSON has none.

        Args:
            step: number of updates made.
            metrics: numbers by name.
        """
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self._path.open("a") as file:
            file.write(json_text({"step": step, **finite}) + "\n")
        for other in self._others:
            other.write(step, metrics)

    def close(self) -> None:
        """Writes what TensorBoard and W&B still hold in memory."""
        for other in self._others:
            other.close()


class _TensorBoard:
    def __init__(self, workdir: Path, step: int):
        from tensorboardX import SummaryWriter

        folder = str(workdir / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=step + 1)

    def write(self, step, metrics):
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self):
        self._writer.close()


class _WeightsAndBiases:
    """W&B takes no step twice: if a step is repeated, it keeps the first numbers."""

    def __init__(self, workdir: Path, step: int, config: Mapping[str, Any] | None):
        import wandb

        path = workdir / "wandb_id"
        if step == 0 or not path.exists():  # a new run
            write_atomic(path, secrets.token_hex(8))
        try:
            self._run = wandb.init(
                dir=str(workdir),
                id=path.read_text().strip(),
                resume="allow",
                config=dict(config or {}),
            )
        except wandb.Error as error:  # no key, no connection
            raise ValueError(f"writer 'wandb' could not start: {error}") from error

    def write(self, step, metrics):
        self._run.log(dict(metrics), step=step)

    def close(self):
        self._run.finish()


def read_metrics(workdir: str | Path) -> list[dict]:
    """Reads the lines of WORKDIR/metrics.jsonl.

    Raises:
        ValueError: if there is no such file.
    """
    path = Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"workdir must hold metrics.jsonl, and {path} is missing.")
    return [json.loads(line) for line in path.read_text().splitlines()]


LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Describes this start of a run in plain JSON values, for `write_description`.

    The names of the machine and of the user are not in it, nor environment variables,
    unless the command line or the config has them.

    Args:
        config: plain JSON values.

    Returns:
        started: ISO 8601 in UTC.
        command: the command line.
        config: as given.
        git: {"commit", "changed"} of the checkout that holds this package, where
            `changed` says whether tracked files differ from the commit; None if it is
            no checkout.
        versions: of Python, this package and its libraries.
        hardware: platform, device_kind, devices and processes of the whole job; cpu,
            cpu_cores and memory_gib of this host.
    """
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "config": dict(config),
        "git": _git_state(Path(__file__)),
        "versions": versions(),
        "hardware": _hardware(),
    }


def command_line() -> str:
    """Returns this process's command line as one would type it, without its folders."""
    arguments = sys.orig_argv[1:]
    if arguments and Path(arguments[0]).name == "jax-diffusion":  # a console script
        return shlex.join(["jax-diffusion", *arguments[1:]])
    return shlex.join(["python", *arguments])


def write_description(workdir: str | Path, record: Mapping[str, Any]) -> None:
    """Appends an entry to the list `starts` of WORKDIR/run.json.

    Args:
        workdir: the folder of the run, made if need be.
        record: as `describe` returns it.

    Raises:
        ValueError: if run.json is there and holds something else.
    """
    path = Path(workdir) / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    starts = read_descriptions(workdir) if path.exists() else []
    write_atomic(path, json_text({"starts": [*starts, dict(record)]}, indent=2) + "\n")


def read_descriptions(workdir: str | Path) -> list[dict[str, Any]]:
    """Reads the list `starts` of WORKDIR/run.json, the first start of the run first.

    Args:
        workdir: the folder of the run.

    Returns:
        An entry for every start, with the keys of `describe`.

    Raises:
        ValueError: if there is no such file, or it holds something else.
    """
    path = Path(workdir) / "run.json"
    if not path.is_file():
        raise ValueError(f"workdir must hold run.json, and {path} is missing.")
    with contextlib.suppress(ValueError):  # no JSON
        content = json.loads(path.read_text())
        if isinstance(content, dict) and isinstance(content.get("starts"), list):
            return content["starts"]
    raise ValueError(f"run.json must be an object with a list `starts`, got {path}.")


def _git_state(path: Path) -> dict[str, Any] | None:
    """Describes the checkout that tracks a file; None if none does.

    A checkout that merely has the file in one of its folders does not count.
    """
    if _git(path, "ls-files", "--error-unmatch", path.name) is None:
        return None
    commit = _git(path, "rev-parse", "HEAD")
    if commit is None:  # nothing is committed yet
        return None
    status = _git(path, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if status is None else bool(status)}


def _git(path: Path, *arguments: str) -> str | None:
    """Runs git in a file's folder; returns what it prints, or None if it fails."""
    command = ["git", "--no-optional-locks", "-C", str(path.parent), *arguments]
    # A hook of another repository sets GIT_DIR.
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str | None]:
    """Returns the versions of Python, this package and `LIBRARIES`, by name.

    A library that is not installed has None.
    """
    package = sys.modules[__name__.partition(".")[0]]
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "jax_diffusion": package.__version__,
    }
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _hardware() -> dict[str, Any]:
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = round(pages / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not everywhere
        memory = None
    return {
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu": cpu.model_name(),
        "cpu_cores": os.cpu_count(),  # logical ones
        "memory_gib": memory,
    }
