"""What a run survives: machines that are taken away, and files that are damaged."""

import functools
import pathlib
import random
import shutil
import time

import pytest
from support.jobs import Job, assert_same_losses, losses, saved, sealed, train_here

pytestmark = pytest.mark.slow


def saves_after(workdir, step):
    """Whether it is in the midst of a save, or just after one."""
    return any(workdir.glob("checkpoints/*tmp*")) or saved(workdir) > step


def test_kills_change_nothing(folder):
    """Five: before the first checkpoint, in the midst of saves, and between steps."""
    more = "--config.total_steps=60"
    train_here(folder / "undisturbed", more)
    workdir, rng = folder / "killed", random.Random(0)
    for i in range(5):
        job = Job(workdir, more, devices=8)
        if i == 0:
            time.sleep(rng.uniform(1, 4))
        else:
            job.wait_for(functools.partial(saves_after, workdir, saved(workdir)))
            time.sleep(0 if i % 2 else rng.uniform(0, 0.3))
        assert job.processes[0].poll() is None  # a kill that comes too late is none
        job.kill()
    train_here(workdir, more)
    digests = [sealed(w, 60)["digests"] for w in (workdir, folder / "undisturbed")]
    assert digests[0] == digests[1]
    assert losses(workdir) == losses(folder / "undisturbed")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, truncate, pathlib.Path.unlink])
def test_a_damaged_checkpoint_changes_nothing(folder, alone, damage):
    """The newest is damaged in one file after the other, and the run goes on."""
    intact = folder / f"intact_{damage.__name__}"
    shutil.copytree(alone, intact)
    shutil.rmtree(intact / "checkpoints" / "12")
    newest = intact / "checkpoints" / "8"
    files = [p for p in newest.rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    for file in (largest, newest / "record" / "metadata"):
        workdir = folder / f"{damage.__name__}_{len(list(folder.iterdir()))}"
        shutil.copytree(intact, workdir)
        damage(workdir / file.relative_to(intact))
        with pytest.warns(UserWarning, match="8"):
            train_here(workdir)
        assert sealed(workdir, 12)["digests"] == sealed(alone, 12)["digests"]
        assert_same_losses(workdir, alone, rtol=0)
