"""Extractors of features: where weights come from, and what a trained network knows."""

import functools
import hashlib
import http.server
import json
import socket
import threading

import jax
import numpy as np
import pytest
from support.oracles import F32

from jax_diffusion import data
from jax_diffusion.evaluation import features as extractors
from jax_diffusion.interop import inception_weights, torch_files
from jax_diffusion.models.feature_cnn import FeatureCNN
from jax_diffusion.models.inception import Inception
from jax_diffusion.runtime import sharding

DIGITS = data.load("digits", "train", batch_size=32)
HELD_OUT = data.load("digits", "test", batch_size=100, train=False)
SMALL = data.load("digits", "train", image_size=4, batch_size=32)
SHAPE = DIGITS.image_shape
STEPS = 150


def refuses(call, *args, **options):
    """The one sentence in which a call is refused."""
    with pytest.raises(ValueError) as info:
        call(*args, **options)
    sentence = str(info.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


def images_of(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def in_batches(images, size):
    return [{"image": images[i : i + size]} for i in range(0, len(images), size)]


def features(extractor, batches):
    found = [*extractors.extract(extractor, batches)]
    return {name: np.concatenate([f[name] for f in found]) for name in found[0]}


def on_devices(monkeypatch, count):
    mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:count])
    monkeypatch.setattr(sharding, "make_mesh", mesh)


# --- features


def test_pixels_are_flat_and_in_the_unit_interval_of_both_signs():
    every = np.arange(256, dtype=np.uint8).reshape(4, 4, 8, 2)
    pool = features(extractors.pixels(), in_batches(every, 3))["pool"]
    known = np.linspace(-1, 1, 256).reshape(4, 64)
    np.testing.assert_allclose(pool, known, **F32)
    assert pool.dtype == np.float32


