"""The feature classifier: what it learns, what its file holds, and what is refused."""

import functools
import json

import jax
import numpy as np
import pytest
from support.features import features_of, images_of, in_batches, refuses

from jax_diffusion import data
from jax_diffusion.evaluation import feature_classifier
from jax_diffusion.evaluation.feature_classifier import (
    load_feature_classifier,
    train_feature_classifier,
)
from jax_diffusion.models.feature_cnn import FeatureCNN
from jax_diffusion.runtime import sharding

DIGITS = data.load("digits", "train", batch_size=32)
HELD_OUT = data.load("digits", "test", batch_size=100, train=False)
SMALL = data.load("digits", "train", image_size=4, batch_size=32)
SHAPE = DIGITS.image_shape
STEPS = 150


def on_devices(monkeypatch, count):
    mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:count])
    monkeypatch.setattr(sharding, "make_mesh", mesh)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What training on the digits returned, and the path of its file."""
    path = tmp_path_factory.mktemp("classifier") / "deep" / "digits.npz"
    options = dict(seed=1, steps=STEPS, data_name="digits")
    told = train_feature_classifier(path, DIGITS, HELD_OUT, **options)
    return {**told, "path": path}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 50])
def test_features_do_not_depend_on_the_batch(size, trained):
    extractor = load_feature_classifier(trained["path"], SHAPE)
    images = HELD_OUT.images
    together = features_of(extractor, in_batches(images, len(images)))
    parts = features_of(extractor, in_batches(images, size))
    for name, array in together.items():
        assert array.dtype == np.float32 and len(array) == len(images)
        np.testing.assert_allclose(parts[name], array, rtol=1e-6, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_features_do_not_depend_on_the_devices(count, trained, monkeypatch):
    extractor = load_feature_classifier(trained["path"], SHAPE)
    on_eight = features_of(extractor, HELD_OUT)
    on_devices(monkeypatch, count)
    for name, array in features_of(extractor, HELD_OUT).items():
        np.testing.assert_allclose(array, on_eight[name], rtol=1e-6, atol=1e-5)


def train(path, images, labels, **options):
    batches = data.from_arrays(images, labels, batch_size=1)
    return train_feature_classifier(path, batches, **options)


def test_the_classifier_learns_the_digits(trained):
    """On images that it has not seen; chance is right once in ten."""
    assert trained["accuracy"] > 0.93 and trained["steps"] == STEPS
    assert 0 < trained["seconds"] < 600


def test_what_is_loaded_is_what_was_trained(trained):
    loaded = load_feature_classifier(trained["path"], SHAPE)
    assert loaded.name == "classifier" and loaded.sha256 == trained["sha256"]
    guesses = features_of(loaded, HELD_OUT)["logits"].argmax(axis=1)
    assert np.mean(guesses == HELD_OUT.labels) == trained["accuracy"]


def test_the_file_says_how_it_came_to_be(trained):
    with np.load(trained["path"], allow_pickle=False) as stored:
        meta = json.loads(str(stored["meta"]))
    assert meta == {
        "image_shape": [8, 8, 1],
        "num_classes": 10,
        "seed": 1,
        "steps": STEPS,
        "accuracy": trained["accuracy"],
        "data": "digits",
    }
    assert [p.name for p in trained["path"].parent.iterdir()] == ["digits.npz"]


def test_pooled_features_of_a_class_lie_together(trained):
    """New digits are nearest to the mean of their own class."""
    loaded = load_feature_classifier(trained["path"], SHAPE)
    pool, labels = features_of(loaded, HELD_OUT)["pool"], HELD_OUT.labels
    assert pool.shape == (HELD_OUT.num_examples, 64) and pool.min() >= 0
    means = np.stack([pool[labels == k].mean(axis=0) for k in range(10)])
    distances = np.linalg.norm(pool[:, None] - means[None], axis=-1)
    assert np.mean(distances.argmin(axis=1) == labels) > 0.9


@pytest.mark.slow
def test_the_seed_and_the_examples_decide_every_parameter(tmp_path):
    arrays = SMALL.images, SMALL.labels
    same = data.from_arrays(*arrays, batch_size=7, train=False, seed=5)
    other = data.from_arrays(*arrays, batch_size=32, flip=True)
    hashes = [
        train_feature_classifier(tmp_path / "a.npz", source, seed=seed, steps=3)
        for source, seed in [(SMALL, 0), (same, 0), (other, 0), (SMALL, 1)]
    ]
    first, again, other_data, other_seed = (told["sha256"] for told in hashes)
    assert first == again and len({first, other_data, other_seed}) == 3


def test_the_number_of_steps_follows_that_of_the_images(tmp_path, monkeypatch):
    counts = {}
    monkeypatch.setattr(feature_classifier, "MIN_STEPS", 2)
    for n in (128, 300):
        images, labels = images_of(n, 1, 1, 1), np.arange(n) % 2
        told = train(tmp_path / "a.npz", images, labels)
        assert told["accuracy"] is None  # without images to test it on
        counts[n] = told["steps"]
    assert counts == {128: 6, 300: 14}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_training_does_not_depend_on_the_devices(count, tmp_path, monkeypatch):
    """Five images: eight devices hold the last one four times, three devices twice."""
    images, labels = images_of(5, 4, 4, 3), np.array([0, 1, 2, 0, 1])
    names = tmp_path / "eight.npz", tmp_path / "few.npz"
    train(names[0], images, labels, steps=5)
    on_devices(monkeypatch, count)
    train(names[1], images, labels, steps=5)
    eight, few = (load_feature_classifier(n, (4, 4, 3)) for n in names)
    shown = in_batches(images_of(16, 4, 4, 3, seed=1), 16)
    one, other = features_of(eight, shown), features_of(few, shown)
    np.testing.assert_allclose(one["logits"], other["logits"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 4, 1), (9, 5, 3)])
def test_images_may_have_any_size_and_any_channels(shape):
    model, images = FeatureCNN(7), images_of(2, *shape)
    params = jax.jit(model.init)(jax.random.key(0), images)
    pool, logits = jax.jit(model.apply)(params, images)
    assert pool.shape == (2, 64) and logits.shape == (2, 7)
    last = params["params"]["Dense_0"]
    known = np.asarray(pool) @ last["kernel"] + np.asarray(last["bias"])[None]
    np.testing.assert_allclose(logits, known, rtol=1e-5, atol=1e-5)
    assert not np.allclose(pool[0], pool[1])


# files


def rewrite(path, out, **changes):
    """The same file with some arrays changed or, by None, left out."""
    with np.load(path, allow_pickle=False) as stored:
        arrays = {**stored, **changes}
    reordered = reversed([(k, a) for k, a in arrays.items() if a is not None])
    np.savez_compressed(out, **dict(reordered))
    return out


def test_the_hash_is_that_of_the_parameters_whatever_the_archive(trained, tmp_path):
    path = rewrite(trained["path"], tmp_path / "a.npz")
    assert path.read_bytes() != trained["path"].read_bytes()
    assert load_feature_classifier(path, SHAPE).sha256 == trained["sha256"]


def test_the_hash_changes_with_every_number(trained, tmp_path):
    with np.load(trained["path"], allow_pickle=False) as stored:
        bias = stored["Dense_0/bias"]
    bias[3] = np.nextafter(bias[3], 1, dtype=np.float32)
    path = rewrite(trained["path"], tmp_path / "a.npz", **{"Dense_0/bias": bias})
    assert load_feature_classifier(path, SHAPE).sha256 != trained["sha256"]


def test_a_classifier_that_is_not_there_is_refused_with_the_command(tmp_path):
    sentence = refuses(load_feature_classifier, tmp_path / "no.npz", SHAPE)
    assert "train it with `python -m jax_diffusion.evaluate --train-feature" in sentence


def test_a_classifier_of_other_images_is_refused(trained):
    sentence = refuses(load_feature_classifier, trained["path"], (28, 28, 1))
    assert "must be of images (28, 28, 1), got (8, 8, 1)" in sentence


@pytest.mark.parametrize(
    "changes",
    [
        {"meta": None},
        {"meta": np.array("{}")},
        {"meta": np.array("[")},
        {"Dense_0/bias": None},
        {"Dense_0/bias": np.zeros(11, np.float32)},
        {"Dense_0/bias": np.zeros(10)},
        {"Dense_1/bias": np.zeros(10, np.float32)},
        {"Dense_0/bias": np.array([None] * 10)},  # a pickle, which may run anything
    ],
)
def test_other_files_are_refused(changes, trained, tmp_path):
    path = rewrite(trained["path"], tmp_path / "a.npz", **changes)
    sentence = refuses(load_feature_classifier, path, SHAPE)
    assert "must be a whole file of train_feature_classifier" in sentence


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_file_that_is_cut_off_is_refused(keep, trained, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(trained["path"].read_bytes()[:keep])
    sentence = refuses(load_feature_classifier, path, SHAPE)
    assert "must be a whole file of train_feature_classifier" in sentence


def test_a_training_that_dies_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    path.write_bytes(b"what was there")

    def die(file, **arrays):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", die)
    with pytest.raises(KeyboardInterrupt):
        train(path, images_of(2, 1, 1, 1), [0, 1], steps=1)
    assert path.read_bytes() == b"what was there"


def test_one_label_is_not_enough_to_learn_from(tmp_path):
    sentence = refuses(train, tmp_path / "a.npz", images_of(4, 2, 2, 1), [3] * 4)
    assert sentence == (
        "training a classifier needs labels of two classes at least, got one."
    )


@pytest.mark.parametrize("options", [dict(seed=-1), dict(steps=0)])
def test_numbers_out_of_range_are_refused(options, tmp_path):
    images = images_of(4, 2, 2, 1)
    refuses(train, tmp_path / "a.npz", images, np.arange(4), **options)


def test_test_images_of_another_shape_are_refused_before_training(tmp_path):
    path = tmp_path / "deep" / "a.npz"
    sentence = refuses(train_feature_classifier, path, DIGITS, SMALL)
    assert "got (4, 4, 1)" in sentence and not path.parent.exists()
