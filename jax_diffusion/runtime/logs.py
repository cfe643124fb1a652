"""What a run says of itself: its numbers, its circumstances, where its time went.

Numbers are one JSON object a line, and go to TensorBoard and Weights & Biases if they
are installed and asked for. Nothing here waits for the device: they come as floats.
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
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jax_diffusion.runtime.files import write_atomic

WRITERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # and the package of each


def check_writers(writers: Sequence[str]) -> None:
    """Accepts names in WRITERS whose package is installed.

    Raises:
        ValueError: for another name, and for a package that is missing.
    """
    for name in writers:
        if name not in WRITERS:
            raise ValueError(f"writers must be some of {[*WRITERS]}, got {name!r}.")
        spec = importlib.util.find_spec(WRITERS[name])
        if spec is None or spec.origin is None:  # a folder wandb/ is no package
            raise ValueError(
                f"writer {name!r} must be installed to be used: pip install "
                f"{WRITERS[name]}."
            )


class MetricWriter:
    """Appends to `workdir`/metrics.jsonl, and to what else `writers` asks for.

    TensorBoard's files lie in `workdir`/tensorboard. W&B's lie in `workdir`/wandb, and
    `workdir`/wandb_id names the run that a resumed run continues; project, name, mode
    and key come from W&B's environment variables and settings.

    Args:
        workdir: created if need be.
        step: the number of updates already made. Lines of later steps, which a run that
            was cut off has written after its last checkpoint, are removed: the resumed
            run writes them again.
        writers: "tensorboard", "wandb".
        config: shown by W&B beside the numbers.

    Raises:
        ValueError: as `check_writers`, before anything is written; or if W&B cannot
            start, for want of a key say.
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
        _keep_until(self._path, step)
        self._others = []
        if "tensorboard" in writers:
            self._others.append(_TensorBoard(workdir, step))
        if "wandb" in writers:
            self._others.append(_WeightsAndBiases(workdir, step, config))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; numbers that are not finite become null, as JSON has none."""
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        for other in self._others:
            other.write(step, metrics)

    def close(self) -> None:
        """Flushes what TensorBoard and W&B still hold."""
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
    """W&B takes no step twice: of steps that are repeated it keeps the first."""

    def __init__(self, workdir: Path, step: int, config: Mapping[str, Any] | None):
        import wandb

        path = workdir / "wandb_id"
        if step == 0 or not path.exists():  # at 0 nothing is resumed: a run of its own
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
    """The lines of `workdir`/metrics.jsonl.

    Raises:
        ValueError: if there is no such file.
    """
    path = Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"workdir must hold metrics.jsonl, and {path} is missing.")
    return [json.loads(line) for line in path.read_text().splitlines()]


def _keep_until(path: Path, step: int) -> None:
    """Drops lines of later steps, and a last line that was cut off half-way."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    write_atomic(path, "".join(kept))


LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe(config: Mapping[str, Any]) -> dict[str, Any]:
    """What made a run: for `write_description`, and of plain JSON values.

    Its keys are `started` (ISO 8601, UTC), `command`, `config`, `git`, `versions` and
    `hardware`. `git` is {"commit", "changed"} of the checkout that this file is part
    of, `changed` saying whether tracked files differ from the commit, or None. Nothing
    of the environment is in it, nor the names of the machine and of the user, unless
    the command line or the config has them.

    Args:
        config: of plain JSON values.
    """
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "config": dict(config),
        "git": _git_state(Path(__file__)),
        "versions": _versions(),
        "hardware": _hardware(),
    }


def write_description(workdir: str | Path, record: Mapping[str, Any]) -> None:
    """Appends to the list `starts` of `workdir`/run.json, an entry a start of the run.

    Raises:
        ValueError: if run.json is there and is something else.
    """
    path = Path(workdir) / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    starts = _read_starts(path) if path.exists() else []
    write_atomic(path, json.dumps({"starts": [*starts, dict(record)]}, indent=2) + "\n")


def _read_starts(path: Path) -> list[Any]:
    with contextlib.suppress(ValueError):  # no JSON
        content = json.loads(path.read_text())
        if isinstance(content, dict) and isinstance(content.get("starts"), list):
            return content["starts"]
    raise ValueError(f"run.json must be an object with a list `starts`, got {path}.")


def _git_state(path: Path) -> dict[str, Any] | None:
    """The checkout that tracks a file; not one that merely has it in a folder."""
    if _git(path, "ls-files", "--error-unmatch", path.name) is None:
        return None
    commit = _git(path, "rev-parse", "HEAD")
    if commit is None:  # nothing is committed yet
        return None
    status = _git(path, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if status is None else bool(status)}


def _git(path: Path, *arguments: str) -> str | None:
    """What git prints in a file's folder; None if it fails, or is not there."""
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


def _versions() -> dict[str, str | None]:
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
    """Devices and processes are those of the whole job, CPU and memory of this host."""
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
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),  # logical ones
        "memory_gib": memory,
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class StepClock:
    """Splits the wall-clock time of training steps without waiting for the device.

    Each moment is charged to the innermost `measure` around it, so that the parts
    neither overlap nor leave a gap; outside of all it is "other", in a `pause` nothing.

        with clock.measure("data"):      # the next batch
        with clock.measure("dispatch"):  # the call of the step, which returns early
        with clock.measure("device"):    # jax.device_get of the metrics, once a line

    A large share of "device" says that the device has work waiting, a large one of
    "data" that it may wait for the host. Where calls do not return early, as on the CPU
    after `cpu.tune`, or once the queue is full, the device's time is in "dispatch".

    Args:
        now: the time in seconds.
    """

    PARTS = ("data", "dispatch", "device", "other")

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._mark = now()
        self._part = "other"
        self._seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Charges what is inside to "data", "dispatch", "device" or "other".

        Raises:
            ValueError: for another name.
        """
        if part not in self.PARTS:
            raise ValueError(f"part must be one of {self.PARTS}, got {part!r}.")
        with self._within(part):
            yield

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """Leaves out what is inside, such as previews and checkpoints."""
        return self._within("paused")

    def line(
        self,
        *,
        steps: int,
        images: int,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
    ) -> dict[str, float]:
        """Numbers for the log about the time since the last line, which starts anew.

        Returns:
            `seconds_per_step`, `images_per_second`, `data_share`, `dispatch_share`,
            `device_share` and `other_share`, which sum to 1; with both `flops_per_step`
            and `peak_flops`, `roofline_share`, the part of the peak that was reached.

        Args:
            steps: made since the last line.
            images: trained on since the last line, on all devices.
            flops_per_step: floating-point operations of a step, on all devices.
            peak_flops: such operations a second, of all devices together.

        Raises:
            ValueError: unless steps >= 1.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}.")
        self._charge(self._part)
        total = sum(self._seconds[part] for part in self.PARTS)
        numbers = {
            "seconds_per_step": total / steps,
            "images_per_second": images / total,
        }
        numbers |= {f"{part}_share": self._seconds[part] / total for part in self.PARTS}
        if flops_per_step is not None and peak_flops is not None:
            numbers["roofline_share"] = flops_per_step * steps / total / peak_flops
        self._seconds.clear()
        return numbers

    @contextlib.contextmanager
    def _within(self, part: str) -> Iterator[None]:
        around = self._part
        self._charge(then=around if around == "paused" else part)
        try:
            yield
        finally:
            self._charge(then=around)

    def _charge(self, then: str) -> None:
        now = self._now()
        self._seconds[self._part] += now - self._mark
        self._mark, self._part = now, then
