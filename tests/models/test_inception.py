"""Inception beside pytorch-fid itself, with random weights in a file of PyTorch's, and
what its published numbers and closed forms say of it.
"""

import os
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from support.oracles import F32, F32_SUM
from support.peers import peer

from jax_diffusion import metrics
from jax_diffusion.interop import torch_files
from jax_diffusion.interop.inception_weights import SHA256, URL, params_from_torch
from jax_diffusion.models import inception
from jax_diffusion.models.inception import Inception, prepare

BATCH = 4
SET_SIZE = 2048  # images, as many as features
# Distinct images in each set, a divisor of that. With 2048, both networks together need
# six minutes on two cores, and SciPy's root of 2048 x 2048 numbers another one; so by
# default each image counts 128 times, and every fourth feature.
DISTINCT = int(os.environ.get("INCEPTION_TEST_IMAGES", "16"))
EVERY = 1 if DISTINCT == SET_SIZE else 4
OPTIMIZED = {"xla_backend_optimization_level": 3}  # this network computes for minutes


def images_of(seed, n, size, channels=3, *, sharp=False):
    """Sums of waves of random colors, lengths and directions; sharp: edges only."""
    rng = np.random.default_rng(seed)
    places = np.mgrid[:size, :size] / size
    frequencies = rng.uniform(-1, 1, (n, 4, 2)) * rng.uniform(0.5, 8, (n, 1, 1))
    phases = rng.uniform(0, 2 * np.pi, (n, 4, 1, 1))
    waves = np.cos(2 * np.pi * np.tensordot(frequencies, places, 1) + phases)
    waves = np.sign(waves) if sharp else waves
    colors = rng.normal(scale=rng.uniform(10, 60, (n, 1, 1)), size=(n, 4, channels))
    tints = rng.uniform(60, 190, (n, 1, 1, channels))
    pictures = np.einsum("nkhw,nkc->nhwc", waves, colors) + tints
    return np.clip(pictures, 0, 255).astype(np.uint8)


# --- beside pytorch-fid


def random_weights(torch):
    """A state dict whose norms know the means and variances of what they see.

    Gains and biases of norms are random. With random means and variances, too, all
    images would have much the same features after so many layers.
    """
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    options = dict(weights=None, aux_logits=False, init_weights=False)
    network = inception_v3(num_classes=1008, **options)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the statistics of the only batch
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.uniform_(module.bias, 0.0, 0.4)
    images = torch.tensor(images_of(0, BATCH, 299)).permute(0, 3, 1, 2)
    with torch.no_grad():
        network.train()(images / 127.5 - 1)
    return network.state_dict()


class Official:
    """pytorch-fid's network, and what it says of images."""

    def __init__(self, torch, module, state):
        self.torch, self.fc = torch, state["fc.weight"].numpy()
        with pytest.MonkeyPatch.context() as patch:
            name = "load_state_dict_from_url"
            patch.setattr(module, name, lambda *args, **options: state)
            self.network = module.InceptionV3([3]).eval()
        mixed_6d = self.network.blocks[2][6]
        mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output):
        self.branch = output

    def __call__(self, images):
        images = np.broadcast_to(images, (*images.shape[:3], 3))
        x = self.torch.tensor(images).permute(0, 3, 1, 2) / 255
        with self.torch.no_grad():
            pool = self.network(x)[0].flatten(1).numpy()
        spatial = self.branch[:, :7].permute(0, 2, 3, 1).flatten(1).numpy()
        return inception.Features(pool, spatial, pool @ self.fc.T)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """pytorch-fid's network and ours, of one file, from images to features."""
    module, torch = peer("pytorch_fid.inception"), pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries
        path = tmp_path_factory.mktemp("inception") / "weights.pth"
        torch.save(random_weights(torch), path)
        official = Official(torch, module, torch.load(path, weights_only=True))
    params = jax.device_put(params_from_torch(torch_files.read_torch(path)))
    apply = jax.jit(
        lambda params, x: Inception().apply({"params": params}, x),
        compiler_options=OPTIMIZED,
    )
    return official, lambda images: jax.tree.map(np.asarray, apply(params, images))


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, channels", [(32, 3), (64, 3), (299, 3), (320, 3), (28, 1)]
)
def test_features_are_those_of_pytorch_fid(size, channels, both):
    images = images_of(size, BATCH, size, channels)
    theirs, ours = (features_of(images) for features_of in both)
    for name, a, b in zip(theirs._fields, theirs, ours, strict=True):
        assert b.dtype == np.float32 and b.shape == a.shape
        # Relative to the norm of an image's features; and of the largest, each of them.
        errors, norms = (np.linalg.norm(x, axis=1) for x in (b - a, a))
        assert np.max(errors / norms) < 1e-4, name
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * np.abs(a).max())
        # A constant would not agree by chance: images differ by far more.
        assert np.linalg.norm(a - a.mean(axis=0)) > 0.1 * np.linalg.norm(a)


