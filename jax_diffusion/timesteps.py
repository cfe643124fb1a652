"""Samplers of training timesteps: which t each image of a batch is noised to.

    sampler = loss_second_moment(1000)
    state = sampler.init()
    t, weight = sampler.sample(key, state, batch_size)
    state = sampler.update(state, t, loss)

Whatever the sampler, the mean of weight * loss(t) is an unbiased estimate of the mean
loss over uniform t. The state is a pytree of arrays, a part of the train state.

In continuous time, `LEVEL_SAMPLERS` draw `Levels` instead of rows, quantiles at even u
of `even_uniform`. `table_of` makes a table of them, on which losses are computed:

    levels, weight = logit_normal_times(schedule).sample(key, (), batch_size)
    table, t = table_of(schedule, levels)

They are for a schedule of `sigma_levels`, `time_levels` or `log_snr_levels`. All
functions raise ValueError if an argument does not fit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

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

MAX_HISTORY = 10_000  # losses of each of T timesteps: they are copied by every update


class TimestepSampler(NamedTuple):
    """A distribution over training timesteps: three pure functions, as in Optax.

    Attributes:
        init: init() -> state, a pytree of arrays, () if nothing is remembered.
        sample: sample(key, state, batch_size) -> (t, weight): int32 [b], or `Levels`
            [b], and float32 [b], the factor of each image's loss.
        update: update(state, t, loss) -> state, given the unweighted losses [b] at t.
    """

    init: Callable[[], PyTree]
    sample: Callable[..., tuple[Any, Array]]
    update: Callable[..., PyTree]


class LossHistory(NamedTuple):
    """The last losses of every timestep: the state of `loss_second_moment`.

    Attributes:
        losses: float32 [T, history], oldest first.
        counts: int32 [T], how many entries of each row are filled.
    """

    losses: Array
    counts: Array


def _stateless(draw: Callable[..., Any]) -> TimestepSampler:
    """A sampler without memory, whose `draw` has the distribution that is trained."""

    def sample(key, state, batch_size):
        del state
        _check_draw(key, batch_size)
        return draw(key, batch_size), jnp.ones(batch_size, jnp.float32)

    return TimestepSampler(lambda: (), sample, lambda state, t, loss: state)


def uniform(num_steps: int) -> TimestepSampler:
    """Draws t independently and uniformly from [0, num_steps) (DDPM algorithm 1).

    >>> sampler = uniform(1000)
    >>> t, weight = sampler.sample(jax.random.key(0), sampler.init(), 4)
    >>> t.shape, weight.tolist()
    ((4,), [1.0, 1.0, 1.0, 1.0])
    """
    checks.integer("num_steps", num_steps, at_least=1)

    def draw(key, b):
        return jax.random.randint(key, (b,), 0, num_steps, jnp.int32)

    return _stateless(draw)


def antithetic(num_steps: int) -> TimestepSampler:
    """Draws pairs t and T - 1 - t, T being `num_steps` (the DDIM repository)."""
    checks.integer("num_steps", num_steps, at_least=1)

    def draw(key, b):
        t = jax.random.randint(key, (b // 2 + 1,), 0, num_steps, jnp.int32)
        return jnp.concatenate([t, num_steps - 1 - t])[:b]

    return _stateless(draw)


def stratified(num_steps: int) -> TimestepSampler:
    """Draws one t in each of b equal parts of [0, T), T being `num_steps`.

    One random shift moves all of them (Kingma et al. 2021). As every batch covers all
    noise levels, the mean loss of a batch has a lower variance.
    """
    checks.integer("num_steps", num_steps, at_least=1)

    def draw(key, b):
        shift = jax.random.randint(key, (), 0, num_steps, jnp.int32)
        t = (shift + np.arange(b) * num_steps // b) % num_steps
        return t.astype(jnp.int32)

    return _stateless(draw)


def loss_second_moment(
    num_steps: int, *, history: int = 10, uniform_prob: float = 1e-3
) -> TimestepSampler:
    """Draws t in proportion to sqrt(E[loss_t^2]) (Nichol & Dhariwal 2021, sec. 3.3).

    Uniform until every timestep has `history` losses. The weight of a timestep drawn
    with probability p is 1 / (T p), which is 1 on average.

    Args:
        num_steps: T.
        history: how many losses of each timestep are remembered, >= 1.
        uniform_prob: the share of draws that stay uniform, in [0, 1].

    Raises:
        ValueError: if an argument is out of range.
    """
    checks.integer("num_steps", num_steps, at_least=1)
    checks.integer("history", history, at_least=1, at_most=MAX_HISTORY)
    checks.number("uniform_prob", uniform_prob, at_least=0, at_most=1)

    def check(state):
        if not isinstance(state, LossHistory):
            rule = "state must be a LossHistory, as init() makes it"
            raise ValueError(f"{rule}, got {checks.shown(state)}.")
        checks.array("state.losses", state.losses, "float", (num_steps, history))

    def probs(state):
        p = jnp.sqrt(jnp.mean(state.losses**2, axis=-1))
        p = p / jnp.maximum(p.sum(), 1e-30)
        p = (1 - uniform_prob) * p + uniform_prob / num_steps
        return jnp.where(jnp.all(state.counts == history), p, 1 / num_steps)

    def init():
        counts = jnp.zeros(num_steps, jnp.int32)
        return LossHistory(jnp.zeros((num_steps, history), jnp.float32), counts)

    def sample(key, state, batch_size):
        _check_draw(key, batch_size)
        check(state)
        p = probs(state)
        t = jax.random.choice(key, num_steps, (batch_size,), p=p).astype(jnp.int32)
        return t, 1 / (num_steps * p[t])

    def update(state, t, loss):
        check(state)
        checks.array("t", t, "int", ("b",))
        checks.array("loss", loss, "float", t.shape)
        checks.rows("t", t, num_steps)
        loss = loss.astype(state.losses.dtype)

        def push(state, item):  # one by one: a timestep may occur twice in a batch
            t, loss = item
            n = state.counts[t]
            row = state.losses[t]
            row = jnp.where(n == history, jnp.roll(row, -1), row)
            row = row.at[jnp.minimum(n, history - 1)].set(loss)
            counts = state.counts.at[t].set(jnp.minimum(n + 1, history))
            return LossHistory(state.losses.at[t].set(row), counts), None

        return jax.lax.scan(push, state, placement.everywhere((t, loss)))[0]

    return TimestepSampler(init, sample, update)


def even_uniform(key: Key[Array, ""], batch_size: int) -> Float[Array, "b"]:
    """Draws uniform u in (0, 1), one in each of b equal parts (Kingma et al. 2021).

    One random shift, by `key`, moves all `batch_size` of them. Each is uniform, and a
    batch covers all levels.

    >>> u = even_uniform(jax.random.key(0), 4)
    >>> sorted((u * 4).astype(int).tolist())
    [0, 1, 2, 3]
    """
    _check_draw(key, batch_size)
    shift = jax.random.uniform(key, (), jnp.float32)
    even = jnp.asarray(np.arange(batch_size) / batch_size, jnp.float32)
    tiny = 2.0**-24
    return jnp.clip((even + shift) % 1.0, tiny, 1 - tiny)


def logit_normal(
    u: Float[Array, "b"], *, mean: float = 0.0, std: float = 1.0
) -> Float[Array, "b"]:
    """Times s of a flow, whose log(s / (1 - s)) is normal (Esser et al. 2024).

    Takes uniform u [b] in (0, 1), and `mean` and `std`, > 0, of the logit.
    """
    return jax.nn.sigmoid(_normal_quantile(u, mean, std))


def log_normal(
    u: Float[Array, "b"], *, mean: float = -1.2, std: float = 1.2
) -> Float[Array, "b"]:
    """EDM's sigma, whose logarithm is normal (Karras et al. 2022, table 1).

    Takes uniform u [b] in (0, 1), and `mean` and `std`, > 0, of log(sigma); those of
    EDM2 are -0.4 and 1.
    """
    return jnp.exp(_normal_quantile(u, mean, std))


def _normal_quantile(u, mean, std):
    checks.array("u", u, "float", ("b",))
    checks.number("mean", mean)
    checks.number("std", std, above=0)
    return mean + std * jax.scipy.special.ndtri(u)


def low_discrepancy_times(schedule: NoiseSchedule) -> TimestepSampler:
    """Draws levels between the rows of a `schedule`, evenly in rows.

    That is uniform s of a flow, and the log-SNR of VDM (Kingma et al. 2021).
    """
    return _of_levels(_between_rows(schedule))


def logit_normal_times(
    schedule: NoiseSchedule, *, mean: float = 0.0, std: float = 1.0
) -> TimestepSampler:
    """Draws times of a flow's `schedule`: `logit_normal` of even u, `mean`, `std`."""
    _check_process(schedule, time_levels)
    return _of_levels(lambda u: time_levels(logit_normal(u, mean=mean, std=std)))


