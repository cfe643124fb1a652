"""Atomic writes, reading .npz, hashes; one .npz of many images written in parts."""

import hashlib
import json
import os
import time
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion.runtime.files import (
    check_output,
    json_text,
    read_npz,
    sha256_of_file,
    sha256_of_tree,
    write_all_atomic,
    write_atomic,
    write_npz_entry,
)
from jax_diffusion.runtime.resumable_npz import ResumableNpz

N = 10
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 4, 3, 2), np.uint8)  # more than are asked for
LABELS = np.arange(12, dtype=np.int32) % 5
RECORD = {"seed": 0, "steps": 50}


class Killed(BaseException):
    """Nothing may catch it, as nothing can catch a kill."""


def finish(out, size=4, record=RECORD):
    """Writes what is not there yet, in parts of `size` images; returns the bytes."""
    writer = ResumableNpz(out, record)
    add(writer, size, until=N)
    writer.join(N)
    return out.read_bytes()


def add(writer, size, until):
    while writer.done < until:
        rows = slice(writer.done, writer.done + size)
        writer.add({"arr_0": IMAGES[rows], "arr_1": LABELS[rows]})


def begin(out, size=4, until=8):
    """What a killed job leaves: parts, and no file."""
    add(ResumableNpz(out, RECORD), size, until)
    return out.with_suffix(".parts")


