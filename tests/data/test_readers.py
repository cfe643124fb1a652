"""Readers of data sets against files that the tests write."""

import contextlib
import gzip
import io
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jax_diffusion import data
from jax_diffusion.data import folder

ROOT = Path(__file__).parents[2]
FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist


def numbered(n, c=1):
    """Images whose first pixel is their number."""
    images = np.zeros((n, 4, 5, c), np.uint8)
    images[:, 0, 0] = np.arange(n)[:, None]
    return images


# Built-in datasets


def test_synthetic_images_show_their_label_as_the_brightest_colour():
    batches = data.load("synthetic", batch_size=1)
    assert batches.images.shape == (512, 16, 16, 3)
    np.testing.assert_array_equal(np.bincount(batches.labels), [128] * 4)
    pixels = batches.images.reshape(512, -1, 3)
    brightest = pixels[np.arange(512), pixels.astype(int).sum(-1).argmax(-1)]
    by_label = [np.unique(brightest[batches.labels == k], axis=0) for k in range(4)]
    assert [len(colours) for colours in by_label] == [1] * 4
    assert len(np.unique(np.concatenate(by_label), axis=0)) == 4


def test_synthetic_images_repeat_and_differ_between_examples_and_splits():
    train, test = (
        data.load("synthetic", s, batch_size=1).images for s in ("train", "test")
    )
    again = data.load("synthetic", batch_size=1, seed=1).images
    np.testing.assert_array_equal(train, again)
    both = data.load("synthetic", "all", image_size=16, batch_size=1).images
    np.testing.assert_array_equal(both, np.concatenate([train, test]))
    assert len(np.unique(both.reshape(1024, -1), axis=0)) == 1024
    assert data.load("synthetic", image_size=7, batch_size=1).image_shape == (7, 7, 3)


def test_digits_hold_out_every_tenth():
    from sklearn.datasets import load_digits

    stored = load_digits()
    expected = np.floor(stored.images * 255 / 16 + 0.5)[..., None]
    held_out = np.arange(1797) % 10 == 9
    rows = {"train": ~held_out, "test": held_out, "all": held_out | True}
    for split, size in (("train", 1618), ("test", 179), ("all", 1797)):
        batches = data.load("digits", split, image_size=8, batch_size=1)
        assert batches.num_examples == size and batches.num_classes == 10
        np.testing.assert_array_equal(batches.images, expected[rows[split]])
        np.testing.assert_array_equal(batches.labels, stored.target[rows[split]])


def test_small_digits_are_the_means_of_blocks_of_the_large_ones():
    from sklearn.datasets import load_digits

    stored = load_digits()
    small = data.load("digits", "all", image_size=4, batch_size=1)
    assert small.image_shape == (4, 4, 1) and small.images.dtype == np.uint8
    np.testing.assert_array_equal(small.labels, stored.target)
    corners = [stored.images[:, i::2, j::2] for i in range(2) for j in range(2)]
    mean = sum(corners) / 4 * 255 / 16
    assert np.abs(small.images[..., 0] - mean).max() <= 0.5  # the nearest level
    held_out = data.load("digits", "test", image_size=4, batch_size=1)
    np.testing.assert_array_equal(held_out.images, small.images[9::10])


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_digits_of_another_size_are_refused(size):
    with pytest.raises(ValueError, match=rf"^image_size of digits .*got {size}\.$"):
        data.load("digits", image_size=size, batch_size=1)


# IDX files


def idx_bytes(array):
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def write_idx(folder, stem, images, labels, mark="-", gz=False):
    for kind, array in (("images", images), ("labels", labels)):
        file = folder / f"{stem}-{kind}{mark}idx{array.ndim}-ubyte{'.gz' * gz}"
        content = idx_bytes(array)
        file.write_bytes(gzip.compress(content) if gz else content)


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("mark", ["-", "."])
def test_idx_files_round_trip(tmp_path, mark, gz):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 5, 4), dtype=np.uint8)
    labels = rng.integers(0, 10, 9, dtype=np.uint8)
    write_idx(tmp_path, "train", images[:6], labels[:6], mark, gz)
    write_idx(tmp_path, "t10k", images[6:], labels[6:], mark, gz)
    rows = {"train": slice(6), "test": slice(6, 9), "all": slice(9)}
    for split, these in rows.items():
        batches = data.load("idx", split, path=tmp_path, batch_size=1)
        np.testing.assert_array_equal(batches.images[..., 0], images[these])
        np.testing.assert_array_equal(batches.labels, labels[these])


