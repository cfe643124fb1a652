"""Twisted sequential Monte Carlo (Wu et al. 2023): the posterior of a mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracles import assert_mean, mixture_denoiser

from jax_diffusion import editing, samplers, schedules

SCHEDULE = schedules.make_schedule(schedules.cosine_betas(60))
MODES, WEIGHTS, STD = np.array([-0.8, 0.1, 0.7]), np.array([0.5, 0.2, 0.3]), 0.15
Y, NOISE = 0.35, 0.3  # y = x_0 + 0.3 eps


@pytest.mark.slow
def test_twisted_smc_gives_the_posterior_of_a_mixture():
    denoise_fn = mixture_denoiser(SCHEDULE, MODES, WEIGHTS, STD)

    def log_likelihood(x_0):
        return -0.5 * ((x_0[:, 0] - Y) / NOISE) ** 2

    @jax.jit
    @jax.vmap
    def run(key):
        keys = samplers.image_keys(key, jnp.arange(500))
        x_T = samplers.normal(samplers.fold_in(keys, SCHEDULE.num_steps), (1,))
        return editing.twisted_smc(keys, denoise_fn, SCHEDULE, x_T, log_likelihood)[0]

    x = np.float64(run(jax.random.split(jax.random.key(0), 40)))[..., 0]
    # Each mode times the likelihood is a normal of variance `var` again.
    var = 1 / (1 / STD**2 + 1 / NOISE**2)
    means = var * (MODES / STD**2 + Y / NOISE**2)
    weights = WEIGHTS * np.exp(-((Y - MODES) ** 2) / (2 * (STD**2 + NOISE**2)))
    weights /= weights.sum()
    # The bias is that of 60 steps and 500 particles.
    assert_mean(x.mean(axis=1), weights @ means, bias=0.01)
    assert_mean((x**2).mean(axis=1), weights @ (means**2 + var), bias=0.01)
    assert_mean((x < -0.35).mean(axis=1), weights[0], bias=0.01)
