"""Samplers of noise levels in continuous time, for flows, EDM and log-SNRs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jax_diffusion import checks
from jax_diffusion.checks import placement
from jax_diffusion.schedules import (
    Levels,
    NoiseSchedule,
    schedule_at,
    sigma_levels,
    time_levels,
)
from jax_diffusion.schedules.levels import continuous_levels
from jax_diffusion.timesteps.rows import (
    TimestepSampler,
    check_draw,
    loss_second_moment,
    stateless,
)


def even_uniform(key: Key[Array, ""], batch_size: int) -> Float[Array, "b"]:
    """Draws uniform u in (0, 1), one in each of b equal parts (Kingma et al. 2021).

    One random shift moves all of them. Each is uniform, and a batch covers all levels.

    Args:
        key: for the shift.
        batch_size: b.

    Returns:
        float32 [b].

    Raises:
        ValueError: unless key is one typed key, and batch_size an integer >= 1.

    >>> u = even_uniform(jax.random.key(0), 4)
    >>> sorted((u * 4).astype(int).tolist())
    [0, 1, 2, 3]
    """
    check_draw(key, batch_size)
    shift = jax.random.uniform(key, (), jnp.float32)
    even = jnp.asarray(np.arange(batch_size) / batch_size, jnp.float32)
    tiny = 2.0**-24
    return jnp.clip((even + shift) % 1.0, tiny, 1 - tiny)


def logit_normal(
    u: Float[Array, "b"], *, mean: float = 0.0, std: float = 1.0
) -> Float[Array, "b"]:
    """Times s of a flow, whose log(s / (1 - s)) is normal (Esser et al. 2024).

    Args:
        u: uniform float32 [b] in (0, 1), such as `even_uniform` draws.
        mean, std: of the logit, std > 0.

    Returns:
        s [b].

    Raises:
        ValueError: unless u is a float array [b], and std > 0.

    >>> logit_normal(jnp.array([0.5]), mean=0.0, std=1.0).tolist()
    [0.5]
    """
    return jax.nn.sigmoid(_normal_quantile(u, mean, std))


def log_normal(
    u: Float[Array, "b"], *, mean: float = -1.2, std: float = 1.2
) -> Float[Array, "b"]:
    """EDM's sigma, whose logarithm is normal (Karras et al. 2022, table 1).

    Args:
        u: uniform float32 [b] in (0, 1), such as `even_uniform` draws.
        mean, std: of log(sigma), std > 0; those of EDM2 are -0.4 and 1.

    Returns:
        sigma [b].

    Raises:
        ValueError: unless u is a float array [b], and std > 0.

    >>> log_normal(jnp.array([0.5]), mean=0.0).tolist()
    [1.0]
    """
    return jnp.exp(_normal_quantile(u, mean, std))


def _normal_quantile(u, mean, std):
    checks.array("u", u, "float", ("b",))
    checks.number("mean", mean)
    checks.number("std", std, above=0)
    return mean + std * jax.scipy.special.ndtri(u)


def low_discrepancy_times(schedule: NoiseSchedule) -> TimestepSampler:
    """Draws levels between the rows of a schedule, evenly in rows.

    That is uniform s of a flow, and the log-SNR of VDM (Kingma et al. 2021).

    Args:
        schedule: in continuous time, see `jax_diffusion.timesteps`.

    Raises:
        ValueError: unless the schedule is such.
    """
    return _of_levels(_between_rows(schedule))


def logit_normal_times(
    schedule: NoiseSchedule, *, mean: float = 0.0, std: float = 1.0
) -> TimestepSampler:
    """Draws times of a flow: `logit_normal` of `even_uniform` (Esser et al. 2024).

    Args:
        schedule: of `time_levels`, such as `flow_levels`.
        mean, std: of the logit, std > 0.

    Raises:
        ValueError: if the schedule is of other levels, or std out of range.
    """
    _check_process(schedule, time_levels)
    return _of_levels(lambda u: time_levels(logit_normal(u, mean=mean, std=std)))


def log_normal_sigmas(
    schedule: NoiseSchedule, *, mean: float = -1.2, std: float = 1.2
) -> TimestepSampler:
    """Draws EDM's sigmas: `log_normal` of `even_uniform` (Karras et al. 2022).

    Args:
        schedule: of `sigma_levels`, such as `edm_levels`.
        mean, std: of log(sigma), std > 0.

    Raises:
        ValueError: if the schedule is of other levels, or std out of range.
    """
    _check_process(schedule, sigma_levels)
    return _of_levels(lambda u: sigma_levels(log_normal(u, mean=mean, std=std)))


def importance_sampled(
    schedule: NoiseSchedule,
    *,
    bins: int = 100,
    history: int = 10,
    uniform_prob: float = 1e-3,
) -> TimestepSampler:
    """Draws levels of `low_discrepancy_times` in proportion to sqrt(E[loss^2]).

    That is `loss_second_moment` (Nichol & Dhariwal 2021, sec. 3.3) of equal parts of u
    in [0, 1], in which u is uniform; weights make the mean that over uniform u.

    Args:
        schedule: whose rows lie at even u.
        bins: number of parts, whose losses are remembered.
        history, uniform_prob: as there, of parts.

    Raises:
        ValueError: if an argument does not fit.
    """
    checks.integer("bins", bins, at_least=1)
    levels_at = _between_rows(schedule)
    parts = loss_second_moment(bins, history=history, uniform_prob=uniform_prob)

    def sample(key, state, batch_size):
        part, weight = parts.sample(key, state, batch_size)
        key = jax.random.fold_in(key, 1)  # of another draw than parts
        u = part + jax.random.uniform(key, (batch_size,), jnp.float32)
        return levels_at(jnp.minimum(u / bins, 1 - 2.0**-24)), weight

    def update(state, t, loss):
        if not isinstance(t, Levels):
            raise ValueError(f"t must be the drawn Levels, got {checks.shown(t)}.")
        ends = _fall(levels_at(jnp.arange(1, bins, dtype=jnp.float32) / bins))
        part = jnp.searchsorted(ends, _fall(placement.everywhere(t)), side="right")
        return parts.update(state, part.astype(jnp.int32), loss)

    return TimestepSampler(parts.init, sample, update)


def _check_process(schedule, levels_fn):
    own, _ = continuous_levels(schedule)
    if own is not levels_fn:
        rule = f"schedule must be of the levels of {levels_fn.__name__}"
        raise ValueError(f"{rule}, got those of {own.__name__}.")


def _between_rows(schedule):
    """levels_at(u), which are the rows at even u from 0 to 1."""
    levels_fn, numbers = continuous_levels(schedule)
    rows = np.arange(len(numbers), dtype=np.float32)
    numbers = numbers.astype(np.float32)
    return lambda u: levels_fn(jnp.interp(u * rows[-1], rows, numbers))


def _of_levels(levels_at):
    levels_at(jnp.full(1, 0.5))  # which checks its arguments
    return stateless(lambda key, b: levels_at(even_uniform(key, b)))


def table_of(schedule: NoiseSchedule, t: Any) -> tuple[NoiseSchedule, Array]:
    """Makes a table of the levels that a sampler in continuous time has drawn.

    Args:
        schedule: the table of all steps.
        t: int32 [b], or `Levels` of arrays [b], as a `TimestepSampler` draws it.

    Returns:
        (schedule, t) as they are; for `Levels`, a table of their own, see
        `schedules.schedule_at`, and its rows 0 .. b - 1, int32 [b].

    Raises:
        ValueError: if the arrays of `Levels` are not float [b].
    """
    if not isinstance(t, Levels):
        return schedule, t
    rows = placement.beside(jnp.arange(len(t.noise), dtype=jnp.int32), t.noise)
    return schedule_at(t), rows


def rows_of(schedule: NoiseSchedule, t: Any) -> Array:
    """Finds the rows that are nearest in log-SNR to levels in continuous time.

    Args:
        schedule: where the rows stand.
        t: int32 [b], which is returned as it is, or `Levels` of arrays [b].

    Returns:
        Rows, int32 [b].
    """
    if not isinstance(t, Levels):
        return t
    fall = -schedule.now.log_snr
    rows = jnp.searchsorted((fall[1:] + fall[:-1]) / 2, _fall(t)).astype(jnp.int32)
    return jnp.minimum(rows, jnp.sum(schedule.visited, dtype=jnp.int32) - 1)


def _fall(levels):
    """Minus the log-SNR."""
    return 2 * (jnp.log(levels.noise) - jnp.log(levels.signal))
