"""Which files of a folder are images, and what is left out of it."""

import os

import numpy as np
import pytest
from PIL import Image

from jax_diffusion import data
from jax_diffusion.data.find import find_images


def save(file, value=7, **kwargs):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(file, **kwargs)


def names_below(root):
    return [os.path.relpath(path, root) for path in find_images(root).paths]


FORMATS = dict(jpg="JPEG", jpe="JPEG", jfif="JPEG", JPEG="JPEG", png="PNG", gif="GIF")
FORMATS |= dict(webp="WEBP", bmp="BMP", tif="TIFF", TIFF="TIFF", avif="AVIF")


@pytest.mark.parametrize("suffix", FORMATS)
def test_images_of_every_format_that_pillow_reads_are_found_and_decoded(
    tmp_path, suffix
):
    save(tmp_path / f"a.{suffix}", 100, format=FORMATS[suffix])
    batches = data.load("folder", "all", path=tmp_path, image_size=4, batch_size=1)
    np.testing.assert_allclose(batches.images[0, 2, 2], 100, atol=3)
    np.testing.assert_array_equal(
        data.open_images(tmp_path).read(np.arange(1)), batches.images
    )


def test_what_is_left_out_is_counted_by_its_reason(tmp_path):
    save(tmp_path / "a.png")
    for name in ("b.txt", "c.TXT", "d.heic", "README", ".hidden.png"):
        (tmp_path / name).write_text("no image")
    save(tmp_path / ".folder" / "x.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")  # whose reader would wait for ever
    found = find_images(tmp_path)
    assert found.paths == [str(tmp_path / "a.png")]
    assert found.left_out == {
        **{".txt": 2, ".heic": 1, "no suffix": 1, "hidden": 2},
        **{"broken link": 1, "no file": 1},
    }
    assert "2 .txt" in found.left_out_in_words


def test_a_suffix_that_pillow_cannot_read_here_is_left_out(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    save(tmp_path / "b.avif", format="AVIF")
    monkeypatch.setattr("jax_diffusion.data.find.readable_suffixes", lambda: (".png",))
    assert find_images(tmp_path).left_out == {".avif": 1}


@pytest.mark.parametrize(
    "links",
    [{"loop": "."}, {"x/loop": ".."}, {"x/to_y": "../y", "y/to_x": "../x"}],
    ids=["itself", "above", "each other"],
)
def test_a_link_to_a_folder_above_is_not_followed(tmp_path, links):
    for name in ("0.png", "x/1.png", "y/2.png"):
        save(tmp_path / name)
    for name, target in links.items():
        (tmp_path / name).symlink_to(target, target_is_directory=True)
    found = find_images(tmp_path)
    names = [os.path.relpath(path, tmp_path) for path in found.paths]
    plain = {"0.png", "x/1.png", "y/2.png"}
    if len(links) == 2:  # each folder is also seen by the other one's name, once
        plain |= {"x/to_y/2.png", "y/to_x/1.png"}
    assert sorted(names) == sorted(plain)
    assert found.left_out == {"link to a folder above": len(links)}


def test_a_linked_folder_elsewhere_is_read(tmp_path):
    save(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cat").symlink_to(tmp_path / "elsewhere")
    assert names_below(tmp_path / "root") == ["cat/1.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list all folders")
def test_a_folder_that_cannot_be_listed_is_refused(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(ValueError, match="must be a folder that can be listed"):
        find_images(tmp_path)


def test_sheets_of_sample_are_no_samples_where_they_are_and_where_they_were(tmp_path):
    for name in ("new/00000.png", "new/sheets/grid.png", "new/sheets/denoising.gif"):
        save(tmp_path / name)
    for name in ("old/00000.png", "old/grid.png", "old/denoising.gif"):
        save(tmp_path / name)
    for name in ("new", "old"):
        assert names_below(tmp_path / name) == ["00000.png"]
        assert find_images(tmp_path / name).left_out == {"sheet of sample": 2}


def test_classes_called_sheets_or_grid_are_classes(tmp_path):
    for name in ("beds/1.png", "sheets/1.png", "sheets/grid.png", "grid.png"):
        save(tmp_path / name)
    assert len(find_images(tmp_path).paths) == 4
