"""lucidrains' U-Net: its layers against PyTorch's and closed forms, its size, and what
must hold of any network."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracles import F32_SUM, assert_mean, assert_moments, normal

from jax_diffusion.models.lucidrains import (
    Block,
    LucidrainsUNet,
    MemoryAttention,
    RMSNorm,
    pixel_unshuffle,
)

# LLVM's optimization is most of the time that a network takes here, and gains nothing.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

HEADS = dict(num_heads=2, head_dim=4)
SMALL = dict(channels=8, multipliers=(1, 2), **HEADS)

X = normal(1, 2, 6, 4, 8)
IMAGES = normal(2, 2, 8, 8, 3)
T = jnp.array([7.0, 400.0])


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def param_shapes(model, image_shape):
    x, t = jnp.zeros((1, *image_shape)), jnp.zeros(1)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), x, t))["params"]


def random_like(shapes):
    """Weights of the right size from NumPy: JAX compiles anew for every shape."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.ndim == 1:  # biases and norms: not at zero or one, to be seen
            return jnp.asarray(rng.uniform(0.1, 1.0, leaf.shape), jnp.float32)
        draws = rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5
        return jnp.asarray(draws, jnp.float32)

    return jax.tree.map(draw, shapes)


@functools.cache
def random_params():
    return random_like(param_shapes(LucidrainsUNet(**SMALL), (8, 8, 3)))


@functools.cache
def compiled(dtype):
    model = LucidrainsUNet(**SMALL, dtype=dtype)
    return jit(lambda params, x, t: model.apply({"params": params}, x, t))


def apply(params, x=IMAGES, t=T, dtype=jnp.float32):
    return compiled(dtype)(params, x, t)


