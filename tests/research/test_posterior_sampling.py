"""DPS of a linear measurement of correlated Gaussian data: the posterior is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles

from jax_diffusion import editing, samplers, schedules, spacing

BETAS = schedules.cosine_betas(4000)
SCHEDULE = schedules.make_schedule(BETAS, keep=spacing.angle_steps(BETAS, 100))
MEAN = np.array([0.3, -0.2, 0.1])
COV = np.array([[0.5, 0.3, 0.0], [0.3, 0.4, -0.1], [0.0, -0.1, 0.3]])
A = np.array([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]])  # y = A x_0 + 0.3 eps
Y, NOISE = np.array([0.8, -0.5]), 0.3


@pytest.mark.slow
def test_posterior_sampling_gives_mean_and_covariance_of_a_gaussian_posterior():
    # What x_t leaves open of x_0 counts as noise of the measurement.
    snr = oracles.alpha_bars(SCHEDULE) / oracles.noise_vars(SCHEDULE)
    open_cov = np.linalg.inv(np.linalg.inv(COV) + snr[:, None, None] * np.eye(3))
    precision = np.linalg.inv(A @ open_cov @ A.T + NOISE**2 * np.eye(2))

    def log_likelihood(x_0, t):
        off = x_0 @ jnp.float32(A.T) - jnp.float32(Y)[None]
        return -0.5 * jnp.einsum("bi,bij,bj->b", off, jnp.float32(precision)[t], off)

    denoise_fn = oracles.normal_denoiser(oracles.normal_rows(SCHEDULE, MEAN, COV))

    @jax.jit
    def sample(keys):
        x_T = samplers.normal(keys, (3,))
        chain = keys, denoise_fn, samplers.heun_step, SCHEDULE, x_T
        return editing.dps(*chain, log_likelihood)

    x = sample(samplers.image_keys(jax.random.key(0), jnp.arange(20_000)))
    oracles.assert_normal(x, *oracles.linear_posterior(MEAN, COV, A, Y, NOISE))
