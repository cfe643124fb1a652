"""Diffusion posterior sampling of a linear-Gaussian problem, whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
from support.oracles import K_SIGMA, alpha_bars, normal_denoiser, normal_rows

from jax_diffusion import guidance, samplers, schedules, spacing

BETAS = schedules.cosine_betas(4000)
SCHEDULE = schedules.make_schedule(BETAS, keep=spacing.angle_steps(BETAS, 100))
MEAN = np.array([0.3, -0.2, 0.1])
COV = np.array([[0.5, 0.3, 0.0], [0.3, 0.4, -0.1], [0.0, -0.1, 0.3]])
A = np.array([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]])  # y = A x_0 + 0.3 eps
Y, NOISE = np.array([0.8, -0.5]), 0.3


def test_posterior_sampling_gives_mean_and_covariance_of_a_gaussian_posterior():
    gain = COV @ A.T @ np.linalg.inv(A @ COV @ A.T + NOISE**2 * np.eye(2))
    mean, cov = MEAN + gain @ (Y - A @ MEAN), COV - gain @ A @ COV

    # What x_t leaves open of x_0 counts as noise of the measurement.
    snr = alpha_bars(SCHEDULE) / (1 - alpha_bars(SCHEDULE))
    open_cov = np.linalg.inv(np.linalg.inv(COV) + snr[:, None, None] * np.eye(3))
    precision = np.linalg.inv(A @ open_cov @ A.T + NOISE**2 * np.eye(2))
    precision = jnp.asarray(precision, jnp.float32)

    def log_likelihood(x_0, t):
        off = x_0 @ jnp.asarray(A.T, jnp.float32) - jnp.asarray(Y, jnp.float32)[None]
        return -0.5 * jnp.einsum("bi,bij,bj->b", off, precision[t], off)

    rows = normal_rows(SCHEDULE, MEAN, COV)

    @jax.jit
    def sample(keys):
        denoise_fn = guidance.posterior(normal_denoiser(rows), log_likelihood)
        x_T = samplers.normal(keys, (3,))
        return samplers.sample(keys, denoise_fn, samplers.heun_step, SCHEDULE, x_T)

    num = 20_000
    x = np.asarray(sample(samplers.image_keys(jax.random.key(0), jnp.arange(num))))
    assert np.abs((x.mean(0) - mean) / np.sqrt(np.diag(cov) / num)).max() < K_SIGMA
    sigma = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / num)
    assert np.abs((np.cov(x.T) - cov) / sigma).max() < K_SIGMA
