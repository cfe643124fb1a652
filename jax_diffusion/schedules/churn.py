"""Noise levels of EDM's stochastic sampler, which rise between its steps."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import checks
from jax_diffusion.schedules.levels import (
    Levels,
    log_snr_levels,
    real_levels,
    sigma_levels,
    tabulate_levels,
    time_levels,
)
from jax_diffusion.schedules.noise_schedule import Level, NoiseSchedule


def churned(
    sigma: Sequence[float] | np.ndarray,
    levels_fn: Callable[[np.ndarray], Levels] | None = None,
    *,
    churn: float,
    s_min: float = 0.0,
    s_max: float = math.inf,
) -> NoiseSchedule:
    """Tabulates the levels of EDM's stochastic sampler (Karras et al. 2022, alg. 2).

    Those are where `samplers.edm_heun_step` asks the network: row 2 i is sigma[i],
    raised to (1 + gamma) sigma[i], and row 2 i - 1 is sigma[i - 1], where a step ends
    before noise raises it. gamma is min(churn / N, sqrt(2) - 1) within [s_min, s_max].
    `betas` of an odd row is the variance of the noise that raises it. The table has no
    posterior: what needs one is refused. It has as many rows for every churn, so that
    one compiled sampler serves all.

    Args:
        sigma: noise / signal [N], > 0 and increasing, such as `edm_levels(N).noise`.
            The last one alone may be infinite, pure noise, which Euler's step leaves.
        levels_fn: makes levels of these, which may round them to levels that a network
            knows, as for a flow `lambda sigma: time_levels(1 / (1 + 1 / sigma))`;
            default `sigma_levels`.
        churn: S_churn, >= 0; 0 is the deterministic method.
        s_min, s_max: the sigma where noise is added, both included.

    Returns:
        NoiseSchedule of float32 arrays [2 N - 1]. `samplers.pure_noise` begins at the
        raised level.

    Raises:
        ValueError: if an argument is out of range, or levels are out of order.

    >>> schedule = churned([1.0, 2.0], churn=0.5)
    >>> schedule.now.noise.tolist(), schedule.prev.noise.tolist()
    ([1.25, 1.0, 2.5], [0.0, 1.25, 1.0])
    """
    table = tabulate_churned(sigma, levels_fn, churn=churn, s_min=s_min, s_max=s_max)
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), table)


def tabulate_churned(
    sigma: Sequence[float] | np.ndarray,
    levels_fn: Callable[[np.ndarray], Levels] | None = None,
    *,
    churn: float,
    s_min: float = 0.0,
    s_max: float = math.inf,
) -> NoiseSchedule:
    """`churned` without the cast: a NoiseSchedule of NumPy arrays, float64 [2 N - 1].

    Takes `sigma`, `levels_fn`, `churn`, `s_min` and `s_max` as there.

    Raises:
        ValueError: as there.
    """
    no_signal = False
    with contextlib.suppress(IndexError, KeyError, TypeError, ValueError):
        no_signal = bool(sigma[-1] == math.inf)
    finite = checks.vector("sigma", sigma[:-1] if no_signal else sigma, above=0)
    sigma = np.append(finite, [math.inf] * no_signal)
    checks.number("churn", churn, at_least=0)
    checks.number("s_min", s_min, at_least=0)
    if s_max != math.inf:
        checks.number("s_max", s_max, at_least=s_min)
    levels_fn = levels_fn or sigma_levels
    checks.function("levels_fn", levels_fn, "(sigma,)")
    within = (sigma >= s_min) & (sigma <= s_max)
    gamma = np.where(within, min(churn / max(len(sigma), 1), math.sqrt(2) - 1), 0.0)
    plain, raised = levels_fn(sigma), levels_fn(sigma * (1 + gamma))
    ends = tabulate_levels(*plain)  # raises ValueError if they are out of order

    def mix(high, low):  # high_0, low_0, high_1, low_1, ..., high_{N-1}
        return np.insert(high, np.arange(1, len(high)), low[:-1])

    signal, noise, timesteps = (mix(*pair) for pair in zip(raised, plain, strict=True))
    with np.errstate(divide="ignore"):  # where there is no signal
        now = signal, noise, 2 * (np.log(signal) - np.log(noise))
        ratio = (
            np.append(1.0, signal[:-1]) / signal
        )  # of prev, which rises from odd rows
    from_last = ends.next.noise[-1] == ends.now.noise[-1]
    start = noise[-1] if from_last else 1.0
    clean, pure = (a[0] for a in ends.prev), (0.0, start, -np.inf)
    below = np.append(0.0, noise[:-1])
    step = noise**2 - (below / ratio) ** 2, below**2 - (noise * ratio) ** 2
    odd, none = np.arange(len(noise)) % 2 == 1, np.full(len(noise), np.nan)
    level, unknown = cast(Any, Level), cast(Any, None)  # which `check_chain` looks for
    return cast(Any, NoiseSchedule)(
        betas=np.where(odd, np.maximum(step[1], 0.0), step[0]),
        now=level(*now),
        prev=level(*(np.append(c, a[:-1]) for a, c in zip(now, clean, strict=True))),
        next=level(*(np.append(a[1:], c) for a, c in zip(now, pure, strict=True))),
        posterior_x_0=unknown,
        posterior_x_t=none,
        posterior_log_var=none,
        timesteps=timesteps,
        mask=np.ones(len(noise)),
    )


def levels_by_ratio(
    table: NoiseSchedule,
) -> tuple[np.ndarray, Callable[[np.ndarray], Levels]]:
    """noise / signal of the rows of a table, float64 [T], and its levels by that.

    They are the process's at real times, where it has them, or else the nearest rows.
    """
    columns = [np.asarray(a, np.float64) for a in (*table.now[:2], table.timesteps)]
    with np.errstate(divide="ignore"):  # a last level may have no signal
        sigma = columns[1] / columns[0]
    try:
        real: Any = real_levels(table)[0]
    except ValueError:
        real = None
    if real is time_levels:
        return sigma, lambda ratio: real(1 / (1 + 1 / ratio))
    if real is log_snr_levels:
        return sigma, lambda ratio: real(-2 * np.log(ratio))

    def nearest(ratio):
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            away = np.where(sigma == ratio[:, None], 0, abs(sigma - ratio[:, None]))
        rows = away.argmin(axis=1)
        return Levels(*(column[rows] for column in columns))

    return sigma, real or nearest
