"""Truths in closed form, in NumPy float64, and the tolerances that tests may use.

Nothing here shares a formula with the package. Of a schedule only `betas` is read, so
that a wrong table cannot excuse itself.
"""

import math

import jax.numpy as jnp
import numpy as np

from jax_diffusion.diffusion import Prediction

F32 = dict(rtol=1e-5, atol=1e-6)  # one operation in float32
F32_SUM = dict(rtol=1e-4, atol=1e-5)  # reductions, and scans over many steps
PARITY = dict(rtol=1e-3, atol=1e-4)  # whole networks against PyTorch

K_SIGMA = 5.0  # once in two million if the claim holds; and keys are fixed


def assert_mean(draws, expected, *, bias=0.0):
    """The mean of independent draws, along axis 0, is `expected` within 5 sigma.

    `bias` is added to that where the claim itself holds only so far.
    """
    draws = np.asarray(draws, np.float64)
    sigma = draws.std(axis=0) / math.sqrt(len(draws))
    error = np.abs(draws.mean(axis=0) - expected)
    allowed = K_SIGMA * sigma + bias + 1e-6  # and the rounding of float32
    assert np.all(error <= allowed), f"off by {np.max(error / allowed):.2f} x allowed"


def assert_moments(draws, mean, var, *, bias=0.0):
    """Independent draws have this mean and variance within 5 sigma."""
    draws, mean = np.asarray(draws, np.float64), np.asarray(mean)
    assert_mean(draws, mean, bias=bias)
    assert_mean((draws - mean) ** 2, np.asarray(var), bias=bias)


def alpha_bars(schedule):
    """alpha_bar of every step, accurate where it is near 1."""
    betas = np.asarray(schedule.betas, np.float64)
    with np.errstate(divide="ignore"):
        return np.exp(np.cumsum(np.log1p(-betas)))


def noise_vars(schedule):
    """1 - alpha_bar of every step, accurate where it is near 0."""
    betas = np.asarray(schedule.betas, np.float64)
    with np.errstate(divide="ignore"):
        return -np.expm1(np.cumsum(np.log1p(-betas)))


def gaussian_denoiser(schedule, mean, std):
    """The exact denoiser for data N(mean, std^2).

    x_{t-1} and x_t are jointly Gaussian: Var[x_{t-1} | x_t] = beta Var x_{t-1} / Var
    x_t. Together with E[x_0 | x_t] that is the exact p(x_{t-1} | x_t) of the data.
    """
    signal, var = np.sqrt(alpha_bars(schedule)), marginal_vars(schedule, std)
    var_prev = np.append(std**2, var[:-1])
    gain = signal * std**2 / var
    betas = np.asarray(schedule.betas, np.float64)
    log_var = np.log(np.maximum(betas * var_prev / var, 1e-30))
    return _affine_denoiser(gain, mean - gain * signal * mean, log_var)


def _affine_denoiser(gain, offset, log_var):
    """x_0 = gain x_t + offset, elementwise."""
    rows = jnp.asarray(np.stack([gain, offset, log_var]), jnp.float32)

    def denoise(x_t, t):
        gain, offset, log_var = rows[:, t].reshape((3, -1) + (1,) * (x_t.ndim - 1))
        return Prediction(gain * x_t + offset, log_var)

    return denoise


def mixture_denoiser(schedule, modes, weights, std):
    """The exact E[x_0 | x_t] for one-dimensional data sum_k w_k N(m_k, std^2).

    Its variance is the one for a single mode: exact as steps grow many.
    """
    signal, var = np.sqrt(alpha_bars(schedule)), marginal_vars(schedule, std)
    log_weights = jnp.log(jnp.asarray(weights, jnp.float32))
    singles = [gaussian_denoiser(schedule, mode, std) for mode in modes]
    signal, var = jnp.asarray(signal, jnp.float32), jnp.asarray(var, jnp.float32)

    def denoise(x_t, t):
        shape = (-1,) + (1,) * (x_t.ndim - 1)
        signal_t, var_t = signal[t].reshape(shape), var[t].reshape(shape)
        logits = jnp.stack(
            [
                log_weight - (x_t - signal_t * mode) ** 2 / (2 * var_t)
                for log_weight, mode in zip(log_weights, modes, strict=True)
            ]
        )
        chance = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
        chance = chance / jnp.sum(chance, axis=0, keepdims=True)
        predictions = [single(x_t, t) for single in singles]
        x_0 = sum(c * p.x_0 for c, p in zip(chance, predictions, strict=True))
        return Prediction(x_0, predictions[0].log_var)

    return denoise


def marginal_vars(schedule, std):
    """Var x_t of every step, for data of this standard deviation."""
    return alpha_bars(schedule) * std**2 + noise_vars(schedule)


def ode_end(schedule, mean, std, x_T):
    """Where the probability-flow ODE takes x_T, for data N(mean, std^2).

    The flow is monotone and keeps quantiles, so x_T's z-score becomes that of x_0.
    """
    signal = np.sqrt(alpha_bars(schedule)[-1])
    z = (np.asarray(x_T, np.float64) - signal * mean) / np.sqrt(
        marginal_vars(schedule, std)[-1]
    )
    return mean + std * z


def information_bits(schedule, std):
    """I(x_0; x_t) in bits of every step, for data of this standard deviation.

    Row 0 minus the last row is what all KL terms sum to, the chain being Markov.
    """
    snr = alpha_bars(schedule) / noise_vars(schedule)
    return 0.5 * np.log1p(std**2 * snr) / math.log(2)


PIXELS = np.arange(256) / 127.5 - 1  # the values of 8-bit data


def normal_cdf(z):
    return 0.5 * (1 + np.vectorize(math.erf)(np.asarray(z, np.float64) / math.sqrt(2)))


def pixel_probs(mean, std):
    """[256] chance of every 8-bit value when N(mean, std^2) is rounded to it."""
    edges = (PIXELS[1:] + PIXELS[:-1]) / 2
    cdf = normal_cdf((edges - mean) / std)
    return np.diff(np.concatenate([[0.0], cdf, [1.0]]))


def entropy_bits(probs):
    """Entropy in bits: no code needs fewer on average."""
    probs = probs[probs > 0]
    return -np.sum(probs * np.log2(probs))
