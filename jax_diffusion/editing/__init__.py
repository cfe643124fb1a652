"""Editing with a sampler: RePaint, SDEdit, inversion; draws from a posterior.

Each function is a few lines around `samplers.sample` and takes one key for each image.
What is known of an image is a mask or a projection, see `samplers.inpaint`: `gray` and
`block_mean` are projections, which colorize and enlarge. Any other measurement of it is
a likelihood, see `dps` and `twisted_smc`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import checks, diffusion, samplers
from jax_diffusion.checks import placement
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.editing.measured import dps, twisted_smc
from jax_diffusion.samplers import StepFn
from jax_diffusion.samplers.loop import like_batch
from jax_diffusion.schedules import (
    NoiseSchedule,
    check_batch,
    check_rows,
    check_schedule,
    check_step,
    take,
)

__all__ = [
    "between_noises",
    "block_mean",
    "descend",
    "dps",
    "edit",
    "gray",
    "grey",
    "reconstruct",
    "renoise",
    "repaint",
    "shrink",
    "twisted_smc",
]


def gray(x: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
    """Replaces every channel by the mean of the channels: the projection to colorize.

    Takes images x [b, ..., c] and returns images of the same shape. Colorizing by a
    projection is of Song et al. 2021 (score SDE), app. I.3.

    Raises:
        ValueError: unless x is a float array with an axis of channels.

    >>> gray(jnp.array([[[[0.0, 0.5, 1.0]]]])).ravel().tolist()
    [0.5, 0.5, 0.5]
    """
    checks.data("x", x, ("b", ...))
    if x.ndim < 2:
        raise ValueError(f"x must have an axis of channels, got {checks.shown(x)}.")
    return jnp.broadcast_to(jnp.mean(x, axis=-1, keepdims=True), x.shape)


grey = gray  # its old name


def block_mean(x: Float[Array, "b h w c"], *, size: int) -> Float[Array, "b h w c"]:
    """Replaces every pixel by the mean of its block: the projection to enlarge images.

    With `samplers.inpaint` it enlarges with any network (cf. Choi et al. 2021, whose
    filter is another).

    Args:
        x: images [b, h, w, c].
        size: side of a block, in pixels.

    Returns:
        Images [b, h, w, c].

    Raises:
        ValueError: unless x is such a float array, and size divides h and w.
    """
    small = shrink(x, size=size)
    layout = placement.of_batch(x, x.ndim)
    tall = jnp.repeat(small, size, axis=1, out_sharding=layout)
    return jnp.repeat(tall, size, axis=2, out_sharding=layout)


def shrink(x: Float[Array, "b h w c"], *, size: int) -> Float[Array, "b h2 w2 c"]:
    """Averages every block of size x size pixels into one pixel.

    So improved-diffusion makes the small images of super-resolution (mode "area").

    Args:
        x: images [b, h, w, c].
        size: side of a block, in pixels.

    Returns:
        Images [b, h / size, w / size, c].

    Raises:
        ValueError: unless x is such a float array, and size divides h and w.

    >>> shrink(jnp.arange(4.0).reshape(1, 2, 2, 1), size=2).ravel().tolist()
    [1.5]
    """
    checks.data("x", x, ("b", "h", "w", "c"))
    b, h, w, c = x.shape
    checks.integer("size", size, at_least=1)
    if h % size or w % size:
        raise ValueError(f"size must divide {h} x {w}, got {size}.")
    x = placement.reshape(x, (b, h // size, size, w // size, size, c))
    return x.mean(axis=(2, 4))


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
        keys: typed keys [b], one for each image.
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
        keys: typed keys [b], one for each image. The noise of an image at a row depends
            on its key, the row, and how often the row has been visited: the first visit
            draws what `samplers.sample` draws there, a later one has its number folded
            into keys.
        denoise_fn: the network as a denoiser.
        step_fn: the sampler's step, not wrapped by `samplers.inpaint`. Its state, which
            `samplers.start` makes, starts anew where noise takes the image back: one
            with fields of its own is not supported.
        schedule: the steps to take.
        x_T: noise [b, ...].
        x_known: the known pixels [b, ...].
        mask: where they are, 1 or 0, [b, ...], or a projection; see `samplers.inpaint`.
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
        first, last = (like_batch(t, x_T) for t in (jnp.max(ts), ts[-1]))

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


def edit(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    step_fn: StepFn,
    schedule: NoiseSchedule,
    x: Float[Array, "b *d"],
    *,
    t: int | Int[Array, ""],
) -> Float[Array, "b *d"]:
    """SDEdit: noises an image to level t and samples from there (Meng et al. 2022).

    Args:
        keys: typed keys [b], one for each image.
        denoise_fn: the network as a denoiser.
        step_fn: the sampler's step.
        schedule: the steps to take.
        x: images [b, ...].
        t: in [0, T), may be traced; the larger it is, the more of the image changes.

    Returns:
        Images [b, ...].

    Raises:
        ValueError: if t is no step of the schedule, where it is known, or arguments do
            not fit each other.
    """
    check_step(schedule, t)
    checks.data("x", x, ("b", ...))
    checks.keys("keys", keys, x.shape[0])
    level = like_batch(t, x)
    eps = samplers.normal(samplers.fold_in(keys, 0), x.shape[1:])
    x_t = diffusion.q_sample(schedule, x, level, eps).astype(jnp.result_type(x))
    return descend(samplers.fold_in(keys, 1), denoise_fn, step_fn, schedule, x_t, t=t)


def descend(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    step_fn: StepFn,
    schedule: NoiseSchedule,
    x_t: Float[Array, "b *d"],
    *,
    t: int | Int[Array, ""],
) -> Float[Array, "b *d"]:
    """Samples from level t down to the image.

    With one x_t repeated and different keys, this gives the images that share x_t (Ho
    et al. 2020, figure 7).

    Args:
        keys: typed keys [b], one for each image.
        denoise_fn: the network as a denoiser.
        step_fn: the sampler's step.
        schedule: the steps to take.
        x_t: noisy data [b, ...] at level t.
        t: in [0, T), may be traced.

    Returns:
        Images [b, ...].

    Raises:
        ValueError: if t is no step of the schedule, where it is known, or arguments do
            not fit each other.
    """
    check_step(schedule, t)
    ts = jnp.where(schedule.steps <= t, schedule.steps, -1)[::-1]
    return samplers.sample(keys, denoise_fn, step_fn, schedule, x_t, ts=ts)


def reconstruct(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    x: Float[Array, "b *d"],
    *,
    t: int | Int[Array, ""] | None = None,
) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
    """Encodes images as noise by DDIM inversion, and decodes them again by DDIM.

    Song et al. 2021, table 2.

    Args:
        keys: typed keys [b], which DDIM with eta = 0 does not use.
        denoise_fn: not clipped: what clipping removes cannot be recovered. Unclipped, a
            network that predicts eps is inaccurate where hardly any signal is left, as
            at the end of a cosine schedule: take a lower t there.
        schedule: the steps to take.
        x: images [b, ...].
        t: the level to encode to, may be traced; default T - 1.

    Returns:
        The noise x_t and the reconstructions, [b, ...] each.

    Raises:
        ValueError: if t is no step of the schedule, where it is known, or arguments do
            not fit each other.
    """
    check_schedule(schedule)
    if t is None:
        t = jnp.sum(schedule.visited) - 1
    x_t = samplers.invert(denoise_fn, schedule, x, t=t)
    return x_t, descend(keys, denoise_fn, samplers.ddim_step, schedule, x_t, t=t)


def between_noises(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    step_fn: StepFn,
    schedule: NoiseSchedule,
    x_T: Float[Array, "b *d"],
    y_T: Float[Array, "b *d"],
    weights: Float[Array, "n"],
) -> Float[Array, "n b *d"]:
    """Samples from noises between x_T and y_T, by slerp (Song et al. 2021, fig. 6).

    Args:
        keys: typed keys [b], one for each pair; all weights share the noise that steps
            add.
        denoise_fn: the network as a denoiser.
        step_fn: the sampler's step.
        schedule: the steps to take.
        x_T, y_T: noise [b, ...].
        weights: [n], 0 for x_T and 1 for y_T.

    Returns:
        [n, b, ...]: a row of images for each weight.

    Raises:
        ValueError: unless arguments fit each other.
    """
    checks.data("x_T", x_T, ("b", ...))
    checks.data("y_T", y_T, x_T.shape)
    checks.array("weights", weights, "float", ("n",))

    def at(weight):
        z_T = samplers.slerp(x_T, y_T, jnp.full(x_T.shape[:1], weight))
        return samplers.sample(keys, denoise_fn, step_fn, schedule, z_T)

    return jax.lax.map(at, weights)
