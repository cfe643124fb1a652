"""Finds the image files below a folder, counts what it leaves out, and why; digests."""

import collections
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jax_diffusion.data.decode import in_threads, reading

# Of image files, in any case. Whether Pillow reads the last two depends on how it was
# built, see `readable_suffixes`.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".tif", ".tiff"),
    *(".webp", ".avif"),
)
SHEETS = "sheets"  # sub-folder of the output of `sample` with what is no sample
SHEET_FILES = ("grid.png", "denoising.gif")
SAMPLE = re.compile(r"\d{5,}\.png")  # names of samples, as 00000.png


class FoundImages(NamedTuple):
    """What `find_images` has found.

    Attributes:
        paths: of all image files, in order of their parts.
        left_out: how many files and folders were left out, by the reason: a suffix as
            ".txt", "no suffix", "hidden", "broken link", "link to a folder above",
            "sheet of sample" or "no file".
    """

    paths: list[str]
    left_out: dict[str, int]

    @property
    def left_out_in_words(self) -> str:
        """Such as "3 .txt, 1 hidden"; "" if nothing was left out."""
        return ", ".join(f"{n} {why}" for why, n in sorted(self.left_out.items()) if n)


@functools.cache
def readable_suffixes() -> tuple[str, ...]:
    """Returns those of `SUFFIXES` that Pillow can read here."""
    from PIL import features

    optional = {".webp": "webp", ".avif": "avif"}
    return tuple(
        s for s in SUFFIXES if s not in optional or features.check(optional[s])
    )


def find_images(root: str | os.PathLike) -> FoundImages:
    """Finds all image files below a folder.

    Files count by their suffix, see `readable_suffixes`. Links are followed, but for
    those to a folder that the link lies in. Hidden files and folders are left out, and
    so are the sheets that `sample` writes beside its images.

    Args:
        root: the folder.

    Raises:
        ValueError: if a folder cannot be listed.
    """
    suffixes, found, left_out = readable_suffixes(), [], collections.Counter()
    folders = [(os.fspath(root), frozenset([_identity(os.fspath(root))]))]
    while folders:
        folder, above = folders.pop()
        for entry in _entries(folder, left_out):
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.is_symlink() and not os.path.exists(entry.path):
                left_out["broken link"] += 1
            elif entry.is_dir():
                if (identity := _identity(entry.path)) in above:
                    left_out["link to a folder above"] += 1
                else:
                    folders.append((entry.path, above | {identity}))
            elif not entry.is_file():  # a pipe would never end
                left_out["no file"] += 1
            elif suffix in suffixes:
                found.append(entry.path)
            else:
                left_out[suffix or "no suffix"] += 1
    paths = sorted(found, key=lambda path: path.replace(os.sep, "\0"))
    return FoundImages(paths, dict(left_out))


def _identity(folder: str) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _entries(folder: str, left_out: dict[str, int]) -> list[os.DirEntry[str]]:
    """What lies in a folder, but for what is hidden and for sheets; both are counted.

    Up to version 0.1, sheets lay beside the samples 00000.png, 00001.png, ...
    """
    try:
        with os.scandir(folder) as inside:
            entries = [*inside]
    except OSError as error:
        raise ValueError(
            f"{folder} must be a folder that can be listed, got {error}."
        ) from error
    of_sample = any(SAMPLE.fullmatch(entry.name) for entry in entries)
    if os.path.basename(folder) == SHEETS:
        images = {e.name for e in entries if e.name.lower().endswith(SUFFIXES)}
        of_sample = images <= {*SHEET_FILES}
    kept = []
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            left_out["hidden"] += 1
        elif of_sample and entry.name in SHEET_FILES:
            left_out["sheet of sample"] += 1
        else:
            kept.append(entry)
    return kept


def digest_of_files(paths: Sequence[str]) -> str:
    """Returns a SHA-256 in hex of the names and sizes of files, in order.

    Names are those below the folder that all of the files lie in: it may be moved.
    """
    folders = [os.path.dirname(path) + os.sep for path in paths]
    root = os.path.commonpath([min(folders), max(folders)])
    start = len(os.path.join(root, ""))

    def lines(rows: list[int]) -> list[bytes]:
        found = [paths[row] for row in rows]
        return [os.fsencode(f"{p[start:]}\0{os.stat(p).st_size}\n") for p in found]

    digest = hashlib.sha256(b"files\n")
    with reading(f"files below {root} must be readable"):
        parts = in_threads(lines, np.arange(len(paths)))
    for line in itertools.chain.from_iterable(parts):
        digest.update(line)
    return digest.hexdigest()
