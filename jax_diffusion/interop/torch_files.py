"""Reads and writes PyTorch's files (.pt, .pth, .ckpt, .bin), without PyTorch.

A .pt file contains a pickle, and a pickle can call any function. `pickles` reads it
without running anything of it. Tensors become a `Tensor`, whose bounds are checked and
which is read when it is used, so a file cannot ask for more memory than it takes
itself.
"""

import io
import math
import mmap
import struct
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jax_diffusion.interop import file_kinds, pickles
from jax_diffusion.interop.pickles import Global
from jax_diffusion.interop.tensors import STORAGES, Region, Tensor
from jax_diffusion.runtime.files import write_atomic
from jax_diffusion.runtime.untrusted import check_zip

Tensors = Mapping[str, Any]

# PyTorch before 1.6 wrote several pickles in a row, the first two of these numbers.
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
MAX_DEPTH = 100  # of dicts and lists inside each other
LOCAL_HEADER = 30  # bytes before the name of an entry in a zip archive


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


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    """Does what `torch._utils._rebuild_tensor_v2` does; checks bounds."""
    plain = (
        isinstance(storage, _Storage)
        and isinstance(size, tuple | list)
        and isinstance(stride, tuple | list)
        and len(size) == len(stride) <= MAX_DEPTH
        and all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride))
    )
    if not plain:
        raise ValueError("a tensor of impossible size")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.count:
        raise ValueError(f"{storage.count} numbers where {last + 1} should be")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


