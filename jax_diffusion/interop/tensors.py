"""Tensors that still lie in their file, and are read when they are used.

A checkpoint often holds its network several times, beside the moments of its optimizer.
A `Tensor` knows its dtype and shape, so that a checkpoint is compared with a network
before anything of it is read, and `numpy.asarray` reads it; nothing else is read.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

CHUNK = 2**20  # bytes that are read at once to check a sum

# Name of PyTorch's storage -> name in .safetensors, and dtype.
DTYPES = {
    "DoubleStorage": ("F64", np.dtype(np.float64)),
    "FloatStorage": ("F32", np.dtype(np.float32)),
    "HalfStorage": ("F16", np.dtype(np.float16)),
    "BFloat16Storage": ("BF16", np.dtype(jnp.bfloat16)),
    "LongStorage": ("I64", np.dtype(np.int64)),
    "IntStorage": ("I32", np.dtype(np.int32)),
    "ShortStorage": ("I16", np.dtype(np.int16)),
    "CharStorage": ("I8", np.dtype(np.int8)),
    "ByteStorage": ("U8", np.dtype(np.uint8)),
    "BoolStorage": ("BOOL", np.dtype(bool)),
}
STORAGES = {name: dtype for name, (_, dtype) in DTYPES.items()}
SAFE_DTYPES = dict(DTYPES.values())
FLOATS = {np.dtype(kind) for kind in ("f2", "f4", "f8")} | {np.dtype(jnp.bfloat16)}


@dataclasses.dataclass
class Region:
    """Bytes of a file.

    Attributes:
        path: the file.
        start: of the first byte.
        size: number of bytes.
        crc: CRC-32 of all of them, which is compared when they are first read; None if
            the file has none.
    """

    path: Path
    start: int
    size: int
    crc: int | None = None

    def read(self, start: int, size: int) -> np.ndarray:
        """Reads some of the bytes, uint8 [size].

        Raises:
            ValueError: if the file has changed, or fails its check sum.
        """
        with self.path.open("rb") as file:
            file.seek(self.start + start)
            found = np.fromfile(file, np.uint8, size)
            if len(found) != size:
                raise ValueError(f"{self.path} must not change, got a shorter file.")
            if self.crc is None:
                return found
            crc = zlib.crc32(found.data)
            if (start, size) != (0, self.size):
                file.seek(self.start)
                crc, left = 0, self.size
                while left and (chunk := file.read(min(CHUNK, left))):
                    crc, left = zlib.crc32(chunk, crc), left - len(chunk)
        if crc != self.crc:
            raise ValueError(
                f"{self.path} must be a whole file, got a damaged one: Bad CRC-32 of "
                f"{self.size} bytes at {self.start}."
            )
        self.crc = None  # once is enough
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """An array in a file: a strided view of numbers, whose bounds have been checked.

    `numpy.asarray` reads it.

    Attributes:
        region: the bytes of the numbers.
        dtype: of the numbers.
        shape: of the array.
        strides: of the axes, in numbers.
        offset: of the first element, in numbers.
    """

    region: Region
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements; `check_sizes` checks that a file holds as many."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the array."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the array, of a dtype if one is given."""
        if not self.size:
            return np.zeros(self.shape, dtype or self.dtype)
        steps = zip(self.shape, self.strides, strict=True)
        count = 1 + sum((n - 1) * step for n, step in steps)
        size = self.dtype.itemsize
        numbers = self.region.read(self.offset * size, count * size).view(self.dtype)
        strides = [step * size for step in self.strides]
        array = np.lib.stride_tricks.as_strided(
            numbers, self.shape, strides, writeable=False
        )
        return array if dtype is None else array.astype(dtype, copy=bool(copy))


def dense(region: Region, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
    """Returns the tensor of all numbers of a region, in the order of C."""
    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return Tensor(region, dtype, shape, tuple(steps))


def check_sizes(tensors: Mapping[str, Any], path: Path, size: int) -> None:
    """Checks that tensors do not describe more numbers than their file can hold.

    Args:
        tensors: the tensors that will be read, by name.
        path: their file, for the error.
        size: its size in bytes, or those of all files.

    Raises:
        ValueError: if they do.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > size:
        raise ValueError(
            f"{path} must hold all numbers of its tensors, {total} bytes, got {size}."
        )


def as_float32(name: str, tensor: Any, *, allow_nonfinite: bool = False) -> np.ndarray:
    """Reads one tensor of weights.

    Args:
        name: its name, for errors.
        tensor: a `Tensor` or an array, of floats of any precision.
        allow_nonfinite: whether NaN and infinity are accepted.

    Returns:
        A float32 array.

    Raises:
        ValueError: if it is not of floats, or has NaN or infinity.
    """
    if np.dtype(tensor.dtype) not in FLOATS:
        raise ValueError(
            f"weights must be of floats, got {tensor.dtype} in the tensor {name!r}."
        )
    with np.errstate(over="ignore"):  # of float64; is seen below
        array = np.asarray(tensor, np.float32)
    if not allow_nonfinite and not np.isfinite(array).all():
        count = int(np.sum(~np.isfinite(array)))
        raise ValueError(
            f"allow_nonfinite must be set to read weights with NaN or infinity, got "
            f"{count} in the tensor {name!r}."
        )
    return array
