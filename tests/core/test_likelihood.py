"""Bits per dimension against exact entropies, informations and densities."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.oracles import F32, F32_SUM, PIXELS, assert_mean

from jax_diffusion import likelihood, samplers, schedules

MEAN, STD = 0.1, 0.2  # the ends of [-1, 1] are 4.5 sigma away
LONG = schedules.make_schedule(schedules.linear_betas(1000))
SHORT = schedules.make_schedule(schedules.linear_betas(50))
LEAKY = schedules.make_schedule(schedules.linear_betas(50, rescale=False))
RAMP = jnp.asarray(PIXELS, jnp.float32).reshape(4, 64)  # every pixel value once
PER_BIN = math.log2(127.5)  # from bits of a density in [-1, 1] to those of a bin


@jax.jit
def bits(key, rows, schedule, x_0):
    return likelihood.bits_per_dim(key, oracles.affine_denoiser(rows), schedule, x_0)


def gaussian_bits(seed, schedule, x_0):
    """By the exact model of N(MEAN, STD^2)."""
    rows = oracles.gaussian_rows(schedule, MEAN, STD)
    return bits(jax.random.key(seed), rows, schedule, x_0)


def constant_bits(x_0, std):
    """By a model that predicts N(x_0, std^2) of the ramp whatever it sees."""
    rows = jnp.array([[0.0], [x_0], [2 * math.log(std)]]).repeat(50, axis=1)
    return bits(jax.random.key(0), rows, SHORT, RAMP)


def test_every_kl_term_is_the_information_lost_in_its_step():
    """The exact p(x_{t-1} | x_t) pays I(x_0; x_{t-1}) - I(x_0; x_t), no more."""
    x_0 = MEAN + STD * oracles.normal(0, 256, 32)
    vlb = gaussian_bits(1, LONG, x_0).vlb[:, 1:]
    known = oracles.information_bits(LONG, STD)
    assert_mean(vlb, known[:-1] - known[1:])
    assert_mean(vlb.sum(axis=1), known[0] - known[-1])


@pytest.mark.slow
def test_the_bound_of_the_exact_model_is_the_entropy_of_its_pixels():
    probs = oracles.pixel_probs(MEAN, STD)
    pixels = np.random.default_rng(0).choice(256, size=(256, 32), p=probs)
    total = gaussian_bits(2, LONG, jnp.asarray(PIXELS[pixels], jnp.float32)).total
    code_length = -np.log2(probs)[pixels].mean(axis=1)  # its mean is the entropy
    # A rounded x_0 is a little off the model's: KL(N(0, b) || N(0, b) * bin) = 1e-3 at
    # the first step, whose variance b = 1e-4 is 20 times that within a bin.
    assert_mean(np.asarray(total) - code_length, 0.0, bias=2e-3)


@pytest.mark.slow
def test_fewer_steps_cost_bits_only_by_a_variance_that_is_wrong_for_them():
    """The exact p(x_{t-1} | x_t) is Gaussian over any stride. The posterior variance is
    too small for it, as if x_0 were known, and the more so the longer the stride.
    """
    betas = schedules.linear_betas(1000)
    strided = schedules.make_schedule(betas, keep=schedules.spaced_steps(1000, 50))
    x_0 = MEAN + STD * oracles.normal(3, 256, 32)

    def total(schedule, exact):
        rows = oracles.gaussian_rows(schedule, MEAN, STD)
        rows = rows if exact else rows.at[2].set(schedule.posterior_log_var)
        rows = jnp.pad(rows, ((0, 0), (0, 1000 - schedule.num_steps)))
        schedule = schedules.pad(schedule, 1000)  # one program for both
        return np.asarray(bits(jax.random.key(3), rows, schedule, x_0).total)

    exact, small = (total(strided, e) - total(LONG, e) for e in (True, False))
    assert_mean(exact, 0.0)
    assert small.mean() > 0.1


def test_the_decoder_term_is_the_code_length_of_the_pixel():
    decoder = np.asarray(constant_bits(0.2, 0.3).vlb[:, 0], np.float64)
    code_lengths = -np.log2(oracles.pixel_probs(0.2, 0.3)).reshape(4, 64)
    # the mean over each quarter of the pixels, to the accuracy of tanh for the CDF
    np.testing.assert_allclose(decoder[1:], code_lengths[1:].mean(axis=1), rtol=1e-3)
    np.testing.assert_allclose(
        decoder[0], code_lengths[0].mean(), rtol=0.05
    )  # the tail


def test_the_prior_term_has_the_published_size():
    """For E[x_0^2] = 1/4, from the official tables."""
    x_0 = jnp.full((2, 8), 0.5)
    raw = schedules.make_schedule(schedules.linear_betas(200, rescale=False))
    np.testing.assert_allclose(likelihood.prior_bpd(raw, x_0), 0.031, atol=5e-4)
    # a difference of terms of size 1: float32 keeps the first digit
    np.testing.assert_allclose(likelihood.prior_bpd(LONG, x_0), 7.3e-6, atol=5e-7)


def test_the_prior_term_grows_with_the_signal_that_is_left():
    """Between x_0 = 1 and x_0 = 0 lie alpha_bar / 2 nats, as variances are equal."""
    raw = schedules.make_schedule(schedules.linear_betas(200, rescale=False))
    prior = likelihood.prior_bpd(raw, jnp.array([[0.0, 0.0], [1.0, -1.0]]))
    nats = (prior[1] - prior[0]) * math.log(2)
    np.testing.assert_allclose(nats, oracles.alpha_bars(raw)[-1] / 2, **F32_SUM)


def test_the_total_is_the_prior_plus_every_term():
    bpd = gaussian_bits(0, LEAKY, RAMP)
    assert np.all(bpd.prior > 0.2)
    assert bpd.vlb.shape == bpd.x_0_mse.shape == bpd.eps_mse.shape == (4, 50)
    parts = np.column_stack([bpd.prior, bpd.vlb])
    np.testing.assert_allclose(bpd.total, parts.sum(axis=1), **F32_SUM)


def test_errors_in_x_0_and_eps_are_those_of_the_prediction():
    bpd = constant_bits(0.0, 0.5)
    mse = (PIXELS.reshape(4, 64) ** 2).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(bpd.x_0_mse, np.tile(mse, 50), **F32)
    snr = oracles.alpha_bars(SHORT) / oracles.noise_vars(SHORT)
    np.testing.assert_allclose(bpd.eps_mse, mse * snr, rtol=1e-3)  # eps - eps cancels


def test_the_noise_is_new_at_every_timestep():
    """For x_0 = 0, and x_t itself as the prediction, the error is noise^2 eps^2."""
    rows = jnp.array([[1.0], [0.0], [0.0]]).repeat(50, axis=1)
    bpd = bits(jax.random.key(0), rows, SHORT, jnp.zeros((4, 64)))
    excess = np.asarray(bpd.x_0_mse) / oracles.noise_vars(SHORT) - 1
    assert_mean(np.ravel(excess), 0.0)
    assert_mean(np.ravel(excess[:, 1:] * excess[:, :-1]), 0.0)


def test_bits_of_an_image_do_not_depend_on_its_batch():  # B15
    keys = samplers.image_keys(jax.random.key(0), jnp.array([4, 7, 1, 9]))
    rows = oracles.gaussian_rows(SHORT, MEAN, STD)
    together = bits(keys, rows, SHORT, RAMP)
    alone = bits(keys[2:3], rows, SHORT, RAMP[2:3])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[2:3], b, **F32_SUM), together, alone
    )


def test_one_key_for_the_batch_stands_for_one_key_an_image():
    rows, x_0 = oracles.gaussian_rows(SHORT, MEAN, STD), jnp.zeros((4, 64))
    key = jax.random.key(0)
    keys = samplers.image_keys(key, jnp.arange(4))
    bpd, same = bits(key, rows, SHORT, x_0), bits(keys, rows, SHORT, x_0)
    np.testing.assert_array_equal(bpd.vlb, same.vlb)
    assert len(np.unique(bpd.total)) == 4  # equal images, each with its own noise


def test_progressive_coding_pays_from_the_prior_up_to_all_but_the_decoder():
    bpd = gaussian_bits(0, SHORT, RAMP)
    rate, _ = likelihood.progressive_coding(bpd)
    np.testing.assert_allclose(rate[:, -1], bpd.prior, **F32_SUM)
    np.testing.assert_allclose(rate[:, 0] + bpd.vlb[:, 0], bpd.total, **F32_SUM)
    np.testing.assert_allclose(rate[:, :-1] - rate[:, 1:], bpd.vlb[:, 1:], **F32_SUM)
    assert np.all(np.diff(rate, axis=1) <= 1e-5)  # a KL is not negative


@pytest.mark.parametrize("shown", [0, 110])
def test_distortion_is_the_root_mean_squared_error_in_pixel_values(shown):
    _, distortion = likelihood.progressive_coding(constant_bits(PIXELS[shown], 1.0))
    of_row = np.sqrt(((np.arange(256) - shown) ** 2).reshape(4, 64).mean(axis=1))
    np.testing.assert_allclose(distortion, np.tile(of_row[:, None], 50), **F32_SUM)


def test_a_padded_schedule_has_the_same_bound_and_zeros_in_its_rows():
    schedule = schedules.make_schedule(schedules.linear_betas(50, rescale=False))
    padded = schedules.pad(schedule, 70)
    x_0 = jnp.linspace(-1, 1, 24).reshape(2, 12)

    def bound(schedule):
        rows = oracles.gaussian_rows(schedule, 0.1, 0.5)
        return bits(jax.random.key(0), rows, schedule, x_0)

    plain, with_rows = bound(schedule), bound(padded)
    np.testing.assert_allclose(with_rows.total, plain.total, **F32)
    np.testing.assert_allclose(with_rows.prior, plain.prior, **F32)
    np.testing.assert_allclose(with_rows.vlb[:, :50], plain.vlb, **F32)
    assert not np.any(with_rows.vlb[:, 50:])


NUM_ROWS = 201  # padded to so many, every schedule runs in one program
SPREADS = np.geomspace(0.05, 0.6, 8)
APART = np.diag(SPREADS**2)  # independent pixels, each of its own variance
TURN = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
TOGETHER = TURN @ APART @ TURN.T  # the same, turned: the Jacobian is not diagonal
KEYS = samplers.image_keys(jax.random.key(0), jnp.arange(512))


@jax.jit
def ode_bits(keys, rows, schedule, x_0):
    denoise_fn = oracles.normal_denoiser(rows)
    return likelihood.ode_bits_per_dim(keys, denoise_fn, schedule, x_0, probes=4)


def angles(num_steps, *, first=0.01):
    """Levels evenly spaced in log tan(phi / 2), up to the angle phi of pure noise: as
    fine as log-SNR where noise is little, and as the angle where it is much.
    """
    half = np.exp(np.linspace(math.log(math.tan(first / 2)), 0.0, num_steps + 1))
    ratios = np.append(np.tan(2 * np.arctan(half[:-1])), np.inf)
    return schedules.make_schedule(oracles.betas_of_ratios(ratios))


def first_row_var(schedule):
    """The noise that is left in the density that the flow ends in."""
    return oracles.noise_vars(schedule)[0] / oracles.alpha_bars(schedule)[0]


def flow_and_error(schedule, cov):
    """Bits of draws from N(MEAN, cov), and how far they are from those of the density.

    The density is that of the data with the noise of row 0.
    """
    x_0 = MEAN + oracles.normal(5, 512, 8) @ jnp.asarray(np.linalg.cholesky(cov).T)
    padded = schedules.pad(schedule, NUM_ROWS)
    found = ode_bits(KEYS, oracles.normal_rows(padded, MEAN, cov), padded, x_0)
    x = likelihood.dequantize(KEYS, x_0)
    cov = cov + first_row_var(schedule) * np.eye(8)
    exact = oracles.normal_bits(x, MEAN, cov) + PER_BIN
    return found, np.asarray(found.total, np.float64) - exact


def test_dequantized_data_are_uniform_in_their_bins():
    off = np.asarray(likelihood.dequantize(KEYS, jnp.full((512, 8), PIXELS[50])))
    off = (off.astype(np.float64) - PIXELS[50]) * 127.5
    assert np.all(np.abs(off) <= 0.5 + 1e-5)
    oracles.assert_moments(off.ravel(), 0.0, 1 / 12)
    oracles.assert_mean(off.ravel() ** 4, 1 / 80)
    oracles.assert_mean(np.prod(off[:, :2], axis=1), 0.0)


LINEAR = schedules.linear_betas(1000)
NO_SIGNAL = schedules.zero_terminal_snr(LINEAR)  # in its last row


@pytest.mark.parametrize(
    "schedule",
    [
        *(
            schedules.make_schedule(b, keep=schedules.log_snr_steps(b, NUM_ROWS))
            for b in (LINEAR, NO_SIGNAL)
        ),
        angles(200, first=0.8),  # a first row with little signal
    ],
    ids=["linear", "no-signal", "noisy"],
)
def test_the_flow_gives_gaussian_data_their_density(schedule):
    found, error = flow_and_error(schedule, APART)
    assert np.mean(np.abs(error)) < 1e-3
    # random signs find the trace of a diagonal Jacobian exactly
    np.testing.assert_allclose(found.probe_error, 0.0, atol=1e-5)


def test_the_flow_ends_in_the_quantiles_of_the_data():
    """Each pixel, standardized, when no signal is left."""
    x_0, schedule = MEAN + 0.3 * oracles.normal(6, 512, 8), angles(200)
    rows = oracles.normal_rows(schedule, MEAN, 0.09 * np.eye(8))
    found = ode_bits(KEYS, rows, schedule, x_0)
    scale = math.sqrt(0.09 + first_row_var(schedule))
    z = (np.asarray(likelihood.dequantize(KEYS, x_0), np.float64) - MEAN) / scale
    np.testing.assert_allclose(
        found.prior, oracles.normal_bits(z, 0.0, np.eye(8)), rtol=1e-3
    )


@pytest.mark.parametrize("num_steps", [10, 25, 50, 100, 200])
def test_the_step_error_bounds_that_of_the_steps_not_by_much(num_steps):
    found, error = flow_and_error(angles(num_steps), APART)
    assert np.all(np.abs(error) <= found.step_error + 1e-5)
    assert np.mean(found.step_error) < 4 * np.mean(np.abs(error))  # three times it


def test_the_error_of_steps_falls_fourfold_when_they_double():
    errors = [
        np.mean(np.abs(flow_and_error(angles(n), APART)[1])) for n in (25, 50, 100, 200)
    ]
    ratios = np.divide(errors[:-1], errors[1:])
    assert np.all((ratios > 3.5) & (ratios < 5.0)), ratios


def test_probes_are_unbiased_and_tell_their_error():
    found, error = flow_and_error(angles(200), TOGETHER)
    steps = float(np.mean(found.step_error))
    assert_mean(error, 0.0, bias=steps)
    assert np.mean(found.probe_error) > 100 * steps
    # of so many images the square is known within 40 %: a factor of 4, probes, is not
    assert_mean(error**2 - np.square(found.probe_error, dtype=np.float64), 0.0)


@pytest.mark.slow
def test_the_flow_gives_a_mixture_its_density():
    """Pixels of three narrow modes, where the flow is not linear."""
    modes, weights, std = (-0.9, 0.1, 0.6), (0.5, 0.3, 0.2), 0.05
    schedule, rng = angles(200), np.random.default_rng(7)
    x_0 = rng.choice(modes, size=(512, 8), p=weights) + std * rng.normal(size=(512, 8))
    x_0 = jnp.asarray(x_0, jnp.float32)

    @jax.jit
    def total(levels):
        denoise_fn = oracles.mixture_of_levels(levels, modes, weights, std)
        return likelihood.ode_bits_per_dim(KEYS, denoise_fn, schedule, x_0).total

    x = np.asarray(likelihood.dequantize(KEYS, x_0), np.float64)
    var = std**2 + first_row_var(schedule)
    density = sum(
        w * np.exp(-((x - mode) ** 2) / (2 * var)) / math.sqrt(2 * math.pi * var)
        for mode, w in zip(modes, weights, strict=True)
    )
    exact = -np.log2(density).mean(axis=1) + PER_BIN
    error = np.asarray(total(oracles.mixture_levels(schedule, std))) - exact
    assert np.mean(np.abs(error)) < 1e-3


def test_the_flow_needs_the_entropy_of_its_pixels():
    """On average, as a density is flat within bins of 1/25 of STD."""
    probs = oracles.pixel_probs(MEAN, STD)
    pixels = np.random.default_rng(8).choice(256, size=(512, 8), p=probs)
    x_0, schedule = jnp.asarray(PIXELS[pixels], jnp.float32), angles(200)
    rows = oracles.normal_rows(schedule, MEAN, STD**2 * np.eye(8))
    total = np.asarray(ode_bits(KEYS, rows, schedule, x_0).total, np.float64)
    # KL of the noise in row 0, 1/20 of STD, and the error of steps: 1e-3 at most
    assert_mean(total + np.log2(probs)[pixels].mean(axis=1), 0.0, bias=1e-3)


def test_padding_does_not_change_the_flow_and_nothing_is_asked_there():
    schedule = angles(9)  # of steps twice as long the last one is cut off
    padded = schedules.pad(schedule, NUM_ROWS)
    rows, x_0 = oracles.normal_rows(schedule, MEAN, TOGETHER), jnp.zeros((512, 8))

    def with_nan(a):
        extra = (NUM_ROWS - len(a), *a.shape[1:])
        return jnp.concatenate([a, jnp.full(extra, jnp.nan)])

    plain = ode_bits(KEYS, rows, schedule, x_0)
    with_rows = ode_bits(KEYS, jax.tree.map(with_nan, rows), padded, x_0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **F32_SUM), plain, with_rows
    )
    assert np.all(np.isfinite(with_rows.total))


@pytest.mark.slow
def test_the_flow_of_an_image_does_not_depend_on_its_batch():
    schedule, x_0 = angles(200), jnp.zeros((512, 8))
    rows = oracles.normal_rows(schedule, MEAN, TOGETHER)
    together = ode_bits(KEYS, rows, schedule, x_0)
    alone = ode_bits(jax.random.key(0), rows, schedule, x_0[:1])  # stands for KEYS[:1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[:1], b, **F32_SUM), together, alone
    )
    assert len(np.unique(together.total)) > 500  # equal images, each with its own noise


def test_guidance_bends_the_flow():
    """From N(0, s^2) to N(m, s^2), by the difference of their scores."""
    var, x_0 = jnp.asarray(oracles.marginal_vars(SHORT, STD), jnp.float32), RAMP[:, :8]
    free, there = (oracles.gaussian_denoiser(SHORT, m, STD) for m in (0.0, MEAN))

    def guided(x_t, t):
        shift = (SHORT.now.signal[t] * MEAN / var[t])[:, None]
        return free(x_t, t)._replace(grad=jnp.broadcast_to(shift, x_t.shape))

    @jax.jit
    def totals(keys):
        return [
            likelihood.ode_bits_per_dim(keys, denoise_fn, SHORT, x_0).total
            for denoise_fn in (guided, there)
        ]

    np.testing.assert_allclose(*totals(KEYS[:4]), **F32_SUM)


def test_errors_that_cannot_be_told_are_nan():
    schedule = angles(1)
    denoise_fn = oracles.gaussian_denoiser(schedule, MEAN, STD)
    x_0 = jnp.zeros((2, 3))
    bits = jax.jit(functools.partial(likelihood.ode_bits_per_dim, KEYS[:2], denoise_fn))
    found = bits(schedule, x_0)
    assert np.all(np.isfinite(found.total))
    assert np.all(np.isnan(found.step_error)) and np.all(np.isnan(found.probe_error))


def test_there_must_be_a_probe():
    with pytest.raises(ValueError, match=r"probes must be an integer >= 1, got 0\."):
        denoise_fn = oracles.gaussian_denoiser(SHORT, MEAN, STD)
        likelihood.ode_bits_per_dim(KEYS[:4], denoise_fn, SHORT, RAMP, probes=0)
