"""Files that are whole or not there: atomic writes, .npz archives, hashes, JSON."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from jaxtyping import PyTree

from jax_diffusion import checks
from jax_diffusion.runtime.untrusted import check_npy, check_zip

DATE = (1980, 1, 1, 0, 0, 0)  # of all archive entries: bytes must not tell the time

Content = bytes | str | Callable[[BinaryIO], Any]


def write_atomic(
    path: str | os.PathLike, content: Content, *, sync: bool = True
) -> None:
    """Writes a file so that a kill leaves the old file or the new one, never a half.

    Args:
        path: the file to write or replace, in a folder that exists.
        content: bytes, text (written as UTF-8), or a function that writes to the open
            binary file that it is given.
        sync: whether to wait for the disk, so that a machine that loses power leaves
            no half either; for many small files that can be made again, it takes long.
    """
    write_all_atomic({Path(path): content}, sync=sync)


def write_all_atomic(files: Mapping[Path, Content], *, sync: bool = True) -> None:
    """Writes several files that belong together: all of them or none.

    They are written beside their places, as `NAME.tmp`, and then renamed; only a kill
    between two renames leaves some of them old and some new.

    Args:
        files: the content of each file by its path, as `write_atomic` takes it.
        sync: as there.
    """
    beside = {path: path.with_name(f"{path.name}.tmp") for path in files}
    try:
        for path, content in files.items():
            with beside[path].open("wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(
                        content.encode() if isinstance(content, str) else content
                    )
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
        for path in files:
            os.replace(beside[path], path)
    except Exception:
        for path in beside.values():
            path.unlink(missing_ok=True)
        raise


def check_output(field: str, path: Any, kind: str = "file") -> None:
    """Checks that a path can be written to, before any work is done; leaves nothing.

    Args:
        field: name of the argument, for errors.
        path: where a file shall be written with `write_atomic`, or a folder be made.
            What is there already is no error if it is of the same kind.
        kind: "file" or "folder".

    Raises:
        ValueError: if the path is empty or no path, if something of the other kind is
            there, if it lies below a file, if a name in it is too long, or if the
            folder that it needs may not be written to, or takes no files (/proc).
    """
    checks.path(field, path, f"the path of a {kind}")
    text, target = os.fspath(path), Path(path).absolute()
    if "\0" in text:
        raise ValueError(f"{field} must be a path without NUL, got {text!r}.")
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            target.stat()  # unlike exists() tells of names too long, links in circles
        found = target.exists()
        if kind == "folder" and (found or target.is_symlink()) and not target.is_dir():
            raise ValueError(f"{field} must be a folder, and {text!r} is none.")
        if kind == "file" and found and not target.is_file():
            raise ValueError(f"{field} must be a file, and {text!r} is none.")
        is_new_folder = kind == "folder" and not found
        missing = [target.name] if kind == "file" or is_new_folder else []
        there = target.parent if missing else target
        while not there.exists() and there != there.parent:
            missing.append(there.name)
            there = there.parent
        longest = os.pathconf(there, "PC_NAME_MAX") if there.is_dir() else 255
    except OSError as error:  # a name or path too long, a link in a circle
        reason = (error.strerror or f"{error}").lower()
        raise ValueError(
            f"{field} must be a path that can be written, got {text!r}: {reason}."
        ) from error
    if not there.is_dir():
        raise ValueError(f"{field} must not lie below a file, got {str(there)!r}.")
    for name in missing:  # a file is written as NAME.tmp first
        if len(os.fsencode(name)) + len(".tmp") > longest:
            raise ValueError(f"{field} must have shorter names, got {name!r}.")
    if not takes_files(there):
        raise ValueError(
            f"{field} must be in a folder that may be written to, got {str(there)!r}."
        )


def takes_files(folder: Path) -> bool:
    """Whether files can be made in a folder; a disk that is full is told by writing."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    try:  # permissions say nothing of /proc, nor do those of root of anything
        with tempfile.TemporaryFile(dir=folder):  # without a name where that can be
            return True
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)


