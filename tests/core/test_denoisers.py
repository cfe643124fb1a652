"""Whose network it is does not matter: the core takes functions.

One linear network, eps = W [x, t / T, 1] over the pixels of x, is written as a plain
function, in Flax Linen, in Flax NNX, in Equinox and in Haiku. Losses, samples and
likelihoods must be those of the formula, and gradients those of least squares.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracles import F32_SUM, normal

from jax_diffusion import diffusion, likelihood, losses, samplers, schedules
from jax_diffusion.diffusion import Objective

SHAPE, STEPS, B = (2, 2, 1), 8, 3
PIXELS = 4
SCHEDULE = schedules.make_schedule(schedules.cosine_betas(STEPS))
OBJECTIVE = Objective(var_type="fixed_small")
# W and b, the same in every library.
KERNEL, BIAS = 0.1 * normal(0, PIXELS + 1, PIXELS), 0.1 * normal(1, PIXELS)


def features(x_t, timesteps):
    return jnp.concatenate([x_t.reshape(len(x_t), -1), timesteps[:, None] / STEPS], 1)


# Each gives params and f(params, x_t, timesteps), and where W and b are in params.


def plain():
    def apply(params, x_t, timesteps):
        kernel, bias = params
        return (features(x_t, timesteps) @ kernel + bias[None]).reshape(x_t.shape)

    return (KERNEL, BIAS), apply, lambda params: params


def linen():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x_t, timesteps):
            y = nn.Dense(PIXELS, name="layer")(features(x_t, timesteps))
            return y.reshape(x_t.shape)

    params = {"params": {"layer": {"kernel": KERNEL, "bias": BIAS}}}

    def found(tree):
        return (tree["params"]["layer"][name] for name in ("kernel", "bias"))

    return params, Network().apply, found


def nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(PIXELS + 1, PIXELS, rngs=rngs)

        def __call__(self, x_t, timesteps):
            return self.layer(features(x_t, timesteps)).reshape(x_t.shape)

    graph, state = nnx.split(Network(nnx.Rngs(0)))
    state["layer"]["kernel"].set_value(KERNEL)
    state["layer"]["bias"].set_value(BIAS)

    def apply(state, x_t, timesteps):
        return nnx.merge(graph, state)(x_t, timesteps)

    def found(tree):
        return (tree["layer"][name].get_value() for name in ("kernel", "bias"))

    return state, apply, found


def equinox():
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        layer: eqx.nn.Linear

        def __call__(self, x_t, timesteps):  # of one image, as is usual there
            y = self.layer(features(x_t[None], timesteps[None])[0])
            return y.reshape(x_t.shape)

    layer = eqx.nn.Linear(PIXELS + 1, PIXELS, key=jax.random.key(0))

    def found(tree):
        return tree.layer.weight, tree.layer.bias

    network = eqx.tree_at(found, Network(layer), (KERNEL.T, BIAS))
    params, static = eqx.partition(network, eqx.is_array)

    def apply(params, x_t, timesteps):
        return jax.vmap(eqx.combine(params, static))(x_t, timesteps)

    return params, apply, lambda tree: (tree.layer.weight.T, tree.layer.bias)


def haiku():
    hk = pytest.importorskip("haiku")

    def network(x_t, timesteps):
        y = hk.Linear(PIXELS, name="layer")(features(x_t, timesteps))
        return y.reshape(x_t.shape)

    transformed = hk.without_apply_rng(hk.transform(network))
    params = {"layer": {"w": KERNEL, "b": BIAS}}
    return params, transformed.apply, lambda tree: [tree["layer"][k] for k in "wb"]


libraries = pytest.mark.parametrize(
    "library", [plain, linen, nnx, equinox, haiku], ids=lambda f: f.__name__
)

# Importing other people's libraries may warn.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def formula(x_t, timesteps):
    """The network in NumPy, float64."""
    x = np.asarray(x_t, np.float64).reshape(len(x_t), -1)
    columns = np.concatenate([x, np.asarray(timesteps)[:, None] / STEPS], axis=1)
    y = columns @ np.asarray(KERNEL, np.float64) + np.asarray(BIAS, np.float64)
    return columns, y


X_0, EPS = jnp.clip(normal(2, B, *SHAPE), -1, 1), normal(3, B, *SHAPE)
TS = jnp.array([0, 3, 7], jnp.int32)


@libraries
def test_loss_and_its_gradient_are_those_of_least_squares(library):
    params, apply, found = library()

    @jax.jit
    def loss(params):
        model_fn = functools.partial(apply, params)
        key = jax.random.key(0)
        terms = losses.training_loss(
            key, model_fn, SCHEDULE, OBJECTIVE, X_0, TS, eps=EPS
        )
        return jnp.mean(terms.loss)

    x_t = diffusion.q_sample(SCHEDULE, X_0, TS, EPS)
    columns, y = formula(x_t, TS)
    error = y - np.asarray(EPS, np.float64).reshape(B, -1)
    np.testing.assert_allclose(loss(params), np.mean(error**2), **F32_SUM)
    kernel, bias = found(jax.grad(loss)(params))
    scale = 2 / error.size
    np.testing.assert_allclose(kernel, scale * columns.T @ error, **F32_SUM)
    np.testing.assert_allclose(bias, scale * error.sum(axis=0), **F32_SUM)


def denoiser(apply, params):
    return diffusion.denoiser(functools.partial(apply, params), SCHEDULE, OBJECTIVE)


@libraries
def test_ddim_samples_are_those_of_the_recursion(library):
    params, apply, _ = library()
    keys, x_T = samplers.image_keys(jax.random.key(0), jnp.arange(B)), EPS

    @jax.jit
    def draw(params):
        return samplers.sample(
            keys, denoiser(apply, params), samplers.ddim_step, SCHEDULE, x_T
        )

    alpha_bar = np.cumprod(1 - schedules.cosine_betas(STEPS))
    x = np.asarray(x_T, np.float64).reshape(B, -1)
    for t in reversed(range(STEPS)):
        now, before = alpha_bar[t], alpha_bar[t - 1] if t else 1.0
        _, eps = formula(x, np.full(B, t))
        x_0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
        x = np.sqrt(before) * x_0 + np.sqrt(1 - before) * eps
    # The last beta of a cosine is near 1, and x_0 there a large number.
    scale = np.abs(x).max()
    np.testing.assert_allclose(
        draw(params).reshape(B, -1), x, rtol=0, atol=1e-4 * scale
    )


@pytest.mark.slow
@libraries
def test_bits_per_dim_are_those_of_the_plain_function(library):
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(B))

    def bits(library):
        params, apply, _ = library()

        @jax.jit
        def bound(params):
            denoise_fn = diffusion.clip_x_0(denoiser(apply, params))
            return likelihood.bits_per_dim(keys, denoise_fn, SCHEDULE, X_0)

        return bound(params)

    ours, expected = bits(library), bits(plain)
    assert np.isfinite(ours.total).all()
    for name, value in ours._asdict().items():
        np.testing.assert_allclose(value, getattr(expected, name), **F32_SUM)
