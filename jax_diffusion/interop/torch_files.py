"""Reads and writes .pt and .safetensors files, without PyTorch and without risk.

A .pt file contains a pickle, and a pickle can call any function. This reader accepts
only the few instructions and names that tensors need, and refuses all others before
anything is imported. In place of a tensor it makes a plain record, whose bounds are
checked. The arrays that it returns are views of the file's bytes, whatever sizes and
strides the file claims, so a file cannot ask for more memory than it takes itself.
.safetensors files are read and written by the library of that name.
"""

import collections
import functools
import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_diffusion.runtime.files import write_atomic

Tensors = Mapping[str, np.ndarray]

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
# PyTorch before 1.6 wrote several pickles in a row, the first two of these numbers.
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
# The instructions of pickles that hold plain containers and tensors only.
OPCODES = set(
    """
    PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
    BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_DICT EMPTY_LIST EMPTY_TUPLE
    SETITEM SETITEMS APPEND APPENDS TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT
    MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID
    """.split()
)


class _Storage(NamedTuple):
    """A flat array, as a pickle describes it: its key in the file, dtype and length."""

    key: str
    dtype: np.dtype
    count: int


class _Tensor(NamedTuple):
    """A tensor, as a pickle describes it: a strided view of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _RebuildTensor:
    """Stands in for `torch._utils._rebuild_tensor_v2`; checks bounds."""

    __slots__ = ()  # nothing that a pickle could change

    def __call__(self, storage, offset, size, stride, *rest):
        numbers = (offset, *size, *stride)
        plain = all(type(n) is int and n >= 0 for n in numbers)
        if not plain or not isinstance(storage, _Storage) or len(size) != len(stride):
            raise ValueError(f"a tensor of size {size} and stride {stride}")
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if math.prod(size) and last >= storage.count:
            raise ValueError(f"{storage.count} numbers where {last + 1} should be")
        return _Tensor(storage, offset, tuple(size), tuple(stride))


class _RebuildParameter:
    """Stands in for `torch._utils._rebuild_parameter`."""

    __slots__ = ()

    def __call__(self, tensor, *rest):
        return tensor


ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _RebuildTensor(),
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{("torch", name): name for name in STORAGES},
}


class _Unpickler(pickle.Unpickler):
    """Unpickles tensors as `_Tensor`, and refuses everything that is no tensor."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise ValueError(f"it asks for {module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, pid):
        kind, name, key, _, count, *view = pid
        if kind != "storage" or name not in STORAGES or any(view):
            raise ValueError(f"it asks for a {kind!r} of {name!r}")
        storage = _Storage(str(key), STORAGES[name], int(count))
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"two kinds of numbers in {storage.key!r}")
        return storage


def _unpickle(file: Any) -> tuple[Any, dict[str, _Storage]]:
    """Unpickles an object and its storages by key, after checking every instruction."""
    start = file.tell()
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name not in OPCODES:
            raise ValueError(f"its pickle has the instruction {opcode.name}")
        if opcode.name == "LONG_BINPUT" and argument > file.tell():
            raise ValueError(f"its pickle asks for {argument} places")
    end = file.tell()
    file.seek(start)
    unpickler = _Unpickler(file.read(end - start))
    return unpickler.load(), unpickler.storages


