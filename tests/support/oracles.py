"""Truths in closed form, in NumPy float64, and the tolerances that tests may use.

Nothing here shares a formula with the package. Of a schedule only `betas` is read, so
that a wrong table cannot excuse itself.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion.diffusion import Prediction

F32 = dict(rtol=1e-5, atol=1e-6)  # one operation in float32
F32_SUM = dict(rtol=1e-4, atol=1e-5)  # reductions, and scans over many steps

K_SIGMA = 5.0  # once in two million if the claim holds; and keys are fixed


def normal(seed, *shape):
    """Standard normal float32 from NumPy: jax.random compiles anew for every shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


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
    """Independent draws have this mean and variance (to `bias`) within 5 sigma."""
    draws, mean = np.asarray(draws, np.float64), np.asarray(mean)
    assert_mean(draws, mean)
    assert_mean((draws - mean) ** 2, np.asarray(var), bias=bias)


def assert_normal(draws, mean, cov):
    """Independent draws [n, d] have this mean and covariance within 5 sigma."""
    draws, var = np.asarray(draws, np.float64), np.diag(cov)
    error = (draws.mean(axis=0) - mean) / np.sqrt(var / len(draws))
    assert np.abs(error).max() < K_SIGMA, error
    sigma = np.sqrt((np.outer(var, var) + cov**2) / len(draws))
    error = (np.cov(draws.T) - cov) / sigma
    assert np.abs(error).max() < K_SIGMA, error


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


def gaussian_rows(schedule, mean, std):
    """The exact denoiser for data N(mean, std^2), as [3, T]: gain, offset, log_var.

    E[x_0 | x_t] = gain x_t + offset. x_{t-1} and x_t are jointly Gaussian, so that
    Var[x_{t-1} | x_t] = beta Var x_{t-1} / Var x_t. Both together are the data's own
    p(x_{t-1} | x_t), whatever the number of steps.
    """
    signal, var = np.sqrt(alpha_bars(schedule)), marginal_vars(schedule, std)
    gain = signal * std**2 / var
    betas = np.asarray(schedule.betas, np.float64)
    step_var = np.maximum(betas * np.append(std**2, var[:-1]) / var, 1e-30)
    rows = np.stack([gain, mean - gain * signal * mean, np.log(step_var)])
    return jnp.asarray(rows, jnp.float32)


def affine_denoiser(rows):
    """The denoiser of `gaussian_rows`, which may be arguments of a jitted function."""

    def denoise(x_t, t):
        gain, offset, log_var = rows[:, t].reshape((3, -1) + (1,) * (x_t.ndim - 1))
        return Prediction(gain * x_t + offset, log_var)

    return denoise


def gaussian_denoiser(schedule, mean, std):
    """The exact denoiser for data N(mean, std^2) on a concrete schedule."""
    return affine_denoiser(gaussian_rows(schedule, mean, std))


def mixture_denoiser(schedule, modes, weights, std):
    """The exact E[x_0 | x_t] for one-dimensional data sum_k w_k N(m_k, std^2).

    Its variance is the one for a single mode: exact as steps grow many.
    """
    signal = jnp.asarray(np.sqrt(alpha_bars(schedule)), jnp.float32)
    var = jnp.asarray(marginal_vars(schedule, std), jnp.float32)
    singles = [gaussian_denoiser(schedule, mode, std) for mode in modes]

    def denoise(x_t, t):
        shape = (-1,) + (1,) * (x_t.ndim - 1)
        signal_t, var_t = signal[t].reshape(shape), var[t].reshape(shape)
        logits = [
            math.log(weight) - (x_t - signal_t * mode) ** 2 / (2 * var_t)
            for weight, mode in zip(weights, modes, strict=True)
        ]
        chances = jax.nn.softmax(jnp.stack(logits), axis=0)
        predictions = [single(x_t, t) for single in singles]
        x_0 = sum(c * p.x_0 for c, p in zip(chances, predictions, strict=True))
        return Prediction(x_0, predictions[0].log_var)

    return denoise


def mixture_levels(schedule, std):
    """signal and Var x_t within a mode, [2, T]: arguments of a jitted function."""
    signal, var = np.sqrt(alpha_bars(schedule)), marginal_vars(schedule, std)
    return jnp.asarray(np.stack([signal, var]), jnp.float32)


def mixture_logits(levels, modes, weights, x_t, t):
    """log of weight times density of x_t in each mode, [k, b, ...], up to one number;
    and signal and variance.
    """
    signal, var = levels[:, t].reshape((2, -1) + (1,) * (x_t.ndim - 1))
    logits = [
        math.log(weight) - (x_t - signal * mode) ** 2 / (2 * var)
        for weight, mode in zip(weights, modes, strict=True)
    ]
    return jnp.stack(logits), signal, var


