"""The gallery draws the same pictures every time; emoji are sorted into classes."""

import json

import pytest
from PIL import Image
from support.tiny_runs import LABELS, make_run, write_images

import jax_diffusion as jd
from jax_diffusion import data
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
