"""A toy to learn: x_0 is 0.5 with chance 0.7, else -0.5. What research code shares."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import diffusion, losses, samplers, schedules

SCHEDULE = schedules.make_schedule(schedules.cosine_betas(50))
OBJECTIVE = diffusion.Objective("v")


def loss(net, key):
    """The training loss of a network on a batch of x_0 [256, 1]."""
    key_x, key_t, key_eps = jax.random.split(key, 3)
    x_0 = jnp.where(jax.random.bernoulli(key_x, 0.7, (256, 1)), 0.5, -0.5)
    t = jax.random.randint(key_t, (256,), 0, 50)
    return losses.training_loss(key_eps, net, SCHEDULE, OBJECTIVE, x_0, t).loss.mean()


def features(x_t, timesteps):
    """[b, 2], what a small network is given."""
    return jnp.concatenate([x_t, timesteps[:, None] / 50], axis=-1)


def sample(net, keys):
    """x [b, 1] of a network."""
    denoise_fn = diffusion.denoiser(net, SCHEDULE, OBJECTIVE)
    x_T = samplers.normal(keys, (1,))
    return samplers.sample(keys, denoise_fn, samplers.ddpm_step, SCHEDULE, x_T)


def assert_learned(history, x, *, within, share):
    """Losses fell, and a `share` of x lies near one of the points, as data do."""
    assert np.mean(history[-50:]) < 0.75 * np.mean(history[:10])
    assert (np.abs(np.abs(x) - 0.5) < within).mean() > share
    assert 0.6 < (np.asarray(x) > 0).mean() < 0.8
