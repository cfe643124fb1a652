"""Locks: one process at a time writes to a folder or a file, also on a shared disk.

A lock is a small JSON file beside what it protects: host, process, when it began, and a
word of its own. It is made by an exclusive creation, which shared file systems carry
out, too, and its owner touches it every `BEAT` seconds. A killed owner's lock is taken
over: on the same machine at once, if there is no such process any more; on another one
after it was watched for `PATIENCE` seconds and was not touched. Clocks of different
machines are never compared.

The processes of one job are one owner: the first one holds the lock.
"""

import contextlib
import datetime
import functools
import inspect
import json
import os
import platform
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from jax_diffusion import checks
from jax_diffusion.runtime import sharding
from jax_diffusion.runtime.files import check_output

NAME = ".lock"  # in a folder; beside FILE it is FILE.lock
BEAT = 10.0  # seconds between two touches
PATIENCE = 60.0  # seconds without a touch, after which an owner elsewhere is dead


Function = TypeVar("Function", bound=Callable[..., Any])
HELD: dict[Path, "Lock"] = {}  # what this process holds, by what is protected


class Lock:
    """A lock that is held; see `hold`.

    Args:
        field: name of the argument that is protected, for errors.
        path: what is protected, for errors.
        file: the lock itself.
        word: the word of its owner.
    """

    def __init__(self, field: str, path: Path, file: Path, word: str):
        self._field, self._path, self._file, self._word = field, path, file, word
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Raises OSError if the folder was removed, or another process has the lock.

        What another process has taken must not be mixed with what this one writes.
        """
        if not self._is_ours():
            what = "was removed" if not self._file.exists() else "is another process's"
            raise OSError(
                f"{self._field} {str(self._path)!r} {what} while this process was "
                "writing to it; this process stops"
            )

    def release(self) -> None:
        """Removes the lock if it is still ours."""
        self._ended.set()
        if self._is_ours():
            self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # `check` tells
                if self._is_ours():
                    os.utime(self._file)

    def _is_ours(self) -> bool:
        return _read(self._file).get("word") == self._word


@contextlib.contextmanager
def hold(field: str, path: str | os.PathLike, kind: str = "folder") -> Iterator[None]:
    """Holds the lock of a folder or a file; on several hosts, all of them call it.

    Before something is written, `check` tells whether the lock was lost meanwhile. The
    folder is made; if nothing was written to it, it is removed in the end.

    Args:
        field: name of the argument that names the path, for errors.
        path: what is protected.
        kind: "folder" or "file".

    Raises:
        ValueError: if the path cannot be written to, or if another process, or this
            one, writes to it already.
    """
    checks.path(field, path, f"the path of a {kind}")
    target, lock, made, problem = Path(path), None, [], None
    if jax.process_index() == 0:
        try:
            check_output(field, path, kind)
            is_folder = kind == "folder"
            folder = target if is_folder else target.parent
            file = folder / (NAME if is_folder else f"{target.name}{NAME}")
            made = [f for f in (folder, *folder.parents) if not f.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            lock = take(field, target, file)
        except (ValueError, OSError) as error:
            _remove(made)
            problem = error
    failed = sharding.broadcast_from_first(int(problem is not None))
    if problem is not None:
        raise problem
    if failed:
        raise ValueError(f"{field} must be free for the first process, and is not.")
    if lock is not None:
        HELD[target.absolute()] = lock
    try:
        yield
    finally:
        if lock is not None:
            HELD.pop(target.absolute(), None)
            lock.release()
        _remove(made)


def check(path: str | os.PathLike) -> None:
    """Raises OSError if this process has lost the lock of a path, see `Lock.check`."""
    lock = HELD.get(Path(path).absolute())
    if lock is not None:
        lock.check()


def holding(field: str) -> Callable[[Function], Function]:
    """Makes a function hold the lock of the folder that an argument of it names.

    Args:
        field: name of the argument; where it is None or left out, nothing is locked.
    """

    def decorate(function: Any) -> Any:
        takes = inspect.signature(function)

        @functools.wraps(function)
        def holds(*args: Any, **keywords: Any) -> Any:
            folder = takes.bind(*args, **keywords).arguments.get(field)
            if not isinstance(folder, str | os.PathLike):  # the function tells
                return function(*args, **keywords)
            with hold(field, folder):
                return function(*args, **keywords)

        return holds

    return decorate


def _remove(folders: list[Path]) -> None:
    """Removes folders that are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def take(field: str, target: Path, file: Path) -> Lock:
    """Creates a lock file; takes over that of a dead owner.

    Args:
        field, target: what is protected, for errors.
        file: the lock file.

    Raises:
        ValueError: if its owner is alive.
    """
    word = secrets.token_hex(8)
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"host": platform.node(), "process": os.getpid(), "began": began}
    about |= {"machine": _machine(), "ticks": _ticks(os.getpid()), "word": word}
    while True:
        try:
            create(file, json.dumps(about))
            return Lock(field, target, file, word)
        except FileExistsError as error:
            mode = mode_of(file)
            if mode is not None and not stat.S_ISREG(mode):
                raise ValueError(
                    f"{field} must have a plain file as its lock, got a folder, a link "
                    f"or another thing: remove {str(file)!r}."
                ) from error
            other = _read(file)
        if is_alive(file, other):
            where = f"process {other.get('process')} on {other.get('host')}"
            raise ValueError(
                f"{field} must not be in use, got {str(target)!r}, to which {where} "
                f"has been writing since {other.get('began')} ({file})."
            )
        # Of several that find a dead owner, one replaces its lock: who holds a lock of
        # the lock, and finds the dead owner's still there. No moment is without a lock.
        claim = take(field, target, file.with_name(f"{file.name}.takeover"))
        try:
            if file.exists() and _read(file) == other:
                new = file.with_name(f"{file.name}.{word}")
                create(new, json.dumps(about))
                os.replace(new, file)
                return Lock(field, target, file, word)
        finally:
            claim.release()


