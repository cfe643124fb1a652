"""Whether a folder can become the workdir of a run: nothing of others may be in it."""

import contextlib
import fnmatch
import os
from pathlib import Path
from typing import Any

from jax_diffusion.runtime.files import entries

# What only a run has; what else a run, its logs and the tools around them leave.
OF_RUNS = ("run.json", "metrics.jsonl")
BESIDE_RUNS = (
    *("checkpoints", "bad_checkpoints", "samples", "best", "loss.png", "evaluation"),
    *(
        "ema_snapshots",
        "profile",
        "tensorboard",
        "events.out.tfevents.*",
        "wandb",
        "wandb_id",
    ),
    *(".*", "*.log", "logs", "nohup.out", "slurm-*.out", "slurm-*.err"),
)


def check_new(workdir: Path, data_path: Any = None, field: str = "workdir") -> None:
    """Checks that a run may begin in a folder; reads names only.

    Args:
        workdir: a folder without checkpoints, which need not exist. What a run that
            failed before its first checkpoint has left does not count, and neither do
            hidden files, logs, and the file that this program prints to.
        data_path: config.data.path, if that is a path.
        field: name of the argument, for errors.

    Raises:
        ValueError: if the folder is, holds or lies in the data, or holds anything else.
    """
    place = os.fspath(data_path) if isinstance(data_path, str | os.PathLike) else ""
    if place and "\0" not in place:  # of which the reader of the data tells
        ours = Path(os.path.realpath(workdir))
        theirs = Path(os.path.realpath(os.path.expanduser(place)))
        if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
            raise ValueError(
                f"{field} must not be, hold or lie in config.data.path, got "
                f"{str(workdir)!r} and {place!r}."
            )
    there = [*workdir.iterdir()] if workdir.is_dir() else []
    if any(path.name in OF_RUNS for path in there):
        return
    others = sorted(path.name for path in there if not is_beside_runs(path))
    if others:
        raise ValueError(
            f"{field} must be a new or empty folder, or that of a run, got "
            f"{entries(others)} in {str(workdir)!r}, such as {others[0]!r}."
        )


def is_beside_runs(path: Path) -> bool:
    """Tells whether runs, their logs or the tools around them leave such a thing."""
    if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in BESIDE_RUNS):
        return True
    for stream in (1, 2):  # output that a shell has redirected
        with contextlib.suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(stream)):
                return True
    return False
