"""Extractors of features, and where the weights of Inception come from."""

import gc
import hashlib
import http.server
import socket
import threading

import jax
import numpy as np
import pytest
from support.features import features_of, images_of, in_batches, refuses
from support.oracles import F32

from jax_diffusion.evaluation import features as extractors
from jax_diffusion.interop import inception_weights, torch_files
from jax_diffusion.models import inception

# requests leaves the socket of a server that does not answer to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


def test_pixels_are_flat_and_in_the_unit_interval_of_both_signs():
    every = np.arange(256, dtype=np.uint8).reshape(4, 4, 8, 2)
    pool = features_of(extractors.pixels(), in_batches(every, 3))["pool"]
    known = np.linspace(-1, 1, 256).reshape(4, 64)
    np.testing.assert_allclose(pool, known, **F32)
    assert pool.dtype == np.float32


def test_a_network_is_traced_once_for_all_batches_of_all_calls():
    traced = []

    def apply(params, images):
        traced.append(images.shape)
        return {"pool": images.reshape(len(images), -1) * params}

    extractor = extractors.FeatureExtractor("doubled", "", np.float32(2), apply)
    images = images_of(19, 2, 2, 1)
    for size in (16, 16, 12):
        parts = in_batches(images, size)
        pool = features_of(extractor, parts)["pool"]
        np.testing.assert_array_equal(pool, 2.0 * images.reshape(19, -1))
    assert traced == [(16, 2, 2, 1)]  # 12 are filled up for eight devices


@pytest.mark.parametrize(
    "images", [np.zeros((2, 4, 4, 1)), images_of(2, 4, 4), images_of(0, 4, 4, 1)]
)
def test_images_of_another_kind_are_refused(images):
    features_of = extractors.compiled(extractors.pixels())
    sentence = refuses(features_of, images)
    assert f"got {images.dtype} {images.shape}" in sentence


# where Inception's weights come from

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
    gc.collect()
    assert "as `inception`" in sentence and options["url"] in sentence
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


def test_a_download_of_another_hash_is_refused(server, weights, tmp_path):
    url = f"{server.url}/weights.pth"
    sentence = refused(tmp_path / "cache", url=url, sha256="0" * 64)
    assert f"expected {'0' * 64} but got {weights[1]}" in " ".join(sentence.split())


@pytest.mark.slow
def test_a_download_that_breaks_off_is_refused(server, weights, tmp_path):
    server.content = server.content[:-100]
    url = f"{server.url}/weights.pth"
    refused(tmp_path / "cache", url=url, sha256=weights[1])


def test_a_missing_page_is_refused(server, weights, tmp_path):
    url = f"{server.url}/other.pth"
    assert "404" in refused(tmp_path / "cache", url=url, sha256=weights[1])


@pytest.mark.slow
def test_an_unreachable_server_is_refused(weights, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}/weights.pth"
    refused(tmp_path / "cache", url=url, sha256=weights[1])


@pytest.mark.slow
def test_a_silent_server_is_given_up(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(extractors, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/weights.pth"
        assert "timed out" in refused(tmp_path / "cache", url=url, sha256=weights[1])


@pytest.mark.slow
@pytest.mark.parametrize("url", ["weights.pth", "file:///no/such/file", "http://[::1"])
def test_an_address_of_nothing_is_refused(url, weights, tmp_path):
    refused(tmp_path / "cache", url=url, sha256=weights[1])


def test_a_cache_that_cannot_be_written_is_refused(weights, tmp_path):
    cache = tmp_path / "file"
    cache.write_bytes(b"")
    options = dict(url=weights[0].as_uri(), sha256=weights[1], cache=cache / "cache")
    assert "as `inception`" in refuses(extractors.inception, **options)


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
    assert f"got {weights[1]}" in sentence and "as `inception`" in sentence
    assert inception_weights.URL in sentence


def test_a_path_without_a_file_is_refused(tmp_path):
    sentence = refuses(extractors.inception, tmp_path / "no.pth")
    assert "no.pth" in sentence and "as `inception`" in sentence


def test_a_file_that_is_none_of_pytorch_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"no weights")
    sentence = refuses(extractors.inception, path, sha256=None)
    assert f"{path} must be a whole PyTorch file" in sentence
    assert "as `inception`" in sentence


@pytest.mark.parametrize("tree", [STATE, [STATE["weight"]], {}])
def test_other_tensors_are_refused(tree, tmp_path, monkeypatch):
    torch_files.write_torch(tmp_path / "a.pth", STATE)
    monkeypatch.setattr(extractors, "read_torch", lambda path: tree)
    sentence = refuses(extractors.inception, tmp_path / "a.pth", sha256=None)
    assert "must hold Inception's weights" in sentence
    assert "as `inception`" in sentence


def test_a_download_is_never_unchecked(tmp_path):
    refuses(extractors.inception, sha256=None, cache=tmp_path)


def test_inception_has_features_of_the_published_sizes(weights):
    apply = extractors.inception(weights[0], sha256=None).apply
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), np.uint8)
    init = jax.eval_shape(inception.Inception().init, jax.random.key(0), images)
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