# As many images as features are too few for a score, not for a comparison.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a Frechet distance of")
def test_fid_is_that_of_pytorch_fid(both, monkeypatch):
    from pytorch_fid import fid_score
    from scipy import linalg

    def sqrtm(matrix, disp=True):
        # SciPy 1.17 warns of the second argument, which 1.18 has no more, and of
        # singular covariances, which those of no more images than features are.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root = linalg.sqrtm(matrix)
        return root if disp else (root, None)

    monkeypatch.setattr(fid_score, "linalg", types.SimpleNamespace(sqrtm=sqrtm))
    few = max(DISTINCT // 8, BATCH)  # of the second set, unlike all others
    images = np.concatenate(
        [images_of(1, DISTINCT, 32), images_of(2, few, 32, sharp=True)]
    )
    starts = range(0, len(images), BATCH)
    theirs, ours = (
        np.concatenate([features_of(images[i : i + BATCH]).pool for i in starts])[
            :, ::EVERY
        ]
        for features_of in both
    )

    def sets(features):
        times = SET_SIZE // DISTINCT
        halves = features[:DISTINCT], features[few:]
        return [np.repeat(half, times, axis=0) for half in halves]

    (a, b), (c, d) = sets(theirs.astype(np.float64)), sets(ours)
    # As its calculate_activation_statistics does it.
    stats = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (a, b)]
    official = fid_score.calculate_frechet_distance(*stats[0], *stats[1])
    fid = metrics.frechet_distance(metrics.moments(c), metrics.moments(d))
    np.testing.assert_allclose(fid, official, rtol=1e-4)
    assert official > 0.01 * np.trace(stats[0][1])


# --- published numbers and closed forms


@pytest.fixture(scope="module")
def shapes():
    """Shapes of the parameters, by path."""
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.uint8)
    init = jax.eval_shape(Inception().init, jax.random.key(0), image)
    return {path: a.shape for path, a in flatten_dict(init["params"]).items()}


def test_its_size_is_the_published_one(shapes):
    # Keras: for every channel of a convolution, what its norm adds, a mean and a
    # variance. torchvision: gains and biases, and a second classifier.
    keras, torchvision = 23_851_784, 27_161_264
    second = 768 * 128 + 128 * 768 * 5 * 5 + 2 * (128 + 768) + (768 + 1) * 1000
    channels = keras - (torchvision - second)
    kernels = keras - 3 * channels - (2048 + 1) * 1000
    ours = sum(int(np.prod(shape)) for shape in shapes.values())
    assert ours == kernels + channels + 2048 * 1008


@pytest.mark.parametrize("shape", [(2, 299, 299, 3), (3, 28, 31, 1), (1, 640, 1, 3)])
def test_features_have_the_documented_shapes_whatever_the_images(shape):
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    key = jax.random.key(0)
    features, _ = jax.eval_shape(Inception().init_with_output, key, images)
    n = shape[0]
    assert [a.shape for a in features] == [(n, 2048), (n, 7 * 17 * 17), (n, 1008)]
    assert {a.dtype for a in features} == {jnp.dtype(jnp.float32)}


def test_images_of_the_size_of_the_network_are_not_resized():
    images = images_of(3, 2, 299)
    np.testing.assert_allclose(prepare(images), images / 127.5 - 1, **F32)


@pytest.mark.parametrize("size", [(28, 32), (400, 13), (299, 256), (1, 1000)])
def test_a_ramp_stays_a_ramp_between_the_outermost_pixels(size):
    # Whole numbers, as images hold them: of many pixels, several are equal.
    rows, columns = (np.linspace(10, 100, n).round() for n in size)
    images = np.uint8(rows[:, None] + columns)[None, :, :, None]

    def between(values):
        n = len(values)
        return np.interp((np.arange(299) + 0.5) * n / 299 - 0.5, np.arange(n), values)

    expected = between(rows)[:, None] + between(columns)
    for channel in np.moveaxis(np.asarray(prepare(images))[0], -1, 0):
        np.testing.assert_allclose(channel, expected / 127.5 - 1, **F32_SUM)


def test_what_lies_between_is_lost_when_images_shrink():
    # To a third: of three pixels, the one in the middle counts alone.
    images = np.zeros((1, 897, 897, 1), np.uint8)
    images[:, 1::3, 1::3] = 255
    np.testing.assert_allclose(prepare(images), 1.0, **F32_SUM)


