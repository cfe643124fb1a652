"""Batches against their contract, loaders against files that the tests write."""

import gzip
import io
import itertools
import json
import socket
import struct
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jax_diffusion import data

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist


def numbered(n, c=1):
    """Images without symmetry whose first pixel, like their label, is their number."""
    images = np.arange(n, dtype=np.uint8)[:, None, None, None] + np.zeros(
        (4, 5, c), np.uint8
    )
    images[:, :, 1:] = np.arange(20 * c - 4 * c, dtype=np.uint8).reshape(4, 4, c)
    return images


def batches_of(n, c=1, **kwargs):
    return data.from_arrays(numbered(n, c), np.arange(n), **kwargs)


def stream(batches, num_steps):
    """The labels of the first batches, one after the other."""
    taken = itertools.islice(batches, num_steps)
    return np.concatenate([batch["label"] for batch in taken])


# Scaling


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_from_uint8_maps_the_range_to_minus_one_to_one(asarray):
    x = data.from_uint8(asarray(np.array([0, 51, 102, 204, 255], np.uint8)))
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, [-1, -0.6, -0.2, 0.6, 1], atol=1e-6)


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_to_uint8_truncates_and_clips(asarray):
    x = asarray(np.array([-9, -1, 0, 0.5, 0.999, 1, 9], np.float32))
    y = data.to_uint8(x)
    assert isinstance(y, np.ndarray) and y.dtype == np.uint8
    np.testing.assert_array_equal(y, [0, 0, 127, 191, 254, 255, 255])


def test_scaling_there_and_back_loses_one_level_from_1_to_63_only():
    v = np.arange(256, dtype=np.uint8)
    lost = (v >= 1) & (v <= 63)
    np.testing.assert_array_equal(data.to_uint8(data.from_uint8(v)), v - lost)


def test_from_uint8_refuses_what_is_scaled_already():
    with pytest.raises(ValueError, match="must be uint8, got float32"):
        data.from_uint8(np.zeros(3, np.float32))


# Order


@pytest.mark.parametrize("n, b", [(10, 4), (10, 10), (7, 3), (7, 1), (1, 1)])
def test_every_epoch_shows_every_example_once_whatever_the_batch_size(n, b):
    labels = stream(batches_of(n, batch_size=b), 6 * n)
    epochs = labels.reshape(-1, n)
    assert epochs.shape[0] == 6 * b
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(n), (6 * b, 1)))


def test_a_straddling_batch_ends_one_epoch_and_begins_the_next():
    batches = batches_of(10, batch_size=4)
    first_epoch = stream(batches, 3)[:10]
    third = batches.batch(2)["label"]
    assert sorted({*range(10)} - {*first_epoch[:8]}) == sorted(third[:2])
    fifth = batches.batch(4)["label"]
    rest = [*third[2:], *batches.batch(3)["label"], *fifth]
    assert sorted(rest) == [*range(10)]


def test_epochs_and_seeds_differ():
    by_seed = {
        tuple(epoch)
        for seed in range(5)
        for epoch in stream(batches_of(30, batch_size=30, seed=seed), 4).reshape(4, 30)
    }
    assert len(by_seed) == 20


def test_each_example_comes_first_equally_often():
    n, epochs = 5, 4000
    labels = stream(batches_of(n, batch_size=n), epochs).reshape(epochs, n)
    counts = np.bincount(labels[:, 0], minlength=n)
    sigma = np.sqrt(epochs * (1 / n) * (1 - 1 / n))
    assert np.abs(counts - epochs / n).max() < 5 * sigma


def test_batch_is_the_same_in_any_order_of_calls():
    batches = batches_of(50, c=3, batch_size=8, seed=3, flip=True)
    other = batches_of(20, batch_size=8, seed=4)  # crowds the cache
    in_order = [batches.batch(step) for step in range(60)]
    for step in np.random.default_rng(0).permutation(60).tolist():
        other.batch(step)
        again = batches.batch(step)
        np.testing.assert_array_equal(again["image"], in_order[step]["image"])
        np.testing.assert_array_equal(again["label"], in_order[step]["label"])


