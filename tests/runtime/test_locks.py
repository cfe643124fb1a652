"""Locks: one owner at a time, and a dead one's is taken over."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import pytest

from jax_diffusion.runtime import locks


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "PATIENCE", 0.5)


def leave_lock(folder, **changes):
    """The lock that a killed owner has left."""
    folder.mkdir(exist_ok=True)
    with locks.hold("workdir", folder):
        text = (folder / ".lock").read_text()
    (folder / ".lock").write_text(json.dumps(json.loads(text) | changes))
    return folder / ".lock"


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture(scope="module")
def dead_owner():
    return dead_process()


ELSEWHERE = dict(machine=["elsewhere"], host="elsewhere", process=7, word="theirs")


def test_a_second_owner_is_refused_with_host_and_process(tmp_path):
    with locks.hold("workdir", tmp_path / "a"):
        owner = json.loads((tmp_path / "a" / ".lock").read_text())
        for _ in range(2):  # the refusal does not free it
            with (
                pytest.raises(
                    ValueError, match=r"^workdir must not be in use, got "
                ) as e,
                locks.hold("workdir", tmp_path / "a"),
            ):
                raise AssertionError
        assert f"process {os.getpid()} on {owner['host']}" in str(e.value)
        assert owner["began"] in str(e.value)
    with locks.hold("workdir", tmp_path / "a"):
        pass


def test_a_folder_and_a_file_have_locks_of_their_own(tmp_path):
    with locks.hold("out", tmp_path / "a.npz", "file"), locks.hold("out", tmp_path):
        assert {p.name for p in tmp_path.iterdir()} == {".lock", "a.npz.lock"}
    assert not [*tmp_path.iterdir()]


def test_folders_that_were_made_for_nothing_are_removed(tmp_path):
    with locks.hold("out", tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not [*tmp_path.iterdir()]
    with (
        pytest.raises(ValueError, match="wrong"),
        locks.hold("out", tmp_path / "a" / "b.npz", "file"),
    ):
        raise ValueError("wrong")
    assert not [*tmp_path.iterdir()]
    with locks.hold("out", tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "c").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "b", "c"]


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"^out must be a folder"),
        locks.hold("out", tmp_path / "file"),
    ):
        raise AssertionError


@pytest.mark.parametrize("owner", ["dead", "number given again", "half-written"])
def test_a_killed_owners_lock_is_taken_over(tmp_path, owner):
    if owner == "dead":
        leave_lock(tmp_path, process=dead_process())
    elif owner == "number given again":  # to a process that began at another time
        leave_lock(tmp_path, ticks="1")
    else:
        leave_lock(tmp_path).write_text('{"host"')
    with locks.hold("workdir", tmp_path):
        locks.check(tmp_path)
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    assert not [*tmp_path.iterdir()]


def test_an_owner_elsewhere_is_dead_if_it_does_not_touch_its_lock(tmp_path):
    leave_lock(tmp_path, **ELSEWHERE)
    begun = time.monotonic()
    with locks.hold("workdir", tmp_path):
        locks.check(tmp_path)
    assert time.monotonic() - begun >= locks.PATIENCE


def test_an_owner_elsewhere_that_touches_its_lock_is_alive(tmp_path):
    file = leave_lock(tmp_path, **ELSEWHERE)
    ended = threading.Event()

    def touch():
        while not ended.wait(locks.BEAT):
            os.utime(file)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with (
            pytest.raises(ValueError, match="process 7 on elsewhere has been writing"),
            locks.hold("workdir", tmp_path),
        ):
            raise AssertionError
    finally:
        ended.set()
        thread.join()
    assert file.exists()


def test_the_owner_touches_its_lock(tmp_path):
    with locks.hold("workdir", tmp_path):
        file = tmp_path / ".lock"
        os.utime(file, (1, 1))
        begun = time.monotonic()
        while file.stat().st_mtime < 2 and time.monotonic() - begun < 10:
            time.sleep(0.01)
        assert file.stat().st_mtime > 2


@pytest.mark.parametrize("attempt", range(12))
def test_of_many_that_find_a_dead_owner_one_takes_its_lock(
    tmp_path, attempt, dead_owner, monkeypatch
):
    leave_lock(tmp_path, process=dead_owner)
    start, owners, others = threading.Barrier(8, timeout=30), [], []
    is_alive = locks.is_alive

    def slow(*args):  # what is found may be over when it is acted on
        found = is_alive(*args)
        time.sleep(0.01 * random.random())
        return found

    monkeypatch.setattr(locks, "is_alive", slow)

    def take():
        start.wait()
        with contextlib.ExitStack() as stack:
            try:
                owners.append(stack.enter_context(locks.hold("workdir", tmp_path)))
            except ValueError as error:
                others.append(str(error))
            start.wait()  # nobody leaves before all have tried

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(owners) == 1 and len(others) == 7, others
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("loss", ["removed", "taken over"])
def test_an_owner_learns_that_its_folder_is_gone_or_anothers(tmp_path, loss):
    with locks.hold("workdir", tmp_path / "a"):
        locks.check(tmp_path / "a")
        if loss == "removed":
            shutil.rmtree(tmp_path / "a")
        else:
            (tmp_path / "a" / ".lock").write_text(json.dumps(ELSEWHERE))
        words = "was removed" if loss == "removed" else "is another process's"
        with pytest.raises(OSError, match=words) as info:
            locks.check(tmp_path / "a")
        assert len(str(info.value).splitlines()) == 1
    assert (tmp_path / "a" / ".lock").exists() == (loss == "taken over")


MINE = dict(machine=locks._machine(), ticks="5", word="w", process=1)
DAMAGED = {
    "nothing": "",
    "no process": {"process": None},
    "a path": {"process": "../../x"},
    "a NUL": {"process": "a\0b"},
    "a dict": {"process": {"a": 1}},
    "True": {"process": True},
    "a large number": {"process": 10**400},
    "a list": "[]",
    "deep": "[" * 100_000,
    "no keys": json.dumps(dict(machine=MINE["machine"])),
    "no ticks": json.dumps(dict(machine=MINE["machine"], process=1)),
    "not text": "\udcff",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_lock_is_taken_over(kind, tmp_path):
    found = DAMAGED[kind]
    text = found if isinstance(found, str) else json.dumps(MINE | found)
    (tmp_path / ".lock").write_bytes(text.encode("utf-8", "surrogateescape"))
    with locks.hold("workdir", tmp_path):
        held = json.loads((tmp_path / ".lock").read_text())
        assert held["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "loop", "link"])
def test_what_is_no_file_is_no_lock_and_stays(kind, tmp_path):
    lock = tmp_path / ".lock"
    if kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(lock if kind == "loop" else tmp_path / "nowhere")
    sentence = r"^workdir must have a plain file as its lock, .*\.lock'\.$"
    with pytest.raises(ValueError, match=sentence), locks.hold("workdir", tmp_path):
        raise AssertionError
    assert os.path.lexists(lock)


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, _):
            raise OSError(28, "No space left on device")

    real = open
    monkeypatch.setattr(locks, "open", lambda *a: Full(real(*a)), raising=False)
    with pytest.raises(OSError, match="No space"), locks.hold("out", tmp_path / "a/b"):
        raise AssertionError
    assert not list(tmp_path.iterdir())
