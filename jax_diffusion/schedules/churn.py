"""Noise levels of EDM's stochastic sampler, which rise between its steps."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import checks
from jax_diffusion.schedules.levels import Levels, sigma_levels, tabulate_levels
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
        levels_fn: makes levels of these, which may round them to levels that a network
            knows, as for a flow `lambda sigma: time_levels(sigma / (1 + sigma))`;
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
    sigma = checks.vector("sigma", sigma, above=0)
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
    now = signal, noise, 2 * (np.log(signal) - np.log(noise))
    from_last = ends.next.noise[-1] == ends.now.noise[-1]
    start = noise[-1] if from_last else 1.0
    clean, pure = (a[0] for a in ends.prev), (0.0, start, -np.inf)
    ratio = np.append(1.0, signal[:-1]) / signal  # of prev, which rises from odd rows
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
