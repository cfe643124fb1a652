"""One .npz of many images, written over hours in parts that survive a kill.

`FILE.parts/` collects the parts and record.json, the settings that decide their bytes;
once all parts are there they are joined into `FILE.npz`. Its bytes are the same however
often the job was killed on the way.

Every part carries a seal: which images it has, the SHA-256 of its arrays, of the job's
record and of the part before. So a part that was changed, or that belongs elsewhere, is
noticed before it gets into the file. Parts that versions until 0.2 have written have
none, and are read as they are.
"""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_diffusion.runtime.files import (
    json_text,
    read_npz,
    sha256_of_file,
    sha256_of_tree,
    write_atomic,
    write_npz_entry,
)

RECORD = "record.json"
SEAL = "seal"  # name of an array of every part


class ResumableNpz:
    """Writes the arrays of many images to one .npz, in parts that survive a kill.

    A job that is started again finds the number of images that are there in `done`,
    and goes on with `add` from that one. One process at a time, see `locks.hold`.

    Args:
        out: the .npz file to end in; the parts lie in the folder `out` with the suffix
            .parts, which appears with the first part.
        record: the settings that decide the arrays' bytes, as plain JSON values. Parts
            of another record are refused.
        upgrade: makes a record of today from one that an older version has stored.

    Attributes:
        out: the file.
        folder: the folder of the parts.
        done: the number of images in the parts.

    Raises:
        ValueError: if there are parts of other settings, or if one or the record is
            missing, damaged or of another job.
    """

    def __init__(
        self,
        out: Path,
        record: dict[str, Any],
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ):
        self._upgrade = upgrade
        self.out, self.folder = out, out.with_suffix(".parts")
        self._record = json.loads(json_text(record))
        self.done = 0
        self._before: str | None = None  # SHA-256 of the last part's arrays
        stored = [*self._stored()]
        if stored:
            self._check_record()
        for first, part in stored:
            if first != self.done:
                raise ValueError(
                    f"{self.folder} must hold parts without gaps, got {part.name} "
                    f"after {self.done} images: put the missing part back, or remove "
                    f"{part.name} and later ones, which are then made again."
                )
            arrays = _read_part(part)
            seal = str(arrays.pop(SEAL)) if SEAL in arrays else None
            lengths = {len(array) for array in arrays.values()}
            wanted = self._seal(arrays) if len(lengths) == 1 else None
            old = seal is None and self._before is None  # of a version without seals
            if wanted is None or not (old or seal == json.dumps(wanted)):
                raise ValueError(
                    f"{part} must be the part of this job that begins with image "
                    f"{first}, and was changed or belongs elsewhere: put the right "
                    "one back, or remove it and later ones, which are then made again."
                )
            self.done += lengths.pop()
            self._before = wanted["sha256"] if seal else None

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the next part: by name, arrays [n, ...] of the next n images."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.done:
            write_atomic(self.folder / RECORD, json_text(self._record, indent=2))
        part, seal = self.folder / f"{self.done:08d}.npz", self._seal(arrays)
        named: Any = {**arrays, SEAL: np.array(json.dumps(seal))}
        write_atomic(part, lambda file: np.savez(file, **named))
        self.done += len(next(iter(arrays.values())))
        self._before = seal["sha256"]

    def read(self, n: int, *, without: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Reads the arrays of the first n images from the parts.

        Args:
            n: the number of images, <= `done`.
            without: names of arrays to leave out.

        Returns:
            Arrays [n, ...] by name.
        """
        stored = [part for first, part in self._stored() if first < n]
        names = [name for name in _read_part(stored[0]) if name not in (SEAL, *without)]
        kept = [_read_part(part, names) for part in stored]
        return {name: np.concatenate([k[name] for k in kept])[:n] for name in names}

    def join(self, n: int, names: Sequence[str] | None = None) -> None:
        """Makes FILE.npz of the first n images, and removes the parts.

        One part is in memory at a time.

        Args:
            n: the number of images, <= `done`.
            names: the arrays to keep; default all.
        """
        parts = [part for _, part in self._stored()]
        names = names or [name for name in _read_part(parts[0]) if name != SEAL]

        def cut(name):
            for part in parts:
                yield _read_part(part, [name])[name][: max(n - int(part.stem), 0)]

        def write(file):
            with zipfile.ZipFile(file, "w") as archive:
                for name in names:
                    write_npz_entry(archive, name, n, cut(name))

        write_atomic(self.out, write)
        self.discard()

    def discard(self) -> None:
        """Removes the parts, the last ones first: a kill leaves no gap."""
        for _, part in reversed([*self._stored()]):
            part.unlink()
        shutil.rmtree(self.folder)

    def _seal(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """What the next part must carry if it has these arrays."""
        return {
            "images": [self.done, self.done + len(next(iter(arrays.values())))],
            "job": sha256_of_file(self.folder / RECORD),
            "after": self._before,
            "sha256": sha256_of_tree(dict(arrays)),
        }

    def _stored(self) -> Iterator[tuple[int, Path]]:
        """Yields each part with the number of its first image, in order."""
        for part in sorted(self.folder.glob("[0-9]*.npz")):
            if part.stem.isdecimal():
                yield int(part.stem), part

    def _check_record(self) -> None:
        path = self.folder / RECORD
        if not path.is_file():
            raise ValueError(
                f"{path} must be there, as it says how the parts beside it were made: "
                "put it back, or remove the folder to begin again."
            )
        try:
            said = json.loads(path.read_text())
            if not isinstance(said, dict) or (self._record and not said):
                raise TypeError(f"{str(said)[:80]} instead of its fields")
            there = self._upgrade(said)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} must be a whole record, got {error!r}."
            ) from error
        names = sorted(there.keys() | self._record.keys())
        other = [k for k in names if there.get(k) != self._record.get(k)]
        if other:
            changes = (f"{k} {there.get(k)} -> {self._record.get(k)}" for k in other)
            raise ValueError(
                f"{self.folder} holds parts of other settings, which must be removed "
                f"or finished first, got {', '.join(changes)}."
            )


def _read_part(part: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    try:
        arrays = read_npz(part, names)
        return {name: arrays[name] for name in names or arrays}
    except (ValueError, KeyError) as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"{part} must be a whole part, got {cause!r}; remove it and later ones, "
            "which are then made again."
        ) from error
