"""Folders of images as training data, against files that the tests write."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from jax_diffusion import data
from jax_diffusion.data import folder


def save(file, array, **kwargs):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(file, **kwargs)


def flat(value, size=4):
    return np.full((size, size, 3), value, np.uint8)


def load_folder(path, split="all", image_size=4):
    batches = data.load(
        "folder", split, path=path, image_size=image_size, batch_size=1, train=False
    )
    return batches.images, batches.labels


@pytest.mark.parametrize(
    "names, labels",
    [
        (["ant/1.png", "bee/b/2.png", "bee/c.d/3.png", "cat/0.png"], [0, 1, 1, 2]),
        (["bee_2.png", "bee_7.png", "cat_1_x.png", "z_0.png"], [0, 0, 1, 2]),
        (["a_1.png", "b.png", "c_d_1.png"], [0, 0, 0]),
        (["10/a.png", "9/a.png"], [1, 0]),
    ],
    ids=["sub-folders", "prefixes", "neither", "numbers"],
)
def test_classes_come_from_sub_folders_else_prefixes_else_are_one(
    tmp_path, names, labels
):
    for i, name in enumerate(names):
        save(tmp_path / name, flat(10 * i))
    images, found = load_folder(tmp_path)
    np.testing.assert_array_equal(images[:, 0, 0, 0], 10 * np.arange(len(names)))
    np.testing.assert_array_equal(found, labels)


def test_all_suffixes_count_in_any_case_and_hidden_files_do_not(tmp_path):
    for i, name in enumerate(["a.png", "b.PNG", "c.jpg", "d.JPEG", "e.gif", "f.Gif"]):
        save(tmp_path / name, flat(40 * i))
    save(tmp_path / ".hidden.png", flat(1))
    (tmp_path / "notes.txt").write_text("no image")
    images, _ = load_folder(tmp_path)
    np.testing.assert_allclose(images[:, 2, 2, 1], 40 * np.arange(6), atol=2)  # JPEG


def test_every_tenth_file_is_for_testing(tmp_path):
    for i in range(23):
        save(tmp_path / f"{i:02}.png", flat(i))
    values = {s: load_folder(tmp_path, s)[0][:, 0, 0, 0].tolist() for s in data.SPLITS}
    assert values["test"] == [9, 19]
    assert sorted(values["train"] + values["test"]) == values["all"] == [*range(23)]


def test_too_few_files_for_a_test_split_are_refused(tmp_path):
    for i in range(9):
        save(tmp_path / f"{i}.png", flat(i))
    with pytest.raises(ValueError, match="'test' must have examples, got 0 of 9"):
        load_folder(tmp_path, "test")


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folders_named_after_splits_are_splits_and_agree_on_classes(tmp_path, held_out):
    for i, name in enumerate(["train/ant/1.png", "train/bee/1.png", "train/cat/1.png"]):
        save(tmp_path / name, flat(i))
    save(tmp_path / held_out / "cat/1.png", flat(7))  # has no ant and no bee
    assert load_folder(tmp_path, "train")[1].tolist() == [0, 1, 2]
    images, labels = load_folder(tmp_path, "test")
    assert (images == 7).all() and labels.tolist() == [2]
    assert load_folder(tmp_path, "all")[1].tolist() == [0, 1, 2, 2]


def test_train_alone_is_a_class_not_a_split(tmp_path):
    for name in ("other/1.png", "train/1.png"):
        save(tmp_path / name, flat(0))
    assert load_folder(tmp_path)[1].tolist() == [0, 1]


def test_blocks_shrink_to_their_values(tmp_path):
    blocks = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    save(tmp_path / "a.png", blocks.repeat(16, 0).repeat(16, 1))
    np.testing.assert_array_equal(load_folder(tmp_path)[0], blocks[None])


def test_the_crop_is_the_center(tmp_path):
    column, row = np.arange(25), np.arange(8)
    wide = np.broadcast_to(10 * column, (8, 25))
    save(tmp_path / "a.png", wide)  # 17 columns too many: 8 off the left
    save(tmp_path / "b.png", wide.T)
    save(tmp_path / "c.png", np.broadcast_to(10 * row, (8, 8)))
    images = load_folder(tmp_path, image_size=8)[0][..., 0]
    np.testing.assert_array_equal(images[0], np.tile(10 * column[8:16], (8, 1)))
    np.testing.assert_array_equal(images[1], images[0].T)
    np.testing.assert_array_equal(images[2], np.tile(10 * row, (8, 1)))


@pytest.mark.parametrize("h, w, size", [(18, 25, 12), (48, 70, 16), (8, 10, 12)])
def test_resizing_keeps_a_gradient_where_it_was(tmp_path, h, w, size):
    save(tmp_path / "a.png", np.broadcast_to(3 * np.arange(w), (h, w)))
    image = load_folder(tmp_path, image_size=size)[0][0, :, :, 0]
    width = round(w * size / h)  # after resizing, before the crop
    place = (np.arange(size) + (width - size) // 2 + 0.5) * w / width - 0.5
    inside = slice(2, -2)  # the filter is cut off at the border
    expected = np.tile(3 * place, (size, 1))
    np.testing.assert_allclose(image[:, inside], expected[:, inside], atol=1)


def test_gray_images_keep_one_channel_only_if_all_are_gray(tmp_path):
    values = np.arange(16).reshape(4, 4) * 10
    save(tmp_path / "a.png", values)
    Image.fromarray(values >= 80).save(tmp_path / "b.png")  # one bit
    Image.fromarray(np.uint8(values)).convert("LA").save(tmp_path / "c.png")
    images, _ = load_folder(tmp_path)
    assert images.shape == (3, 4, 4, 1)
    np.testing.assert_array_equal(images[1, ..., 0], 255 * (values >= 80))
    np.testing.assert_array_equal(images[2], images[0])
    save(tmp_path / "d.png", flat(9))
    mixed, _ = load_folder(tmp_path)
    assert mixed.shape == (4, 4, 4, 3)
    np.testing.assert_array_equal(mixed[:3], images.repeat(3, -1))


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    upper = np.arange(16, dtype=np.uint16).reshape(4, 4) * 17
    image = Image.fromarray(upper * 256 + 200)
    assert image.mode == "I;16"
    image.save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match="16 gray levels become 16"):
        np.testing.assert_array_equal(load_folder(tmp_path)[0][0, ..., 0], upper)


def test_exif_orientation_is_applied(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees clockwise to see me upright"
    save(tmp_path / "a.png", array, exif=exif)
    np.testing.assert_array_equal(load_folder(tmp_path)[0][0], np.rot90(array, -1))


def jpeg():
    """A JPEG file of noise."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "path, size, words",
    [
        (None, 4, r"must be a folder.*got None"),
        ("nowhere", 4, r"must be a folder.*nowhere"),
        ("empty", 4, r"must hold images.*\.png.*got none"),
        ("good", None, r"image_size of a folder.*got None"),
        ("good", 0, r"image_size must be an integer in \[1, .* got 0"),
    ],
)
def test_folders_without_images_or_size_are_refused(path, size, words, tmp_path):
    save(tmp_path / "good/a.png", flat(0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=words):
        load_folder(None if path is None else tmp_path / path, image_size=size)


@pytest.mark.parametrize("content", [b"", b"no image", jpeg()[:-500]])
def test_images_that_cannot_be_decoded_are_named(content, tmp_path):
    save(tmp_path / "a.png", flat(0))
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.jpg must be a whole image, got"):
        load_folder(tmp_path)


def test_links_are_followed_and_a_broken_one_is_left_out(tmp_path):
    save(tmp_path / "elsewhere/1.png", flat(7))
    (tmp_path / "root").mkdir()
    (tmp_path / "root/ant").symlink_to(tmp_path / "elsewhere")
    images, _ = load_folder(tmp_path / "root")
    assert images.shape == (1, 4, 4, 3) and (images == 7).all()
    (tmp_path / "root/ant/2.png").symlink_to(tmp_path / "nowhere.png")
    assert load_folder(tmp_path / "root")[0].shape == (1, 4, 4, 3)


def test_folders_are_no_images_whatever_they_are_called(tmp_path):
    save(tmp_path / "a.png/1.png", flat(7))
    save(tmp_path / ".hidden/1.png", flat(8))
    assert load_folder(tmp_path)[0].shape == (1, 4, 4, 3)


def test_names_need_not_be_text(tmp_path):
    name = os.fsdecode(b"\xff_1.png")
    try:
        save(tmp_path / name, flat(7))
    except OSError:
        pytest.skip("this file system wants text")
    save(tmp_path / "\u00e4_1.png", flat(8))
    images, labels = load_folder(tmp_path)
    assert images[:, 0, 0, 0].tolist() == [8, 7] and labels.tolist() == [0, 1]


def test_packed_strings_are_as_they_were():
    strings = ["", "a", "\u00e4\u20ac", os.fsdecode(b"\xff"), "a" * 300, ""]
    packed = folder.PackedStrings(strings)
    assert [packed[i] for i in range(len(strings))] == strings


@pytest.mark.parametrize("colored", range(3))
def test_gray_among_colors_is_repeated_whatever_comes_first(
    tmp_path, monkeypatch, colored
):
    for i in range(3):
        save(tmp_path / f"{i}.png", flat(i) if i == colored else flat(i)[..., 0])
    monkeypatch.setattr(folder, "HEADERS", 2)  # the first and the last, then all
    options = dict(path=tmp_path, image_size=4, batch_size=3, train=False)
    for in_memory in (True, False):
        batches = data.load("folder", "all", in_memory=in_memory, **options)
        expected = [flat(i) for i in range(3)]
        np.testing.assert_array_equal(batches.batch(0)["image"], expected)
    stored = data.open_images(tmp_path)
    np.testing.assert_array_equal(stored.read(np.arange(3)), expected)


@pytest.mark.parametrize("colored", ["train/3.png", "test/0.png", "valid/1.png"])
def test_all_splits_have_images_of_one_shape(tmp_path, colored):
    for split in ("train", "test", "valid"):
        for i in range(4):
            name = f"{split}/{i}.png"
            save(tmp_path / name, flat(i) if name == colored else flat(i)[..., 0])
    for split in data.SPLITS:
        assert load_folder(tmp_path, split)[0].shape[1:] == (4, 4, 3)
    digest = folder.open_folder("train", tmp_path, 4).digest
    save(tmp_path / colored, flat(0)[..., 0])
    for split in data.SPLITS:
        assert load_folder(tmp_path, split)[0].shape[1:] == (4, 4, 1)
    if "train" not in colored:  # what the run was trained with is still the same
        assert folder.open_folder("train", tmp_path, 4).digest == digest


def test_of_colored_images_few_headers_are_read(tmp_path, monkeypatch):
    for i in range(20):
        save(tmp_path / f"{i}.png", flat(i))
    read, is_gray = [], data.Decoder.is_gray
    monkeypatch.setattr(
        data.Decoder, "is_gray", lambda self, f: read.append(f) or is_gray(self, f)
    )
    assert folder.open_folder("all", tmp_path, 4).image_shape == (4, 4, 3)
    assert len(read) == 1


def test_readers_give_arrays_by_their_names(tmp_path):
    save(tmp_path / "1.png", flat(7))
    images, labels = data.DATASETS["folder"]("all", tmp_path, 4).read_all()
    np.testing.assert_array_equal(images, flat(7)[None])
    assert labels.tolist() == [0]