def random_module(module, *args):
    """A module with random weights as a function of its inputs, and the weights."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]
    params = random_like(shapes)
    return functools.partial(module.apply, {"params": params}), params


def to_torch(torch, x):
    """An image, channels first."""
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))


def from_torch(x):
    return np.moveaxis(x.numpy(), 1, -1)


def kernel_to_torch(torch, kernel):
    return torch.tensor(np.asarray(kernel).transpose(3, 2, 0, 1))


# Its layers


@pytest.mark.slow
def test_pixels_become_channels_in_the_order_of_pytorch(torch):
    theirs = torch.nn.functional.pixel_unshuffle(to_torch(torch, X), 2)
    np.testing.assert_array_equal(pixel_unshuffle(X), from_torch(theirs))


@pytest.mark.slow
def test_norm_is_pytorchs_normalize_times_gain_and_root_of_channels(torch):
    norm, params = random_module(RMSNorm(), X)
    theirs = torch.nn.functional.normalize(to_torch(torch, X), dim=1)
    expected = from_torch(theirs) * np.asarray(params["scale"]) * 8**0.5
    np.testing.assert_allclose(norm(X), expected, **F32_SUM)


def test_norm_of_black_pixels_is_zero_with_a_finite_gradient():
    norm, _ = random_module(RMSNorm(), X)
    y, grad = jax.value_and_grad(lambda x: norm(x).sum())(jnp.zeros((1, 1, 1, 8)))
    assert y == 0 and jnp.all(jnp.isfinite(grad))


def torch_qkv(torch, params):
    """Queries, and keys and values with the memory first: [b, head, n, d] of X."""
    h = torch.nn.functional.normalize(to_torch(torch, X), dim=1) * 8**0.5
    h = h * torch.tensor(np.array(params["norm"]["scale"])).reshape(1, 8, 1, 1)
    h = torch.nn.functional.conv2d(h, kernel_to_torch(torch, params["qkv"]["kernel"]))
    q, k, v = h.reshape(2, 3, 2, 4, 6 * 4).transpose(-1, -2).unbind(1)
    memory = torch.tensor(np.array(params["memory"])).transpose(1, 2)
    memory = memory[:, None].expand(2, 2, 2, 4, 4)  # kind, b, head, n, d
    return q, torch.cat([memory[0], k], 2), torch.cat([memory[1], v], 2)


def torch_out(torch, h, params):
    kernel, bias = (
        params["out"]["kernel"],
        torch.tensor(np.array(params["out"]["bias"])),
    )
    h = h.transpose(-1, -2).reshape(2, 8, 6, 4)
    return torch.nn.functional.conv2d(h, kernel_to_torch(torch, kernel), bias)


@pytest.mark.slow
def test_full_attention_is_that_of_pytorch_with_the_memory_among_keys(torch):
    attention, params = random_module(MemoryAttention(**HEADS), X)
    q, k, v = torch_qkv(torch, params)
    h = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    expected = X + from_torch(torch_out(torch, h, params))
    np.testing.assert_allclose(attention(X), expected, **F32_SUM)


@pytest.mark.slow
def test_linear_attention_weighs_pixels_and_memory_by_products_of_softmaxes(torch):
    attention, params = random_module(MemoryAttention(linear=True, **HEADS), X)
    q, k, v = (a.double() for a in torch_qkv(torch, params))
    weights = q.softmax(-1) @ k.softmax(-2).transpose(-1, -2)
    assert weights.shape == (2, 2, 24, 24 + 4)
    np.testing.assert_allclose(weights.sum(-1), 1)
    h = torch_out(torch, (weights @ v / 4**0.5).float(), params)
    h = torch.nn.functional.normalize(h, dim=1) * 8**0.5
    scale = np.asarray(params["norm_out"]["scale"])
    np.testing.assert_allclose(attention(X), X + from_torch(h) * scale, **F32_SUM)


def test_block_is_modulated_inside_its_first_half():
    emb = normal(3, 2, 16)
    block, params = random_module(Block(channels=8), X, emb, False)
    # A scale of -1 and no shift silence the first half, whatever x.
    bias = jnp.concatenate([-jnp.ones(8), jnp.zeros(8)])
    params["emb"] = {"kernel": jnp.zeros((16, 16)), "bias": bias}
    # What is left is the second half of a constant.
    params["norm_out"]["scale"] = jnp.ones(8)
    b = params["conv_out"]["bias"]
    constant = nn.silu(b / jnp.linalg.norm(b) * 8**0.5)
    y = block(X, emb, False)
    np.testing.assert_allclose(y - X, jnp.broadcast_to(constant, X.shape), **F32_SUM)


def test_dropout_drops_its_share_between_the_halves_when_training_only():
    emb = jnp.zeros((2, 16))
    block, params = random_module(Block(channels=8, dropout=0.25), X, emb, False)
    # The last convolution passes on its input, and the norm keeps what is zero.
    identity = jnp.zeros((3, 3, 8, 8)).at[1, 1].set(jnp.eye(8))
    params["conv_out"] = {"kernel": identity, "bias": jnp.zeros(8)}
    dropped = block(X, emb, True, rngs={"dropout": jax.random.key(0)}) - X
    kept = block(X, emb, False) - X
    seen = jnp.abs(kept) > 1e-3
    assert_mean((jnp.abs(dropped) > 1e-5)[seen], 0.75)


# Its size and start


@pytest.mark.parametrize(
    ("out_channels", "expected"), [(3, 35_711_491), (6, 35_711_491 + 3 * (64 + 1))]
)
def test_published_network_has_its_number_of_parameters(out_channels, expected):
    params = param_shapes(LucidrainsUNet(out_channels=out_channels), (32, 32, 3))
    assert sum(p.size for p in jax.tree.leaves(params)) == expected
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_attention_is_linear_but_for_the_innermost_level_and_the_middle():
    shapes = param_shapes(
        LucidrainsUNet(**SMALL | dict(multipliers=(1, 2, 3))), (8, 8, 3)
    )
    attentions = {name: p for name, p in shapes.items() if "attention" in name}
    full = {name for name, p in attentions.items() if "norm_out" not in p}
    assert full == {"down_2_attention", "mid_attention", "up_2_attention"}
    assert len(attentions) == 7


def test_layers_start_uniform_and_the_memory_normal():
    init = jit(MemoryAttention(linear=True).init)
    params = jax.device_get(init(jax.random.key(0), X)["params"])
    assert_moments(params["memory"].ravel(), 0, 1)
    for name, fan_in in dict(qkv=8, out=128).items():
        draws = np.concatenate([p.ravel() for p in params[name].values()]) * fan_in**0.5
        assert np.abs(draws).max() <= 1 + 1e-6
        assert_moments(draws, 0, 1 / 3)


# What must hold of any network


@pytest.mark.slow
def test_stem_reaches_the_last_block_past_all_levels():
    params = dict(random_params())
    params["up_0_narrow"] = jax.tree.map(jnp.zeros_like, params["up_0_narrow"])
    y, y_other = (apply(params, x) for x in (IMAGES, -IMAGES))
    assert jnp.abs(y_other - y).max() > 1e-3
