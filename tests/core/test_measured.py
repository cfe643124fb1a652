"""DPS and the twisted particle sampler: Gaussian posteriors on every process."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles, processes
from support.oracles import F32_SUM, assert_mean

from jax_diffusion import editing, samplers, schedules
from jax_diffusion.diffusion import Prediction

RATIOS = np.geomspace(0.005, 50.0, 24)
LEVELS = {kind: processes.levels(kind, RATIOS) for kind in processes.KINDS}
MEAN, STD = np.array([0.3, -0.2]), 0.6  # of data of two values, independent
A, Y, NOISE = np.array([[1.0, 0.5]]), np.array([0.8]), 0.3  # y = A x_0 + 0.3 eps
POSTERIOR = oracles.linear_posterior(MEAN, STD**2 * np.eye(2), A, Y, NOISE)
SPREAD = (A @ A.T)[0, 0] * STD**2 + NOISE**2  # of y
DENSITY = np.exp(-((Y[0] - A[0] @ MEAN) ** 2) / (2 * SPREAD))
DENSITY /= np.sqrt(2 * np.pi * SPREAD)
every_process = pytest.mark.parametrize("kind", LEVELS)


def problem(kind, length=None):
    """Table, exact denoiser, log-likelihood of (x_0, t), and x_T from keys."""
    signal, noise = LEVELS[kind]
    table = processes.schedule_of(signal, noise, length=length)
    rows = np.stack(  # [3, 2, T]
        [processes.gaussian_rows(signal, noise, mean, STD) for mean in MEAN], 1
    )
    rows = jnp.asarray(processes.padded(rows, length or len(signal)))
    left = STD**2 * noise**2 / (signal**2 * STD**2 + noise**2)  # Var x_0 given x_t
    spread = (A @ A.T)[0, 0] * left + NOISE**2
    spread = jnp.float32(processes.padded(spread, len(rows[0, 0])))

    def denoise_fn(x_t, t):
        gain, offset, log_var = jnp.moveaxis(rows[:, :, t], 1, -1)
        return Prediction(gain * x_t + offset, log_var)

    def log_likelihood(x_0, t):
        off = x_0 @ jnp.float32(A[0]) - Y.item()
        return -0.5 * (off**2 / spread[t] + jnp.log(2 * jnp.pi * spread[t]))

    def x_T(keys):
        scale = np.hypot(signal[-1] * STD, noise[-1]).item()
        z = samplers.normal(samplers.fold_in(keys, 99), (2,))
        return jnp.float32(signal[-1] * MEAN)[None] + scale * z

    return table, denoise_fn, log_likelihood, x_T


@every_process
def test_dps_of_a_linear_measurement_gives_the_gaussian_posterior(kind):
    table, denoise_fn, log_likelihood, x_T = problem(kind)

    @jax.jit
    def sample(keys):
        chain = keys, denoise_fn, samplers.heun_step, table, x_T(keys)
        return editing.dps(*chain, log_likelihood)

    x = sample(samplers.image_keys(jax.random.key(0), jnp.arange(4000)))
    oracles.assert_normal(x, *POSTERIOR)


@pytest.mark.parametrize(
    ("kind", "knows_variance"),
    [
        pytest.param(kind, knows, marks=() if kind == "flow" else pytest.mark.slow)
        for kind in LEVELS
        for knows in (True, False)
    ],
)
def test_twisted_smc_gives_posterior_and_evidence_whatever_the_twist(
    kind, knows_variance
):
    table, denoise_fn, log_likelihood, x_T = problem(kind)
    if not knows_variance:  # as if x_0 were what is predicted of it
        exact = log_likelihood
        log_likelihood = lambda x_0: exact(x_0, jnp.zeros(len(x_0), int))  # noqa: E731

    @jax.jit
    @jax.vmap
    def run(key):
        keys = samplers.image_keys(key, jnp.arange(200))
        return editing.twisted_smc(keys, denoise_fn, table, x_T(keys), log_likelihood)

    x, log_evidence = run(jax.random.split(jax.random.key(1), 60))
    mean, cov = POSTERIOR
    off = np.float64(x) - mean
    assert_mean(off.mean(axis=1), 0.0, bias=0.01)  # of 200 particles
    outer = off[..., :, None] * off[..., None, :]
    assert_mean(outer.mean(axis=1), cov, bias=0.01)
    assert_mean(np.exp(np.float64(log_evidence)) / DENSITY, 1.0)


def test_twisted_smc_of_a_padded_schedule_is_the_same():
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(20))
    found = []
    for length in (None, 30):
        table, denoise_fn, log_likelihood, x_T = problem("vp", length)
        chain = keys, denoise_fn, table, x_T(keys)
        run = functools.partial(editing.twisted_smc, *chain)
        found.append(jax.jit(lambda run=run, f=log_likelihood: run(f))())
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, **F32_SUM)


def test_an_evidence_without_steps_towards_y_is_the_mean_likelihood():
    """A likelihood without a gradient only weighs, once for all steps."""
    table, denoise_fn, _, x_T = problem("vp")
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(20))
    chain = keys, denoise_fn, table, x_T(keys)
    x, log_evidence = editing.twisted_smc(*chain, lambda x_0: 0.0 * x_0[:, 0] - 3.0)
    np.testing.assert_allclose(log_evidence, -3.0, **F32_SUM)
    plain = samplers.sample(*chain[:2], samplers.ddpm_step, *chain[2:])
    np.testing.assert_allclose(x, plain, **F32_SUM)


def test_a_likelihood_of_zero_everywhere_is_an_evidence_of_minus_infinity():
    schedule = schedules.make_schedule(schedules.cosine_betas(5))
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(8))
    denoise_fn = oracles.gaussian_denoiser(schedule, 0.0, 1.0)
    x, evidence = editing.twisted_smc(
        *(keys, denoise_fn, schedule, samplers.normal(keys, (1,))),
        lambda x_0: jnp.where(x_0[:, 0] > 1e9, 0.0, -jnp.inf),
    )
    assert evidence == -jnp.inf and np.isfinite(x).all()
