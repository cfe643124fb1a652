"""Data sets that are arrays: digits, synthetic, IDX, .npz and .npy files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from jax_diffusion import data

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist


def numbered(n, c=1):
    """Images whose first pixel is their number."""
    images = np.zeros((n, 4, 5, c), np.uint8)
    images[:, 0, 0] = np.arange(n)[:, None]
    return images


def test_synthetic_images_show_their_label_as_the_brightest_color():
    batches = data.load("synthetic", batch_size=1)
    assert batches.images.shape == (512, 16, 16, 3)
    np.testing.assert_array_equal(np.bincount(batches.labels), [128] * 4)
    pixels = batches.images.reshape(512, -1, 3)
    brightest = pixels[np.arange(512), pixels.astype(int).sum(-1).argmax(-1)]
    by_label = [np.unique(brightest[batches.labels == k], axis=0) for k in range(4)]
    assert [len(colors) for colors in by_label] == [1] * 4
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


@pytest.mark.parametrize(
    "path, split, words",
    [
        (None, "train", r"^path must be a folder.*got None"),
        (
            "nowhere",
            "train",
            r"for the reader 'idx', got '.*nowhere', which does not exist\.$",
        ),
        (".", "test", r"must hold t10k-images-idx3-ubyte\[\.gz\], got no such file"),
        (".", "train", "idx must be 4 x 4, got 8"),
    ],
)
def test_missing_idx_files_are_refused(path, split, words, tmp_path):
    write_idx(tmp_path, "train", np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.uint8))
    place = None if path is None else tmp_path / path
    with pytest.raises(ValueError, match=words):
        data.load("idx", split, path=place, image_size=8, batch_size=1)


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_has_ten_classes_of_seven_thousand():
    for split, size in (("train", 6000), ("test", 1000)):
        batches = data.load("idx", split, path=FASHION, image_size=28, batch_size=128)
        np.testing.assert_array_equal(np.bincount(batches.labels), [size] * 10)
        assert batches.image_shape == (28, 28, 1)


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


PICKLED = np.array([{}], object)


@pytest.mark.parametrize(
    "content, kwargs, words",
    [
        (None, {}, r"^path must be a .npz or .npy file.*a\.npz', which does not exist"),
        (b"", {}, r"^path must be a .npz or .npy file of plain arrays, got '.*a\.npz'"),
        (
            b"no archive",
            {},
            r"^path must be a .npz .* got .*a\.npz', which starts with b.no arc., or",
        ),
        (b"PK\x03\x04 no archive", {}, "must be a .npz or .npy file of plain arrays"),
        ((PICKLED,), {}, "plain arrays, got.*allow_pickle=False"),
        (dict(x=numbered(20)), {}, r"images .* or arr_0 .*, got \['x'\]"),
        (
            (numbered(20), np.arange(19)),
            {},
            r"^labels of .*a\.npz must be 20 integers, got int64 \(19,\)",
        ),
        (
            (numbered(20) / 255,),
            {},
            r"^images of .*a\.npz must be uint8.*config\.data\.max_value",
        ),
        ((numbered(5),), dict(split="test"), "got 0 of 5; `split` 'all' has"),
        ((numbered(5),), dict(image_size=4), "npz must be 4 x 5, got 4"),
        (None, dict(path=None), "path must be a .npz"),
    ],
)
def test_bad_npz_files_are_refused(content, kwargs, words, tmp_path):
    path = tmp_path / "a.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        args, named = ((), content) if isinstance(content, dict) else (content, {})
        np.savez(path, *args, **named)
    with pytest.raises(ValueError, match=words):
        data.load("npz", **{"path": path, "batch_size": 1, **kwargs})
