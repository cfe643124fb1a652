"""The U-Net on sequences [b, n, c] and volumes [b, d, h, w, c], through the core."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.oracles import F32_SUM, normal
from support.tiny_runs import random_params

from jax_diffusion import diffusion, losses, samplers, schedules
from jax_diffusion.models import bind
from jax_diffusion.models.unet import UNet

# LLVM's optimization is most of the time that a network takes here, and gains nothing.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

MODEL = UNet(
    channels=8,
    num_groups=4,
    multipliers=(1, 2),
    num_res_blocks=0,
    attention_resolutions=(),
    out_channels=2,
)
SHAPES = {"sequence": (16, 2), "volume": (3, 4, 4, 2)}  # an odd depth stays as it is
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
S = schedules.make_schedule(schedules.cosine_betas(10))
X_0 = diffusion.Objective("x_0")


@pytest.mark.slow
@shapes
def test_every_position_of_a_sequence_or_volume_attends_to_every_other(shape):
    params, t = random_params(MODEL, shape), jnp.array([3.0, 900.0])
    model_fn = jit(bind(MODEL, params, None))
    x = normal(1, 2, *shape)
    y = model_fn(x, t)
    assert y.shape == x.shape and y.dtype == jnp.float32
    corner = (0,) * (x.ndim - 1)  # of the first example
    moved = np.abs(model_fn(x.at[corner].add(5.0), t) - y)
    assert (moved[0] > 0).all() and moved[1].max() == 0
    swapped = model_fn(x[::-1], t[::-1])[::-1]
    np.testing.assert_allclose(swapped, y, **F32_SUM)


@pytest.mark.slow
@shapes
def test_sequences_and_volumes_are_learned_and_drawn(shape):
    pattern = np.random.default_rng(0).choice([-0.5, 0.5], shape).astype(np.float32)
    x_0, tx = jnp.broadcast_to(pattern, (4, *shape)), optax.adam(1e-2)

    def loss(params, key):
        key_t, key_eps = jax.random.split(key)
        t = jax.random.randint(key_t, (4,), 0, S.num_steps)
        model_fn = bind(MODEL, params, None)
        terms = losses.training_loss(key_eps, model_fn, S, X_0, x_0, t)
        return jnp.mean(terms.loss)

    @jit
    def update(params, state, key):
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    params = random_params(MODEL, shape)
    state, found = tx.init(params), []
    for i in range(100):
        params, state, value = update(params, state, jax.random.key(i))
        found.append(float(value))
    assert np.mean(found[-10:]) < 0.05 < found[0]  # 0.25 for an output of zero

    @jit
    def draw(params, keys):
        denoise_fn = diffusion.denoiser(bind(MODEL, params, None), S, X_0)
        x_T = samplers.normal(keys, shape)
        return samplers.sample(keys, denoise_fn, samplers.ddim_step, S, x_T)

    keys = samplers.image_keys(jax.random.key(1), jnp.arange(4))
    drawn = draw(params, keys)
    assert drawn.shape == (4, *shape)
    assert np.sqrt(np.mean((drawn - pattern[None]) ** 2)) < 0.2
    alone = draw(params, keys[2:3])  # whoever is drawn beside it
    np.testing.assert_allclose(alone[0], drawn[2], rtol=0, atol=1e-4)