def refuses(out, record=RECORD):
    """The one sentence in which the parts are refused; nothing is touched."""
    folder = out.with_suffix(".parts")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError) as info:
        ResumableNpz(out, record)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    sentence = str(info.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


def kill_at(monkeypatch, moment):
    """Dies just before the given one of all changes to the folder; counts them."""
    made = []

    def watched(change):
        def changing(*args, **options):
            made.append(change)
            if len(made) == moment + 1:
                raise Killed
            return change(*args, **options)

        return changing

    for name in ("replace", "fsync", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    return made


@pytest.mark.parametrize(
    "content", [b"caf\xc3\xa9\n", "café\n", lambda file: file.write(b"caf\xc3\xa9\n")]
)
def test_write_atomic_takes_bytes_text_and_functions(content, tmp_path):
    write_atomic(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == b"caf\xc3\xa9\n"
    assert (
        sha256_of_file(tmp_path / "a") == hashlib.sha256(b"caf\xc3\xa9\n").hexdigest()
    )


def test_write_atomic_that_fails_leaves_the_old_files_and_nothing_else(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    write_all_atomic(dict.fromkeys(paths, "old"))

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_all_atomic({paths[0]: "new", paths[1]: fail})
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "a": "old",
        "b": "old",
    }


def test_read_npz_returns_all_arrays_or_those_named_that_are_there(tmp_path):
    np.savez(tmp_path / "a.npz", x=IMAGES, y=LABELS)
    found = read_npz(tmp_path / "a.npz")
    assert [*found] == ["x", "y"]
    np.testing.assert_array_equal(found["x"], IMAGES, strict=True)
    assert [*read_npz(tmp_path / "a.npz", ["y", "z"])] == ["y"]


def test_read_npz_refuses_what_is_no_whole_file_of_plain_arrays(tmp_path):
    np.save(tmp_path / "array.npy", LABELS)
    np.savez(tmp_path / "objects.npz", x=np.array([{}], object))
    (tmp_path / "empty.npz").touch()
    for name in ("array.npy", "objects.npz", "empty.npz", "missing.npz"):
        with pytest.raises(ValueError, match=r"must be a whole \.npz file of plain"):
            read_npz(tmp_path / name)


def test_write_npz_entry_writes_what_numpy_reads(tmp_path):
    rows = np.arange(30, dtype=np.int16).reshape(5, 2, 3)
    path = tmp_path / "rows.npz"
    with zipfile.ZipFile(path, "w") as archive:
        write_npz_entry(archive, "rows", 5, [rows[:2], rows[2:4], rows[4:]])
    found = read_npz(path)["rows"]
    assert found.dtype == rows.dtype and np.array_equal(found, rows)


def test_sha256_of_tree_depends_on_names_dtypes_shapes_and_values_alone():
    tree = {"b": {"y": LABELS}, "a": np.float32(1)}
    expected = hashlib.sha256()
    for name, array in (("a", np.float32(1)), ("b/y", LABELS)):
        expected.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        expected.update(array.tobytes())
    assert sha256_of_tree(tree) == expected.hexdigest()
    same = {"a": jnp.ones(()), "b": {"y": jnp.asarray(LABELS)}}
    assert sha256_of_tree(same) == expected.hexdigest()
    others = [
        {"b": {"z": LABELS}, "a": np.float32(1)},
        {"b": {"y": LABELS[:, None]}, "a": np.float32(1)},
        {"b": {"y": LABELS.astype(np.uint32)}, "a": np.float32(1)},
        {"b": {"y": LABELS[::-1]}, "a": np.float32(1)},
    ]
    assert len({sha256_of_tree(t) for t in [tree, *others]}) == 5


def test_a_job_killed_at_any_moment_ends_in_the_same_bytes(tmp_path):
    undisturbed = finish(tmp_path / "whole.npz")
    moment, killed = 0, True
    while killed:
        out = tmp_path / str(moment) / "a.npz"
        with pytest.MonkeyPatch.context() as patch:
            made = kill_at(patch, moment)
            try:
                finish(out)
                killed = False
            except Killed:
                pass
        if out.exists():  # then it is whole
            assert out.read_bytes() == undisturbed
        assert finish(out) == undisturbed
        assert [p.name for p in out.parent.iterdir()] == ["a.npz"]
        moment += 1
    assert moment > 3 * 2 + 2 and len(made) == moment - 1


def test_parts_that_are_there_are_not_asked_for_again(tmp_path):
    out = tmp_path / "a.npz"
    assert ResumableNpz(out, RECORD).done == 0
    for until in (4, 8, 12):
        begin(out, until=until)
        assert ResumableNpz(out, RECORD).done == until
    assert not out.exists()


@pytest.mark.parametrize("sizes", [(3, 3), (10, 10), (12, 12), (1, 5)])
def test_the_bytes_are_the_same_however_they_were_split(sizes, tmp_path):
    begin(tmp_path / "a.npz", sizes[0], until=sizes[0])
    assert finish(tmp_path / "a.npz", sizes[1]) == finish(tmp_path / "b.npz")


def test_the_bytes_are_the_same_at_any_time(tmp_path, monkeypatch):
    now = finish(tmp_path / "a.npz")
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert finish(tmp_path / "b.npz") == now
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None


def test_numpy_reads_the_images_and_labels_that_were_asked_for(tmp_path):
    finish(tmp_path / "deep" / "a.npz", size=4)
    with np.load(tmp_path / "deep" / "a.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"arr_0", "arr_1"}
        images, labels = arrays["arr_0"], arrays["arr_1"]
    np.testing.assert_array_equal(images, IMAGES[:N], strict=True)
    np.testing.assert_array_equal(labels, LABELS[:N], strict=True)


def test_more_parts_than_images_are_cut(tmp_path):
    begin(tmp_path / "a.npz", size=1, until=12)
    assert finish(tmp_path / "a.npz") == finish(tmp_path / "b.npz", size=N)


def test_other_settings_are_refused_with_the_difference_and_nothing_is_lost(tmp_path):
    out = tmp_path / "a.npz"
    begin(out)
    sentence = refuses(out, {"seed": 0, "steps": 51, "eta": 0.5})
    assert "got eta None -> 0.5, steps 50 -> 51." in sentence
    assert finish(out) == finish(tmp_path / "b.npz")


def test_settings_are_compared_as_json_keeps_them(tmp_path):
    out = tmp_path / "a.npz"
    writer = ResumableNpz(out, {"label": (1, 2)})
    writer.add({"arr_0": IMAGES[:4], "arr_1": LABELS[:4]})
    assert ResumableNpz(out, {"label": [1, 2]}).done == 4


def test_a_gap_is_refused(tmp_path):
    folder = begin(tmp_path / "a.npz", size=2, until=8)
    (folder / "00000002.npz").unlink()
    assert "got 00000004.npz after 2 images: put" in refuses(tmp_path / "a.npz")


def test_a_part_without_its_labels_is_refused(tmp_path):
    folder = begin(tmp_path / "a.npz")
    np.savez(folder / "00000004.npz", IMAGES[4:8], LABELS[4:7])
    assert "00000004.npz" in refuses(tmp_path / "a.npz")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_part_is_refused(keep, tmp_path):
    part = begin(tmp_path / "a.npz") / "00000004.npz"
    part.write_bytes(part.read_bytes()[:keep])
    assert f"{part} must be a whole part" in refuses(tmp_path / "a.npz")


def test_parts_without_a_record_are_refused(tmp_path):
    folder = begin(tmp_path / "a.npz")
    (folder / "record.json").unlink()
    sentence = refuses(tmp_path / "a.npz")
    assert "record.json must be there" in sentence
    assert "put it back, or remove the folder to begin again" in sentence


@pytest.mark.parametrize("text", ["", '{"seed": 0', "[1]", "\udc80"])
def test_a_record_that_cannot_be_read_is_refused(text, tmp_path):
    path = begin(tmp_path / "a.npz") / "record.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert f"{path} must be a whole record" in refuses(tmp_path / "a.npz")


def test_leftovers_of_a_killed_write_do_not_matter(tmp_path):
    out = tmp_path / "a.npz"
    folder = begin(out)
    for path in (folder / "00000008.npz", folder / "record.json", out):
        path.with_name(f"{path.name}.tmp").write_bytes(b"half of it")
    assert ResumableNpz(out, RECORD).done == 8
    assert finish(out) == finish(tmp_path / "b.npz")
    assert not folder.exists() and {p.name for p in tmp_path.iterdir()} == {
        "a.npz",
        "b.npz",
    }


def swap(folder, other):
    """Two parts of one job, whose names say where they belong."""
    parts = [folder / "00000000.npz", folder / "00000004.npz"]
    contents = [p.read_bytes() for p in parts]
    for path, content in zip(parts, reversed(contents), strict=True):
        path.write_bytes(content)


def exchange(folder, other):
    """A part of another job, with as many images."""
    (folder / "00000004.npz").write_bytes((other / "00000004.npz").read_bytes())


def edit(folder, other):
    """One pixel."""
    path = folder / "00000000.npz"
    arrays = read_npz(path)
    arrays["arr_0"][0, 0, 0, 0] ^= 1
    np.savez(path, **arrays)


def without_seal(folder, other):
    """As a version without seals has written it."""
    path = folder / "00000004.npz"
    arrays = read_npz(path)
    np.savez(path, arr_0=arrays["arr_0"], arr_1=arrays["arr_1"])


def edit_record(folder, other):
    """Its text differs, its settings do not."""
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text())))


@pytest.mark.parametrize("change", [swap, exchange, edit, without_seal, edit_record])
def test_a_part_that_is_not_the_jobs_own_is_refused(tmp_path, change):
    folder = begin(tmp_path / "a.npz")
    writer = ResumableNpz(tmp_path / "b.npz", {"seed": 1, "steps": 50})
    add(writer, 4, until=8)
    change(folder, writer.folder)
    sentence = refuses(tmp_path / "a.npz")
    assert "must be the part of this job that begins with image" in sentence
    assert "remove it and later ones, which are then made again" in sentence


def test_parts_of_a_version_without_seals_are_continued(tmp_path):
    folder = begin(tmp_path / "a.npz")
    for path in folder.glob("0*.npz"):
        arrays = read_npz(path)
        assert [*arrays] == ["arr_0", "arr_1", "seal"]
        np.savez(path, arr_0=arrays["arr_0"], arr_1=arrays["arr_1"])
    assert ResumableNpz(tmp_path / "a.npz", RECORD).done == 8
    assert finish(tmp_path / "a.npz") == finish(tmp_path / "b.npz")


def test_json_is_what_every_reader_takes():
    value = {"a": (1, float("nan")), "b": {"c": float("-inf"), "d": 0.5}, "e": None}
    text = json_text(value, indent=2)

    def refuse(word):
        raise AssertionError(word)

    found = json.loads(text, parse_constant=refuse)
    assert found == {"a": [1, "nan"], "b": {"c": "-inf", "d": 0.5}, "e": None}
    assert float(found["b"]["c"]) == -np.inf
    assert json_text({"a": 1.5, "b": [True]}) == json.dumps({"a": 1.5, "b": [True]})


def test_the_record_says_what_was_asked_for(tmp_path):
    folder = begin(tmp_path / "a.npz")
    assert json.loads((folder / "record.json").read_text()) == RECORD


def test_some_arrays_can_be_read_before_and_kept_after(tmp_path):
    writer = ResumableNpz(tmp_path / "a.npz", RECORD)
    for rows in (slice(0, 7), slice(7, 12)):
        writer.add({"arr_0": IMAGES[rows], "norms": LABELS[rows] / 2})
    for n in (5, 7, 10):
        found = writer.read(n, without=["arr_0"])
        assert found.keys() == {"norms"}
        np.testing.assert_array_equal(found["norms"], LABELS[:n] / 2, strict=True)
    writer.join(N, ["arr_0"])
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"arr_0"}
        np.testing.assert_array_equal(arrays["arr_0"], IMAGES[:N], strict=True)


