"""RePaint: inpainting that goes back and draws again."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import checks, samplers
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.samplers import StepFn
from jax_diffusion.schedules import (
    NoiseSchedule,
    check_batch,
    check_rows,
    check_schedule,
    take,
)


def renoise(
    keys: Key[Array, "b"],
    schedule: NoiseSchedule,
    x: Float[Array, "b *d"],
    t: Int[Array, "b"],
    to: Int[Array, "b"],
) -> Float[Array, "b *d"]:
    """Adds noise to an unfinished sample: draws x_to from q(x_to | x_{t-1}).

    DDPM eq. 4, between two noise levels.

    Args:
        keys: one for each image.
        schedule: the steps to take.
        x: [b, ...], what a sampler's step at t has returned, at the level of t - 1.
        t: int32 [b], the step that was made last.
        to: int32 [b], the step whose level is wanted; t <= to.

    Returns:
        x at the level of `to`, [b, ...].

    Raises:
        ValueError: unless schedule, keys, x, t and `to` fit each other, and, where they
            are known, t <= to.
    """
    check_batch(schedule, t, x=x)
    check_rows(schedule, to, "to")
    checks.keys("keys", keys, x.shape[0])
    if np.shape(to) != t.shape:
        raise ValueError(f"to must have the shape of t, got {checks.shown(to)}.")
    if checks.known(t) and checks.known(to) and np.any(np.asarray(to) < np.asarray(t)):
        raise ValueError(f"to must be at least t = {t}, got {to}.")
    low = take(schedule, t, x.ndim).prev
    high = take(schedule, to, x.ndim).now
    ratio = high.signal / low.signal
    var = high.noise**2 - (ratio * low.noise) ** 2
    std = jnp.sqrt(jnp.maximum(var, 0.0))
    x_to = ratio * x + std * samplers.normal(keys, x.shape[1:])
    return x_to.astype(jnp.result_type(x))


def repaint(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    step_fn: StepFn,
    schedule: NoiseSchedule,
    x_T: Float[Array, "b *d"],
    x_known: Float[Array, "b *d"],
    mask: Array | Callable[[Array], Array],
    *,
    jump: int = 10,
    resamples: int = 10,
) -> Float[Array, "b *d"]:
    """RePaint: inpainting with resampling (Lugmayr et al. 2022, algorithm 1).

    Every stretch of `jump` steps is repeated: noise takes the image back to the level
    where the stretch began, and the steps are made again, `resamples` times in all.
    Each time the generated pixels fit the known ones better. A step that uses the last
    prediction (`samplers.dpmpp_2m_step`) forgets it where noise takes the image back.

    Args:
        keys: one for each image. The noise of an image at a row depends on its key, the
            row, and how often the row has been visited: the first visit draws what
            `samplers.sample` draws there, a later one has its number folded into keys.
        denoise_fn: the network as a denoiser.
        step_fn: the sampler's step, not wrapped by `samplers.inpaint`. Its state, which
            `samplers.start` makes, starts anew where noise takes the image back: one
            with fields of its own is not supported.
        schedule: the steps to take.
        x_T: noise [b, ...].
        x_known, mask: the known pixels and where they are, see `samplers.inpaint`.
        jump: steps in a stretch, >= 1; from T on, all steps are one stretch.
        resamples: how often each stretch is made, >= 1; 1 is `samplers.inpaint`.

    Returns:
        Images [b, ...].

    Raises:
        ValueError: if jump or resamples is no integer in its range, or arguments do
            not fit each other.
    """
    check_schedule(schedule)
    checks.integer("jump", jump, at_least=1)
    checks.integer("resamples", resamples, at_least=1)
    checks.data("x_T", x_T, ("b", ...))
    checks.data("x_known", x_known, x_T.shape)
    checks.keys("keys", keys, x_T.shape[0])
    step_fn = samplers.inpaint(step_fn, x_known, mask)
    ts = schedule.steps[::-1]
    jump = min(jump, len(ts))  # longer ones would be padded only
    ts = jnp.pad(ts, (-len(ts) % jump, 0), constant_values=-1).reshape(-1, jump)

    def stretch(state, ts):
        # Skipped steps, -1, come first in a stretch: it begins at the largest t.
        first, last = (jnp.full(x_T.shape[:1], t) for t in (jnp.max(ts), ts[-1]))

        def once(state, visit):
            # Negative, so that the number of a visit is none of a row.
            keys_now = jnp.where(visit > 0, samplers.fold_in(keys, -visit), keys)
            args = (keys_now, denoise_fn, step_fn, schedule)
            state = samplers.sample(*args, state=state, ts=ts)
            # A third purpose of the row, after those of `step_fn` and of `inpaint`.
            keys_back = samplers.fold_in(samplers.fold_in(keys_now, last), 2)
            back = renoise(keys_back, schedule, state.x, last, first)
            goes_back = visit < resamples - 1
            again = functools.partial(jnp.where, goes_back)
            return jax.tree.map(again, samplers.start(back, step_fn), state), None

        done, _ = jax.lax.scan(once, state, jnp.arange(resamples, dtype=jnp.int32))
        skipped = functools.partial(jnp.where, ts[-1] < 0)
        return jax.tree.map(skipped, state, done), None

    state, _ = jax.lax.scan(stretch, samplers.start(x_T, step_fn), ts)
    return state.x
