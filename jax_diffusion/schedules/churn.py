"""Noise levels of EDM's stochastic sampler, which rise between its steps."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from jax_diffusion import checks
from jax_diffusion.schedules.levels import (
    CONTINUOUS,
    Levels,
    check_levels,
    continuous_levels,
    from_levels,
    sigma_levels,
)
from jax_diffusion.schedules.noise_schedule import (
    NoiseSchedule,
    in_float32,
    table_of_squares,
)


@in_float32
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
            takes sigma [n], and returns `Levels` [n]; default `sigma_levels`.
        churn: S_churn, >= 0; 0 is the deterministic method.
        s_min, s_max: the sigma where noise is added, both included.

    Returns:
        NoiseSchedule of float32 arrays [2 N - 1]; `churned.__wrapped__` returns float64
        of NumPy. `samplers.pure_noise` begins at the raised level.

    Raises:
        ValueError: if an argument is out of range, or levels are out of order.

    >>> schedule = churned([1.0, 2.0], churn=0.5)
    >>> schedule.now.noise.tolist(), schedule.prev.noise.tolist()
    ([1.25, 1.0, 2.5], [0.0, 1.25, 1.0])
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
    plain, raised = (check_levels(*levels_fn(a)) for a in (sigma, sigma * (1 + gamma)))
    for signal, *_ in (plain, raised):
        if len(signal) != len(sigma):
            rule = f"levels_fn must return {len(sigma)} levels, one for each sigma"
            raise ValueError(f"{rule}, got {len(signal)}.")
    from_levels.__wrapped__(*plain)  # raises ValueError if they are out of order

    def mix(raised, plain):  # raised_0, plain_0, raised_1, plain_1, ..., raised_{N-1}
        return np.insert(raised, np.arange(1, len(raised)), plain[:-1])

    signal, noise, told = map(mix, raised, plain)
    below = np.append(0.0, noise[:-1])
    with np.errstate(divide="ignore"):  # where there is no signal
        log_snr = 2 * (np.log(signal) - np.log(noise))
        ratio = np.append(1.0, signal[:-1]) / signal  # of prev, which may be raised
        down = noise**2 - (below / ratio) ** 2
        up = np.maximum(below**2 - (noise * ratio) ** 2, 0.0)
        steps = signal**2, noise**2, log_snr, 1 / ratio
    betas = np.where(np.arange(len(noise)) % 2, up, down)
    table = table_of_squares(*steps, betas, told)
    none = np.full(len(noise), np.nan)
    return dataclasses.replace(
        table, posterior_x_0=None, posterior_x_t=none, posterior_log_var=none
    )


def levels_by_ratio(
    table: NoiseSchedule,
) -> tuple[np.ndarray, Callable[[np.ndarray], Levels]]:
    """noise / signal of the rows of a table, float64 [T], and its levels by that.

    They are the process's in continuous time, if it is, or else the nearest rows.
    """
    columns = [np.asarray(a, np.float64) for a in (*table.now[:2], table.timesteps)]
    with np.errstate(divide="ignore"):  # a last level may have no signal
        sigma = columns[1] / columns[0]
    with contextlib.suppress(ValueError):
        levels_fn, _ = continuous_levels(table)
        return sigma, lambda ratio: levels_fn(CONTINUOUS[levels_fn](ratio))

    def nearest(ratio):
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            away = np.where(sigma == ratio[:, None], 0, abs(sigma - ratio[:, None]))
        rows = away.argmin(axis=1)
        return Levels(*(column[rows] for column in columns))

    return sigma, nearest
