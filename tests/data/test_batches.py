"""Batches against their contract."""

import contextlib
import itertools
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from jax_diffusion import data
from jax_diffusion.data import folder


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


def same(a, b):
    """Two batches are equal, bit by bit."""
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


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
            with pytest.raises(ValueError, match=f">= 0 and in the data, got {step}"):
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


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("train", [True, False])
def test_rows_of_hosts_are_those_of_the_whole_batch_flips_included(c, train):
    batches = batches_of(10, c, batch_size=4, seed=5, train=train, flip=True)
    for step in range(3):
        whole = batches.batch(step)
        for rows in ([0, 1], [2, 3], [0, 2], [1, 3], [0, 1, 2, 3], [2], np.arange(0)):
            part = batches.batch(step, np.array(rows))
            there = [row for row in rows if row < len(whole["label"])]
            same(part, {key: value[there] for key, value in whole.items()})


def test_a_host_without_rows_in_a_short_batch_gets_none():
    last = batches_of(5, batch_size=4, train=False).batch(1, [2, 3])
    assert last["image"].shape == (0, 4, 5, 1) and last["label"].shape == (0,)


@pytest.mark.parametrize(
    "rows", [[1, 0], [0, 0], [-1, 2], [3, 4], [[0, 1]], 2, [0.0, 1.0], [True], ["0"]]
)
def test_rows_that_are_no_increasing_positions_are_refused(rows):
    batches = batches_of(10, batch_size=4)
    for ask in (lambda: batches.batch(0, rows), lambda: batches.stream(0, rows)):
        with pytest.raises(ValueError, match=r"increase in \[0, 4\), got"):
            ask()


def square(n, c):
    return np.ascontiguousarray(numbered(n, c)[:, :, :4])


def write_files(folder, images):
    for i, image in enumerate(images):
        image = image[..., 0] if image.shape[-1] == 1 else image
        Image.fromarray(image).save(folder / f"{i % 3}_{i:02}.png")


def lazy(folder, split="all", **kwargs):
    kwargs = {"batch_size": 4, "image_size": 4, "in_memory": False, **kwargs}
    return data.load("folder", split, path=folder, **kwargs)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("train", [True, False])
def test_lazy_batches_equal_those_in_memory(tmp_path, c, train):
    write_files(tmp_path, square(10, c))
    options = dict(train=train, flip=True, seed=3)
    a = lazy(tmp_path, **options)
    b = lazy(tmp_path, in_memory=True, **options)
    assert b.in_memory and not a.in_memory
    for step in range(9 if train else 3):
        same(a.batch(step), b.batch(step))
        same(a.batch(step, [1, 3]), b.batch(step, [1, 3]))
    same(a.batch(0, np.arange(0)), b.batch(0, np.arange(0)))
    np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(a.labels, b.labels)
    for name in ("image_shape", "num_examples", "num_classes"):
        assert getattr(a, name) == getattr(b, name)


def test_what_is_known_of_a_lazy_folder_decodes_nothing(tmp_path, monkeypatch):
    write_files(tmp_path, square(10, 3))
    monkeypatch.delattr(folder.Decoder, "decode")
    batches = lazy(tmp_path)
    assert batches.image_shape == (4, 4, 3)
    assert (batches.num_examples, batches.num_classes) == (10, 3)
    assert batches.labels.dtype == np.int32


def test_only_the_rows_asked_for_are_decoded(tmp_path):
    write_files(tmp_path, square(8, 1))
    batches = lazy(tmp_path, train=False)
    (tmp_path / "0_03.png").unlink()  # the second, by name
    batches.batch(0, [0, 2, 3])
    with pytest.raises(ValueError, match=r"0_03\.png must be a whole image, got"):
        batches.batch(0, [1])


def test_what_exceeds_the_limit_is_lazy(tmp_path, monkeypatch):
    write_files(tmp_path, square(10, 3))
    size = 10 * 4 * 4 * 3
    for limit, in_memory in ((size, True), (size - 1, False)):
        monkeypatch.setattr(data, "MAX_IN_MEMORY", limit)
        assert lazy(tmp_path, in_memory=None).in_memory == in_memory
    assert lazy(tmp_path, in_memory=True).in_memory
    assert data.load("digits", batch_size=1).in_memory


@pytest.fixture(params=["in memory", "lazy"])
def make(request, tmp_path):
    """Makes batches of the same ten images, in memory or not."""
    write_files(tmp_path, square(10, 3))
    in_memory = request.param == "in memory"
    return lambda **kwargs: lazy(tmp_path, in_memory=in_memory, **kwargs)


def threads_ahead():
    """Threads that read ahead; those that never had work may be about to end."""
    alive = [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]
    for thread in alive:
        thread.join(0.5)
    return [thread for thread in alive if thread.is_alive()]


