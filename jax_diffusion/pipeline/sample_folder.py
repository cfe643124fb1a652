"""A folder of samples: whether it may be written, and its sheets and record.

Other programs may read the folder, in which there are:

    00000.png, ...  the samples, nothing else
    sheets/         grid.png and perhaps denoising.gif, left out by `data.find_images`
    record.json     the job: its options, seed and number of images
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_diffusion.data.find import SAMPLE, SHEET_FILES, SHEETS
from jax_diffusion.runtime import files

RECORD = "record.json"


def check_folder(folder: Path, record: Mapping[str, Any], *, overwrite: bool) -> None:
    """Checks that a folder may be written: it is new, empty or of the same job.

    Args:
        folder: the folder, which need not exist. Hidden files in it do not count.
        record: the job, as plain JSON values.
        overwrite: whether the samples of another job may be replaced.

    Raises:
        ValueError: if it holds something else, and with `overwrite` also if that is not
            of `sample`.
    """
    there = _inside(folder)
    if not there or _is_of(record, folder):
        return
    if not overwrite:
        raise ValueError(
            "out must be a new or empty folder, or hold the same job, got "
            f"{files.entries(there)} in {str(folder)!r}; --overwrite replaces samples."
        )
    if others := [path.name for path in there if not _is_ours(path)]:
        raise ValueError(
            f"overwrite removes only what sample has written, got {others[0]!r} in "
            f"{str(folder)!r}."
        )


def begin(folder: Path, record: Mapping[str, Any]) -> None:
    """Removes the samples of another job, and writes the record of this one."""
    if not _is_of(record, folder):
        for path in _inside(folder):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(folder / RECORD, json.dumps(record, indent=2))


def _inside(folder: Path) -> list[Path]:
    """What is in a folder but for hidden files, in order."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in inside if not path.name.startswith("."))


def _is_ours(path: Path) -> bool:
    """Whether `sample` writes this; up to version 0.1, sheets lay beside samples."""
    if path.is_dir() and not path.is_symlink():
        return path.name == SHEETS and all(
            p.name in SHEET_FILES for p in path.iterdir()
        )
    name = path.name
    return bool(SAMPLE.fullmatch(name)) or name in (*SHEET_FILES, RECORD)


def _is_of(record: Mapping[str, Any], folder: Path) -> bool:
    """Whether a folder has the record of this job, and one that can be read.

    An option that an older version did not have is None where it is not used.
    """
    try:
        stored = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(stored, dict):
        return False
    own = json.loads(json.dumps(record))
    return all(own.get(name) == stored.get(name) for name in {*own, *stored})
