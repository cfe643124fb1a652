"""Bits per dimension against exact entropies and informations of Gaussian data."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import F32, F32_SUM, PIXELS, assert_mean

from jax_diffusion import likelihood, samplers, schedules

MEAN, STD = 0.1, 0.2  # the ends of [-1, 1] are 4.5 sigma away
LONG = schedules.make_schedule(schedules.linear_betas(1000))
SHORT = schedules.make_schedule(schedules.linear_betas(50))
LEAKY = schedules.make_schedule(schedules.linear_betas(50, rescale=False))
RAMP = jnp.asarray(PIXELS, jnp.float32).reshape(4, 64)  # every pixel value once


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


def test_the_bound_of_the_exact_model_is_the_entropy_of_its_pixels():
    probs = oracles.pixel_probs(MEAN, STD)
    pixels = np.random.default_rng(0).choice(256, size=(256, 32), p=probs)
    total = gaussian_bits(2, LONG, jnp.asarray(PIXELS[pixels], jnp.float32)).total
    code_length = -np.log2(probs)[pixels].mean(axis=1)  # its mean is the entropy
    # A rounded x_0 is a little off the model's: KL(N(0, b) || N(0, b) * bin) = 1e-3 at
    # the first step, whose variance b = 1e-4 is 20 times that within a bin.
    assert_mean(np.asarray(total) - code_length, 0.0, bias=2e-3)


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
        denoise_fn = oracles.gaussian_denoiser(schedule, 0.1, 0.5)
        return likelihood.bits_per_dim(jax.random.key(0), denoise_fn, schedule, x_0)

    plain, with_rows = bound(schedule), bound(padded)
    np.testing.assert_allclose(with_rows.total, plain.total, **F32)
    np.testing.assert_allclose(with_rows.prior, plain.prior, **F32)
    np.testing.assert_allclose(with_rows.vlb[:, :50], plain.vlb, **F32)
    assert not np.any(with_rows.vlb[:, 50:])
