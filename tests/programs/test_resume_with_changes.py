"""Resuming on purpose with changes: what may differ, what is recorded, what is not."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from support.features import refuses
from support.oracles import F32
from support.programs import train
from support.tiny_runs import UNET, tiny_config, write_images

from jax_diffusion import data
from jax_diffusion.runtime import checkpoint, logs


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of two steps, and its images beside it."""
    folder = tmp_path_factory.mktemp("begun")
    write_images(folder / "images.npz", channels=1)
    train.train(tiny_config(folder / "images.npz"), folder / "run")
    return folder


@pytest.fixture
def run(begun, tmp_path):
    """A copy of it; config.data.path names the first one's images."""
    shutil.copytree(begun / "run", tmp_path / "run")
    return tmp_path / "run"


def config_of(begun, **changes):
    return tiny_config(begun / "images.npz", **dict(total_steps=3) | changes)


def files_of(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def same(a, b):
    equal = jax.tree.map(np.array_equal, jax.device_get(a), jax.device_get(b))
    return all(jax.tree.leaves(equal))


def test_a_named_field_changes_and_the_record_and_run_json_say_when(begun, run, capsys):
    config = config_of(begun, optimizer=dict(lr=0.5))
    line = "optimizer.lr: 0.01 -> 0.5"
    sentence = refuses(train.train, config, run)
    assert sentence.endswith(f"--allow-change optimizer.lr; what differs: {line}.")
    before = checkpoint.load_params(run, ema=None)
    state = train.train(config, run, allow_change=["optimizer.lr"])
    assert f"from step 2 on: {line}" in capsys.readouterr().out
    rows = logs.read_metrics(run)
    np.testing.assert_allclose([row["lr"] for row in rows], [0.01, 0.01, 0.5], **F32)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, before)
    assert max(jax.tree.leaves(moved)) > 0.1  # Adam's step is about the rate
    record = checkpoint.load_record(run)
    assert record["config"]["optimizer"]["lr"] == 0.5
    assert record["changes"] == [{"step": 2, "fields": [line]}]
    starts = logs.read_descriptions(run)
    assert [start["step"] for start in starts] == [0, 2]
    assert starts[1]["changes"] == record["changes"] and "changes" not in starts[0]
    # From now on that is the run's config; the same command may be given again.
    for allowed in ([], ["optimizer.lr"]):
        train.train(config, run, allow_change=allowed)
    assert "optimizer.lr: 0.5 -> 0.01" in refuses(train.train, config_of(begun), run)


@pytest.mark.slow
def test_a_change_that_is_taken_back_is_in_the_record_twice(begun, run):
    for total, lr in ((3, 0.5), (4, 0.01)):
        config = config_of(begun, total_steps=total, optimizer=dict(lr=lr))
        train.train(config, run, allow_change=["optimizer"])
    steps = [change["step"] for change in checkpoint.load_record(run)["changes"]]
    assert steps == [2, 3]


