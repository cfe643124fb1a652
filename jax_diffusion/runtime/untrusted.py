"""Checks of files that somebody else has written: JSON, zip archives, .npz.

A small file can claim to hold much more than it does. What is read of it is bounded by
its own size before anything is allocated.
"""

import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

MAX_UNPACKED, MAX_RATIO = 2**28, 100  # see `check_zip`


def check_zip(archive: zipfile.ZipFile) -> None:
    """Checks that a zip archive is not made to fill the memory.

    Args:
        archive: open for reading.

    Raises:
        ValueError: if entries overlap, so that each claims the same bytes, or if they
            become over 256 MiB and over 100 times the archive when they are unpacked.
    """
    entries = sorted(archive.infolist(), key=lambda info: info.header_offset)
    size = archive.start_dir  # where the entries end
    ends = [info.header_offset + info.compress_size for info in entries]
    starts = [info.header_offset for info in entries[1:]] + [size]
    if any(end > start for end, start in zip(ends, starts, strict=False)):
        raise ValueError("an archive whose entries overlap")
    unpacked = sum(info.file_size for info in entries)
    if unpacked > max(MAX_UNPACKED, MAX_RATIO * size):
        raise ValueError(f"an archive of {size} bytes that becomes {unpacked}")


def check_npy(archive: zipfile.ZipFile, entry: str) -> None:
    """Checks that an array of a .npz holds as many numbers as it claims.

    Args:
        archive: the .npz, open for reading.
        entry: name of the array's file, with .npy.

    Raises:
        ValueError: if it does not.
    """
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read(file)
        found = archive.getinfo(entry).file_size - file.tell()
    if not dtype.hasobject and found != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{found} bytes for {dtype} {shape} in {entry}")


def read_json(path: str | os.PathLike, *, most: int = 2**24) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
        path: the file.
        most: the largest size in bytes.

    Raises:
        ValueError: if it is missing, too large, or not as `parse_json` wants it.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(most + 1)
        if len(text) > most:
            raise ValueError(f"over {most} bytes")
        return parse_json(text)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise ValueError(f"{path} must be there, got no such file.") from None
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} must be a JSON file, got {reason}.") from error


def parse_json(text: bytes | str) -> dict[str, Any]:
    """Parses a JSON object of somebody else.

    Args:
        text: the JSON; bytes are UTF-8.

    Raises:
        ValueError: if it is no JSON object, is nested too deeply, has a name twice in
            one object, or has NaN or infinity, which JSON has not.
    """

    def number(text):
        if not math.isfinite(value := float(text)):
            raise ValueError(f"the number {text[:20]}")
        return value

    def unique(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name that stands there twice")
        return found

    if isinstance(text, bytes):
        text = text.decode()
    try:
        found = json.loads(
            text, parse_float=number, parse_constant=number, object_pairs_hook=unique
        )
    except RecursionError:
        raise ValueError("too many brackets inside each other") from None
    if not isinstance(found, dict):
        raise ValueError(f"a JSON {type(found).__name__} in place of an object")
    return found