def log_normal_sigmas(
    schedule: NoiseSchedule, *, mean: float = -1.2, std: float = 1.2
) -> TimestepSampler:
    """Draws sigmas of EDM's `schedule`: `log_normal` of even u, `mean`, `std`."""
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

    That is `loss_second_moment` of equal parts of u in [0, 1], in which u is uniform;
    weights make the mean that over uniform u.

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
    return _stateless(lambda key, b: levels_at(even_uniform(key, b)))


def table_of(schedule: NoiseSchedule, t: Any) -> tuple[NoiseSchedule, Array]:
    """Returns (schedule, t) as they are; for `Levels` [b], a table of their own and its
    rows 0 .. b - 1.
    """
    if not isinstance(t, Levels):
        return schedule, t
    rows = placement.beside(jnp.arange(len(t.noise), dtype=jnp.int32), t.noise)
    return schedule_at(t), rows


def rows_of(schedule: NoiseSchedule, t: Any) -> Array:
    """Returns t int32 [b] as it is; for `Levels` [b], the rows of the `schedule` that
    are nearest in log-SNR.
    """
    if not isinstance(t, Levels):
        return t
    fall = -schedule.now.log_snr
    rows = jnp.searchsorted((fall[1:] + fall[:-1]) / 2, _fall(t)).astype(jnp.int32)
    return jnp.minimum(rows, jnp.sum(schedule.visited, dtype=jnp.int32) - 1)


