"""The gallery draws the same pictures every time; emoji are sorted into classes."""

import json
import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from support.tiny_runs import LABELS, UNET, make_run, write_images

import jax_diffusion as jd
from jax_diffusion import data, pipeline
from jax_diffusion.runtime import sharding
from tests.benchmarks import emoji, gallery

DRAWN = [name for name in gallery.PICTURES if name != "steps"]  # scores 22,000 images


@pytest.mark.slow
def test_gallery_draws_every_picture_twice_alike(tmp_path, capsys):
    write_images(tmp_path / "images.npz")
    run = jd.load_run(make_run(tmp_path / "run", **LABELS))
    for name in DRAWN:
        for folder in ("first", "second"):
            gallery.PICTURES[name](run, tmp_path / folder / f"{name}.png")
    first = {path.name: path for path in (tmp_path / "first").iterdir()}
    expected = {f"{name}.{'gif' if name == 'denoising' else 'png'}" for name in DRAWN}
    assert first.keys() == expected
    for name, path in first.items():
        assert path.read_bytes() == (tmp_path / "second" / name).read_bytes()
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    assert "RMSE to the nearest training image" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["guided", "guidance"])
def test_gallery_says_why_a_run_without_labels_has_no_guidance(tmp_path, name):
    run = jd.load_run(make_run(tmp_path / "run"))
    with pytest.raises(gallery.NotForThisRun, match=r"config\.label_dropout"):
        gallery.PICTURES[name](run, tmp_path / "picture.png")


def test_gallery_refuses_before_it_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "PICTURES", dict(samples=pytest.fail))
    plain = make_run(tmp_path / "plain")
    low_res = make_run(tmp_path / "up", model=UNET | dict(low_res=True))
    told = make_run(tmp_path / "told", model=UNET | dict(cond_dim=2))
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for flags, words in (
        (("--workdir", tmp_path / "none"), "must hold a checkpoint"),
        (("--workdir", tmp_path / "empty"), "must hold a checkpoint"),
        (("--workdir", low_res), "nothing but labels, got one that takes low_res"),
        (("--workdir", told), "nothing but labels, got one that takes cond"),
        (("--workdir", plain, "--only", "samples,nope"), r"got \['nope'\]"),
        (("--workdir", plain, "--only", ""), r"--only must be some of"),
        (("--workdir", plain, "--out", tmp_path / "file"), "--out must be a folder"),
        (("--workdir", plain, "--out", tmp_path / "file" / "x"), "below a file"),
        (("--workdir", plain, "--out", "/proc/x"), "--out must be"),
    ):
        monkeypatch.setattr("sys.argv", ["gallery", *map(str, flags)])
        with pytest.raises(ValueError, match=words):
            gallery.main()


