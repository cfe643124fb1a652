"""Samplers of rows: which steps of a schedule the images of a batch are trained on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jax_diffusion import checks
from jax_diffusion.checks import placement
from jax_diffusion.schedules import Levels

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


def stateless(draw: Callable[..., Any]) -> TimestepSampler:
    """A sampler without memory, whose `draw` has the distribution that is trained.

    `draw` takes (key, batch_size), and returns t of a `TimestepSampler`, whose `sample`
    raises ValueError unless key and batch_size are such.
    """

    def sample(key, state, batch_size):
        del state
        check_draw(key, batch_size)
        return draw(key, batch_size), jnp.ones(batch_size, jnp.float32)

    return TimestepSampler(lambda: (), sample, lambda state, t, loss: state)


def check_draw(key: Array, batch_size: int) -> None:
    """Raises ValueError unless `key` is one typed key, and `batch_size` is >= 1."""
    checks.key("key", key)
    checks.integer("batch_size", batch_size, at_least=1)


def uniform(num_steps: int) -> TimestepSampler:
    """Draws t independently and uniformly from [0, T) (DDPM algorithm 1).

    Args:
        num_steps: T.

    Raises:
        ValueError: unless num_steps is an integer >= 1.

    >>> sampler = uniform(1000)
    >>> t, weight = sampler.sample(jax.random.key(0), sampler.init(), 4)
    >>> t.shape, weight.tolist()
    ((4,), [1.0, 1.0, 1.0, 1.0])
    """
    checks.integer("num_steps", num_steps, at_least=1)

    def draw(key, b):
        return jax.random.randint(key, (b,), 0, num_steps, jnp.int32)

    return stateless(draw)


def antithetic(num_steps: int) -> TimestepSampler:
    """Draws pairs t and T - 1 - t (the DDIM repository).

    Args:
        num_steps: T.

    Raises:
        ValueError: unless num_steps is an integer >= 1.
    """
    checks.integer("num_steps", num_steps, at_least=1)

    def draw(key, b):
        t = jax.random.randint(key, (b // 2 + 1,), 0, num_steps, jnp.int32)
        return jnp.concatenate([t, num_steps - 1 - t])[:b]

    return stateless(draw)


def stratified(num_steps: int) -> TimestepSampler:
    """Draws one t in each of b equal parts of [0, T) (Kingma et al. 2021).

    One random shift moves all of them. As every batch covers all noise levels, the mean
    loss of a batch has a lower variance.

    Args:
        num_steps: T.

    Raises:
        ValueError: unless num_steps is an integer >= 1.
    """
    checks.integer("num_steps", num_steps, at_least=1)

    def draw(key, b):
        shift = jax.random.randint(key, (), 0, num_steps, jnp.int32)
        t = (shift + np.arange(b) * num_steps // b) % num_steps
        return t.astype(jnp.int32)

    return stateless(draw)


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
        check_draw(key, batch_size)
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