def test_a_resumed_run_continues_the_stream():
    straight = batches_of(10, batch_size=4, seed=1, flip=True)
    resumed = batches_of(10, batch_size=4, seed=1, flip=True, start_step=7)
    for a, b in zip(itertools.islice(straight, 7, 20), resumed, strict=False):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_writing_into_a_batch_changes_no_other():
    for train in (True, False):
        batches = batches_of(4, batch_size=4, train=train)
        first = batches.batch(0)
        expected = first["image"].copy()
        first["image"][:], first["label"][:] = 99, 99
        np.testing.assert_array_equal(batches.batch(0)["image"], expected)
        assert sorted(batches.batch(0)["label"]) == [0, 1, 2, 3]


def test_labels_stay_with_their_images():
    batch = batches_of(30, c=3, batch_size=16).batch(5)
    assert batch["image"].dtype == np.uint8 and batch["image"].shape == (16, 4, 5, 3)
    assert batch["label"].dtype == np.int32 and batch["label"].shape == (16,)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])


def test_evaluation_is_one_pass_in_order_with_a_short_end():
    batches = batches_of(10, batch_size=4, train=False, flip=True)
    assert [len(batch["label"]) for batch in batches] == [4, 4, 2]
    np.testing.assert_array_equal(stream(batches, None), np.arange(10))
    np.testing.assert_array_equal(batches.batch(2)["image"], numbered(10)[8:])
    tail = batches_of(10, batch_size=4, train=False, start_step=1)
    np.testing.assert_array_equal(stream(tail, None), np.arange(4, 10))
    whole = batches_of(3, batch_size=8, train=False)
    np.testing.assert_array_equal(stream(whole, None), [0, 1, 2])


def test_steps_outside_the_data_are_refused():
    for step in (-1, -7):
        for train in (True, False):
            with pytest.raises(ValueError, match=f"at least 0.*got {step}"):
                batches_of(10, batch_size=4, train=train).batch(step)
    with pytest.raises(ValueError, match="in the data, got 3"):
        batches_of(10, batch_size=4, train=False).batch(3)


def test_far_steps_do_not_overflow():
    labels = batches_of(10, batch_size=10).batch(2**40)["label"]
    assert sorted(labels) == [*range(10)]


def test_properties_tell_shape_and_counts():
    batches = data.from_arrays(
        np.zeros((6, 4, 5), np.uint8), [0, 3, 1, 0, 0, 0], batch_size=2
    )
    assert batches.image_shape == (4, 5, 1)
    assert batches.num_examples == 6
    assert batches.num_classes == 4
    unlabelled = data.from_arrays(numbered(3), batch_size=2)
    assert unlabelled.num_classes == 1
    np.testing.assert_array_equal(unlabelled.batch(0)["label"], [0, 0])


# Flips


@pytest.mark.parametrize("c", [1, 2, 3, 4])
def test_flipped_images_are_exact_mirrors_half_of_the_time(c):
    num_steps, b = 100, 50
    batches = batches_of(64, c=c, batch_size=b, flip=True)
    flips = []
    for step in range(num_steps):
        batch = batches.batch(step)
        stored = numbered(64, c)[batch["label"]]
        mirrored = (batch["image"] == stored[:, :, ::-1]).all((1, 2, 3))
        assert (mirrored | (batch["image"] == stored).all((1, 2, 3))).all()
        flips.append(mirrored)
    sigma = 0.5 / np.sqrt(num_steps * b)
    assert abs(np.mean(flips) - 0.5) < 5 * sigma
    by_place = np.mean(flips, axis=0)  # no place in the batch is special
    assert np.abs(by_place - 0.5).max() < 5 * 0.5 / np.sqrt(num_steps)


def test_flipping_leaves_the_order_alone():
    plain = batches_of(20, batch_size=6, seed=2)
    flipped = batches_of(20, batch_size=6, seed=2, flip=True)
    np.testing.assert_array_equal(stream(plain, 30), stream(flipped, 30))