def idx_faults():
    images, labels = np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.uint8)
    good, packed = idx_bytes(images), gzip.compress(idx_bytes(images))
    flipped = bytearray(packed)
    flipped[-5] ^= 255  # in the checksum
    return {
        "magic": ("", b"\0\0\x08\x01" + good[4:], "must start with.*x03.*got.*x01"),
        "floats": ("", b"\0\0\x0d\x03" + good[4:], "must start with"),
        "empty": ("", b"", "must start with.*got b''"),
        "header": ("", good[:9], "bytes, got 9"),
        "truncated": ("", good[:-1], "must hold 64 bytes, got 63"),
        "over-long": ("", good + b"\0", "must hold 64 bytes, got 65"),
        "huge": ("", good[:4] + b"\xff" * 12 + good[16:], "bytes, got 64"),
        "counts": ("", idx_bytes(images[:2]), "labels must be 2 integers"),
        "none": ("", idx_bytes(images[:0]), r"got uint8 \(0, 4, 4, 1\)"),
        "not gzip": (".gz", good, "whole file, got BadGzipFile"),
        "cut gzip": (".gz", packed[:-9], "whole file, got EOFError"),
        "bad gzip": (".gz", bytes(flipped), "whole file, got BadGzipFile"),
    }, labels


@pytest.mark.parametrize("fault", idx_faults()[0])
def test_damaged_idx_files_are_refused(tmp_path, fault):
    faults, labels = idx_faults()
    end, content, words = faults[fault]
    (tmp_path / f"train-images-idx3-ubyte{end}").write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    with pytest.raises(ValueError, match=words):
        data.load("idx", path=tmp_path, batch_size=1)


def test_missing_idx_files_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"config\.data\.path must be a folder.*got None"
    ):
        data.load("idx", batch_size=1)
    with pytest.raises(ValueError, match=r"must be a folder.*nowhere"):
        data.load("idx", path=tmp_path / "nowhere", batch_size=1)
    with pytest.raises(ValueError, match=r"must hold t10k-images-idx3-ubyte\[\.gz\]"):
        data.load("idx", "test", path=tmp_path, batch_size=1)
    write_idx(tmp_path, "train", np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="idx must be 4 x 4, got 8"):
        data.load("idx", path=tmp_path, image_size=8, batch_size=1)


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_has_ten_classes_of_seven_thousand():
    for split, size in (("train", 6000), ("test", 1000)):
        batches = data.load("idx", split, path=FASHION, image_size=28, batch_size=128)
        np.testing.assert_array_equal(np.bincount(batches.labels), [size] * 10)
        assert batches.image_shape == (28, 28, 1)


# Folders of images


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
        (["bee_2.png", "cat_1_x.png", "x/bee_7.png", "x/y/ant_0.png"], [1, 2, 1, 0]),
        (["a_1.png", "b.png", "c/d_1.png"], [0, 0, 0]),
        (["10/a.png", "9/a.png"], [0, 1]),
    ],
    ids=["sub-folders", "prefixes", "neither", "names are text"],
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


def test_the_crop_is_the_centre(tmp_path):
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


def test_grey_images_keep_one_channel_only_if_all_are_grey(tmp_path):
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
    np.testing.assert_array_equal(load_folder(tmp_path)[0][0, ..., 0], upper)