@pytest.mark.parametrize(
    ("changes", "allowed", "words"),
    [
        (
            dict(seed=1),
            ["optimizer.lr"],
            "--allow-change seed; what differs: seed: 0 -> 1.",
        ),
        (
            dict(seed=1, optimizer=dict(lr=0.5)),
            ["optimizer.lr"],
            "--allow-change seed; what differs: seed: 0 -> 1.",
        ),
        (
            dict(seed=1, optimizer=dict(lr=0.5)),
            [],
            "--allow-change optimizer.lr,seed; what differs: optimizer.lr: 0.01 -> 0.5;"
            " seed: 0 -> 1",
        ),
        ({}, ["optimizer.rl"], "got 'optimizer.rl'; did you mean 'optimizer.lr'?"),
        ({}, ["lr"], "allow_change must name fields of the config, got 'lr'"),
        ({}, "optimizer.lr", "allow_change must be a list of names of fields, got"),
        ({}, ["init_from"], "allow_change must not name init_from"),
        (
            dict(model=dict(channels=8)),
            ["model.channels"],
            "got model.channels: (none) -> 8, with which",
        ),
        (dict(model=dict(num_classes=4)), ["model"], "label/embedding: (none) -> (4"),
        (dict(ema_decays=(0.9, 0.5)), ["ema_decays"], "ema_params/0.5/"),
        (dict(ema_decays=(0.5,)), ["ema_decays"], "(none) -> "),
        (dict(optimizer=dict(grad_clip=1.0)), ["optimizer"], "opt_state/"),
        (
            dict(optimizer=dict(name="optax:sgd")),
            ["optimizer.name"],
            "the arrays of the saved state as they are, got optimizer.name",
        ),
        (
            dict(timesteps=dict(name="loss_second_moment")),
            ["timesteps"],
            "timestep_state/",
        ),
    ],
)
def test_other_changes_are_refused_before_anything_is_written(
    begun, run, changes, allowed, words
):
    before = files_of(run)
    config = config_of(begun, **changes)
    assert words in refuses(train.train, config, run, allow_change=allowed)
    assert files_of(run) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(data=dict(image_size=0)), "image_size"),
        (dict(data=dict(batch_size=0)), "config.data.batch_size must be"),
        (dict(data=dict(path="nowhere.npz")), "nowhere.npz"),
        (dict(optimizer=dict(lr=-1.0)), "config.optimizer.lr must be"),
        (dict(model=UNET | dict(dropout=1.5)), "dropout must be"),
        (dict(schedule=dict(name="cosin")), "did you mean 'cosine'?"),
        (dict(model=dict(channels=8)), "of its arrays"),
        (dict(ema_decays=(0.5,)), "whose saved state is not that of this one"),
        (dict(optimizer=dict(name="optax:sgd")), "opt_state/"),
    ],
)
def test_nobody_is_told_to_allow_what_would_not_go_on(begun, run, changes, words):
    sentence = refuses(train.train, config_of(begun, **changes), run)
    assert words in sentence and "told --allow-change" not in sentence


@pytest.mark.parametrize("allowed", [[], ["data.path"]])
@pytest.mark.parametrize("name", ["images.npz", "colors.npz"])
def test_images_of_another_shape_are_named(begun, run, tmp_path, allowed, name):
    record = checkpoint.load_record(run)
    path = tmp_path / name  # that of the record, or another one
    if name == "images.npz":
        record["config"]["data"]["path"] = str(path)
    del record["data_digest"]
    write_images(path, channels=3)
    before, config = files_of(run), tiny_config(path, total_steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load_record", lambda workdir: record)
        sentence = refuses(train.train, config, run, allow_change=allowed)
    told = "the data now have images (8, 8, 3), the run was trained on (8, 8, 1)"
    assert told in sentence and "told --allow-change" not in sentence
    assert files_of(run) == before


@pytest.mark.slow
def test_larger_images_may_go_on_if_that_is_allowed(begun, run, tmp_path):
    write_images(tmp_path / "large.npz", channels=1, size=16)
    config = tiny_config(tmp_path / "large.npz", total_steps=3)
    sentence = refuses(train.train, config, run)
    assert "told --allow-change data.path; what differs: " in sentence
    assert "images (16, 16, 1), the run was trained on (8, 8, 1)." in sentence
    assert int(train.train(config, run, allow_change=["data.path"]).step) == 3


def test_names_are_checked_for_a_new_run_too(begun, tmp_path):
    sentence = refuses(
        train.train, config_of(begun), tmp_path / "new", allow_change=["optimzer.lr"]
    )
    assert "did you mean 'optimizer.lr'" in sentence and not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(data=dict(batch_size=16)),
        dict(seed=5),
        dict(model=dict(name="support.networks:TinyToo")),
        dict(objective=dict(mean_type="v")),
    ],
)
def test_what_leaves_the_state_as_it_is_can_be_changed(begun, run, changes):
    groups = [*changes]
    state = train.train(config_of(begun, **changes), run, allow_change=groups)
    assert int(state.step) == 3


def test_a_moved_data_set_is_the_same_run(begun, run, tmp_path):
    moved = tmp_path / "elsewhere.npz"
    shutil.copy(begun / "images.npz", moved)
    state = train.train(tiny_config(moved, total_steps=3), run)
    record = checkpoint.load_record(run)
    assert record["config"]["data"]["path"] == str(moved)
    (change,) = record["changes"]
    assert change["fields"] == [f"data.path: {begun / 'images.npz'} -> {moved}"]
    whole = train.train(config_of(begun), tmp_path / "whole")
    assert same(state, whole)


