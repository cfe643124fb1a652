"""Where a run may begin: tests of `workdirs`."""

import os

import pytest

from jax_diffusion.runtime import workdirs

DATA = "must not be, hold or lie in config.data.path, got "
FOREIGN = "must be a new or empty folder, or that of a run, got "


def tree(root):
    """All that lies below a folder, with its bytes."""
    return {p: p.is_file() and p.read_bytes() for p in sorted(root.rglob("*"))}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Photos in flat/, a workdir beside them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat" / "dogs").mkdir(parents=True)
    (tmp_path / "flat" / "dogs" / "1.png").write_bytes(b"")
    (tmp_path / "link").symlink_to("flat")
    return tmp_path


@pytest.mark.parametrize(
    "workdir",
    ["flat", "flat/", "flat/new", "flat/dogs", ".", "link", "link/new", "x/../flat"],
)
def test_a_workdir_in_around_or_at_the_place_of_its_data_is_refused(folder, workdir):
    before = tree(folder)
    for path in ("flat", folder / "flat", "link"):
        with pytest.raises(ValueError, match=f"^workdir {DATA}"):
            workdirs.check_new(folder / workdir, path)
    assert tree(folder) == before


@pytest.mark.parametrize("name", ["flat2", "new", "fla", "runs/flat"])
def test_a_workdir_beside_its_data_is_accepted(folder, name):
    for path in ("flat", "link", None, "", "nowhere"):
        workdirs.check_new(folder / name, path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["notes.txt"], "1 entry in '{}', such as 'notes.txt'."),
        (["b/", "a.png", "c.py"], "3 entries in '{}', such as 'a.png'."),
        (["checkpoints/", "model.py"], "1 entry in '{}', such as 'model.py'."),
        (["train.log", "config.py"], "1 entry in '{}', such as 'config.py'."),
    ],
)
def test_a_folder_of_anything_else_is_refused_with_its_entries(tmp_path, names, words):
    make(tmp_path, names)
    with pytest.raises(ValueError, match=r"^workdir must") as info:
        workdirs.check_new(tmp_path)
    assert str(info.value) == f"workdir {FOREIGN}" + words.format(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["nohup.out", "slurm-17.out", "train.log", "logs/", ".nfs0", ".lock"],
        ["run.json", "notes.txt"],
        ["metrics.jsonl", "mine/"],
        ["checkpoints/", "samples/", "wandb/", "tensorboard/", "profile/"],
        ["events.out.tfevents.1.host", "best/", "bad_checkpoints/", "loss.png"],
    ],
)
def test_what_a_run_its_logs_and_its_tools_leave_is_accepted(tmp_path, names):
    make(tmp_path, names)
    workdirs.check_new(tmp_path)
    workdirs.check_new(tmp_path / "new")


def test_the_file_that_a_shell_writes_our_output_to_is_accepted(tmp_path, monkeypatch):
    out = tmp_path / "out.txt"
    with out.open("w") as file:
        ours, fstat = file.fileno(), os.fstat
        monkeypatch.setattr(os, "fstat", lambda n: fstat(ours if n == 2 else n))
        workdirs.check_new(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"such as .out\.txt"):
        workdirs.check_new(tmp_path)


def make(folder, names):
    """Makes folders, whose names end in a slash, and files."""
    for name in names:
        path = folder / name
        path.mkdir() if name.endswith("/") else path.touch()
