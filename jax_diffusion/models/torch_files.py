"""PyTorch's files without PyTorch: tensors in and out, and nothing is ever executed.

A `.pt` is a pickle, and a pickle may call anything. The reader here knows the handful
of names that tensors need and refuses all others before they are even imported; what
stands for a tensor is a plain record, made an array only after its bounds are checked.
"""

import collections
import dataclasses
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(bool),
}
# PyTorch before 1.6 wrote several pickles in a row, these numbers first.
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


@dataclasses.dataclass
class _Tensor:
    """What a pickle says of a tensor."""

    storage: tuple[str, np.dtype, int]  # key, type, number of elements
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(storage, offset, size, stride, *rest):
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(tensor, *rest):
    return tensor


ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Unpickles tensors as `_Tensor`, and refuses whatever is none."""

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise ValueError(f"it asks for {module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, pid):
        kind, dtype, key, _, size = pid[:5]
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ValueError(f"it asks for a {kind!r}")
        return str(key), dtype, int(size)


def read_torch(path: str | Path) -> Any:
    """Reads a `.pt`, `.pth`, `.ckpt` or `.bin` file, its tensors as NumPy arrays.

    Knows the zip format of PyTorch 1.6 and later, and the one before it. Containers
    come back as they were saved: mostly a dict from name to array.

    Raises:
        ValueError: if the file is cut off or corrupted, or if its pickle asks for
            anything but tensors and plain containers; none of it is run.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"a checkpoint must be a file, got {str(path)!r}.")
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                return _read_zip(file)
            file.seek(0)
            return _read_legacy(file)
    except Exception as error:  # damage shows as any kind of error
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} must be a whole PyTorch file of tensors only, got {reason!r}."
        ) from error


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        (pickled,) = (n for n in names if n.endswith("/data.pkl"))
        root = pickled.removesuffix("data.pkl")
        if (
            f"{root}byteorder" in names
            and archive.read(f"{root}byteorder") != b"little"
        ):
            raise ValueError("it is big-endian")
        tree = _Unpickler(io.BytesIO(archive.read(pickled))).load()
        return _arrays(tree, lambda key: archive.read(f"{root}data/{key}"))


def _read_legacy(file: BinaryIO) -> Any:
    magic, version, system = (_Unpickler(file).load() for _ in range(3))
    if (
        magic != LEGACY_MAGIC
        or version != LEGACY_VERSION
        or not system["little_endian"]
    ):
        raise ValueError("no PyTorch file")
    tree, keys = (_Unpickler(file).load() for _ in range(2))
    sizes = {s[0]: s[1].itemsize for s in _storages(tree)}
    data = {}
    for key in keys:  # in this order, each after its number of elements
        (count,) = struct.unpack("<q", file.read(8))
        data[key] = file.read(count * sizes[key])
    return _arrays(tree, data.__getitem__)


def _storages(tree):
    if isinstance(tree, _Tensor):
        yield tree.storage
    elif isinstance(tree, Mapping | list | tuple):
        for item in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _storages(item)


def _arrays(tree, read):
    """The tree with arrays in place of `_Tensor`, by `read(key) -> bytes`."""
    if isinstance(tree, _Tensor):
        return _array(tree, read)
    if isinstance(tree, Mapping):
        return {key: _arrays(item, read) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return [_arrays(item, read) for item in tree]
    return tree


def _array(tensor, read):
    key, dtype, _ = tensor.storage
    flat = np.frombuffer(read(key), dtype)
    if (
        len(tensor.size) != len(tensor.stride)
        or min((tensor.offset, *tensor.size, *tensor.stride), default=0) < 0
    ):
        raise ValueError(f"a tensor of size {tensor.size} and stride {tensor.stride}")
    steps = zip(tensor.size, tensor.stride, strict=True)
    last = tensor.offset + sum((size - 1) * stride for size, stride in steps)
    if math.prod(tensor.size) and last >= len(flat):
        raise ValueError(f"{len(flat)} numbers where {last + 1} should be")
    strides = [stride * dtype.itemsize for stride in tensor.stride]
    view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.size, strides)
    return view.copy()


def write_torch(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict that `torch.load(path, weights_only=True)` reads."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    pickled = io.BytesIO()
    # Written opcode by opcode: a pickler would have to import torch to name its types.
    pickled.write(b"\x80\x02ccollections\nOrderedDict\n)R(")
    for key, (name, array) in enumerate(tensors.items()):
        strides = tuple(
            s // array.itemsize for s in np.empty(array.shape, array.dtype).strides
        )
        pickled.write(_string(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((")
        pickled.write(_string("storage") + f"ctorch\n{names[array.dtype]}\n".encode())
        pickled.write(_string(str(key)) + _string("cpu") + _integer(array.size) + b"tQ")
        pickled.write(_integer(0) + _integers(array.shape) + _integers(strides))
        pickled.write(b"\x89ccollections\nOrderedDict\n)RtR")  # no gradient, no hooks
    pickled.write(b"u.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(tensors.values()):
            archive.writestr(
                f"archive/data/{key}", np.ascontiguousarray(array).tobytes()
            )
        archive.writestr("archive/version", "3\n")


def _string(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _integer(value: int) -> bytes:
    data = value.to_bytes(8, "little")
    return b"\x8a\x08" + data


def _integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
