"""Schedules made of noise levels: EDM, rectified flow, log-SNRs; `LEVELS` lists them.

    levels = flow_levels(50, shift=3.0)     signal, noise and what the network is told
    schedule = from_levels(*levels)         what the rest of the package reads

Each function of a number of steps returns `Levels` whose rows go from the least noise
to the most. To add a process: write such a function here, and give it a row in
`LEVELS`. Three processes are functions of a real number: `sigma_levels`, `time_levels`
and `log_snr_levels`. `schedule_at` makes a table of their levels, to train on.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import checks
from jax_diffusion.schedules.betas import MAX_STEPS
from jax_diffusion.schedules.noise_schedule import (
    Level,
    NoiseSchedule,
    check_finite,
    check_schedule,
    in_float32,
    table_of_squares,
)


class Levels(NamedTuple):
    """Noise levels x = signal x_0 + noise eps, and what a network is told of them.

    Attributes:
        signal, noise: [T]; float64 on the host, or arrays of JAX.
        timesteps: [T], what the network gets in the place of a step's number.
    """

    signal: Any
    noise: Any
    timesteps: Any


@in_float32
def from_levels(
    signal: Sequence[float] | np.ndarray,
    noise: Sequence[float] | np.ndarray,
    timesteps: Sequence[float] | np.ndarray,
) -> NoiseSchedule:
    """Tabulates the process that has these noise levels (Kingma et al. 2021, app. A).

    q(x_t | x_{t-1}) and its posterior are those of the levels, one after the other, so
    that every sampler, loss and likelihood works on the result as on a chain of betas.

    Args:
        signal, noise: [T] in the order of growing noise, T >= 1: noise / signal must
            grow. The last signal alone may be 0.
        timesteps: [T], what the network is told.

    Returns:
        NoiseSchedule of float32 arrays [T]; `from_levels.__wrapped__` returns float64
        of NumPy.

    Raises:
        ValueError: if there are none, or not as many of each, if a level is out of
            order, or a coefficient is not finite in float32.

    >>> schedule = from_levels([0.9, 0.5, 0.0], [0.1, 0.5, 1.0], [0.1, 0.5, 1.0])
    >>> schedule.prev.signal.round(2)
    Array([1. , 0.9, 0.5], dtype=float32)
    """
    signal, noise, told = check_levels(signal, noise, timesteps)
    with np.errstate(divide="ignore"):
        log_ratio = np.log(noise) - np.log(signal)
    # Infinity minus infinity, of two levels without signal, is no growth either.
    with np.errstate(invalid="ignore"):
        grows = np.append(
            log_ratio[0] < np.inf or len(signal) == 1, np.diff(log_ratio) > 0
        )
    if not grows.all():
        row = int(np.argmin(grows))
        raise ValueError(
            "noise must grow against signal from level to level, got "
            f"{noise[row]:.6g} and signal {signal[row]:.6g} in row {row}."
        )
    ratio = signal / np.append(1.0, signal[:-1])
    kept = ratio * np.append(0.0, noise[:-1])  # of the noise of the level before
    betas = (noise - kept) * (noise + kept)
    table = table_of_squares(signal**2, noise**2, -2 * log_ratio, ratio, betas, told)
    check_finite(table, "signal and noise", signal, noise)
    return table


def check_levels(
    signal: Any, noise: Any, timesteps: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns signal, noise and timesteps as float64 [T].

    Raises:
        ValueError: unless there are as many of each, at least one, within their ranges.
    """
    signal = checks.vector("signal", signal, at_least=0)
    noise = checks.vector("noise", noise, above=0)
    timesteps = checks.vector("timesteps", timesteps)
    if not len(signal):
        raise ValueError("signal must be at least 1 value, got 0.")
    for name, column in (("noise", noise), ("timesteps", timesteps)):
        if len(column) != len(signal):
            rule = f"{name} must be as many values as signal, {len(signal)}"
            raise ValueError(f"{rule}, got {len(column)}.")
    return signal, noise, timesteps


def schedule_at(levels: Levels) -> NoiseSchedule:
    """The table of levels in any order, as they are drawn to train in continuous time.

    VDM (Kingma et al. 2021) and EDM (Karras et al. 2022) train so. There is a row for
    each image of a batch, t = jnp.arange(b), and what reads the level of a row works on
    it: `diffusion.q_sample`, `losses.training_loss`, `denoiser`. No chain leads through
    these rows: mu, a variance, the bound and all samplers, which need one, refuse them.
    Call it within `jax.jit`.

    Args:
        levels: JAX arrays [b].

    Returns:
        NoiseSchedule of float32 arrays [b].

    Raises:
        ValueError: unless these are float arrays of one shape.

    >>> schedule = schedule_at(time_levels(jnp.array([0.75, 0.25])))
    >>> schedule.now.noise.tolist(), schedule.timesteps.tolist()
    ([0.75, 0.25], [750.0, 250.0])
    """
    checks.array("signal", levels.signal, "float", ("b",))
    for name in ("noise", "timesteps"):
        checks.array(name, getattr(levels, name), "float", levels.signal.shape)
    signal, noise, told = (jnp.asarray(a, jnp.float32) for a in levels)
    none = jnp.full_like(signal, jnp.nan)
    now = Level(signal, noise, 2 * (jnp.log(signal) - jnp.log(noise)))
    unknown: Any = None  # which `check_chain` looks for
    no_level = Level(unknown, unknown, unknown)
    chain = none, now, no_level, no_level, none, none, none
    return NoiseSchedule(*chain, told, jnp.ones_like(none))


