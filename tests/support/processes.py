"""Gaussian processes by their levels, and what is exactly true on them, in float64.

Every function takes `signal` and `noise`, float64 [T], that a test has also given to
`schedules.from_levels`: nothing is read from a schedule.
"""

import numpy as np
from support import oracles

from jax_diffusion import schedules

# From noise / signal, [T], to signal and noise: processes that differ in scale only.
KINDS = {
    "vp": lambda r: (1 / np.hypot(1, r), r / np.hypot(1, r)),
    "edm": lambda r: (np.ones_like(r), np.asarray(r)),
    "flow": lambda r: (1 / (1 + r), r / (1 + r)),
}


def half_flow(num_steps, scale=1.0):
    """A process from outside, as a config may name it: the first half of a flow."""
    return schedules.time_levels(scale * np.arange(1, num_steps + 1) / num_steps / 2)


def levels(kind, ratios, *, no_signal=False):
    """signal and noise at these noise / signal; perhaps one more level without signal,
    which EDM cannot have: it goes on to ten times the noise.
    """
    ratios = np.asarray(ratios, np.float64)
    if kind == "edm" and no_signal:
        ratios = np.append(ratios, 10 * ratios[-1])
    signal, noise = KINDS[kind](ratios)
    if kind != "edm" and no_signal:
        signal, noise = np.append(signal, 0.0), np.append(noise, 1.0)
    return signal, noise


def schedule_of(signal, noise, timesteps=None, *, length=None):
    """The table of these levels, padded; a network is told log(noise) / 4, as by EDM,
    which is negative where there is little noise.
    """
    timesteps = np.log(noise) / 4 if timesteps is None else timesteps
    schedule = schedules.from_levels(signal, noise, timesteps)
    return schedule if length is None else schedules.pad(schedule, length)


def padded(rows, length):
    """Columns of an oracle [..., T], with rows to fill a padded table."""
    extra = length - rows.shape[-1]
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, extra)], mode="edge")


def gaussian_rows(signal, noise, mean, std):
    """`oracles.gaussian_rows` on any levels: the exact p(x_{t-1} | x_t) of the data."""
    var = signal**2 * std**2 + noise**2
    gain = signal * std**2 / var
    prev_signal, prev_noise = np.append(1.0, signal[:-1]), np.append(0.0, noise[:-1])
    prev_var = prev_signal**2 * std**2 + prev_noise**2
    ratio = signal / prev_signal
    step_var = np.maximum(prev_var - (ratio * prev_var) ** 2 / var, 1e-30)
    return np.float32([gain, mean - gain * signal * mean, np.log(step_var)])


def mixture_levels(signal, noise, std):
    """`oracles.mixture_levels` on any levels."""
    return np.float32([signal, signal**2 * std**2 + noise**2])


def mixture_flow(signal, noise, modes, weights, std, x_T):
    """`oracles.mixture_flow` from the level (signal, noise), two numbers."""
    spread = np.hypot(signal * std, noise)
    return oracles.to_quantile(
        x_T, signal * np.asarray(modes), weights, spread, modes, std
    )
