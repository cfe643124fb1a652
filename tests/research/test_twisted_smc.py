"""Twisted sequential Monte Carlo (Wu et al. 2023): particles with weights of their own.

A step of one's own carries log weights through `samplers.sample`, in a state that has
one field more than `SampleState`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from support.oracles import assert_mean, mixture_denoiser

from jax_diffusion import diffusion, guidance, samplers, schedules

SCHEDULE = schedules.make_schedule(schedules.cosine_betas(60))
MODES, WEIGHTS, STD = (-0.8, 0.1, 0.7), (0.5, 0.2, 0.3), 0.15
Y, NOISE = 0.35, 0.3  # y = x_0 + 0.3 eps


class Particles(NamedTuple):
    x: jax.Array
    x_0: jax.Array
    log_snr: jax.Array
    log_twist: jax.Array  # [b], log p(y | x_t) as it is guessed


def log_likelihood(x_0):
    return -0.5 * ((x_0[:, 0] - Y) / NOISE) ** 2


def twisted_step(keys, denoise_fn, schedule, state, t):
    """ddpm_step towards y, then weights for what it did, then resampling."""
    prediction = guidance.posterior(denoise_fn, log_likelihood)(state.x, t)
    mean = diffusion.guided_mean(schedule, prediction._replace(grad=None), state.x, t)
    last, log_var = t[:, None] == 0, prediction.log_var
    var = jnp.where(last, 1.0, jnp.exp(log_var))
    shift = jnp.where(last, 0.0, var * prediction.grad)
    keys = samplers.fold_in(keys, t)
    eps = samplers.normal(keys, (1,))
    x = mean + shift + jnp.where(last, 0.0, jnp.sqrt(var)) * eps

    x_0 = jnp.where(last, x, denoise_fn(x, jnp.maximum(t - 1, 0)).x_0)
    log_twist = log_likelihood(x_0)
    drift = ((x - mean) ** 2 - (x - mean - shift) ** 2) / (2 * var)  # log q - log p
    log_weight = log_twist - state.log_twist - drift[:, 0]
    # Systematic resampling: one random number spaces the survivors evenly.
    first = jax.random.uniform(jax.random.fold_in(keys[0], 1))
    places = (first + jnp.arange(len(t))) / len(t)
    chosen = jnp.searchsorted(jnp.cumsum(jax.nn.softmax(log_weight)), places)
    chosen = jnp.minimum(chosen, len(t) - 1)
    log_snr = schedules.take(schedule, t, 2).now.log_snr
    return Particles(x[chosen], prediction.x_0[chosen], log_snr, log_twist[chosen])


def test_twisted_smc_gives_the_posterior_of_a_mixture():
    denoise_fn = mixture_denoiser(SCHEDULE, MODES, WEIGHTS, STD)

    @jax.jit
    @jax.vmap
    def run(key):
        keys = samplers.image_keys(key, jnp.arange(500))
        x_T = samplers.normal(samplers.fold_in(keys, SCHEDULE.num_steps), (1,))
        first = samplers.start(x_T)
        t = jnp.full(500, SCHEDULE.num_steps - 1)
        log_twist = log_likelihood(denoise_fn(x_T, t).x_0)
        state = Particles(*first, log_twist=log_twist)
        return samplers.sample(keys, denoise_fn, twisted_step, SCHEDULE, state=state).x[
            ..., 0
        ]

    x = np.asarray(run(jax.random.split(jax.random.key(0), 40)), np.float64)
    # Each mode times the likelihood is a normal of variance `var` again.
    var = 1 / (1 / STD**2 + 1 / NOISE**2)
    means = var * (np.array(MODES) / STD**2 + Y / NOISE**2)
    gap = (Y - np.array(MODES)) ** 2 / (2 * (STD**2 + NOISE**2))
    weights = np.array(WEIGHTS) * np.exp(-gap)
    weights /= weights.sum()
    mean = weights @ means
    assert_mean(x.mean(axis=1), mean, bias=0.01)  # of 60 steps and 500 particles
    second = weights @ (means**2 + var)
    assert_mean((x**2).mean(axis=1), second, bias=0.01)
    assert_mean((x < -0.35).mean(axis=1), weights[0], bias=0.01)