def read_torch(path: str | Path) -> Any:
    """Reads a .pt, .pth, .ckpt or .bin file of PyTorch.

    Args:
        path: a file in the zip format of PyTorch 1.6 and later, or in the older format.

    Returns:
        What was saved, mostly a dict from name to tensor. Tensors are read-only NumPy
        arrays, tuples are lists.

    Raises:
        ValueError: if the file is cut off or corrupted, or if its pickle contains
            anything but tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"a checkpoint must be a file, got {str(path)!r}.")
    try:
        with path.open("rb") as file:
            zipped = zipfile.is_zipfile(file)
            file.seek(0)
            return _read_zip(file) if zipped else _read_legacy(file)
    except Exception as error:  # damage shows as any kind of error
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} must be a whole PyTorch file of tensors only, got {reason!r}."
        ) from error


def _read_zip(file: Any) -> Any:
    """Reads the format of PyTorch 1.6 and later: a pickle, and a file per storage."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [n for n in names if n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{len(pickles)} times data.pkl in it")
        if any(info.compress_type for info in archive.infolist()):
            raise ValueError("it is compressed")
        root = pickles[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in names and archive.read(order) != b"little":
            raise ValueError("it is big-endian")
        tree, _ = _unpickle(io.BytesIO(archive.read(pickles[0])))
        return _arrays(tree, lambda storage: archive.read(f"{root}data/{storage.key}"))


def _read_legacy(file: Any) -> Any:
    """Reads the older format: five pickles in a row, then all storages."""
    magic, version, system = (_unpickle(file)[0] for _ in range(3))
    if magic != LEGACY_MAGIC or version != LEGACY_VERSION:
        raise ValueError("no PyTorch file")
    if not system["little_endian"]:
        raise ValueError("it is big-endian")
    (tree, storages), (keys, _) = _unpickle(file), _unpickle(file)
    data = {}
    for key in keys:  # in this order, each after its number of elements
        (count,) = struct.unpack("<q", file.read(8))
        if count != storages[key].count:
            raise ValueError(f"{count} numbers in {key!r}")
        data[key] = file.read(count * storages[key].dtype.itemsize)
    return _arrays(tree, lambda storage: data[storage.key])


def _arrays(tree: Any, read: Callable[[_Storage], bytes]) -> Any:
    """Replaces every `_Tensor` of a tree by an array.

    Args:
        tree: dicts and lists.
        read: returns the bytes of a storage.
    """
    done: dict[int, Any] = {}  # by id: an object can occur in a tree very often

    @functools.cache
    def numbers(storage):
        flat = np.frombuffer(read(storage), storage.dtype)
        if len(flat) != storage.count:
            raise ValueError(f"{len(flat)} numbers of {storage.count}")
        return flat

    def convert(item):
        if id(item) not in done:
            done[id(item)] = inside(item)
        return done[id(item)]

    def inside(item):
        if isinstance(item, _Tensor):
            flat = numbers(item.storage)
            strides = [stride * flat.itemsize for stride in item.stride]
            return np.lib.stride_tricks.as_strided(
                flat[item.offset :], item.size, strides, writeable=False
            )
        if isinstance(item, Mapping):
            return {key: convert(value) for key, value in item.items()}
        if isinstance(item, list | tuple):
            return [convert(value) for value in item]
        return item

    return convert(tree)


def write_torch(path: str | Path, tensors: Tensors) -> None:
    """Writes a state dict that `torch.load(path, weights_only=True)` reads.

    Args:
        path: the file to write or replace; folders are made.
        tensors: arrays by name.

    Raises:
        ValueError: if PyTorch has no dtype of one of the arrays.
    """
    content = torch_content(tensors)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)


def torch_content(tensors: Tensors) -> Callable[[BinaryIO], None]:
    """Returns a function that writes what `write_torch` writes, to an open file.

    Args:
        tensors: arrays by name.

    Raises:
        ValueError: if PyTorch has no dtype of one of the arrays.
    """
    names = {dtype: name for name, dtype in STORAGES.items()}
    _check_dtypes(tensors, names)
    pickled = io.BytesIO()
    # Written instruction by instruction: `pickle` would have to import torch for its
    # types.
    pickled.write(b"\x80\x02ccollections\nOrderedDict\n)R(")
    for key, (name, array) in enumerate(tensors.items()):
        strides = np.empty(array.shape, np.uint8).strides
        pickled.write(_string(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((")
        pickled.write(_string("storage") + f"ctorch\n{names[array.dtype]}\n".encode())
        pickled.write(_string(str(key)) + _string("cpu") + _integer(array.size) + b"tQ")
        pickled.write(_integer(0) + _integers(array.shape) + _integers(strides))
        pickled.write(b"\x89ccollections\nOrderedDict\n)RtR")  # no gradient, no hooks
    pickled.write(b"u.")

    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickled.getvalue())
            archive.writestr("archive/byteorder", "little")
            for key, array in enumerate(tensors.values()):
                archive.writestr(f"archive/data/{key}", array.tobytes())
            archive.writestr("archive/version", "3\n")

    return write


def _string(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _integer(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def _integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


def _check_dtypes(tensors: Tensors, known: Mapping[np.dtype, str]) -> None:
    for name, array in tensors.items():
        if array.dtype not in known:
            raise ValueError(
                f"tensors must be of {sorted(map(str, known))}, got {array.dtype} "
                f"in {name!r}."
            )


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a .safetensors file.

    Args:
        path: the file.

    Returns:
        Arrays by name, and the metadata, strings by name.

    Raises:
        ValueError: if the file is missing, cut off or corrupted, or if the library
            safetensors is not installed.
    """
    library = _safetensors()
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"a checkpoint must be a file, got {str(path)!r}.")
    try:
        entries = library.deserialize(path.read_bytes())
        arrays = {
            name: np.frombuffer(e["data"], SAFE_DTYPES[e["dtype"]]).reshape(e["shape"])
            for name, e in entries
        }
        with library.safe_open(path, framework="numpy") as file:
            return arrays, file.metadata() or {}
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} must be a whole .safetensors file, got {reason!r}."
        ) from error


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
    library = _safetensors()
    _check_dtypes(tensors, {dtype: name for name, dtype in SAFE_DTYPES.items()})
    dense = {k: np.asarray(array, order="C") for k, array in tensors.items()}
    return library.numpy.save(dense, metadata=dict(metadata))


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ValueError(
            "safetensors must be installed, `pip install 'jax_diffusion[convert]'`, "
            "got none."
        ) from None
    return safetensors