def test_other_images_are_another_run_wherever_they_lie(begun, run, tmp_path):
    other = tmp_path / "images.npz"
    write_images(other, channels=1, labels=(1, 1, 1))
    config, before = tiny_config(other, total_steps=3), files_of(run)
    sentence = refuses(train.train, config, run)
    assert sentence.endswith(f"{other}, which holds other images.")
    assert (
        "--allow-change data.path; what differs: " in sentence
        and files_of(run) == before
    )
    state = train.train(config, run, allow_change=["data.path"])
    assert int(state.step) == 3
    # The path of now has, behind the run's back, other images again.
    write_images(other, channels=1, labels=(2, 2, 2))
    config = tiny_config(other, total_steps=4)
    assert "other images than the run was trained with" in refuses(
        train.train, config, run
    )
    assert "other images" in refuses(
        train.train, config, run, allow_change=["data.batch_size"]
    )
    train.train(config, run, allow_change=["data.path"])
    assert "data.path" in str(checkpoint.load_record(run)["changes"][-1])


def test_a_record_without_a_digest_is_read_as_before(
    begun, run, tmp_path, monkeypatch, capsys
):
    record = checkpoint.load_record(run)
    del record["data_digest"]
    monkeypatch.setattr(checkpoint, "load_record", lambda workdir: record)
    moved = tmp_path / "elsewhere.npz"
    shutil.copy(begun / "images.npz", moved)
    config = tiny_config(moved, total_steps=3)
    assert "--allow-change data.path; what differs: data.path: " in refuses(
        train.train, config, run
    )
    capsys.readouterr()
    assert int(train.train(config_of(begun), run).step) == 3
    told = "did not record a digest of its images, so that others would not be noticed"
    assert f"{told}; now 63 images are read" in capsys.readouterr().out


def write_folder(root, sizes=(8, 9, 10, 11, 12)):
    for i, size in enumerate(sizes):
        for name in ("cat", "dog"):
            (root / name).mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(0, 256, (size, size), np.uint8)
            Image.fromarray(noise).save(root / name / f"{i}.png")


def digest(root, **changes):
    options = dict(path=str(root), image_size=8, batch_size=1, split="all") | changes
    return data.load("folder", **options).examples.digest


@pytest.mark.slow
def test_a_mended_picture_is_a_change_of_the_data(tmp_path):
    write_folder(tmp_path / "photos", sizes=range(8, 18))
    group = dict(name="folder", path=str(tmp_path / "photos"), image_size=8)
    group["in_memory"] = False
    damaged = tmp_path / "photos" / "dog" / "3.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:60])
    workdir, changes = tmp_path / "run", dict(data=group, total_steps=4)
    with pytest.raises(ValueError, match=r"3.png.*--allow-change data\.path"):
        train.train(tiny_config(None, **changes), workdir)
    damaged.write_bytes(whole)
    config = tiny_config(None, **changes)
    if checkpoint.latest_step(workdir) is not None:
        assert "other images" in refuses(train.train, config, workdir)
    assert int(train.train(config, workdir, allow_change=["data.path"]).step) == 4


def test_the_digest_of_a_folder_is_of_names_and_sizes_and_not_of_the_place(tmp_path):
    write_folder(tmp_path / "a")
    first = digest(tmp_path / "a")
    assert first == digest(tmp_path / "a", in_memory=False)
    assert first == digest(tmp_path / "a", in_memory=True)
    shutil.copytree(tmp_path / "a", tmp_path / "deep" / "b")
    b = tmp_path / "deep" / "b"
    assert digest(b) == first
    assert digest(b, split="train") != first
    seen = {first}
    (b / "cat" / "0.png").rename(b / "cat" / "00.png")
    seen.add(digest(b))
    (b / "cat" / "00.png").write_bytes((b / "dog" / "2.png").read_bytes())
    seen.add(digest(b))
    (b / "dog").rename(b / "cow")
    seen.add(digest(b))
    (b / "cow" / "1.png").unlink()
    seen.add(digest(b))
    assert len(seen) == 5


def test_the_digest_of_arrays_is_of_every_pixel_and_label():
    images, labels = np.zeros((9, 4, 4, 1), np.uint8), np.zeros(9, int)
    changed, other = images.copy(), labels.copy()
    changed[7, 3, 2], other[8] = 1, 1
    seen = {
        data.from_arrays(x, y, batch_size=1).examples.digest
        for x, y in (
            *((images, labels), (changed, labels), (images, other)),
            *((images.reshape(9, 2, 8, 1), labels), (images, labels)),
        )
    }
    assert len(seen) == 4