def test_one_channel_is_three_equal_ones():
    images = images_of(4, 2, 40, 1)
    np.testing.assert_array_equal(prepare(images), prepare(images.repeat(3, axis=3)))


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 8, 8, 3), np.float32),
        np.zeros((1, 8, 8, 3), np.int32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((1, 8, 8, 2), np.uint8),
        np.zeros((1, 3, 8, 8), np.uint8),
    ],
)
def test_other_images_are_refused(images):
    with pytest.raises(ValueError) as info:
        jax.eval_shape(Inception().init, jax.random.key(0), images)
    assert str(info.value) == (
        "images must be uint8 [b, h, w, c] with c = 1 or 3, got "
        f"{images.dtype} of shape {images.shape}."
    )


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (1, 0, 8, 3)])
def test_no_image_is_refused(shape):
    with pytest.raises(ValueError, match="one pixel at least, got shape"):
        prepare(np.zeros(shape, np.uint8))


# --- from a state dict


@pytest.fixture
def tensors(shapes):
    """A state dict in PyTorch's form, of ones that take no memory."""
    found = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for (*path, kind), shape in shapes.items():
        name = ".".join(path)
        if kind == "bias":
            kinds = ("weight", "bias", "running_mean", "running_var")
            found |= {f"{name}.bn.{kind}": shape for kind in kinds}
        elif name != "fc":
            found[f"{name}.conv.weight"] = (shape[3], shape[2], *shape[:2])
    one = np.float32(1)
    return {name: np.broadcast_to(one, shape) for name, shape in found.items()}


def test_a_layer_is_the_convolution_and_the_norm_after_it(tensors, shapes):
    rng, name = np.random.default_rng(0), "Mixed_6b.branch7x7_2"
    kernel = rng.normal(size=(128, 128, 1, 7)).astype(np.float32)
    gain, bias, mean = rng.normal(size=(3, 128)).astype(np.float32)
    var = rng.uniform(0.001, 0.1, 128).astype(np.float32)
    norm = {"weight": gain, "bias": bias, "running_mean": mean, "running_var": var}
    tensors |= {f"{name}.bn.{kind}": array for kind, array in norm.items()}
    tensors[f"{name}.conv.weight"] = kernel
    tensors["fc.weight"] = rng.normal(size=(1008, 2048)).astype(np.float32)
    params = params_from_torch(tensors)
    assert {k: a.shape for k, a in flatten_dict(params).items()} == shapes
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    x = rng.normal(size=(7, 128))  # what one output sees, in a row
    before = np.einsum("oiw,wi->o", kernel[:, :, 0], x)
    after = (before - mean) / np.sqrt(var + 0.001) * gain + bias
    layer = params["Mixed_6b"]["branch7x7_2"]
    ours = np.einsum("wio,wi->o", layer["kernel"][0], x) + layer["bias"]
    np.testing.assert_allclose(ours, after, **F32_SUM)
    np.testing.assert_array_equal(params["fc"]["kernel"], tensors["fc.weight"].T)


def test_all_that_is_wrong_with_a_state_dict_is_said_at_once(tensors):
    del tensors["Mixed_5b.branch1x1.bn.running_var"]
    tensors["AuxLogits.fc.bias"] = np.zeros(1008, np.float32)
    tensors["other.bn.num_batches_tracked"] = np.array(0)
    tensors["fc.weight"] = np.zeros((1000, 2048), np.float32)
    with pytest.raises(ValueError) as info:
        params_from_torch(tensors)
    assert str(info.value) == (
        "a checkpoint must have exactly the tensors of its network, got 4 differences: "
        "Mixed_5b.branch1x1.bn.running_var (64,) is missing; "
        "AuxLogits.fc.bias (1008,) is unexpected; "
        "other.bn.num_batches_tracked () is unexpected; "
        "fc.weight should be (1008, 2048) and is (1000, 2048)."
    )


@pytest.mark.slow
def test_how_many_batches_a_norm_has_seen_does_not_matter(tensors):
    without = params_from_torch(tensors)
    tensors |= {
        name.replace("running_var", "num_batches_tracked"): np.array(7)
        for name in tensors
        if name.endswith("running_var")
    }
    jax.tree.map(np.testing.assert_array_equal, params_from_torch(tensors), without)


def test_the_file_is_the_one_of_its_hash():
    # PyTorch's hub wants the first digits of the hash in the name.
    stem = URL.removesuffix(".pth")
    assert SHA256.startswith(stem.split("-")[-1])
    assert len(bytes.fromhex(SHA256)) == 32
