"""Which timesteps to train on, as triples of pure functions (cf. Optax).

    state = sampler.init()
    t, weight = sampler.sample(key, state, batch_size)
    state = sampler.update(state, t, loss)

The mean of weight * loss(t) estimates the mean of loss(t) over uniform t without bias,
whatever the sampler. The state is a pytree that lives in the train state.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree


class TimestepSampler(NamedTuple):
    """A distribution over training timesteps."""

    init: Callable[[], PyTree]
    sample: Callable[..., tuple[Array, Array]]  # (key, state, b) -> t [b], weight [b]
    update: Callable[..., PyTree]  # (state, t [b], loss [b]) -> state


class LossHistory(NamedTuple):
    """The last losses of every timestep."""

    losses: Array  # [T, history], oldest first
    counts: Array  # [T] int32, how many entries of a row are filled


def _stateless(draw: Callable[..., Array]) -> TimestepSampler:
    """A sampler without memory whose draws are uniform one by one."""

    def sample(key, state, batch_size):
        del state
        return draw(key, batch_size).astype(jnp.int32), jnp.ones(batch_size)

    return TimestepSampler(lambda: (), sample, lambda state, t, loss: state)


def uniform(num_steps: int) -> TimestepSampler:
    """Independent and uniform over [0, T) (DDPM algorithm 1)."""
    return _stateless(lambda key, b: jax.random.randint(key, (b,), 0, num_steps))


def antithetic(num_steps: int) -> TimestepSampler:
    """Pairs t and T - 1 - t (the DDIM repository)."""

    def draw(key, b):
        t = jax.random.randint(key, (b // 2 + 1,), 0, num_steps)
        return jnp.concatenate([t, num_steps - 1 - t])[:b]

    return _stateless(draw)


def stratified(num_steps: int) -> TimestepSampler:
    """One t in each of b equal parts of [0, T), shifted together (Kingma et al. 2021).

    Lowers the variance of the batch mean: every batch covers all noise levels.
    """

    def draw(key, b):
        shift = jax.random.randint(key, (), 0, num_steps)
        return (shift + np.arange(b) * num_steps // b) % num_steps

    return _stateless(draw)


def loss_second_moment(
    num_steps: int, *, history: int = 10, uniform_prob: float = 1e-3
) -> TimestepSampler:
    """Draws t in proportion to sqrt(E[loss_t^2]) (Nichol & Dhariwal 2021, sec. 3.3).

    Uniform until every timestep has `history` losses. The weight is 1 / (T p), so that
    it is 1 on average; `update` takes the losses without it.
    """

    def probs(state):
        p = jnp.sqrt(jnp.mean(state.losses**2, axis=-1))
        p = p / jnp.maximum(p.sum(), 1e-30)
        p = (1 - uniform_prob) * p + uniform_prob / num_steps
        return jnp.where(jnp.all(state.counts == history), p, 1 / num_steps)

    def init():
        counts = jnp.zeros(num_steps, jnp.int32)
        return LossHistory(jnp.zeros((num_steps, history)), counts)

    def sample(key, state, batch_size):
        p = probs(state)
        t = jax.random.choice(key, num_steps, (batch_size,), p=p).astype(jnp.int32)
        return t, 1 / (num_steps * p[t])

    def update(state, t, loss):
        def push(state, item):  # one by one: a timestep may occur twice in a batch
            t, loss = item
            n = state.counts[t]
            row = state.losses[t]
            row = jnp.where(n == history, jnp.roll(row, -1), row)
            row = row.at[jnp.minimum(n, history - 1)].set(loss)
            counts = state.counts.at[t].set(jnp.minimum(n + 1, history))
            return LossHistory(state.losses.at[t].set(row), counts), None

        return jax.lax.scan(push, state, (t, loss))[0]

    return TimestepSampler(init, sample, update)


TIMESTEP_SAMPLERS: dict[str, Callable[..., TimestepSampler]] = {
    "uniform": uniform,
    "antithetic": antithetic,
    "stratified": stratified,
    "loss_second_moment": loss_second_moment,
}
SAMPLERS = TIMESTEP_SAMPLERS  # its old name