def _fall(levels):
    """Minus the log-SNR."""
    return 2 * (jnp.log(levels.noise) - jnp.log(levels.signal))


def check_results(sampler: Any) -> TimestepSampler:
    """Returns the same sampler, which raises ValueError where a result does not fit.

    Args:
        sampler: anything with the functions of a `TimestepSampler`.

    Raises:
        ValueError: unless it has them.
    """
    names = TimestepSampler._fields
    if not all(callable(getattr(sampler, name, None)) for name in names):
        got = checks.shown(sampler)
        raise ValueError(f"it makes {got}, without {', '.join(names)}.")

    def sample(key, state, batch_size):
        t, weight = sampler.sample(key, state, batch_size)
        kind = "float" if isinstance(t, Levels) else "int"
        for column in t if isinstance(t, Levels) else [t]:
            checks.array("t", column, kind, (batch_size,))
        checks.array("weight", weight, "float", (batch_size,))
        return t, weight

    def update(state, t, loss):
        new = sampler.update(state, t, loss)
        types = [
            jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), tree)
            for tree in (state, new)
        ]
        if types[0] != types[1]:
            rule = "update must return a state like the one that it is given"
            raise ValueError(f"{rule}, {types[0]}, got {types[1]}.")
        return new

    return TimestepSampler(sampler.init, sample, update)


def _check_draw(key: Array, batch_size: int) -> None:
    checks.key("key", key)
    checks.integer("batch_size", batch_size, at_least=1)


TIMESTEP_SAMPLERS: dict[str, Callable[..., TimestepSampler]] = {
    "uniform": uniform,
    "antithetic": antithetic,
    "stratified": stratified,
    "loss_second_moment": loss_second_moment,
}
"""Samplers by name: f(num_steps, **arguments) -> TimestepSampler."""

LEVEL_SAMPLERS: dict[str, Callable[..., TimestepSampler]] = {
    "low_discrepancy": low_discrepancy_times,
    "logit_normal": logit_normal_times,
    "log_normal": log_normal_sigmas,
    "importance": importance_sampled,
}
"""Those in continuous time: f(schedule, **arguments) -> TimestepSampler of `Levels`."""

SAMPLERS = TIMESTEP_SAMPLERS  # its old name