def betas_of_levels(levels: Levels) -> np.ndarray:
    """The betas, float64 [T], of the chain with the same ratios of noise to signal.

    Rules of `spacing`, which choose rows by such ratios, take them. The `levels` are
    float64 [T] on the host.

    >>> betas_of_levels(flow_levels(2)).round(3).tolist()
    [0.5, 1.0]
    """
    with np.errstate(divide="ignore"):  # a last level may have no signal
        log_alpha_bar = -np.log1p((levels.noise / levels.signal) ** 2)
    return -np.expm1(np.diff(log_alpha_bar, prepend=0.0))


def sigma_levels(sigma: Any) -> Levels:
    """EDM's process: signal 1 and noise sigma [T]; the network is told log(sigma) / 4.

    `sigma` is an array [T] > 0, of NumPy or of JAX (Karras et al. 2022, table 1).
    """
    xp = jnp if isinstance(sigma, jax.Array) else np
    return Levels(xp.ones_like(sigma), sigma, xp.log(sigma) / 4)


def time_levels(s: Any) -> Levels:
    """A rectified flow: signal 1 - s and noise s [T]; the network is told 1000 s.

    `s` is an array [T] in [0, 1], of NumPy or of JAX (Liu et al. 2023).
    """
    return Levels(1 - s, s, 1000 * s)


def log_snr_levels(log_snr: Any) -> Levels:
    """Variance-preserving levels of these log-SNRs [T], which the network is told.

    `log_snr` is an array [T] of NumPy or of JAX; signal^2 is its logistic sigmoid
    (Kingma et al. 2021, sec. 3.2).
    """
    xp = jnp if isinstance(log_snr, jax.Array) else np
    one, ratio = xp.ones_like(log_snr), xp.exp(-log_snr / 2)  # of noise to signal
    return Levels(1 / xp.hypot(one, ratio), 1 / xp.hypot(one, 1 / ratio), log_snr)


CONTINUOUS: dict[Callable[[Any], Levels], Callable[[np.ndarray], np.ndarray]] = {
    sigma_levels: lambda ratio: ratio,
    time_levels: lambda ratio: 1 / (1 + 1 / ratio),
    log_snr_levels: lambda ratio: -2 * np.log(ratio),
}
"""The processes that are functions of a real number, and that of noise / signal."""


def continuous_levels(
    schedule: NoiseSchedule,
) -> tuple[Callable[[Any], Levels], np.ndarray]:
    """Returns which function of `CONTINUOUS` gives the rows of a schedule, and where.

    Args:
        schedule: any table without added rows.

    Returns:
        The function, and its argument at every row, float64 [T].

    Raises:
        ValueError: if there is none, as for a chain of betas.

    >>> continuous_levels(from_levels(*flow_levels(4)))[1].tolist()
    [0.25, 0.5, 0.75, 1.0]
    """
    check_schedule(schedule)
    signal, noise, log_snr = (np.asarray(a, np.float64) for a in schedule.now)
    columns = signal, noise, np.asarray(schedule.timesteps, np.float64)
    close = functools.partial(np.allclose, rtol=1e-4, atol=1e-5)
    for levels_fn, number in zip(CONTINUOUS, (noise, noise, log_snr), strict=True):
        if all(map(close, levels_fn(number), columns)):
            return levels_fn, number
    rule = "schedule must be in continuous time, of sigma_levels, time_levels or "
    raise ValueError(f"{rule}log_snr_levels, got rows that none of them gives.")