@pytest.mark.parametrize("size", [1, 50])
def test_features_do_not_depend_on_the_batch(size, trained):
    extractor = extractors.load_classifier(trained["path"], SHAPE)
    images = HELD_OUT.images
    together = features(extractor, in_batches(images, len(images)))
    parts = features(extractor, in_batches(images, size))
    for name, array in together.items():
        assert array.dtype == np.float32 and len(array) == len(images)
        np.testing.assert_allclose(parts[name], array, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_features_do_not_depend_on_the_devices(count, trained, monkeypatch):
    extractor = extractors.load_classifier(trained["path"], SHAPE)
    on_eight = features(extractor, HELD_OUT)
    on_devices(monkeypatch, count)
    for name, array in features(extractor, HELD_OUT).items():
        np.testing.assert_allclose(array, on_eight[name], rtol=1e-6, atol=1e-5)


def test_a_network_is_traced_once_for_all_batches_of_all_calls():
    traced = []

    def apply(params, images):
        traced.append(images.shape)
        return {"pool": images.reshape(len(images), -1) * params}

    extractor = extractors.FeatureExtractor("doubled", "", np.float32(2), apply)
    images = images_of(19, 2, 2, 1)
    for size in (16, 16, 12):
        parts = in_batches(images, size)
        pool = features(extractor, parts)["pool"]
        np.testing.assert_array_equal(pool, 2.0 * images.reshape(19, -1))
    assert traced == [(16, 2, 2, 1)]  # 12 are filled up for eight devices


@pytest.mark.parametrize(
    "images", [np.zeros((2, 4, 4, 1)), images_of(2, 4, 4), images_of(0, 4, 4, 1)]
)
def test_images_of_another_kind_are_refused(images):
    features_of = extractors.compiled(extractors.pixels())
    sentence = refuses(features_of, images)
    assert f"got {images.dtype} {images.shape}" in sentence


# --- the classifier


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What training on the digits returned, and the path of its file."""
    path = tmp_path_factory.mktemp("classifier") / "deep" / "digits.npz"
    options = dict(seed=1, steps=STEPS, data_name="digits")
    told = extractors.train_classifier(path, DIGITS, HELD_OUT, **options)
    return {**told, "path": path}


def train(path, images, labels, **options):
    batches = data.from_arrays(images, labels, batch_size=1)
    return extractors.train_classifier(path, batches, **options)


def test_the_classifier_learns_the_digits(trained):
    """On images that it has not seen; chance is right once in ten."""
    assert trained["accuracy"] > 0.93 and trained["steps"] == STEPS
    assert 0 < trained["seconds"] < 600


def test_what_is_loaded_is_what_was_trained(trained):
    loaded = extractors.load_classifier(trained["path"], SHAPE)
    assert loaded.name == "classifier" and loaded.sha256 == trained["sha256"]
    guesses = features(loaded, HELD_OUT)["logits"].argmax(axis=1)
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
    loaded = extractors.load_classifier(trained["path"], SHAPE)
    pool, labels = features(loaded, HELD_OUT)["pool"], HELD_OUT.labels
    assert pool.shape == (HELD_OUT.num_examples, 64) and pool.min() >= 0
    means = np.stack([pool[labels == k].mean(axis=0) for k in range(10)])
    distances = np.linalg.norm(pool[:, None] - means[None], axis=-1)
    assert np.mean(distances.argmin(axis=1) == labels) > 0.9


def test_the_seed_and_the_examples_decide_every_parameter(tmp_path):
    arrays = SMALL.images, SMALL.labels
    same = data.from_arrays(*arrays, batch_size=7, train=False, seed=5)
    other = data.from_arrays(*arrays, batch_size=32, flip=True)
    hashes = [
        extractors.train_classifier(tmp_path / "a.npz", source, seed=seed, steps=3)
        for source, seed in [(SMALL, 0), (same, 0), (other, 0), (SMALL, 1)]
    ]
    first, again, other_data, other_seed = (told["sha256"] for told in hashes)
    assert first == again and len({first, other_data, other_seed}) == 3


def test_the_number_of_steps_follows_that_of_the_images(tmp_path, monkeypatch):
    counts = {}
    monkeypatch.setattr(extractors, "MIN_STEPS", 2)
    for n in (128, 300):
        images, labels = images_of(n, 1, 1, 1), np.arange(n) % 2
        told = train(tmp_path / "a.npz", images, labels)
        assert told["accuracy"] is None  # without images to test it on
        counts[n] = told["steps"]
    assert counts == {128: 6, 300: 14}


@pytest.mark.parametrize("count", [1, 3])
def test_training_does_not_depend_on_the_devices(count, tmp_path, monkeypatch):
    """Five images: eight devices hold the last one four times, three devices twice."""
    images, labels = images_of(5, 4, 4, 3), np.array([0, 1, 2, 0, 1])
    names = tmp_path / "eight.npz", tmp_path / "few.npz"
    train(names[0], images, labels, steps=5)
    on_devices(monkeypatch, count)
    train(names[1], images, labels, steps=5)
    eight, few = (extractors.load_classifier(n, (4, 4, 3)) for n in names)
    shown = in_batches(images_of(16, 4, 4, 3, seed=1), 16)
    one, other = features(eight, shown), features(few, shown)
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


# --- files of classifiers


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
    assert extractors.load_classifier(path, SHAPE).sha256 == trained["sha256"]


def test_the_hash_changes_with_every_number(trained, tmp_path):
    with np.load(trained["path"], allow_pickle=False) as stored:
        bias = stored["Dense_0/bias"]
    bias[3] = np.nextafter(bias[3], 1, dtype=np.float32)
    path = rewrite(trained["path"], tmp_path / "a.npz", **{"Dense_0/bias": bias})
    assert extractors.load_classifier(path, SHAPE).sha256 != trained["sha256"]


def test_a_classifier_that_is_not_there_is_refused_with_the_command(tmp_path):
    sentence = refuses(extractors.load_classifier, tmp_path / "no.npz", SHAPE)
    assert "train it with `python -m jax_diffusion.evaluate --train-class" in sentence


def test_a_classifier_of_other_images_is_refused(trained):
    sentence = refuses(extractors.load_classifier, trained["path"], (28, 28, 1))
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
    sentence = refuses(extractors.load_classifier, path, SHAPE)
    assert "must be a whole file of train_classifier" in sentence


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_file_that_is_cut_off_is_refused(keep, trained, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(trained["path"].read_bytes()[:keep])
    sentence = refuses(extractors.load_classifier, path, SHAPE)
    assert "must be a whole file of train_classifier" in sentence


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
    sentence = refuses(extractors.train_classifier, path, DIGITS, SMALL)
    assert "got (4, 4, 1)" in sentence and not path.parent.exists()


# --- where Inception's weights come from

STATE = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file of tensors that stand for Inception's, and its hash."""
    monkeypatch.setattr(
        inception_weights, "params_from_torch", lambda state: dict(state)
    )
    monkeypatch.setenv("no_proxy", "*")
    path = tmp_path / "weights.pth"
    torch_files.write_torch(path, STATE)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


class Server(http.server.HTTPServer):
    """Serves one file on this machine, and notes what it was asked for."""

    def __init__(self, content):
        self.asked, self.content, self.promised = [], content, len(content)
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path != "/weights.pth":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(self.server.promised))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(weights):
    with Server(weights[0].read_bytes()) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def assert_loaded(extractor, sha256):
    assert extractor.name == "inception" and extractor.sha256 == sha256
    np.testing.assert_array_equal(extractor.params["weight"], STATE["weight"])