def test_gallery_draws_each_picture_once_and_names_it_after_the_folder(
    tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setitem(gallery.PICTURES, "tasks", lambda _, path: drawn.append(path))
    monkeypatch.chdir(make_run(tmp_path / "run"))
    flags = ("--workdir", ".", "--out", tmp_path, "--only", "tasks,tasks")
    monkeypatch.setattr("sys.argv", ["gallery", *map(str, flags)])
    gallery.main()
    assert drawn == [tmp_path / "run_tasks.png"]


@pytest.mark.parametrize(
    "process",
    [
        dict(schedule=dict(name="flow", num_steps=12), mean="flow"),
        dict(schedule=dict(name="edm", num_steps=12), mean="x_0"),
        dict(shape=(6, 6, 1)),
        dict(shape=(7, 5, 3)),
    ],
)
def test_gallery_asks_for_nothing_that_a_process_cannot_do(
    process, tmp_path, monkeypatch
):
    """Every option is checked, and every sampler traced; nothing is computed."""

    def traced(bound, *, ids, seed, batch_size):
        rows = {name: a[ids % len(a)] for name, a in bound.rows.items()}
        inputs = bound._inputs(sharding.make_mesh(), bound.params, ids, rows, 0, 9)
        shape = jax.eval_shape(bound.draw, *inputs).shape
        yield np.zeros((shape[0], len(ids), *shape[2:]), np.uint8), ids

    monkeypatch.setattr(pipeline.BoundSampler, "batches", traced)
    changes = {k: process[k] for k in ("shape", "schedule") if k in process}
    if "mean" in process:
        kinds = dict(mean_type=process["mean"], var_type="fixed_small", loss="l2")
        changes["objective"] = kinds
    shape = changes.get("shape", (8, 8, 3))
    images = np.zeros((80, *shape), np.uint8)
    np.savez(tmp_path / "images.npz", images, np.zeros(80, int))
    model = dict(name="support.networks:Tiny")
    run = jd.load_run(make_run(tmp_path / "run", model=model, **changes))
    for name in ("tasks", "denoising", "interpolation"):
        gallery.PICTURES[name](run, tmp_path / f"{name}.png")


def test_gallery_compares_only_as_many_steps_as_there_are(tmp_path, monkeypatch):
    asked = set()

    def evaluate(run, *, steps, **told):
        asked.add(steps)
        return [SimpleNamespace(value=1.0)]

    monkeypatch.setattr(jd, "evaluate", evaluate)
    run = jd.load_run(make_run(tmp_path / "run"))  # 8 steps
    gallery.PICTURES["steps"](run, tmp_path / "steps.png")
    assert asked == {5}
    few = make_run(tmp_path / "few", schedule=dict(name="cosine", num_steps=4))
    with pytest.raises(gallery.NotForThisRun, match="4 steps only"):
        gallery.PICTURES["steps"](jd.load_run(few), tmp_path / "steps.png")


@pytest.fixture
def package(tmp_path):
    """A package of three emoji with transparent corners, one of skin alone."""
    images = tmp_path / "package" / "img" / "google" / "64"
    images.mkdir(parents=True)
    table = []
    for name, category in (
        ("1f600", "Smileys & Emotion"),
        ("1f436", "Animals & Nature"),
        ("1f44b", "People & Body"),
        ("1f44b-1f3fb", None),  # a variant of skin tones stands within its emoji
        ("1f3fb", "Component"),
    ):
        image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        image.paste((255, 0, 0, 255), (16, 16, 48, 48))
        image.save(images / f"{name}.png")
        row = dict(image=f"{name}.png", category=category, has_img_google=True)
        if category is not None:
            table.append(row)
    table[2]["skin_variations"] = {"1F3FB": dict(image="1f44b-1f3fb.png")}
    (tmp_path / "package" / "emoji.json").write_text(json.dumps(table))
    return tmp_path / "package"


def test_emoji_are_sorted_by_category_and_laid_on_white(package, tmp_path):
    counts = emoji.sort_emoji(package, tmp_path / "emoji")
    assert counts == {"smileys_emotion": 1, "animals_nature": 1, "people_body": 1}
    loaded = data.load(
        *("folder", "all"), path=str(tmp_path / "emoji"), image_size=32, batch_size=3
    )
    assert loaded.class_names == ("animals_nature", "people_body", "smileys_emotion")
    images = loaded.batch(0)["image"]
    assert (images[:, 0, 0] == 255).all()
    assert (images[:, 16, 16] == (255, 0, 0)).all()


def test_emoji_refuses_an_incomplete_package_and_a_folder_that_exists(
    package, tmp_path
):
    with pytest.raises(ValueError, match="--out must be a folder to make"):
        emoji.sort_emoji(package, tmp_path)
    (package / "emoji.json").unlink()
    with pytest.raises(ValueError, match=r"--package must hold emoji\.json and img"):
        emoji.sort_emoji(package, tmp_path / "emoji")
    assert not (tmp_path / "emoji").exists()


ROW = dict(image="1f600.png", category="Smileys", has_img_google=True)


@pytest.mark.parametrize(
    "table",
    [
        *("", "[", "\0", "3", "{}", "[]", "[3]", "[[]]", "[{}]"),
        *(
            json.dumps([ROW, ROW | change])
            for change in (
                *(dict(image=x) for x in ("../1f600.png", "/x.png", "", None, 3, [])),
                *(dict(category=x) for x in (None, "", "..", "日本", 3)),
                dict(image="missing.png"),
            )
        ),
        json.dumps([ROW | dict(has_img_google=False)]),
    ],
)
def test_emoji_refuses_a_table_that_is_another_one_before_it_copies(
    table, package, tmp_path
):
    (package / "emoji.json").write_text(table)
    with pytest.raises(ValueError, match=r"^--package must hold ") as info:
        emoji.sort_emoji(package, tmp_path / "emoji")
    assert not (tmp_path / "emoji").exists() and len(str(info.value)) < 500


def test_emoji_of_a_category_with_odd_characters_have_a_plain_folder(package, tmp_path):
    rows = [ROW | dict(category="../Smileys/../& Émotion\n2")]
    (package / "emoji.json").write_text(json.dumps(rows))
    assert emoji.sort_emoji(package, package / "out") == {"smileys_motion": 1}
    assert [path.name for path in (package / "out").iterdir()] == ["smileys_motion"]


def test_emoji_refuses_a_place_that_cannot_be_made(package, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x", "/proc/x"):
        with pytest.raises(ValueError, match=r"^--out must "):
            emoji.sort_emoji(package, pathlib.Path(out))