def test_parts_can_be_thrown_away(tmp_path):
    begin(tmp_path / "a.npz")
    ResumableNpz(tmp_path / "a.npz", RECORD).discard()
    assert not [*tmp_path.iterdir()]
    assert ResumableNpz(tmp_path / "a.npz", RECORD).done == 0


REFUSED_OUTPUTS = {  # what is there is made by the test
    "empty": ("", "file", "must be the path of a file"),
    "blank": (" ", "folder", "must be the path of a folder"),
    "no path": (3, "file", "must be the path of a file"),
    "nul": ("a\0b", "file", "must be a path without NUL"),
    "a folder for a file": ("folder", "file", "must be a file"),
    "a file for a folder": ("file", "folder", "must be a folder"),
    "a dead link for a folder": ("dead", "folder", "must be a folder"),
    "a file below a file": ("file/new.npz", "file", "must not lie below a file"),
    "a folder far below a file": ("file/a/b", "folder", "must not lie below a file"),
    "a long name": ("x" * 300, "file", "must be a path that can be written"),
    "a name too long with .tmp": ("x" * 253, "file", "must have shorter names"),
    "a long folder": ("a/" + "x" * 300 + "/b", "folder", "must "),
    "a long path": ("abcdefg/" * 1000, "folder", "must be a path that can be written"),
    "a link in a circle": ("circle/a", "file", "must be a path that can be written"),
    "a device": ("/dev/null", "file", "must be a file"),
    "a folder that may not be written": ("shut/a", "file", "that may be written to"),
    "an existing folder": ("shut", "folder", "that may be written to"),
    "a folder below it": ("shut/a/b", "folder", "that may be written to"),
}
if Path("/proc/self").exists():  # where root may write, by its permissions
    for kind in ("file", "folder"):
        words = "that may be written to, got '/proc'"
        REFUSED_OUTPUTS[f"a new {kind} in /proc"] = ("/proc/x", kind, words)
        REFUSED_OUTPUTS[f"a new {kind} below it"] = ("/proc/x/y", kind, words)


@pytest.mark.parametrize("case", REFUSED_OUTPUTS)
def test_what_cannot_be_written_is_refused_in_a_sentence(tmp_path, monkeypatch, case):
    (tmp_path / "folder").mkdir()
    (tmp_path / "shut").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    monkeypatch.chdir(tmp_path)
    allowed = os.access  # root may write anywhere
    monkeypatch.setattr(
        os, "access", lambda path, mode: "shut" not in str(path) and allowed(path, mode)
    )
    path, kind, words = REFUSED_OUTPUTS[case]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"^out must ") as info:
        check_output("out", path, kind)
    assert words in str(info.value) and len(str(info.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_can_be_written_is_accepted_and_not_made(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "old").mkdir() if kind == "folder" else (tmp_path / "old").touch()
    before = sorted(tmp_path.rglob("*"))
    for path in ("new", "old", "there/new", "a/b/c", "x" * 250, tmp_path / "new"):
        check_output("out", path, kind)
    assert sorted(tmp_path.rglob("*")) == before