def test_draws_of_different_purposes_seeds_and_indices_never_meet():
    keys = itertools.product((0, 1, 2), (0, 1, 2**63 + 5), (0, 1, 2**40))
    draws = np.concatenate([data._draw(*key, 500) for key in keys])
    assert len(np.unique(draws)) == len(draws) == 27 * 500


def test_without_flip_and_in_evaluation_images_are_as_stored():
    for kwargs in (dict(train=False, flip=True), dict(train=True, flip=False)):
        for batch in itertools.islice(batches_of(40, batch_size=20, **kwargs), 2):
            np.testing.assert_array_equal(batch["image"], numbered(40)[batch["label"]])


def test_images_that_are_not_contiguous_are_flipped_too():
    images = np.moveaxis(
        np.ascontiguousarray(np.moveaxis(numbered(8, 3), -1, 1)), 1, -1
    )
    a = data.from_arrays(images, batch_size=8, flip=True).batch(0)
    b = data.from_arrays(numbered(8, 3), batch_size=8, flip=True).batch(0)
    np.testing.assert_array_equal(a["image"], b["image"])


# Bad arguments


@pytest.mark.parametrize(
    "images, labels, kwargs, words",
    [
        (numbered(4).astype(np.float32), None, {}, r"uint8 \[n h w c\], got float32"),
        (numbered(4).astype(np.int64), None, {}, "uint8.*got int64"),
        (np.zeros((4, 4), np.uint8), None, {}, r"got uint8 \(4, 4\)"),
        (np.zeros((1, 4, 4, 4, 1), np.uint8), None, {}, r"got uint8 \(1, 4, 4, 4, 1\)"),
        (np.zeros((0, 4, 4, 1), np.uint8), None, {}, r"got uint8 \(0, 4, 4, 1\)"),
        (np.zeros((4, 4, 0, 1), np.uint8), None, {}, r"got uint8 \(4, 4, 0, 1\)"),
        (numbered(4), np.arange(3), {}, r"labels must be 4 integers, got int64 \(3,\)"),
        (numbered(4), np.zeros((4, 1), int), {}, r"4 integers, got int64 \(4, 1\)"),
        (numbered(4), np.zeros(4), {}, "4 integers, got float64"),
        (numbered(4), [True] * 4, {}, "4 integers, got bool"),
        (
            numbered(4),
            [0, 1, -1, 2],
            {},
            r"labels must be in \[0, 2\^31\), got -1 to 2",
        ),
        (numbered(4), [0, 1, 2**31, 2], {}, "got 0 to 2147483648"),
        (numbered(4), None, dict(batch_size=0), r"in \[1, 4\], got 0"),
        (numbered(4), None, dict(batch_size=5), r"in \[1, 4\], got 5"),
        (numbered(4), None, dict(batch_size=0, train=False), "got 0"),
        (numbered(4), None, dict(seed=-1), "seed and start_step must be >= 0, got -1"),
        (numbered(4), None, dict(start_step=-2), "must be >= 0, got 0, -2"),
    ],
)
def test_bad_arrays_and_numbers_are_refused(images, labels, kwargs, words):
    with pytest.raises(ValueError, match=words):
        data.from_arrays(images, labels, **{"batch_size": 2, **kwargs})


def test_unknown_names_list_the_choices_and_the_nearest():
    with pytest.raises(
        ValueError, match=r"'digits', 'synthetic'.*did you mean 'digits'"
    ):
        data.load("digts", batch_size=2)
    with pytest.raises(
        ValueError, match=r"'train', 'test', 'all'.*did you mean 'train'"
    ):
        data.load("digits", "trian", batch_size=2)
    with pytest.raises(ValueError, match=r"dataset must be one of.*got 'zzz'\.$"):
        data.load("zzz", batch_size=2)