CALLS: dict[Global, Callable[..., Any]] = {
    Global("torch", "Size"): lambda sizes: tuple(sizes),
    Global("torch._utils", "_rebuild_tensor"): _rebuild,
    Global("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    Global("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    Global("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
}


class _Contents(NamedTuple):
    """What one pickle of a file describes: its object, storages and other objects."""

    tree: Any
    storages: dict[str, _Storage]
    objects: list[str]


def _unpickle(file: Any) -> _Contents:
    storages: dict[str, _Storage] = {}

    def call(function, arguments):
        known = CALLS.get(function)
        return NotImplemented if known is None else known(*arguments)

    def persistent(pid):
        if len(pid) not in (5, 6) or pid[5:] not in ((), (None,)):
            raise ValueError("a storage of an unknown kind")
        kind, name, key, _, count = pid[:5]
        if kind != "storage":
            found = kind[:20] if isinstance(kind, str) else type(kind).__name__
            raise ValueError(f"a {found!r} in place of a storage")
        known = isinstance(name, Global) and name.module == "torch"
        if not known or name.name not in STORAGES:
            raise ValueError("a storage of unknown numbers")
        if not isinstance(key, str | int) or not isinstance(count, int):
            raise ValueError("a storage without key and length")
        storage = _Storage(str(key), STORAGES[name.name], count)
        if storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"two kinds of numbers in {storage.key[:40]!r}")
        return storage

    tree, objects = pickles.load(file, call, persistent)
    return _Contents(tree, storages, objects)


def read_torch(path: str | Path, *, ignore_objects: bool = False) -> Any:
    """Reads a .pt, .pth, .ckpt or .bin file of PyTorch.

    Args:
        path: a file in the zip format of PyTorch 1.6 and later, or in the older format.
        ignore_objects: whether objects that are neither tensors nor plain containers
            are left out, such as an `argparse.Namespace`. Nothing of them is run.

    Returns:
        What was saved, mostly a dict from name to tensor. Every tensor is a `Tensor`,
        which `numpy.asarray` reads; tuples are lists, objects left out are None.

    Raises:
        ValueError: if the file is cut off or corrupted, is of another kind, or holds
            other objects that are not ignored.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"a checkpoint must be a file, got {str(path)!r}.")
    try:
        with path.open("rb") as file:
            if not file_kinds.is_torch(path):
                raise ValueError(file_kinds.describe(path))
            zipped = zipfile.is_zipfile(file)
            tree, objects = (_read_zip if zipped else _read_legacy)(file, path)
    except Exception as error:  # damage shows as any kind of error
        reason = str(error).split("\n")[0][:300].rstrip(".") or type(error).__name__
        raise ValueError(
            f"{path} must be a whole PyTorch file of tensors only, got {reason}."
        ) from error
    if objects and not ignore_objects:
        more = f" and {len(objects) - 3} others" if len(objects) > 3 else ""
        raise ValueError(
            f"ignore_objects must be set to read {path}, which holds objects beside "
            f"its tensors, got {', '.join(objects[:3])}{more}; they are left out then, "
            "and nothing of them is run."
        )
    return tree


def _read_zip(file: Any, path: Path) -> tuple[Any, list[str]]:
    """Reads the format of PyTorch 1.6 and later: a pickle, and a file per storage."""
    with zipfile.ZipFile(file) as archive:
        check_zip(archive)
        names = archive.namelist()
        found = [n for n in names if n.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError(f"a zip archive with {len(found)} data.pkl")
        if any(info.compress_type for info in archive.infolist()):
            raise ValueError("a compressed archive")
        root = found[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in names and archive.read(order) != b"little":
            raise ValueError("big-endian numbers")
        contents = _unpickle(io.BytesIO(archive.read(found[0])))
        regions: dict[str, Region] = {}
        for key in contents.storages:
            info = archive.getinfo(f"{root}data/{key}")
            file.seek(info.header_offset)
            header = file.read(LOCAL_HEADER)
            name, extra = struct.unpack("<HH", header[26:])
            start = info.header_offset + LOCAL_HEADER + name + extra
            if start + info.file_size > archive.start_dir:
                raise ValueError("a file that is cut off")
            regions[key] = Region(path, start, info.file_size, info.CRC)
    return _tensors(contents, regions), contents.objects


def _read_legacy(file: Any, path: Path) -> tuple[Any, list[str]]:
    """Reads the older format: five pickles in a row, then all storages."""
    size = path.stat().st_size
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        magic, version, system = (_unpickle(mapped).tree for _ in range(3))
        if (magic, version) != (LEGACY_MAGIC, LEGACY_VERSION):
            raise ValueError("a pickle of something else")
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("big-endian numbers")
        contents, (keys, *_) = _unpickle(mapped), _unpickle(mapped)
        regions: dict[str, Region] = {}
        for key in keys:  # in this order, each after its number of elements
            (count,) = struct.unpack("<q", mapped.read(8))
            storage = contents.storages[key]
            if count != storage.count:
                raise ValueError(f"{count} numbers in {key!r}")
            region = Region(path, mapped.tell(), count * storage.dtype.itemsize)
            if region.start + region.size > size:
                raise ValueError("a file that is cut off")
            mapped.seek(region.size, 1)
            regions[key] = region
    return _tensors(contents, regions), contents.objects


def _tensors(contents: _Contents, regions: Mapping[str, Region]) -> Any:
    """Replaces every `_Tensor` of a tree by a `Tensor`.

    Args:
        contents: the tree, of dicts, lists and tuples, and its storages.
        regions: the bytes of every storage by its key.
    """
    for key, (_, dtype, count) in contents.storages.items():
        if regions[key].size != count * dtype.itemsize:
            found = regions[key].size // dtype.itemsize
            raise ValueError(f"{found} numbers of {count}")
    done: dict[int, Any] = {}  # by id: an object can occur in a tree very often

    def convert(item, depth):
        if depth > MAX_DEPTH:
            raise ValueError(f"a recursion over {MAX_DEPTH} deep")
        if id(item) not in done:
            done[id(item)] = inside(item, depth + 1)
        return done[id(item)]

    def inside(item, depth):
        if isinstance(item, _Tensor):
            (key, dtype, _), offset, size, stride = item
            return Tensor(regions[key], dtype, size, stride, offset)
        if isinstance(item, dict):
            return {key: convert(value, depth) for key, value in item.items()}
        if isinstance(item, Global | _Storage) or item is pickles.OBJECT:
            return None
        if isinstance(item, list | tuple):
            return [convert(value, depth) for value in item]
        return item

    return convert(contents.tree, 0)


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
    check_dtypes(tensors, names)
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
                archive.writestr(f"archive/data/{key}", np.asarray(array).tobytes())
            archive.writestr("archive/version", "3\n")

    return write


def _string(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _integer(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def _integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


def check_dtypes(tensors: Tensors, known: Collection[np.dtype]) -> None:
    """Raises a ValueError if an array has a dtype that a format does not know.

    Args:
        tensors: arrays by name.
        known: the dtypes of the format.
    """
    for name, array in tensors.items():
        if array.dtype not in known:
            raise ValueError(
                f"tensors must be of {sorted(map(str, known))}, got {array.dtype} "
                f"in {name!r}."
            )