def test_palettes_with_transparency_give_their_colours(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    np.testing.assert_array_equal(load_folder(tmp_path)[0][0, 0, 0], [10, 20, 30])


def test_exif_orientation_is_applied(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees clockwise to see me upright"
    save(tmp_path / "a.png", array, exif=exif)
    np.testing.assert_array_equal(load_folder(tmp_path)[0][0], np.rot90(array, -1))


def test_folders_without_readable_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a folder.*got None"):
        load_folder(None)
    with pytest.raises(ValueError, match=r"must be a folder.*nowhere"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must hold images.*\.png.*got none"):
        load_folder(tmp_path)
    save(tmp_path / "a.png", flat(0))
    with pytest.raises(ValueError, match=r"image_size of a folder.*got None"):
        load_folder(tmp_path, image_size=None)
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    for content in (b"", b"no image", buffer.getvalue()[:-500]):
        (tmp_path / "bad.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.jpg must be a whole image, got"):
            load_folder(tmp_path)


def test_links_are_followed_and_a_broken_one_is_named(tmp_path):
    save(tmp_path / "elsewhere/1.png", flat(7))
    (tmp_path / "root").mkdir()
    (tmp_path / "root/ant").symlink_to(tmp_path / "elsewhere")
    images, _ = load_folder(tmp_path / "root")
    assert images.shape == (1, 4, 4, 3) and (images == 7).all()
    (tmp_path / "root/ant/2.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"ant/2\.png must be a whole image, got Fi"):
        load_folder(tmp_path / "root")


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


def test_a_lazy_folder_that_looks_grey_names_the_file_that_is_not(
    tmp_path, monkeypatch
):
    for i in range(3):
        save(tmp_path / f"{i}.png", flat(i) if i == 1 else flat(i)[..., 0])
    monkeypatch.setattr(folder, "HEADERS", 2)  # the first and the last
    options = dict(path=tmp_path, image_size=4, batch_size=1, train=False)
    lazy = data.load("folder", "all", in_memory=False, **options)
    assert lazy.image_shape == lazy.batch(0)["image"].shape[1:] == (4, 4, 1)
    with pytest.raises(ValueError, match=r"1\.png must be gray.*in_memory=True"):
        lazy.batch(1)
    assert data.load("folder", "all", **options).image_shape == (4, 4, 3)


def test_a_lazy_folder_that_looks_coloured_shows_grey_in_three_channels(tmp_path):
    save(tmp_path / "0.png", flat(0))
    save(tmp_path / "1.png", flat(7)[..., 0])
    options = dict(path=tmp_path, image_size=4, batch_size=2, train=False)
    lazy = data.load("folder", "all", in_memory=False, **options)
    np.testing.assert_array_equal(lazy.batch(0)["image"][1], flat(7))


def test_readers_give_arrays_by_their_names(tmp_path):
    save(tmp_path / "1.png", flat(7))
    images, labels = data.DATASETS["folder"]("all", tmp_path, 4).read_all()
    np.testing.assert_array_equal(images, flat(7)[None])
    assert labels.tolist() == [0]


# Readers of one's own

OWN = """
import numpy as np
from jax_diffusion import data

def arrays(split, path, image_size):
    images = np.full((6, 4, 4, 1), len(split), np.uint8)
    return images, np.arange(6) % 3

class Lazy(data.Examples):
    labels = np.arange(6, dtype=np.int32)
    image_shape = (4, 4, 3)

    def __init__(self, value):
        self.value = value

    def __len__(self):
        return 6

    def read(self, rows):
        images = np.full((len(rows), 4, 4, 3), self.value, np.uint8)
        images[:, 0, 0] = np.asarray(rows)[:, None]
        return images, self.labels[rows]

def lazy(split, path, image_size):
    return Lazy(int(path))

def wrong(split, path, image_size):
    return np.zeros((6, 4, 4, 1), np.uint8)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module with readers."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_a_reader_of_ones_own_is_a_function_by_its_name(own):
    batches = data.load(f"{own}:arrays", "my split", image_size=4, batch_size=2)
    assert batches.in_memory and batches.num_classes == 3
    assert (batches.batch(5)["image"] == len("my split")).all()
    with pytest.raises(ValueError, match=r"must be 4 x 4, got 8\.$"):
        data.load(f"{own}:arrays", image_size=8, batch_size=2)
    with pytest.raises(ValueError, match=r"None or True for 'own.*:arrays', got False"):
        data.load(f"{own}:arrays", batch_size=2, in_memory=False)


def test_a_reader_of_ones_own_may_be_lazy(own):
    options = dict(path="9", batch_size=4, train=True, flip=True, seed=1)
    lazy, memory = (
        data.load(f"{own}:lazy", in_memory=in_memory, **options)
        for in_memory in (False, None)
    )
    assert memory.in_memory and not lazy.in_memory
    assert lazy.num_classes == 6 and lazy.image_shape == (4, 4, 3)
    for step in range(5):
        for key, value in memory.batch(step).items():
            np.testing.assert_array_equal(lazy.batch(step)[key], value)
    np.testing.assert_array_equal(lazy.images[:, 1, 1, 1], 9)


@pytest.mark.parametrize(
    "name, words",
    [
        ("wrong", r"a reader must return .*, got ndarray from 'own.*:wrong'\.$"),
        ("missing", r"dataset must name an importable .*, got 'own.*:missing'"),
    ],
)
def test_what_is_no_reader_is_refused(own, name, words):
    with pytest.raises(ValueError, match=words):
        data.load(f"{own}:{name}", batch_size=2)


# PATH or NAME:PATH


@pytest.mark.parametrize(
    "text, expected",
    [
        ("folder:photos", ("folder", "photos")),
        ("npz:a.npz", ("npz", "a.npz")),
        ("tfds:cifar10:3.0.2", ("tfds", "cifar10:3.0.2")),
        ("digits", ("digits", None)),
        ("digits:", ("digits", None)),
        ("FOLDER", ("folder", "FOLDER")),
        ("./FOLDER", ("folder", "./FOLDER")),
        ("a:b", ("folder", "a:b")),
        ("missing.npz", ("npz", "missing.npz")),
        ("x/A.NPY", ("npz", "x/A.NPY")),
        ("my.readers:read", ("my.readers:read", None)),
        ("my.readers:read:/a:b/c", ("my.readers:read", "/a:b/c")),
    ],
)
def test_a_source_of_images_is_a_path_or_a_name_and_a_path(
    text, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("FOLDER", "a:b", "digits"):  # "./digits" would be the folder
        (tmp_path / name).mkdir()
    assert data.parse_source(text) == expected


@pytest.mark.parametrize(
    "text, words",
    [
        ("", r"got ''\.$"),
        ("nowhere", r"got 'nowhere'\.$"),
        ("fodler", r"did you mean 'folder'\?$"),
        ("digit:x/y", r"one of \['digits', 'folder', .*did you mean 'digits'\?$"),
        ("a.png", r"a \.npz or \.npy file, or NAME:PATH .*got 'a\.png'\.$"),
    ],
)
def test_what_is_no_source_of_images_is_refused(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^images must be a folder, .*" + words):
        data.parse_source(text)


# NPZ files


@pytest.mark.parametrize("keys", [("arr_0", "arr_1"), ("images", "labels")])
def test_npz_files_round_trip(tmp_path, keys):
    images, labels = numbered(20, 3), np.arange(20) % 7
    np.savez(tmp_path / "a.npz", **dict(zip(keys, (images, labels), strict=True)))
    rows = {"train": [*range(9), *range(10, 19)], "test": [9, 19], "all": [*range(20)]}
    for split, these in rows.items():
        batches = data.load("npz", split, path=tmp_path / "a.npz", batch_size=1)
        np.testing.assert_array_equal(batches.images, images[these])
        np.testing.assert_array_equal(batches.labels, labels[these])


def test_npz_may_lack_labels_and_npy_has_none(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", numbered(20))
    np.save(tmp_path / "a.npy", numbered(20)[..., 0])
    for name in ("a.npz", "a.npy"):
        batches = data.load("npz", "all", path=str(tmp_path / name), batch_size=1)
        np.testing.assert_array_equal(batches.images, numbered(20))
        assert not batches.labels.any()


def test_bad_npz_files_are_refused(tmp_path):
    def refused(words, **kwargs):
        with pytest.raises(ValueError, match=words):
            data.load("npz", path=tmp_path / "a.npz", batch_size=1, **kwargs)

    refused("must be a .npz or .npy file.*FileNotFoundError")
    for content in (b"", b"no archive", b"PK\x03\x04 no archive"):
        (tmp_path / "a.npz").write_bytes(content)
        refused(r"a\.npz must be a .npz or .npy file of plain arrays, got")
    np.savez(tmp_path / "a.npz", np.array([{}], object), allow_pickle=True)
    refused("plain arrays, got.*allow_pickle=False")
    np.savez(tmp_path / "a.npz", x=numbered(20))
    refused(r"must have images or arr_0, got \['x'\]")
    np.savez(tmp_path / "a.npz", numbered(20), np.arange(19))
    refused(r"labels must be 20 integers, got int64 \(19,\)")
    np.savez(tmp_path / "a.npz", numbered(20) / 255)
    refused("images must be uint8.*float64")
    np.savez(tmp_path / "a.npz", numbered(5))
    refused("'test' must have examples, got 0 of 5", split="test")
    refused("npz must be 4 x 5, got 4", image_size=4)
    with pytest.raises(ValueError, match=r"None must be a .npz"):
        data.load("npz", batch_size=1)


# TFDS


@pytest.fixture
def tfds(monkeypatch, tmp_path):
    """TFDS with an empty data folder and no network to wait for."""

    def refuse(*args):
        raise AssertionError("a test asked the network")

    module = pytest.importorskip("tensorflow_datasets")
    module.disable_progress_bar()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return module


def prepare_patches(tfds, folder, shape):
    """Writes a dataset of 12 + 5 flat images, by builder, and returns its name."""

    class TinyPatches(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3))
            features = {
                "image": image,
                "label": tfds.features.ClassLabel(num_classes=5),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            spans = {"train": range(12), "test": range(12, 17)}
            return {
                split: self._generate_examples(span) for split, span in spans.items()
            }

        def _generate_examples(self, span):
            for i in span:
                image = Image.fromarray(np.full(shape, 10 * i, np.uint8))
                yield i, {"image": image, "label": i % 5}

    builder = TinyPatches(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return "tiny_patches"


def test_tfds_reads_what_a_builder_wrote(tfds, tmp_path):
    name = prepare_patches(tfds, tmp_path, (6, 6, 3))
    numbers = {"train": range(12), "test": range(12, 17), "all": range(17)}
    for path in (name, f"{name}:1.0.0"):
        for split, span in numbers.items():
            batches = data.load("tfds", split, path=path, batch_size=1)
            assert batches.image_shape == (6, 6, 3)
            found = (
                batches.images[:, 0, 0, 0] // 10
            )  # TFDS stores in an order of its own
            assert sorted(found) == [*span]
            np.testing.assert_array_equal(batches.labels, found % 5)
    assert data.load("tfds", "train[:3]", path=name, batch_size=1).num_examples == 3
    with pytest.raises(ValueError, match=r"must have split 'tset'.*'train', 'test'"):
        data.load("tfds", "tset", path=name, batch_size=1)
    with pytest.raises(ValueError, match=r"got no tiny_patches:2\.0\.0"):
        data.load("tfds", path=f"{name}:2.0.0", batch_size=1)


def test_tfds_images_are_resized_by_the_rule_of_folders(tfds, tmp_path):
    name = prepare_patches(tfds, tmp_path, (8, 11, 3))
    assert data.load("tfds", path=name, batch_size=1).image_shape == (8, 11, 3)
    batches = data.load("tfds", path=name, image_size=4, batch_size=1)
    assert batches.images.shape == (12, 4, 4, 3)
    assert sorted(batches.images[:, 2, 2, 0] // 10) == [*range(12)]


def test_lazy_tfds_batches_equal_those_in_memory(tfds, tmp_path):
    name = prepare_patches(tfds, tmp_path, (8, 11, 3))
    for size, train in ((None, True), (4, True), (None, False)):
        options = dict(path=name, image_size=size, batch_size=5, train=train, flip=True)
        lazy = data.load("tfds", "all", in_memory=False, **options)
        memory = data.load("tfds", "all", **options)
        assert memory.in_memory and not lazy.in_memory
        assert lazy.image_shape == memory.image_shape
        assert lazy.num_examples == memory.num_examples == 17
        assert lazy.num_classes == 5  # as declared
        np.testing.assert_array_equal(lazy.images, memory.images)
        np.testing.assert_array_equal(lazy.labels, memory.labels)
        with contextlib.closing(lazy.stream(0, [0, 2, 4])) as stream:
            for step, found in zip(range(4), stream, strict=False):
                for key, value in memory.batch(step, [0, 2, 4]).items():
                    assert found[key].dtype == value.dtype
                    np.testing.assert_array_equal(found[key], value)
        nothing = lazy.batch(0, np.arange(0))
        assert nothing["image"].shape == (0, *lazy.image_shape)


def test_tfds_reads_without_tensorflow(tfds, tmp_path):
    name = prepare_patches(tfds, tmp_path, (6, 6, 3))
    code = f"""if True:
        import sys
        from jax_diffusion import data
        options = dict(path={name!r}, image_size=4, batch_size=2)
        for in_memory in (True, False):
            data.load("tfds", in_memory=in_memory, **options).batch(0)
        assert "tensorflow" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def stub(folder, file_format):
    folder.mkdir(parents=True)
    info = json.dumps({"fileFormat": file_format, "name": folder.parent.name})
    (folder / "dataset_info.json").write_text(info)


class Records(list):
    """A source of TFDS: flat images of the sizes in the list, without labels."""

    dataset_info = SimpleNamespace(features={})

    def __getitems__(self, rows):
        return [{"image": flat(0, self[i])} for i in rows]


def prepared(tfds, monkeypatch, records):
    """Lets all folders hold these records; returns the folders and splits asked for."""
    asked = []

    def open_folder(folder):
        def as_data_source(split):
            asked.append((folder, split))
            return records

        return SimpleNamespace(as_data_source=as_data_source)

    monkeypatch.setattr(tfds, "builder_from_directory", open_folder)
    return asked


def test_tfds_reads_an_official_data_set(tfds, tmp_path, monkeypatch):
    mocking = pytest.importorskip("tensorflow_datasets.testing.mocking")
    # The original expects a `self` that the mock, not a class, does not give it.
    monkeypatch.setattr(
        mocking,
        "_getitems",
        lambda rows, generator: [*map(generator.__getitem__, rows)],
    )
    stub(tmp_path / "cifar10/3.0.2", "array_record")
    with tfds.testing.mock_data(num_examples=7):
        records = tfds.data_source("cifar10", split="train")
        prepared(tfds, monkeypatch, records)
        for size, in_memory in ((None, True), (32, False), (16, True), (16, False)):
            options = dict(image_size=size, in_memory=in_memory, batch_size=4)
            batches = data.load("tfds", path="cifar10", **options)
            shape = size or 32, size or 32, 3
            assert batches.image_shape == shape and batches.num_classes <= 10
            assert batches.images.shape == (7, *shape) and batches.images.std() > 20
            assert batches.labels.shape == (7,)
        assert (
            data.load("tfds", path="cifar10", in_memory=False, batch_size=1).num_classes
            == 10
        )


def test_tfds_takes_the_newest_version_that_is_ready(tfds, tmp_path, monkeypatch):
    for version in ("9.0.0", "10.0.0", "incomplete.4F_11.0.0"):
        stub(tmp_path / "made/up" / version, "array_record")
    stub(tmp_path / "made/up/12.0.0", "tfrecord")
    asked = prepared(tfds, monkeypatch, Records([4] * 1001))
    batches = data.load("tfds", "all", path="made/up", batch_size=1)
    assert asked == [(tmp_path / "made/up/10.0.0", "train+test")]
    assert batches.num_examples == 1001 and not batches.labels.any()


def test_tfds_data_may_be_anywhere(tfds, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for version in ("1.0.0", "2.0.0"):
        stub(tmp_path / "here" / version, "array_record")
    asked = prepared(tfds, monkeypatch, Records([4, 4]))
    here = f"{tmp_path}/here"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    for path in (here, f"{here}:1.0.0", f"{here}/1.0.0", Path(here), "~/here"):
        data.load("tfds", "test", path=path, batch_size=1)
    versions = [folder.name for folder, _ in asked]
    assert versions == ["2.0.0", "1.0.0", "1.0.0", "2.0.0", "2.0.0"]
    monkeypatch.delenv("TFDS_DATA_DIR")
    stub(tmp_path / "tensorflow_datasets/here/3.0.0", "array_record")
    data.load("tfds", path="here", batch_size=1)
    assert asked[-1] == (tmp_path / "tensorflow_datasets/here/3.0.0", "train")


def test_tfds_images_of_many_shapes_need_an_image_size(tfds, tmp_path, monkeypatch):
    stub(tmp_path / "many/1.0.0", "array_record")
    prepared(tfds, monkeypatch, Records([4, 5, 6]))
    with pytest.raises(ValueError, match=r"images of one shape, got.*same shape"):
        data.load("tfds", path="many", batch_size=1)
    lazy = data.load("tfds", path="many", batch_size=1, in_memory=False, train=False)
    assert lazy.batch(0)["image"].shape == (1, 4, 4, 3)
    with pytest.raises(ValueError, match=r"1\.0\.0 must have .* images of one shape"):
        lazy.batch(1)
    for in_memory in (True, False):
        batches = data.load(
            "tfds", path="many", image_size=4, batch_size=1, in_memory=in_memory
        )
        assert batches.images.shape == (3, 4, 4, 3)


def test_lazy_tfds_data_know_their_classes_or_say_why_not(tfds, tmp_path, monkeypatch):
    stub(tmp_path / "many/1.0.0", "array_record")
    records = Records([4, 4])
    prepared(tfds, monkeypatch, records)
    lazy = data.load("tfds", path="many", batch_size=1, in_memory=False)
    assert lazy.num_classes == 1 and lazy.batch(0)["label"].tolist() == [0]
    records.dataset_info = SimpleNamespace(features={"label": "a scalar"})
    with pytest.raises(ValueError, match=r"ClassLabel.*got a scalar"):
        lazy.num_classes  # noqa: B018


def test_damaged_tfds_data_are_refused(tfds, tmp_path):
    prepare_patches(tfds, tmp_path, (6, 6, 3))
    file = next(tmp_path.glob("tiny_patches/1.0.0/*train.array_record*"))
    file.write_bytes(file.read_bytes()[:100])
    for in_memory in (True, False):
        with pytest.raises(ValueError, match=r"tiny_patches/1\.0\.0 must have split"):
            data.load("tfds", path="tiny_patches", batch_size=1, in_memory=in_memory)


def test_tfds_data_that_are_not_prepared_name_the_command(tfds, tmp_path):
    command = (
        rf"tfds\.builder\('mnist', data_dir='{tmp_path}', file_format='array_record'"
    )
    for prepare in (lambda: None, lambda: stub(tmp_path / "mnist/3.0.1", "tfrecord")):
        prepare()
        with pytest.raises(ValueError, match=f"`python.*{command}.*got no mnist"):
            data.load("tfds", path="mnist", batch_size=1)
    with pytest.raises(ValueError, match=r"must be prepared.*got no None"):
        data.load("tfds", batch_size=1)


def test_tfds_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"pip install jax_diffusion\[tfds\]"):
        data.load("tfds", path="mnist", batch_size=1)
