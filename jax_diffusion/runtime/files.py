"""Arrays of many images in one .npz, written in parts that survive a kill.

`FILE.parts` holds the parts and a record of what decides their bytes, until all are
there; then they become `FILE.npz`, the same bytes whatever happened on the way.
"""

import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DATE = (1980, 1, 1, 0, 0, 0)  # of the entries of every archive


class ResumableNpz:
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
            lengths = {len(array) for array in _read(part).values()}
            if first != self.done or len(lengths) != 1:
                raise ValueError(
                    f"{self.folder} must hold parts without gaps, got {part.name} "
                    f"after {self.done} images; remove it to begin again."
                )
            self.done += lengths.pop()

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes what is known of the next images, arrays [n, ...] by name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.done:
            text = json.dumps(self._record, indent=2)
            write_atomic(self.folder / "record.json", lambda f: f.write(text.encode()))
        part = self.folder / f"{self.done:08d}.npz"
        named: Any = arrays
        write_atomic(part, lambda f: np.savez(f, **named))
        self.done += len(next(iter(arrays.values())))

    def read(self, n: int, *, without: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """All arrays of the first n images but some, from the parts."""
        stored = [part for first, part in self._stored() if first < n]
        names = [name for name in _names(stored[0]) if name not in without]
        kept = [_read(part, names) for part in stored]
        return {name: np.concatenate([k[name] for k in kept])[:n] for name in names}

    def join(self, n: int, names: Sequence[str] | None = None) -> None:
        """Makes FILE.npz of the first n images, and removes the parts.

        Args:
            names: of the arrays to keep; default all.
        """
        parts = [part for _, part in self._stored()]
        write_atomic(self.out, lambda f: _join(f, parts, n, names))
        self.discard()

    def discard(self) -> None:
        """Removes the parts."""
        for _, part in reversed([*self._stored()]):  # a kill leaves the first ones
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


def _join(file: Any, parts: list[Path], n: int, names: Sequence[str] | None) -> None:
    """One archive of the arrays of all parts, of which one is in memory at a time."""

    def cut(name):
        for part in parts:
            yield _read(part, [name])[name][: max(n - int(part.stem), 0)]

    with zipfile.ZipFile(file, "w") as archive:
        for name in names or _names(parts[0]):
            _write_array(archive, name, n, cut(name))


def _write_array(
    archive: zipfile.ZipFile, name: str, n: int, arrays: Iterable[np.ndarray]
) -> None:
    arrays = iter(arrays)
    first = next(arrays)
    shape = (n, *first.shape[1:])
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": shape}
    entry = zipfile.ZipInfo(f"{name}.npy", DATE)
    with archive.open(entry, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for array in itertools.chain([first], arrays):
            file.write(np.ascontiguousarray(array).tobytes())


def _names(part: Path) -> list[str]:
    return [*_read(part)]


def _read(part: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    try:
        with part.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names or arrays.files}
    except Exception as error:
        raise ValueError(
            f"{part} must be a whole part, got {error!r}; remove it."
        ) from error


def write_atomic(path: Path, write: Any) -> None:
    """Writes a file beside and moves it into place: it is whole or not there."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