def test_a_wrong_image_size_is_refused():
    with pytest.raises(ValueError, match="digits must be 8 x 8, got 16"):
        data.load("digits", image_size=16, batch_size=2)
    for size in (0, -1):
        with pytest.raises(
            ValueError, match=f"image_size must be at least 1, got {size}"
        ):
            data.load("synthetic", image_size=size, batch_size=2)
    with pytest.raises(TypeError, match="fip"):
        data.load("synthetic", batch_size=2, fip=True)  # pyright: ignore


def test_load_passes_the_options_on():
    kwargs = dict(batch_size=3, seed=5, train=True, flip=True, start_step=4)
    batches = data.load("synthetic", **kwargs)
    assert {key: getattr(batches, key) for key in kwargs} == kwargs


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


def stub(folder, file_format):
    folder.mkdir(parents=True)
    info = json.dumps({"fileFormat": file_format, "name": folder.parent.name})
    (folder / "dataset_info.json").write_text(info)


def test_tfds_by_an_official_name(tfds, tmp_path, monkeypatch):
    mocking = pytest.importorskip("tensorflow_datasets.testing.mocking")
    # The original expects a `self` that the mock, not a class, does not give it.
    monkeypatch.setattr(
        mocking,
        "_getitems",
        lambda rows, generator: [*map(generator.__getitem__, rows)],
    )
    stub(tmp_path / "cifar10/3.0.2", "array_record")
    with tfds.testing.mock_data(num_examples=7):
        for image_size in (None, 32, 16):
            batches = data.load(
                "tfds", path="cifar10", image_size=image_size, batch_size=4
            )
            size = image_size or 32
            assert batches.images.shape == (7, size, size, 3)
            assert batches.labels.shape == (7,) and batches.num_classes <= 10
            assert batches.images.std() > 20


def test_tfds_takes_the_newest_version_that_is_ready(tfds, tmp_path, monkeypatch):
    for version in ("9.0.0", "10.0.0", "incomplete.4F_11.0.0"):
        stub(tmp_path / "made/up" / version, "array_record")
    stub(tmp_path / "made/up/12.0.0", "tfrecord")
    asked = []

    def data_source(name, **kwargs):
        asked.append((name, kwargs["split"], kwargs["download"]))
        return prepared

    class prepared(list):
        __getitems__ = staticmethod(lambda rows: [{"image": flat(0)} for _ in rows])

    prepared = prepared(range(1001))
    monkeypatch.setattr(tfds, "data_source", data_source)
    batches = data.load("tfds", "all", path="made/up", batch_size=1)
    assert asked == [("made/up:10.0.0", "train+test", False)]
    assert batches.num_examples == 1001 and not batches.labels.any()


def test_tfds_images_of_many_shapes_need_an_image_size(tfds, tmp_path, monkeypatch):
    stub(tmp_path / "many/1.0.0", "array_record")

    class Source(list):
        __getitems__ = staticmethod(
            lambda rows: [{"image": flat(0, 4 + i)} for i in rows]
        )

    monkeypatch.setattr(tfds, "data_source", lambda *a, **k: Source(range(3)))
    with pytest.raises(ValueError, match=r"images of one shape, got.*same shape"):
        data.load("tfds", path="many", batch_size=1)
    batches = data.load("tfds", path="many", image_size=4, batch_size=1)
    assert batches.images.shape == (3, 4, 4, 3)


def test_tfds_data_that_are_not_prepared_name_the_command(tfds, tmp_path):
    command = "tfds build mnist --file_format=array_record --data_dir="
    for prepare in (lambda: None, lambda: stub(tmp_path / "mnist/3.0.1", "tfrecord")):
        prepare()
        with pytest.raises(ValueError, match=f"`{command}.*got no mnist"):
            data.load("tfds", path="mnist", batch_size=1)
    with pytest.raises(ValueError, match=r"must be prepared.*got no None"):
        data.load("tfds", batch_size=1)


def test_tfds_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"pip install jax_diffusion\[tfds\]"):
        data.load("tfds", path="mnist", batch_size=1)