def entries(found: Sequence[Any]) -> str:
    """Says how many files and folders were found, in words: "1 entry", "2 entries"."""
    return "1 entry" if len(found) == 1 else f"{len(found)} entries"


def reason_of_disk(error: BaseException | None) -> str:
    """Returns why a disk does not take something, in words; "" for any other error.

    Libraries wrap the errors of a disk in errors of many kinds.
    """
    text = f"{error}".lower()
    codes = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO]
    codes += [errno.ENOENT]  # a folder that was removed meanwhile
    for reason in map(os.strerror, codes):
        if reason.lower() in text:
            return reason
    return " ".join(f"{error}".split())[:200] if isinstance(error, OSError) else ""


def json_text(value: Any, **layout: Any) -> str:
    """Returns a value as JSON that any reader takes.

    JSON has no NaN and no infinity: numbers that are not finite become the words
    "nan", "inf" and "-inf", which `float` reads.

    Args:
        value: as `json.dumps` takes it.
        layout: arguments of `json.dumps`, such as indent.

    >>> json_text({"loss": float("nan"), "steps": (1, 2)})
    '{"loss": "nan", "steps": [1, 2]}'
    """

    def finite(value):
        if isinstance(value, Mapping):
            return {name: finite(v) for name, v in value.items()}
        if isinstance(value, list | tuple):
            return [finite(v) for v in value]
        odd = isinstance(value, float) and not math.isfinite(value)
        return f"{float(value)}" if odd else value

    return json.dumps(finite(value), allow_nan=False, **layout)


def read_npz(
    path: str | os.PathLike, names: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """Reads the arrays of a .npz file.

    Args:
        path: the file; its name may end in anything.
        names: the arrays to read, default all; names that the file lacks are left out.

    Returns:
        Arrays by name, in the order of `names` or of the file.

    Raises:
        ValueError: if the file is missing or damaged, or holds pickled objects.
    """
    try:
        with Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            check_zip(archive)
            there = [name.removesuffix(".npy") for name in archive.namelist()]
            wanted = there if names is None else [n for n in names if n in there]
            for name in wanted:
                check_npy(archive, f"{name}.npy")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in wanted}
    except Exception as error:  # damage shows as any kind of error
        raise ValueError(
            f"{path} must be a whole .npz file of plain arrays, got {error!r}."
        ) from error


def write_npz_entry(
    archive: zipfile.ZipFile, name: str, n: int, arrays: Iterable[np.ndarray]
) -> None:
    """Writes an array to a .npz that is open, without the whole of it in memory.

    Its bytes do not depend on the time, nor on how the rows were split.

    Args:
        archive: the .npz, open for writing.
        name: the array's name in the .npz.
        n: number of rows in all.
        arrays: the rows in order, in one or more arrays [m, ...] of the same dtype.
    """
    arrays = iter(arrays)
    first = next(arrays)
    shape = (n, *first.shape[1:])
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": shape}
    entry = zipfile.ZipInfo(f"{name}.npy", DATE)
    with archive.open(entry, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for array in itertools.chain([first], arrays):
            file.write(np.ascontiguousarray(array).tobytes())


def sha256_of_file(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def leaves_by_name(tree: PyTree) -> dict[str, Any]:
    """Names each leaf of a pytree by the keys on the way to it, joined by "/".

    >>> leaves_by_name({"block": {"kernel": 1, "scales": [2, 3]}})
    {'block/kernel': 1, 'block/scales/0': 2, 'block/scales/1': 3}
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def sha256_of_tree(tree: PyTree) -> str:
    """Returns the SHA-256 of a pytree of arrays, as 64 hexadecimal digits.

    Names ("block/kernel"), dtypes, shapes and bytes of all leaves enter, in the order
    of the names; JAX and NumPy arrays of the same values give the same hash.

    >>> a, b = np.zeros(2, np.float32), np.zeros(2, np.int32)
    >>> sha256_of_tree({"a": a}) == sha256_of_tree({"a": b})
    False
    """
    arrays = {name: np.asarray(leaf) for name, leaf in leaves_by_name(tree).items()}
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
