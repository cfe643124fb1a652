"""Reads and writes .safetensors files.

Reading needs no library: a file is the length of a header, the header, which is JSON,
and the numbers. The header is checked as a whole, and the numbers are read when they
are used. Writing needs the library safetensors.
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_diffusion.interop import file_kinds
from jax_diffusion.interop.tensors import SAFE_DTYPES, Region, Tensor, dense
from jax_diffusion.interop.torch_files import Tensors, check_dtypes
from jax_diffusion.runtime.files import write_atomic
from jax_diffusion.runtime.untrusted import parse_json

MAX_HEADER = 2**24  # bytes, of about 150,000 tensors
METADATA = "__metadata__"


class Safetensors(NamedTuple):
    """Content of a .safetensors file: tensors and strings by name."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_safetensors(path: str | Path) -> Safetensors:
    """Reads a .safetensors file.

    Args:
        path: the file.

    Returns:
        Tensors by name, which `numpy.asarray` reads, in the order of the file; and the
        metadata.

    Raises:
        ValueError: if the file is missing, cut off, corrupted or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"a checkpoint must be a file, got {str(path)!r}.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            head = file.read(8)
            (length,) = struct.unpack("<Q", head) if len(head) == 8 else (size,)
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                raise ValueError(file_kinds.describe(path))
            header = parse_json(file.read(length))
        metadata = header.pop(METADATA, {})
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise ValueError("metadata that are no strings")
        entries = {name: entry_of(name, header[name]) for name in header}
        check_cover(entries, size - 8 - length)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} must be a whole .safetensors file, got {str(error).rstrip('.')}."
        ) from error
    return Safetensors(
        {
            name: dense(Region(path, 8 + length + start, end - start), dtype, shape)
            for name, (dtype, shape, start, end) in entries.items()
        },
        metadata,
    )


class Entry(NamedTuple):
    """One tensor of the header: dtype, shape, and its bytes [start, end)."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def entry_of(name: str, fields: Any) -> Entry:
    """Checks the entry of one tensor in the header.

    Args:
        name: of the tensor.
        fields: what the header says of it.

    Raises:
        ValueError: if a field is missing or impossible.
    """
    wanted = {"dtype", "shape", "data_offsets"}
    if not isinstance(fields, dict) or fields.keys() != wanted:
        raise ValueError(f"a header without dtype, shape and offsets of {name[:80]!r}")
    kind, shape, offsets = (fields[key] for key in ("dtype", "shape", "data_offsets"))
    numbers = isinstance(shape, list) and isinstance(offsets, list)
    if (
        not numbers
        or len(offsets) != 2
        or len(shape) > 32
        or not all(type(n) is int and 0 <= n < 2**63 for n in shape + offsets)
    ):
        raise ValueError(f"no numbers for the shape or the offsets of {name[:80]!r}")
    if not isinstance(kind, str) or kind not in SAFE_DTYPES:
        raise ValueError(f"the dtype {str(kind)[:20]!r} of {name[:80]!r}")
    start, end = offsets
    if end - start != math.prod(shape) * SAFE_DTYPES[kind].itemsize:
        raise ValueError(f"{end - start} bytes for a {kind} {shape}, {name[:80]!r}")
    return Entry(SAFE_DTYPES[kind], tuple(shape), start, end)


def check_cover(entries: Mapping[str, Entry], size: int) -> None:
    """Checks that the tensors cover all bytes behind the header, and none twice.

    Args:
        entries: of all tensors, by name.
        size: number of bytes.

    Raises:
        ValueError: if there is a gap or an overlap.
    """
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != place:
            raise ValueError(f"a gap or an overlap at the bytes of {name[:80]!r}")
        place = entry.end
    if place != size:
        raise ValueError(f"{size} bytes of tensors where {place} should be")


def write_safetensors(
    path: str | Path, tensors: Tensors, metadata: Mapping[str, str]
) -> None:
    """Writes a .safetensors file.

    Args:
        path: the file to write or replace; folders are made.
        tensors: arrays by name.
        metadata: strings by name.

    Raises:
        ValueError: if the format has no dtype of one of the arrays, or if the library
            safetensors is not installed.
    """
    content = safetensors_content(tensors, metadata)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)


def safetensors_content(tensors: Tensors, metadata: Mapping[str, str]) -> bytes:
    """Returns the bytes of the file that `write_safetensors` writes.

    Args:
        tensors: arrays by name.
        metadata: strings by name.

    Raises:
        ValueError: as `write_safetensors` does.
    """
    try:
        from safetensors.numpy import save
    except ImportError:
        raise ValueError(
            "safetensors must be installed, `pip install 'jax_diffusion[convert]'`, "
            "got none."
        ) from None
    check_dtypes(tensors, SAFE_DTYPES.values())
    arrays = {k: np.asarray(array, order="C") for k, array in tensors.items()}
    return save(arrays, metadata=dict(metadata))
