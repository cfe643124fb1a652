"""Where numbers go: one JSON object a line, and TensorBoard if it is there."""

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path


class MetricWriter:
    """Appends to `workdir`/metrics.jsonl and to TensorBoard files beside it.

    Args:
        workdir: created if need be.
        step: the number of updates already made. Lines of later steps, which a run that
            was cut off has written after its last checkpoint, are removed: the resumed
            run writes them again.
    """

    def __init__(self, workdir: str | Path, step: int):
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        _keep_until(self._path, step)
        self._tensorboard = None
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(workdir / "tensorboard"), purge_step=step + 1
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; numbers that are not finite become null, as JSON has none."""
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        if self._tensorboard:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes TensorBoard's files."""
        if self._tensorboard:
            self._tensorboard.close()


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
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)  # at once: a kill leaves one file or the other