def refused(cache, **options):
    """The sentence, after which nothing has come into the cache."""
    sentence = refuses(extractors.inception, cache=cache, **options)
    assert "--inception FILE" in sentence and options["url"] in sentence
    assert not cache.exists() or not [*cache.iterdir()]
    return sentence


def test_weights_are_downloaded_once(server, weights, tmp_path):
    options = dict(sha256=weights[1], cache=tmp_path / "deep" / "cache")
    url = f"{server.url}/weights.pth"
    assert_loaded(extractors.inception(url=url, **options), weights[1])
    unreachable = "http://127.0.0.1:9/weights.pth"
    assert_loaded(extractors.inception(url=unreachable, **options), weights[1])
    assert_loaded(extractors.inception(url=url, **options), weights[1])
    assert server.asked == ["/weights.pth"]
    files = [path.name for path in options["cache"].iterdir()]
    assert files == ["pt_inception-2015-12-05-6726825d.pth"]


def test_the_address_may_be_that_of_a_file(weights, tmp_path):
    path, sha256 = weights
    options = dict(url=path.as_uri(), sha256=sha256, cache=tmp_path / "cache")
    assert_loaded(extractors.inception(**options), sha256)
    path.unlink()
    assert_loaded(extractors.inception(**options), sha256)


@pytest.mark.parametrize("told", [True, False])
def test_the_cache_is_where_caches_are(told, weights, tmp_path, monkeypatch):
    path, sha256 = weights
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "told") if told else "")
    extractors.inception(url=path.as_uri(), sha256=sha256)
    place = tmp_path / "told" if told else tmp_path / "home" / ".cache"
    assert [*place.rglob("*.pth")] == [
        place / "jax_diffusion" / "pt_inception-2015-12-05-6726825d.pth"
    ]


def test_a_path_is_read_where_it_is(weights, tmp_path):
    path, sha256 = weights
    for given in (path, str(path)):
        assert_loaded(extractors.inception(given, sha256=sha256), sha256)
    assert_loaded(extractors.inception(path, sha256=None), sha256)


def test_a_download_of_another_hash_is_refused(server, tmp_path):
    url = f"{server.url}/weights.pth"
    sentence = refused(tmp_path / "cache", url=url, sha256="0" * 64)
    assert f"for {'0' * 64}" in sentence


