"""Many images in one .npz, written in parts that survive a kill.

`FILE.parts` holds the parts and a record of what decides their bytes, until all are
there; then they become `FILE.npz`, the same bytes whatever happened on the way.
"""

import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("arr_0", "arr_1")  # images and labels, as improved-diffusion calls them
DATE = (1980, 1, 1, 0, 0, 0)  # of the entries of every archive


class Parts:
    """What has been written of FILE.npz.

    Raises:
        ValueError: if parts of other settings are there, or one cannot be read.
    """

    def __init__(self, out: Path, record: dict[str, Any]):
        self.out, self.folder = out, out.with_suffix(".parts")
        self._record = json.loads(json.dumps(record))
        self.done = 0  # images that are there
        stored = [*self._stored()]
        if stored:
            self._check_record()
        for first, part in stored:
            images, labels = _read(part)
            if first != self.done or len(images) != len(labels):
                raise ValueError(
                    f"{self.folder} must hold parts without gaps, got {part.name} "
                    f"after {self.done} images; remove it to begin again."
                )
            self.done += len(images)

    def add(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Writes the next images, uint8 [n h w c], and their labels [n]."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.done:
            text = json.dumps(self._record, indent=2)
            _replace(self.folder / "record.json", lambda f: f.write(text.encode()))
        part = self.folder / f"{self.done:08d}.npz"
        _replace(part, lambda f: np.savez(f, images, labels))
        self.done += len(images)

    def join(self, n: int) -> None:
        """Makes FILE.npz of the first n images, and removes the parts."""
        parts = [part for _, part in self._stored()]
        _replace(self.out, lambda f: _join(f, parts, n))
        for part in reversed(parts):  # a kill leaves the first ones
            part.unlink()
        shutil.rmtree(self.folder)

    def _stored(self) -> Iterator[tuple[int, Path]]:
        for part in sorted(self.folder.glob("[0-9]*.npz")):
            yield int(part.stem), part

    def _check_record(self) -> None:
        path = self.folder / "record.json"
        try:
            there = dict(json.loads(path.read_text())) if path.is_file() else {}
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} must be a whole record, got {error!r}."
            ) from error
        names = sorted(there.keys() | self._record.keys())
        other = [k for k in names if there.get(k) != self._record.get(k)]
        if other:
            raise ValueError(
                f"{self.folder} holds parts of other settings, which must be removed "
                f"or finished first, got "
                + ", ".join(
                    f"{k} {there.get(k)} -> {self._record.get(k)}" for k in other
                )
                + "."
            )


def _join(file: Any, parts: list[Path], n: int) -> None:
    """One archive of the arrays of all parts, of which one is in memory at a time."""
    with zipfile.ZipFile(file, "w") as archive:
        for i, name in enumerate(NAMES):
            shape = (n, *_read(parts[0])[i].shape[1:])
            cut = (_read(p)[i][: max(n - int(p.stem), 0)] for p in parts)
            _write_array(archive, name, shape, cut)


def _write_array(
    archive: zipfile.ZipFile, name: str, shape: Any, arrays: Iterable[np.ndarray]
) -> None:
    arrays = iter(arrays)
    first = next(arrays)
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": shape}
    entry = zipfile.ZipInfo(f"{name}.npy", DATE)
    with archive.open(entry, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for array in itertools.chain([first], arrays):
            file.write(np.ascontiguousarray(array).tobytes())


def _read(part: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with part.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return arrays[NAMES[0]], arrays[NAMES[1]]
    except Exception as error:
        raise ValueError(
            f"{part} must be a whole part, got {error!r}; remove it."
        ) from error


def _replace(path: Path, write: Any) -> None:
    """Writes a file beside and moves it into place: it is whole or not there."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