def edm_levels(
    num_steps: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Levels:
    """EDM's levels, evenly spaced in sigma^(1 / rho) (Karras et al. 2022, eq. 5).

    The signal is 1 and the noise sigma; the network is told log(sigma) / 4.

    Args:
        num_steps: T, not counting the clean data that a last step leads to.
        sigma_min, sigma_max: the first and the last sigma, > 0.
        rho: > 0; a larger one takes more steps where there is little noise.

    Raises:
        ValueError: if an argument is out of range.

    >>> edm_levels(3).noise.round(3).tolist()
    [0.002, 2.515, 80.0]
    """
    _check(num_steps)
    checks.number("sigma_min", sigma_min, above=0)
    checks.number("sigma_max", sigma_max, above=sigma_min)
    checks.number("rho", rho, above=0)
    ends = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigma = np.linspace(*ends, num_steps) ** rho if num_steps > 1 else [sigma_max]
    sigma = np.asarray(sigma, np.float64)
    sigma[-1] = sigma_max  # not a root's power
    return sigma_levels(sigma)


def flow_levels(num_steps: int, *, shift: float = 1.0) -> Levels:
    """Levels of a rectified flow: signal 1 - s, noise s (Liu et al. 2023).

    s is i / T for i = 1 .. T, shifted to shift s / (1 + (shift - 1) s) (Esser et al.
    2024, eq. 23); the network is told 1000 s.

    Args:
        num_steps: T.
        shift: > 0; above 1 it takes more steps where there is much noise, as large
            images need, sqrt(m / n) for m pixels instead of n.

    Raises:
        ValueError: if an argument is out of range.

    >>> flow_levels(4, shift=3.0).noise.round(3).tolist()
    [0.5, 0.75, 0.9, 1.0]
    """
    _check(num_steps)
    return time_levels(_shifted(np.arange(1, num_steps + 1) / num_steps, shift))


def logit_normal_levels(
    num_steps: int, *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Levels:
    """Levels of a rectified flow at quantiles of a logit-normal (Esser et al. 2024).

    A uniform t then draws s from that distribution. The network is told 1000 s.

    Args:
        num_steps: T.
        mean, std: of log(s / (1 - s)), std > 0.
        shift: as in `flow_levels`.

    Raises:
        ValueError: if an argument is out of range.
    """
    _check(num_steps)
    checks.number("mean", mean)
    checks.number("std", std, above=0)
    normal = statistics.NormalDist(mean, std)
    logits = np.array([normal.inv_cdf(u) for u in _middles(num_steps)])
    return time_levels(_shifted(1 / (1 + np.exp(-logits)), shift))


def cosine_levels(
    num_steps: int,
    *,
    shift: float = 1.0,
    log_snr_min: float = -15.0,
    log_snr_max: float = 15.0,
) -> Levels:
    """Cosine levels in log-SNR, shifted (Hoogeboom et al. 2023, simple diffusion).

    log-SNR is -2 log tan(pi u / 2) + 2 log shift, at T even u between the bounds. The
    network is told the log-SNR.

    Args:
        num_steps: T.
        shift: > 0; below 1 there is more noise, as large images need: 64 / d for images
            of side d, if 64 needs none.
        log_snr_min, log_snr_max: the last and the first log-SNR before the shift.

    Raises:
        ValueError: if an argument is out of range.
    """
    _check(num_steps)
    checks.number("shift", shift, above=0)
    checks.number("log_snr_min", log_snr_min)
    checks.number("log_snr_max", log_snr_max, above=log_snr_min)
    ends = np.arctan(np.exp(-np.array([log_snr_max, log_snr_min]) / 2))
    angle = np.linspace(ends[0], ends[1], num_steps) if num_steps > 1 else ends[1:]
    return log_snr_levels(-2 * np.log(np.tan(angle)) + 2 * np.log(shift))


def laplace_levels(num_steps: int, *, mean: float = 0.0, scale: float = 0.5) -> Levels:
    """Levels whose log-SNRs are quantiles of a Laplace distribution (Hang et al. 2024).

    A uniform t then draws the log-SNR from it. The network is told the log-SNR.

    Args:
        num_steps: T.
        mean, scale: of the distribution, scale > 0.

    Raises:
        ValueError: if an argument is out of range.
    """
    _check(num_steps)
    checks.number("mean", mean)
    checks.number("scale", scale, above=0)
    away = 0.5 - _middles(num_steps)
    return log_snr_levels(mean - scale * np.sign(away) * np.log1p(-2 * np.abs(away)))


def vdm_levels(
    num_steps: int, *, log_snr_min: float = -5.0, log_snr_max: float = 13.3
) -> Levels:
    """Levels evenly spaced in log-SNR (Kingma et al. 2021, VDM).

    The network is told the log-SNR.

    Args:
        num_steps: T; the first level's x is what VDM decodes the data from.
        log_snr_min, log_snr_max: the last and the first log-SNR, -gamma_1 and -gamma_0.

    Raises:
        ValueError: if an argument is out of range.
    """
    _check(num_steps)
    checks.number("log_snr_min", log_snr_min)
    checks.number("log_snr_max", log_snr_max, above=log_snr_min)
    ends = (log_snr_max, log_snr_min) if num_steps > 1 else (log_snr_min, log_snr_min)
    return log_snr_levels(np.linspace(*ends, num_steps))


LEVELS: dict[str, Callable[..., Levels]] = {
    "edm": edm_levels,
    "flow": flow_levels,
    "logit_normal": logit_normal_levels,
    "cosine_log_snr": cosine_levels,
    "laplace": laplace_levels,
    "vdm": vdm_levels,
}
"""Processes by name: f(num_steps, **arguments) -> Levels."""


def _check(num_steps: int) -> None:
    checks.integer("num_steps", num_steps, at_least=1, at_most=MAX_STEPS)


def _middles(num_steps: int) -> np.ndarray:
    """The middles of T equal parts of [0, 1]."""
    return (np.arange(num_steps) + 0.5) / num_steps


def _shifted(s: np.ndarray, shift: float) -> np.ndarray:
    """s of a flow, shifted for the resolution of images."""
    checks.number("shift", shift, above=0)
    return s / (s + (1 - s) / shift)  # is 1 at s = 1, also in floating point