def test_a_download_that_breaks_off_is_refused(server, weights, tmp_path):
    server.content = server.content[:-100]
    url = f"{server.url}/weights.pth"
    refused(tmp_path / "cache", url=url, sha256=weights[1])


def test_a_missing_page_is_refused(server, weights, tmp_path):
    url = f"{server.url}/other.pth"
    assert "404" in refused(tmp_path / "cache", url=url, sha256=weights[1])


def test_an_unreachable_server_is_refused(weights, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}/weights.pth"
    refused(tmp_path / "cache", url=url, sha256=weights[1])


def test_a_silent_server_is_given_up(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(extractors, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/weights.pth"
        assert "timed out" in refused(tmp_path / "cache", url=url, sha256=weights[1])


@pytest.mark.parametrize("url", ["weights.pth", "file:///no/such/file", "http://[::1"])
def test_an_address_of_nothing_is_refused(url, weights, tmp_path):
    refused(tmp_path / "cache", url=url, sha256=weights[1])


def test_a_cache_that_cannot_be_written_is_refused(weights, tmp_path):
    cache = tmp_path / "file"
    cache.write_bytes(b"")
    options = dict(url=weights[0].as_uri(), sha256=weights[1], cache=cache / "cache")
    assert "--inception FILE" in refuses(extractors.inception, **options)


def test_another_file_in_the_cache_is_refused_and_not_removed(weights, tmp_path):
    path, sha256 = weights
    options = dict(url=path.as_uri(), sha256=sha256, cache=tmp_path / "cache")
    extractors.inception(**options)
    (cached,) = options["cache"].iterdir()
    cached.write_bytes(b"another")
    sentence = refuses(extractors.inception, **options)
    assert f"{cached} must have SHA-256 {sha256}" in sentence
    assert "remove it" in sentence and cached.read_bytes() == b"another"


def test_a_path_of_another_hash_is_refused(weights):
    sentence = refuses(extractors.inception, weights[0], sha256="0" * 64)
    assert f"got {weights[1]}" in sentence and "--inception FILE" in sentence
    assert inception_weights.URL in sentence


def test_a_path_without_a_file_is_refused(tmp_path):
    sentence = refuses(extractors.inception, tmp_path / "no.pth")
    assert "no.pth" in sentence and "--inception FILE" in sentence


def test_a_file_that_is_none_of_pytorch_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"no weights")
    sentence = refuses(extractors.inception, path, sha256=None)
    assert f"{path} must be a whole PyTorch file" in sentence
    assert "--inception FILE" in sentence


@pytest.mark.parametrize("tree", [STATE, [STATE["weight"]], {}])
def test_other_tensors_are_refused(tree, tmp_path, monkeypatch):
    torch_files.write_torch(tmp_path / "a.pth", STATE)
    monkeypatch.setattr(extractors, "read_torch", lambda path: tree)
    sentence = refuses(extractors.inception, tmp_path / "a.pth", sha256=None)
    assert "must hold Inception's weights" in sentence
    assert "--inception FILE" in sentence


def test_a_download_is_never_unchecked(tmp_path):
    refuses(extractors.inception, sha256=None, cache=tmp_path)


def test_inception_has_features_of_the_published_sizes(weights):
    apply = extractors.inception(weights[0], sha256=None).apply
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), np.uint8)
    init = jax.eval_shape(Inception().init, jax.random.key(0), images)
    found = jax.eval_shape(apply, init["params"], images)
    shapes = {name: feature.shape for name, feature in found.items()}
    assert shapes == {"pool": (2, 2048), "spatial": (2, 2023), "logits": (2, 1008)}
    assert {feature.dtype for feature in found.values()} == {np.dtype(np.float32)}


def test_weights_that_are_no_state_dict_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "list.pth"
    path.write_bytes(b"a list of tensors")
    monkeypatch.setattr(extractors, "read_torch", lambda path: [np.zeros(3)])
    sentence = refuses(extractors.inception, path, sha256=None)
    assert "list for a state dict" in sentence
