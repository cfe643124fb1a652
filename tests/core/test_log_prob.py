"""Log densities of data that are no images, against closed forms, on every process."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles, processes

from jax_diffusion import diffusion, likelihood, samplers, schedules

# From far below the data's finest detail, as in `test_likelihood.angles`. EDM's end in
# noise of 10,000: in that of 500, a mean of 3 would still cost 0.006 nats a sigma.
HALVES = np.exp(np.linspace(math.log(math.tan(5e-4)), 0.0, 401))[:-1]
RATIOS = np.append(np.tan(2 * np.arctan(HALVES)), 1e3)
KEY = jax.random.key(0)
MEAN = np.array([0.5, -2.0, 3.0])  # no pixels: beyond [-1, 1]
TURN = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
COV = TURN @ np.diag([0.1, 0.5, 2.0]) ** 2 @ TURN.T
DRAWS = np.random.default_rng(1).multivariate_normal(MEAN, COV, 64).astype(np.float32)
MODES, WEIGHTS, STD = (-2.0, 0.5, 3.0), (0.5, 0.3, 0.2), 0.2
kinds = pytest.mark.parametrize("kind", processes.KINDS)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def table(kind):
    return processes.levels(kind, RATIOS, no_signal=True)


def gaussian_rows(kind):
    """E[x_0 | x_t] = gain x_t + offset for N(MEAN, COV) on any levels."""
    signal, noise = (a[:, None, None] for a in table(kind))
    gains = signal * np.linalg.solve(signal**2 * COV + noise**2 * np.eye(3), COV)
    offsets = MEAN - signal[..., 0] * (gains @ MEAN)
    return np.float32(gains), np.float32(offsets)


@functools.partial(jit, static_argnames=("probes", "per_dim"))
def gaussian(rows, schedule, x_0, **options):
    rows = jax.tree.map(jnp.asarray, rows)
    denoise_fn = oracles.normal_denoiser(rows)
    return likelihood.ode_log_prob(KEY, denoise_fn, schedule, x_0, **options)


def found(kind, **options):
    schedule = processes.schedule_of(*table(kind))
    return gaussian(gaussian_rows(kind), schedule, DRAWS, **options)


def exact_gaussian():
    return -3 * math.log(2) * oracles.normal_bits(DRAWS, MEAN, COV)


@kinds
def test_correlated_gaussian_data_have_their_log_density(kind):
    log_prob = found(kind)
    error = np.asarray(log_prob.total) - exact_gaussian()
    assert np.max(np.abs(error)) < 3 * 1e-3  # of three dimensions
    assert not np.any(log_prob.probe_error)


def test_per_dimension_is_a_third_of_three_dimensions():
    whole, shared = found("flow"), found("flow", per_dim=True)
    for a, b in zip(whole, shared, strict=True):
        np.testing.assert_allclose(a, 3 * b, rtol=1e-5)


def test_probes_estimate_the_divergence_without_bias_and_tell_their_error():
    log_prob = found("edm", probes=16)
    error = np.asarray(log_prob.total, np.float64) - exact_gaussian()
    oracles.assert_mean(error, 0.0, bias=3e-3)
    told = np.square(log_prob.probe_error, dtype=np.float64)
    oracles.assert_mean(error**2 - told, 0.0, bias=1e-3)
    assert np.mean(told) > 0.05


@kinds
def test_a_mixture_in_sequences_has_its_log_density(kind):
    rng = np.random.default_rng(2)
    x_0 = rng.choice(MODES, (64, 2, 1), p=WEIGHTS) + STD * rng.normal(size=(64, 2, 1))
    levels = processes.mixture_levels(*table(kind), STD)
    log_prob = mixture(levels, processes.schedule_of(*table(kind)), np.float32(x_0))
    off = x_0[..., None] - np.array(MODES)
    peaks = np.exp(-(off**2) / (2 * STD**2)) / math.sqrt(2 * math.pi * STD**2)
    exact = np.log(peaks @ np.array(WEIGHTS)).sum((1, 2))
    assert np.mean(np.abs(log_prob.total - exact)) < 2 * 1e-3


@jit
def mixture(levels, schedule, x_0):
    denoise_fn = oracles.mixture_of_levels(jnp.asarray(levels), MODES, WEIGHTS, STD)
    return likelihood.ode_log_prob(KEY, denoise_fn, schedule, x_0)


def test_examples_that_are_mapped_have_the_densities_of_the_batch():
    def one(x):
        return gaussian(rows, schedule, x[None]).total[0]

    rows, schedule = gaussian_rows("vp"), processes.schedule_of(*table("vp"))
    mapped = jax.vmap(one)(jnp.asarray(DRAWS))
    np.testing.assert_allclose(mapped, found("vp").total, rtol=1e-4, atol=1e-4)


def test_noise_of_the_first_row_blurs_the_density_as_the_docstring_says():
    signal, noise = (a[250:] for a in table("edm"))
    assert 0.1 < noise[0] < 0.2
    rows = jax.tree.map(lambda a: a[250:], gaussian_rows("edm"))
    schedule = processes.schedule_of(signal, noise)
    log_prob = gaussian(rows, schedule, DRAWS, per_dim=True)
    cov = COV + noise[0] ** 2 * np.eye(3)
    exact = -math.log(2) * oracles.normal_bits(DRAWS, MEAN, cov)
    assert np.max(np.abs(log_prob.total - exact)) < 1e-3


SHORT = schedules.from_levels(*schedules.flow_levels(4))
LAST = schedules.schedule_at(schedules.time_levels(jnp.array([0.5, 0.7])))
REFUSED = {
    "NaN": (dict(x_0=jnp.full((2, 3), jnp.nan)), "x_0 must be finite, got NaN or "),
    "probes": (dict(probes=0), "probes must be an integer >= 1, got 0."),
    "continuous time": (dict(schedule=LAST), "schedule must be a chain"),
    "keys": (dict(key=jax.random.split(KEY, 3)), "key must be an array of typed keys"),
}


@pytest.mark.parametrize(("wrong", "begins"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_do_not_fit_are_refused(wrong, begins):
    def denoise_fn(x_t, t):
        return diffusion.Prediction(0 * x_t, x_t)

    given = dict(key=KEY, schedule=SHORT, x_0=jnp.ones((2, 3))) | wrong
    order = given.pop("key"), denoise_fn, given.pop("schedule"), given.pop("x_0")
    with pytest.raises(ValueError) as error:
        likelihood.ode_log_prob(*order, **given)
    assert str(error.value).startswith(begins) and "\n" not in str(error.value)


def test_keys_of_each_example_stand_for_the_key_of_the_batch():
    keys = samplers.image_keys(KEY, jnp.arange(2))
    denoise_fn = oracles.wide_denoiser
    call = functools.partial(likelihood.ode_log_prob, probes=2)
    one, many = (call(k, denoise_fn, SHORT, jnp.ones((2, 3))) for k in (KEY, keys))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_array_equal(a, b)