def mode_of(file: Path) -> int | None:
    """What kind of thing a path is, as `stat` has it; None if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        return file.lstat().st_mode
    return None


def create(file: Path, text: str) -> None:
    """Makes a file that must not be there; leaves none if the disk is full."""
    with open(file, "x") as opened:
        try:
            opened.write(text)
            opened.flush()
        except BaseException:
            file.unlink(missing_ok=True)
            raise


def is_alive(file: Path, owner: dict[str, Any]) -> bool:
    """Tells whether the owner of a lock runs; on another machine, watches its lock.

    Args:
        file: the lock file.
        owner: what it says.
    """
    if owner.get("machine") == _machine():
        return _ticks(owner["process"]) == owner["ticks"]
    if owner:
        print(
            f"{file} belongs to process {owner.get('process')} on {owner.get('host')}: "
            f"watching for up to {PATIENCE:.0f} s whether it is alive",
            flush=True,
        )
    first, begun = _touched(file), time.monotonic()
    # What cannot be read is being written, or a kill has left it so.
    patience = PATIENCE if owner else min(PATIENCE, 2.0)
    while time.monotonic() - begun < patience:
        time.sleep(min(0.2, patience / 10))
        if _touched(file) != first:
            return file.exists()
    return False


def _touched(file: Path) -> tuple[float, int] | None:
    """When a file was last touched; opening it asks the server of a shared disk."""
    try:
        with file.open("rb") as opened:
            found = os.fstat(opened.fileno())
    except FileNotFoundError:
        return None
    return found.st_mtime, found.st_ino


def _read(file: Path) -> dict[str, Any]:
    """What a lock file says; nothing if it is gone, half-written or damaged."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or type(found.get("process")) is not int:
        return {}
    return found if {"machine", "ticks", "word"} <= found.keys() else {}


def _machine() -> list[str]:
    """What two processes have in common if they can see each other."""
    found = [platform.node()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            is_link = os.path.islink(path)
            found.append(os.readlink(path) if is_link else Path(path).read_text())
    return found


def _ticks(process: int) -> str | None:
    """When a process of this machine began; "" if unknown, None if there is none."""
    try:
        line = Path(f"/proc/{process}/stat").read_text()
        fields = line.rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]  # a zombie writes no more
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # no process has so large a number
        return None
    except OSError:
        pass
    return ""