def mixture_of_levels(levels, modes, weights, std):
    """`mixture_denoiser` of `mixture_levels`, without a variance."""

    def denoise(x_t, t):
        logits, signal, var = mixture_logits(levels, modes, weights, x_t, t)
        means = [m + signal * std**2 / var * (x_t - signal * m) for m in modes]
        x_0 = jnp.sum(jax.nn.softmax(logits, axis=0) * jnp.stack(means), axis=0)
        return Prediction(x_0, jnp.zeros_like(signal))

    return denoise


def mixture_log_prob(schedule, modes, weights, std, which):
    """The exact log p(k = which | x_t) of `mixture_denoiser`'s data, for all pixels.

    For a schedule with all of its steps, so that timesteps are its rows.
    """
    levels = mixture_levels(schedule, std)

    def log_prob(x_t, timesteps):
        t = timesteps.astype(jnp.int32)
        logits, _, _ = mixture_logits(levels, modes, weights, x_t, t)
        log_probs = jax.nn.log_softmax(logits, axis=0)[which]
        return jnp.sum(log_probs, axis=tuple(range(1, x_t.ndim)))

    return log_prob


def mixture_flow(schedule, modes, weights, std, x_T):
    """Where the probability flow of `mixture_denoiser`'s data takes x_T: to the same
    quantile of the data, as in one dimension paths cannot cross.
    """
    signal = np.sqrt(alpha_bars(schedule)[-1])
    std_T = np.sqrt(marginal_vars(schedule, std)[-1])
    return to_quantile(x_T, signal * np.asarray(modes), weights, std_T, modes, std)


def to_quantile(x, from_modes, weights, from_std, modes, std):
    """The values of one mixture of normals at the quantiles that x has in another."""

    def cdf(x, modes, spread):
        chances = [normal_cdf((x - mode) / spread) for mode in modes]
        return np.tensordot(weights, chances, axes=1)

    quantile = cdf(np.asarray(x, np.float64), from_modes, from_std)
    low, high = (np.full(np.shape(x), edge) for edge in (-10.0, 10.0))
    for _ in range(50):
        middle = (low + high) / 2
        below = cdf(middle, modes, std) < quantile
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def betas_of_ratios(ratios):
    """The variances whose levels have these noise / signal; infinity is no signal."""
    alpha_bar = 1 / (1 + np.asarray(ratios, np.float64) ** 2)
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def log_uniform_ratios(num_levels, *, low=1e-3, high=100.0):
    """noise / signal evenly spaced in log-SNR."""
    return np.exp(np.linspace(math.log(low), math.log(high), num_levels))


def wide_denoiser(x_t, t):
    """Holds 32 times its input at once."""
    wide = jnp.sin(x_t[..., None] * jnp.arange(32.0).reshape(1, 1, 32))
    return Prediction(jnp.tanh(jnp.mean(wide, axis=-1)), jnp.zeros((1, 1)))


def marginal_vars(schedule, std):
    """Var x_t of every step, for data of this standard deviation."""
    return alpha_bars(schedule) * std**2 + noise_vars(schedule)


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


def normal_rows(schedule, mean, cov):
    """The exact denoiser for vectors N(mean, cov): gains [T, d, d], offsets [T, d].

    E[x_0 | x_t] = gain x_t + offset.
    """
    alpha_bar = alpha_bars(schedule)[:, None, None]
    noise_var = noise_vars(schedule)[:, None, None] * np.eye(len(cov))
    signal = np.sqrt(alpha_bar)
    gains = signal * np.linalg.solve(alpha_bar * cov + noise_var, cov)  # they commute
    offsets = mean - signal[..., 0] * (gains @ np.broadcast_to(mean, len(cov)))
    return tuple(jnp.asarray(a, jnp.float32) for a in (gains, offsets))


def normal_denoiser(rows):
    """The denoiser of `normal_rows`, which may be arguments of a jitted function."""
    gains, offsets = rows

    def denoise(x_t, t):
        x_0 = jnp.einsum("bij,bj->bi", gains[t], x_t) + offsets[t]
        return Prediction(x_0, jnp.zeros_like(x_t))

    return denoise


def linear_posterior(mean, cov, matrix, y, noise):
    """Mean and covariance of N(mean, cov) given y = matrix x + noise eps."""
    spread = matrix @ cov @ matrix.T + noise**2 * np.eye(len(y))
    gain = cov @ matrix.T @ np.linalg.inv(spread)
    return mean + gain @ (y - matrix @ mean), cov - gain @ matrix @ cov


def normal_bits(x, mean, cov):
    """-log2 of the density N(mean, cov) of vectors [b, d], per dimension: [b]."""
    off = np.asarray(x, np.float64) - mean
    squares = np.sum(off * np.linalg.solve(cov, off.T).T, axis=1)
    log_det = np.linalg.slogdet(2 * math.pi * cov)[1]
    return (squares + log_det) / (2 * math.log(2) * len(cov))