def taken(stream, n):
    """The first batches of a stream, which is closed then."""
    with contextlib.closing(stream):
        return [*itertools.islice(stream, n)]


def all_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        same(a, b)


def test_a_stream_is_the_batches_from_a_step_on(make):
    batches = make(seed=2, flip=True)
    expected = [batches.batch(step) for step in range(12)]
    all_same(taken(batches.stream(0), 12), expected)
    all_same(taken(batches.stream(5), 7), expected[5:])
    all_same(taken(iter(make(seed=2, flip=True, start_step=5)), 7), expected[5:])
    parts = [batches.batch(step, [0, 3]) for step in range(6)]
    all_same(taken(batches.stream(0, [0, 3]), 6), parts)


def test_a_stream_in_evaluation_ends(make):
    batches = make(train=False)
    assert [len(batch["label"]) for batch in batches.stream(0)] == [4, 4, 2]
    assert [len(batch["label"]) for batch in batches.stream(0, [1, 2])] == [2, 2, 1]
    all_same([*batches.stream(1)], [batches.batch(1), batches.batch(2)])
    assert [*batches.stream(3)] == []


def test_streams_beside_each_other_do_not_meet(make):
    batches = make()
    with (
        contextlib.closing(batches.stream(0)) as a,
        contextlib.closing(batches.stream(3)) as b,
    ):
        for step in range(6):
            same(next(a), batches.batch(step))
            same(next(b), batches.batch(step + 3))


def test_a_step_before_the_first_is_refused(make):
    with pytest.raises(ValueError, match="first must be >= 0, got -1"):
        make().stream(-1)


def test_a_bad_file_is_met_by_its_batch(tmp_path):
    write_files(tmp_path, square(12, 1))
    batches = lazy(tmp_path, train=False, batch_size=2)
    bad = tmp_path / "2_02.png"  # the ninth, by name
    bad.write_bytes(bad.read_bytes()[:40])
    stream = batches.stream(0)
    all_same([next(stream) for _ in range(4)], map(batches.batch, range(4)))
    with pytest.raises(ValueError, match=r"2_02\.png must be a whole image, got"):
        next(stream)
    assert threads_ahead() == []


def test_no_thread_outlives_a_stream(make):
    batches = make()
    stream = batches.stream(0)
    assert threads_ahead() == []  # nothing begins by itself
    next(stream)
    assert bool(threads_ahead()) != batches.in_memory
    stream.close()
    assert threads_ahead() == []
    with pytest.raises(StopIteration):
        next(stream)
    for _ in batches.stream(0):
        break
    assert [len(batch["label"]) for batch in make(train=False)] == [4, 4, 2]
    assert threads_ahead() == []


@pytest.fixture
def reads(monkeypatch):
    """Lists of the reads from folders that have begun and that have ended."""
    begun, ended, read = [], [], folder.Folder.read

    def noted(self, rows):
        begun.append(len(rows))
        found = read(self, rows)
        time.sleep(0.02)
        ended.append(len(rows))
        return found

    monkeypatch.setattr(folder.Folder, "read", noted)
    return begun, ended


def test_a_few_batches_are_made_ahead_and_no_more(tmp_path, reads):
    write_files(tmp_path, square(10, 1))
    with contextlib.closing(lazy(tmp_path).stream(0)) as stream:
        next(stream)
        last = time.monotonic() + 10
        while len(reads[1]) < 1 + data.PREFETCH_BATCHES and time.monotonic() < last:
            time.sleep(0.01)
        time.sleep(0.1)  # for more, were there more to come
        assert reads[0] == reads[1] == [4] * (1 + data.PREFETCH_BATCHES)


def test_closing_a_stream_waits_for_what_has_begun(tmp_path, reads):
    write_files(tmp_path, square(10, 1))
    stream = lazy(tmp_path).stream(0)
    next(stream)
    stream.close()
    begun, ended = map(len, reads)
    assert 1 <= begun == ended


def test_only_reading_ahead_needs_grain(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    batches = make()
    batches.batch(0)
    if batches.in_memory:
        next(batches.stream(0))
    else:
        with pytest.raises(ValueError, match=r"pip install 'jax_diffusion\[grain\]'"):
            next(batches.stream(0))


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
        (numbered(4), None, dict(batch_size=5), r"in \[1, 4\], the number of .* 5"),
        (numbered(4), None, dict(batch_size=0, train=False), "got 0"),
        (numbered(4), None, dict(seed=-1), "seed must be an integer >= 0, got -1"),
        (
            numbered(4),
            None,
            dict(start_step=-2),
            "start_step must be an integer >= 0, got -2",
        ),
    ],
)
def test_bad_arrays_and_numbers_are_refused(images, labels, kwargs, words):
    with pytest.raises(ValueError, match=words):
        data.from_arrays(images, labels, **{"batch_size": 2, **kwargs})
