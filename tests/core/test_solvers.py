"""Single steps of DPM-Solver++(2M) and Heun against their papers; mixtures by all.

Orders of convergence and what every sampler must do are in test_sampler_protocol.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.oracles import F32, F32_SUM, assert_mean, assert_moments, normal

from jax_diffusion import diffusion, samplers, schedules
from jax_diffusion.diffusion import Prediction
from jax_diffusion.samplers import SAMPLERS
from jax_diffusion.samplers.state import marked

WEIGHTS = (0.3, 0.7)
KEYS = samplers.image_keys(jax.random.key(0), jnp.arange(200))
SHORT = schedules.make_schedule(schedules.cosine_betas(10))


def tanh_denoiser(schedule, gain=2.0):
    """Some denoiser that is not linear, with the posterior variance."""

    def denoise(x_t, t):
        log_var = schedules.take(schedule, t, x_t.ndim).posterior_log_var
        return Prediction(jnp.tanh(gain * x_t), log_var)

    return denoise


def step_from(name, schedule, state, t):
    """One step with the denoiser tanh(2 x)."""
    t = jnp.full(state.x.shape[:1], t, jnp.int32)
    keys = KEYS[: state.x.shape[0]]
    return SAMPLERS[name].step(keys, tanh_denoiser(schedule), schedule, state, t)


@functools.cache
def without_signal():
    """Ten steps, of which the last begins without any signal."""
    return schedules.make_schedule(
        schedules.zero_terminal_snr(schedules.cosine_betas(10))
    )


def underway(schedule, t):
    """A state on its way at t, with a prediction made at t + 1."""
    log_snr = jnp.full((4, 1), schedule.now.log_snr[t + 1])
    return samplers.SampleState(normal(0, 4, 6), normal(1, 4, 6), log_snr)


def test_the_first_step_of_dpmpp_2m_is_one_of_ddim():
    state = samplers.start(normal(0, 4, 6))
    two, one = (step_from(name, SHORT, state, 9).x for name in ("dpmpp_2m", "ddim"))
    np.testing.assert_allclose(two, one, **F32)


def test_the_last_step_of_dpmpp_2m_is_one_of_ddim():
    two, one = (
        step_from(name, SHORT, underway(SHORT, 0), 0).x for name in ("dpmpp_2m", "ddim")
    )
    np.testing.assert_allclose(two, one, **F32)


def test_dpmpp_2m_ignores_what_was_predicted_without_signal():
    schedule = without_signal()
    two, one = (
        step_from(name, schedule, underway(schedule, 8), 8).x
        for name in ("dpmpp_2m", "ddim")
    )
    np.testing.assert_allclose(two, one, **F32)


def log_ratios(schedule):
    """log(signal / noise) of every step, in float64."""
    alpha_bar, var = oracles.alpha_bars(schedule), oracles.noise_vars(schedule)
    return (np.log(alpha_bar) - np.log(var)) / 2


@pytest.mark.parametrize("t", [1, 5, 8])
def test_a_step_of_dpmpp_2m_is_that_of_the_paper(t):
    """Lu et al. 2022, algorithm 2, in its own terms: h, r, D and an exponential."""
    state = underway(SHORT, t)
    lam = log_ratios(SHORT)
    alpha, sigma = (
        np.sqrt(oracles.alpha_bars(SHORT)),
        np.sqrt(oracles.noise_vars(SHORT)),
    )
    h = lam[t - 1] - lam[t]
    r = (lam[t] - lam[t + 1]) / h
    x, last = (np.asarray(a, np.float64) for a in (state.x, state.x_0))
    D = (1 + 1 / (2 * r)) * np.tanh(2 * x) - last / (2 * r)
    expected = sigma[t - 1] / sigma[t] * x - alpha[t - 1] * np.expm1(-h) * D
    x_prev = step_from("dpmpp_2m", SHORT, state, t).x
    np.testing.assert_allclose(x_prev, expected, **F32_SUM)
    ddim = step_from("ddim", SHORT, state, t).x
    assert np.abs(ddim - expected).min(axis=-1).max() > 1e-4  # the last x_0 does matter


@pytest.mark.parametrize("t", [1, 5, 9])
def test_a_step_of_heun_is_that_of_the_paper(t):
    """Lu et al. 2022, algorithm 1 with r = 1: the data prediction of DPM-Solver++."""
    state = samplers.start(normal(0, 4, 6))
    alpha, sigma = (
        np.sqrt(oracles.alpha_bars(SHORT)),
        np.sqrt(oracles.noise_vars(SHORT)),
    )
    lam = log_ratios(SHORT)
    h, x = lam[t - 1] - lam[t], np.asarray(state.x, np.float64)
    decay, growth = sigma[t - 1] / sigma[t], -alpha[t - 1] * np.expm1(-h)
    u = decay * x + growth * np.tanh(2 * x)
    expected = decay * x + growth * (np.tanh(2 * x) + np.tanh(2 * u)) / 2
    x_prev = step_from("heun", SHORT, state, t).x
    np.testing.assert_allclose(x_prev, expected, **F32_SUM)
    assert np.abs(x_prev - step_from("ddim", SHORT, state, t).x).max() > 1e-3


def test_the_last_step_of_heun_is_one_of_ddim():
    state = samplers.start(normal(0, 4, 6))
    two, one = (step_from(name, SHORT, state, 0).x for name in ("heun", "ddim"))
    np.testing.assert_array_equal(two, one)


@pytest.mark.parametrize("t", [2, 4, 8])
def test_a_pair_of_calls_of_dpmpp_2s_is_a_step_of_the_paper(t):
    """Lu et al. 2022, algorithm 1, from row t over t - 1, which gives r, to t - 2."""
    state = samplers.start(normal(0, 4, 6))
    signal = np.sqrt(oracles.alpha_bars(SHORT))
    noise, lam = np.sqrt(oracles.noise_vars(SHORT)), log_ratios(SHORT)
    x, h = np.asarray(state.x, np.float64), lam[t - 2] - lam[t]
    r = (lam[t - 1] - lam[t]) / h
    first = np.tanh(2 * x)
    u = noise[t - 1] / noise[t] * x - signal[t - 1] * np.expm1(-r * h) * first
    D = (1 - 1 / (2 * r)) * first + 1 / (2 * r) * np.tanh(2 * u)
    expected = noise[t - 2] / noise[t] * x - signal[t - 2] * np.expm1(-h) * D
    middle = step_from("dpmpp_2s", SHORT, state, t)
    np.testing.assert_allclose(middle.x, u, **F32_SUM)
    end = step_from("dpmpp_2s", SHORT, middle, t - 1)
    np.testing.assert_allclose(end.x, expected, **F32_SUM)


def test_a_pair_of_calls_of_dpmpp_sde_draws_as_one_step_does():
    """With a constant x_0, the two draws are together one of q(x_{t-2} | x_t, x_0)."""
    state, t = samplers.start(jnp.ones((200, 100))), jnp.full(200, 8, jnp.int32)

    def denoise_fn(x_t, t):
        return Prediction(jnp.full_like(x_t, 0.4), jnp.zeros((1, 1)))

    for row in (t, t - 1):
        state = samplers.dpmpp_sde_step(KEYS, denoise_fn, SHORT, state, row)
    alpha_bar = oracles.alpha_bars(SHORT)
    high, low = alpha_bar[8], alpha_bar[6]
    beta = 1 - high / low
    mean = np.sqrt(low) * beta * 0.4 + np.sqrt(high / low) * (1 - low)
    assert_moments(np.ravel(state.x), mean / (1 - high), beta * (1 - low) / (1 - high))


PAIRS = ("dpmpp_2s", "dpmpp_sde", "edm_heun")


@pytest.mark.parametrize("name", PAIRS)
def test_a_chain_that_starts_within_a_pair_takes_a_step_of_first_order(name):
    state = samplers.start(normal(0, 4, 6))
    first_order = "euler_ancestral" if SAMPLERS[name].adds_noise else "ddim"
    two, one = (step_from(n, SHORT, state, 7).x for n in (name, first_order))
    np.testing.assert_allclose(two, one, **F32)


def test_unipc_corrects_the_first_step_to_one_of_heun():
    """Its corrector of order 1 takes the mean of x_0 at both ends; and then goes on."""
    state = samplers.start(normal(0, 4, 6), samplers.unipc_step)
    state = step_from("unipc", SHORT, state, 9)
    heun = step_from("heun", SHORT, samplers.start(normal(0, 4, 6)), 9).x
    x_0 = jnp.tanh(2 * state.x)  # predicted before the correction
    signal = np.sqrt(oracles.alpha_bars(SHORT))
    noise, lam = np.sqrt(oracles.noise_vars(SHORT)), log_ratios(SHORT)
    h, r = lam[7] - lam[8], (lam[8] - lam[9]) / (lam[7] - lam[8])
    D = x_0 + (x_0 - state.x_0) / (2 * r)
    expected = noise[7] / noise[8] * heun - signal[7] * np.expm1(-h) * D
    found = step_from("unipc", SHORT, state, 8).x
    np.testing.assert_allclose(found, expected, **F32_SUM)


@pytest.mark.parametrize("name", ["unipc", "dpmpp_3m_sde"])
def test_a_state_without_the_predictions_that_a_step_reads_is_refused(name):
    said = r"^state must hold earlier predictions, as samplers\.start\(x_T, step_fn\)"
    with pytest.raises(ValueError, match=said):
        step_from(name, SHORT, samplers.start(normal(0, 4, 6)), 7)


@pytest.mark.parametrize("name", ["unipc", "dpmpp_3m_sde"])
def test_earlier_predictions_are_kept_in_order(name):
    state = samplers.start(normal(0, 4, 6), SAMPLERS[name].step)
    seen = []
    for t in (9, 8, 7):
        state = step_from(name, SHORT, state, t)
        seen.insert(0, (state.x_0, state.log_snr))
    for past, (x_0, log_snr) in zip(state.earlier, seen[1:], strict=False):
        np.testing.assert_array_equal(past.x_0, x_0)
        np.testing.assert_array_equal(past.log_snr, log_snr)


WRAPS = {
    "partial": functools.partial,
    "jit": functools.partial(jax.jit, static_argnums=1),
    "jit of a partial": lambda step_fn: jax.jit(functools.partial(step_fn)),
    "a partial of on_step": lambda step_fn: functools.partial(
        samplers.on_step(step_fn, int)
    ),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_wrapped_step_of_ones_own_keeps_its_marks(wrap):
    @marked(num_earlier=3, way=-1)
    def step(keys, denoise_fn, schedule, state, t):
        return samplers.unipc_step(keys, denoise_fn, schedule, state, t)

    x = normal(0, 4, 6)
    assert len(samplers.start(x, wrap(step)).earlier) == 3
    given = KEYS[:4], tanh_denoiser(SHORT), wrap(step), SHORT, x
    with pytest.raises(ValueError, match=r"^ts must go down as step_fn"):
        samplers.sample(*given, ts=jnp.arange(3))


@pytest.mark.parametrize("h", [0.01, 0.3, 0.99, 1.01, 4.0, 40.0, np.inf])
def test_moments_are_integrals_over_an_exact_step(h):
    tau = (np.arange(200_000) + 0.5) / 200_000
    weight = np.exp(min(h, 1e4) * (tau - 1))
    expected = [np.sum(weight * tau**k) / np.sum(weight) for k in (1, 2, 3)]
    found = samplers.steps._moments(jnp.float32(h))
    np.testing.assert_allclose(found, expected, rtol=2e-5 if h < np.inf else 1e-3)


FAR, NARROW = (-0.6, 0.6), 0.1  # modes that are 12 deviations apart


def assert_mixture(x_0, *, bias=0.0):
    """Mean and variance of all, the weights, and mean and variance of each mode.

    `bias` is that of the variance in a mode, from the linear recursion of it.
    """
    x_0, mean = np.ravel(x_0), np.dot(WEIGHTS, FAR)
    var = np.dot(WEIGHTS, np.square(FAR)) - mean**2 + NARROW**2
    assert_moments(x_0, mean, var, bias=bias)
    assert_mean(x_0 > 0, WEIGHTS[1])
    assert_moments(x_0[x_0 > 0], FAR[1], NARROW**2, bias=bias)
    assert_moments(x_0[x_0 < 0], FAR[0], NARROW**2, bias=bias)


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "dpmpp_2s", "unipc", "edm_heun"])
def test_second_order_solvers_give_a_mixture_in_100_steps(name):
    ratios = oracles.log_uniform_ratios(100)
    schedule = schedules.make_schedule(oracles.betas_of_ratios(ratios))
    denoise_fn = oracles.mixture_denoiser(schedule, FAR, WEIGHTS, NARROW)
    step_fn = SAMPLERS[name].step
    sample = functools.partial(samplers.sample, KEYS, denoise_fn, step_fn)
    assert_mixture(jax.jit(sample)(schedule, normal(0, 200, 100)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "var_type, bias", [("fixed_small", 0.00073), ("fixed_large", 0.00016)]
)
def test_ddpm_gives_a_mixture_in_1000_steps_with_either_variance(var_type, bias):
    schedule = schedules.make_schedule(schedules.linear_betas(1000))
    exact = oracles.mixture_denoiser(schedule, FAR, WEIGHTS, NARROW)
    objective = diffusion.Objective("x_0", var_type)

    def denoise_fn(x_t, t):
        return diffusion.predict(schedule, objective, exact(x_t, t).x_0, x_t, t)

    sample = functools.partial(samplers.sample, KEYS, denoise_fn, samplers.ddpm_step)
    assert_mixture(jax.jit(sample)(schedule, normal(0, 200, 100)), bias=bias)


@pytest.mark.slow
@pytest.mark.parametrize("eta, bias", [(0.0, 0.00034), (1.0, 0.00073)])
def test_ddim_gives_a_mixture_in_1000_steps(eta, bias):
    schedule = schedules.make_schedule(schedules.linear_betas(1000))
    denoise_fn = oracles.mixture_denoiser(schedule, FAR, WEIGHTS, NARROW)
    step_fn = functools.partial(samplers.ddim_step, eta=eta)
    sample = functools.partial(samplers.sample, KEYS, denoise_fn, step_fn)
    assert_mixture(jax.jit(sample)(schedule, normal(0, 200, 100)), bias=bias)
