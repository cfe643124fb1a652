"""The annotated DDPM's network: its layers against PyTorch's and closed forms, its
size, and what its missing skip means."""

import functools
import importlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from support.oracles import F32, F32_SUM, assert_moments, normal, normal_cdf

from jax_diffusion.models import cpu_convs, torch_layers
from jax_diffusion.models.annotated import AnnotatedUNet, Attention, Double
from jax_diffusion.models.torch_layers import TorchLayers

# LLVM's optimization is most of the time that a network takes here, and gains nothing.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

HEADS = dict(num_heads=2, head_dim=4)
SMALL = dict(channels=8, multipliers=(1, 2), num_groups=4, **HEADS)
BLOCKS = {"convnext": {}, "resnet": dict(use_convnext=False)}
blocks = pytest.mark.parametrize(
    "block", ["convnext", pytest.param("resnet", marks=pytest.mark.slow)]
)

IMAGES = normal(1, 2, 8, 8, 1)
X = normal(2, 2, 6, 8, 5)
T = jnp.array([7.0, 400.0])


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def param_shapes(model, image_shape):
    x, t = jnp.zeros((1, *image_shape)), jnp.zeros(1)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), x, t))["params"]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.cache
def random_params(block="convnext", **options):
    """Weights of the right size from NumPy: JAX compiles anew for every shape."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.ndim == 1:  # biases and norms: not at zero or one, to be seen
            return jnp.asarray(rng.uniform(0.1, 1.0, leaf.shape), jnp.float32)
        draws = rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5
        return jnp.asarray(draws, jnp.float32)

    model = AnnotatedUNet(**SMALL | BLOCKS[block] | options)
    return jax.tree.map(draw, param_shapes(model, (8, 8, 1)))


@functools.cache
def compiled(block="convnext", **options):
    model = AnnotatedUNet(**SMALL | BLOCKS[block] | options)
    return jit(lambda params, x, t: model.apply({"params": params}, x, t))


def apply(params, x=IMAGES, t=T, **options):
    return compiled(**options)(params, x, t)


def init_and_apply(module, *args):
    """What a new module computes, and its parameters in NumPy."""
    y, variables = jit(module.init_with_output)(jax.random.key(0), *args)
    return y, jax.device_get(variables.get("params", {}))


def to_torch(torch, x):
    """An image, channels first."""
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))


def from_torch(x):
    return np.moveaxis(x.numpy(), 1, -1)


def kernel_to_torch(torch, kernel):
    return torch.tensor(np.asarray(kernel).transpose(3, 2, 0, 1))


# Its layers


class Conv(TorchLayers):
    size: int = 3
    options: tuple = ()

    @nn.compact
    def __call__(self, x):
        return self.conv(x, 7, name="conv", size=self.size, **dict(self.options))


class Norm(TorchLayers):
    @nn.compact
    def __call__(self, x):
        return self.norm(x, name="norm")


class Embed(TorchLayers):
    @nn.compact
    def __call__(self, t):
        return self.embed(t, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "options", "torch_options"),
    [
        (7, (), dict(padding=3)),
        (4, (("stride", 2), ("padding", 1)), dict(stride=2, padding=1)),
    ],
)
def test_convolutions_are_those_of_pytorch(torch, size, options, torch_options):
    ours, params = init_and_apply(Conv(size=size, options=options), X)
    theirs = torch.nn.functional.conv2d(
        to_torch(torch, X),
        kernel_to_torch(torch, params["conv"]["kernel"]),
        torch.tensor(params["conv"]["bias"]),
        **torch_options,
    )
    np.testing.assert_allclose(ours, from_torch(theirs), **F32_SUM)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cpu", "default"])
def test_doubling_is_the_transposed_convolution_of_pytorch(torch, monkeypatch, way):
    monkeypatch.setattr(
        cpu_convs.lax, "platform_dependent", lambda *args, **ways: ways[way](*args)
    )
    ours, params = init_and_apply(Double(), X)
    dy = normal(5, *ours.shape)
    back = jit(lambda x, p: jax.vjp(Double().apply, {"params": p}, x)[1](dy))
    of_params, of_x = back(X, params)
    their_x = to_torch(torch, X).requires_grad_()
    kernel = kernel_to_torch(torch, params["kernel"]).requires_grad_()
    bias = torch.tensor(params["bias"])
    options = dict(stride=2, padding=1)
    theirs = torch.nn.functional.conv_transpose2d(their_x, kernel, bias, **options)
    theirs.backward(to_torch(torch, dy))
    assert ours.shape == (2, 12, 16, 5)
    np.testing.assert_allclose(ours, from_torch(theirs.detach()), **F32_SUM)
    np.testing.assert_allclose(of_x, from_torch(their_x.grad), **F32_SUM)
    of_kernel = kernel.grad.numpy().transpose(2, 3, 1, 0)
    np.testing.assert_allclose(of_params["params"]["kernel"], of_kernel, **F32_SUM)


def convolutions(function, platform, *shapes):
    """How many a program for that platform has, forward and backward."""
    gradient = jax.grad(lambda args: jnp.sum(function(*args) ** 2))
    traced = jax.jit(gradient).trace([jnp.zeros(shape) for shape in shapes])
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return text.count("stablehlo.convolution")


@pytest.mark.parametrize("size", [3, 4])
def test_only_the_cpu_doubles_images_by_four_convolutions(size):
    doubles = {3: cpu_convs.conv_of_doubled, 4: cpu_convs.conv_transpose}[size]
    shapes = (1, 4, 4, 2), (size, size, 2, 2)
    assert convolutions(doubles, "cpu", *shapes) == 3 * 4
    for platform in ("cuda", "tpu"):
        assert convolutions(doubles, platform, *shapes) == 3


def test_a_convolution_of_one_pixel_is_a_matrix_product_everywhere():
    for platform in ("cpu", "cuda", "tpu"):
        shapes = (1, 4, 4, 2), (1, 1, 2, 3)
        assert convolutions(cpu_convs.pointwise_conv, platform, *shapes) == 0


WAYS = [cpu_convs._banded_conv, cpu_convs._grouped_conv, cpu_convs.depthwise_conv]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@pytest.mark.slow
@ways
@pytest.mark.parametrize("shape", [(2, 6, 8, 5), (1, 9, 2, 3)])
def test_depthwise_convolution_is_that_of_pytorch(torch, way, shape):
    x, kernel = normal(3, *shape), normal(4, 7, 7, 1, shape[-1])
    theirs = torch.nn.functional.conv2d(
        to_torch(torch, x),
        kernel_to_torch(torch, kernel),
        padding=3,
        groups=shape[-1],
    )
    np.testing.assert_allclose(jit(way)(x, kernel), from_torch(theirs), **F32_SUM)


@pytest.mark.slow
@ways
def test_depthwise_gradients_are_those_of_pytorch(torch, way):
    kernel, dy = normal(4, 7, 7, 1, 5), normal(5, *X.shape)
    gradients = jit(lambda x, kernel: jax.vjp(way, x, kernel)[1](dy))
    dx, dkernel = gradients(X, kernel)
    their_x = to_torch(torch, X).requires_grad_()
    their_kernel = kernel_to_torch(torch, kernel).requires_grad_()
    y = torch.nn.functional.conv2d(their_x, their_kernel, padding=3, groups=5)
    y.backward(to_torch(torch, dy))
    np.testing.assert_allclose(dx, from_torch(their_x.grad), **F32_SUM)
    theirs = their_kernel.grad.numpy().transpose(2, 3, 1, 0)
    np.testing.assert_allclose(dkernel, theirs, **F32_SUM)


@pytest.mark.parametrize(
    ("platform", "width", "convolves"),
    [("cpu", 28, False), ("cpu", 1024, True), ("cuda", 28, True), ("tpu", 28, True)],
)
def test_only_the_cpu_multiplies_matrices_for_a_depthwise_convolution(
    platform, width, convolves
):
    x, kernel = jnp.zeros((1, 4, width, 2)), jnp.zeros((7, 7, 1, 2))
    traced = jax.jit(
        jax.grad(lambda x, k: jnp.sum(cpu_convs.depthwise_conv(x, k) ** 2))
    )
    text = traced.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.convolution" in text) == convolves
    assert ("stablehlo.dot_general" in text) != convolves


def test_norm_is_over_the_whole_image_with_the_true_variance():
    x = np.asarray(X, np.float64) + 100
    axes = (1, 2, 3)
    std = np.sqrt(x.var(axis=axes, keepdims=True) + 1e-5)
    ours, _ = init_and_apply(Norm(), jnp.asarray(x, jnp.float32))
    expected = (x - x.mean(axis=axes, keepdims=True)) / std
    np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-5)  # 100 has 1e-5


def test_gelu_is_x_times_the_normal_distribution_function():
    x = np.linspace(-4, 4, 41)
    ours = torch_layers.gelu(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(ours, x * normal_cdf(x), **F32)


@pytest.mark.slow
def test_timesteps_are_embedded_as_in_pytorch(torch):
    ours, params = init_and_apply(Embed(), T)
    angles = np.outer(T, 10_000.0 ** (-np.arange(4) / 3))  # down to 1 / 10,000 itself
    h = torch.tensor(np.hstack([np.sin(angles), np.cos(angles)]), dtype=torch.float32)
    for i, name in enumerate(["time_0", "time_1"]):
        h = torch.nn.functional.gelu(h) if i else h
        kernel, bias = params[name]["kernel"].T, params[name]["bias"]
        h = torch.nn.functional.linear(h, torch.tensor(kernel), torch.tensor(bias))
    np.testing.assert_allclose(ours, h.numpy(), **F32_SUM)


def softmax(x, axis):
    x = np.exp(np.asarray(x, np.float64))
    return x / x.sum(axis=axis, keepdims=True)


def test_linear_attention_weighs_values_by_products_of_two_softmaxes():
    q, k, v = normal(6, 2, 5, 3, 4), normal(7, 2, 9, 3, 4), normal(8, 2, 9, 3, 6)
    q_soft, k_soft = softmax(q, axis=-1), softmax(k, axis=1)
    weights = np.einsum("bnhd,bmhd->bhnm", q_soft, k_soft)  # of each pixel by pixel
    np.testing.assert_allclose(weights.sum(axis=-1), 1)
    expected = np.einsum("bhnm,bmhe->bnhe", weights, v) / 4**0.5
    np.testing.assert_allclose(
        jit(torch_layers.linear_attention)(q, k, v), expected, **F32
    )


@pytest.mark.slow
def test_full_attention_is_that_of_pytorch(torch):
    ours, params = init_and_apply(Attention(**HEADS), X)
    f = torch.nn.functional
    h = f.group_norm(to_torch(torch, X), 1)
    h = f.conv2d(h, kernel_to_torch(torch, params["qkv"]["kernel"]))
    q, k, v = h.reshape(2, 3, 2, 4, 6 * 8).transpose(-1, -2).unbind(1)
    h = f.scaled_dot_product_attention(q, k, v)
    h = h.transpose(-1, -2).reshape(2, 8, 6, 8)
    kernel, bias = params["out"]["kernel"], torch.tensor(params["out"]["bias"])
    h = f.conv2d(h, kernel_to_torch(torch, kernel), bias)
    np.testing.assert_allclose(ours, X + from_torch(h), **F32_SUM)


# Its size and start


def test_published_network_has_its_number_of_parameters():
    assert count(param_shapes(AnnotatedUNet(), (28, 28, 1))) == 2_996_315


def test_full_skip_costs_what_twice_the_channels_cost_in_the_last_block():
    extra = (
        28
        * (
            (7 * 7 + 1)  # depthwise
            + 2  # its norm
            + 3 * 3 * 56  # convolution to twice the channels
            + 56  # skip of size 1, new as the channels now change,
        )
        + 28
    )  # and its bias
    params = param_shapes(AnnotatedUNet(full_skip=True), (28, 28, 1))
    assert count(params) == 2_996_315 + extra


@pytest.mark.slow
def test_layers_start_uniform_up_to_the_root_of_one_over_fan_in():
    inputs = jax.eval_shape(lambda: (IMAGES, T))  # nothing is computed of them
    init = AnnotatedUNet(**SMALL).lazy_init(jax.random.key(0), *inputs)
    params = flatten_dict(jax.device_get(init["params"]))
    draws = []
    for path, kernel in params.items():
        if path[-1] == "kernel":
            # PyTorch counts the second axis of its weights, here the third.
            root = kernel[..., 0].size ** 0.5
            draws.append(kernel.ravel() * root)
            bias = params.get((*path[:-1], "bias"))
            draws += [] if bias is None else [bias * root]
    draws = np.concatenate(draws)
    assert np.abs(draws).max() <= 1 + 1e-6
    assert_moments(draws, 0, 1 / 3)


# What its missing skip means


def blocked(params):
    """The network whose halving lets nothing through."""
    halve = jax.tree.map(jnp.zeros_like, params["down_0_halve"])
    return params | {"down_0_halve": halve}


@pytest.mark.slow
@blocks
def test_published_network_sees_nothing_but_through_the_first_halving(block):
    params = blocked(random_params(block))
    y = apply(params, block=block)
    np.testing.assert_array_equal(apply(params, -IMAGES, block=block), y)


@pytest.mark.slow
@blocks
def test_mended_network_sees_past_the_first_halving(block):
    params = blocked(random_params(block, full_skip=True))
    y, y_other = (
        apply(params, x, block=block, full_skip=True) for x in (IMAGES, -IMAGES)
    )
    assert jnp.abs(y_other - y).max() > 1e-3


@pytest.mark.slow
def test_mended_network_contains_the_published_one():
    params = random_params("resnet")
    out = params["block_out"]
    kernel = out["conv_in"]["kernel"]
    wide = jnp.concatenate([kernel, jnp.zeros_like(kernel)], axis=2)
    pick = jnp.eye(16, 8).reshape(1, 1, 16, 8)
    out = out | {
        "conv_in": out["conv_in"] | {"kernel": wide},
        "skip": {"kernel": pick, "bias": jnp.zeros(8)},
    }
    y = apply(params | {"block_out": out}, block="resnet", full_skip=True)
    np.testing.assert_allclose(y, apply(params, block="resnet"), **F32_SUM)


# What must hold of any network


@blocks
def test_last_block_is_not_told_the_time_and_all_others_are(block):
    told = {path[0] for path in flatten_dict(random_params(block)) if path[1] == "emb"}
    every = {name for name in random_params(block) if re.search(r"_[01]$", name)}
    assert told == every - {"time_0", "time_1"} and "block_out" not in told


def test_channels_that_cannot_be_grouped_are_named_in_one_sentence():
    options = dict(use_convnext=False, num_groups=8, channels=28)
    message = r"^[^.]*divisible by num_groups = 8, got 28\.(\n|$)"
    with pytest.raises(ValueError, match=message):
        param_shapes(AnnotatedUNet(**SMALL | options), (8, 8, 1))


BLOCK = {  # of the benchmark's network -> of ours
    **{"depthwise": "depthwise", "emb.1": "emb", "skip": "skip"},
    **{
        "net.0": "norm_in",
        "net.1": "conv_in",
        "net.3": "norm_out",
        "net.4": "conv_out",
    },
}
WHOLE = {
    "stem": "conv_in",
    "embed.1": "time_0",
    "embed.3": "time_1",
    "out.1": "conv_out",
}


def our_name(name, levels):
    """The path in our parameters of a module of annotated_pytorch.py."""
    if name in WHOLE:
        return (WHOLE[name],)
    part, _, rest = name.partition(".")
    if part == "out":
        return "block_out", BLOCK[rest.removeprefix("0.")]
    if part.startswith("mid"):
        return part, BLOCK.get(rest, rest)
    index, kind, *inner = (part, *rest.split("."))[1:]
    level = int(index) if part == "down" else levels - 1 - int(index)
    if kind == "resample":
        return (f"{part}_{level}_{'halve' if part == 'down' else 'double'}",)
    stage = {"first": "0", "second": "1"}.get(kind, kind)
    return f"{part}_{level}_{stage}", BLOCK.get(".".join(inner), ".".join(inner))


@pytest.mark.slow
def test_the_network_that_benchmarks_run_in_pytorch_is_ours(torch, monkeypatch):
    monkeypatch.syspath_prepend("tests/benchmarks")
    theirs = importlib.import_module("annotated_pytorch").Unet(8, (1, 2))
    params = {}
    for name, value in theirs.named_parameters():
        module, _, kind = name.rpartition(".")
        value = value.detach().numpy()
        norm = value.ndim == 1 and kind == "weight"
        if not norm and kind == "weight":
            kind = "kernel"
            value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
        params[(*our_name(module, 2), "scale" if norm else kind)] = value
    params = unflatten_dict(params)
    model = AnnotatedUNet(channels=8, multipliers=(1, 2))
    shapes = param_shapes(model, (8, 8, 1))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    ours = jit(model.apply)({"params": params}, IMAGES, T)
    with torch.no_grad():
        expected = theirs(to_torch(torch, IMAGES), torch.tensor(np.asarray(T)))
    np.testing.assert_allclose(ours, from_torch(expected), rtol=0, atol=2e-5)
