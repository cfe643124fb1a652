"""What people do with a sampler: change, complete and join images.

Each function is a few lines around `samplers.sample`, with one key per image as there.
What is known of an image may be given as a mask or as a projection, see
`samplers.inpaint`; `grey` and `block_mean` are projections.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import diffusion, samplers
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.samplers import StepFn
from jax_diffusion.schedules import NoiseSchedule, check_step, take


def grey(x: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
    """The mean of the channels, in each of them: what colourisation knows."""
    return jnp.broadcast_to(jnp.mean(x, axis=-1, keepdims=True), x.shape)


def block_mean(x: Float[Array, "b h w c"], *, size: int) -> Float[Array, "b h w c"]:
    """The mean of every block of pixels, in each of them: what enlarging knows.

    With `samplers.inpaint`, enlarging with any network (Choi et al. 2021 do so with
    another filter).

    Raises:
        ValueError: unless both sides divide by the size of a block.
    """
    small = shrink(x, size=size)
    return jnp.repeat(jnp.repeat(small, size, axis=1), size, axis=2)


def shrink(x: Float[Array, "b h w c"], *, size: int) -> Float[Array, "b h2 w2 c"]:
    """The mean of every block of size x size pixels.

    Raises:
        ValueError: unless both sides divide by it.
    """
    b, h, w, c = x.shape
    if size < 1 or h % size or w % size:
        raise ValueError(f"blocks of pixels must divide {h} x {w}, got {size}.")
    return x.reshape(b, h // size, size, w // size, size, c).mean(axis=(2, 4))


def renoise(
    keys: Key[Array, "b"],
    schedule: NoiseSchedule,
    x: Float[Array, "b *d"],
    t: Int[Array, "b"],
    to: Int[Array, "b"],
) -> Float[Array, "b *d"]:
    """x_to ~ q(x_to | x), where x is what a sampler's step at t has returned, t <= to.

    From the level of t - 1 up to that of `to` (DDPM eq. 4, from one level to another).
    """
    low = take(schedule, t, x.ndim).prev
    high = take(schedule, to, x.ndim).now
    ratio = high.signal / low.signal
    var = high.noise**2 - (ratio * low.noise) ** 2
    std = jnp.sqrt(jnp.maximum(var, 0.0))
    return ratio * x + std * samplers.normal(keys, x.shape[1:])


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
    """Inpainting that goes back and forth (Lugmayr et al. 2022, algorithm 1).

    Every `jump` steps are made `resamples` times, with noise added in between that
    takes the image back to where they begin, so that what is generated comes to fit
    what is known. resamples = 1 is `samplers.inpaint`. A step that remembers the last
    prediction (`samplers.dpmpp_2m_step`) begins anew each time.

    Raises:
        ValueError: unless both numbers are positive.
    """
    if jump < 1 or resamples < 1:
        raise ValueError(
            f"jump and resamples must be positive, got {jump} and {resamples}."
        )
    step_fn = samplers.inpaint(step_fn, x_known, mask)
    ts = schedule.steps[::-1]
    ts = jnp.pad(ts, (-len(ts) % jump, 0), constant_values=-1).reshape(-1, jump)

    def stretch(x, number_and_ts):
        number, ts = number_and_ts
        keys_here = samplers.fold_in(keys, number)
        # Steps that are skipped stand first: the largest is where the others begin.
        first, last = jnp.max(ts), ts[-1]

        def once(x, i):
            keys_once = samplers.fold_in(keys_here, 2 * i)
            x = samplers.sample(keys_once, denoise_fn, step_fn, schedule, x, ts=ts)
            keys_back = samplers.fold_in(keys_here, 2 * i + 1)
            rows = (jnp.full(x.shape[:1], t) for t in (last, first))
            back = renoise(keys_back, schedule, x, *rows)
            return jnp.where(i < resamples - 1, back, x), None

        done, _ = jax.lax.scan(once, x, jnp.arange(resamples))
        return jnp.where(last < 0, x, done), None

    # Noise is keyed by the stretches to go, so that skipped ones do not change it.
    x, _ = jax.lax.scan(stretch, x_T, (jnp.arange(len(ts))[::-1], ts))
    return x


def edit(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    step_fn: StepFn,
    schedule: NoiseSchedule,
    x: Float[Array, "b *d"],
    *,
    t: int | Int[Array, ""],
) -> Float[Array, "b *d"]:
    """Takes an image up to level t with noise, and down again (Meng et al. 2022).

    SDEdit. The larger t, in [0, T), the more is made up. It may be traced.

    Raises:
        ValueError: if t is no step of the schedule, where both have values.
    """
    check_step(schedule, t)
    level = jnp.full(x.shape[:1], t, jnp.int32)
    eps = samplers.normal(samplers.fold_in(keys, 0), x.shape[1:])
    x_t = diffusion.q_sample(schedule, x, level, eps)
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
    """Samples from level t, which may be traced, down to the image.

    From one x_t repeated for several keys: the completions of Ho et al. 2020, figure 7.

    Raises:
        ValueError: if t is no step of the schedule, where both have values.
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
    """The noise at level t that stands for an image, and what DDIM makes of it.

    Do not clip the denoiser: what is clipped cannot be found again. Without clipping, a
    network that predicts eps cannot come down from where hardly any signal is left, as
    at the end of a cosine schedule: choose a lower t than T - 1, the default.
    """
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
    """Images of the noises between two, by `samplers.slerp` (Song et al. 2021, fig. 6).

    One row for each weight, 0 for x_T and 1 for y_T; all share the noise of the steps.
    """

    def at(weight):
        z_T = samplers.slerp(x_T, y_T, jnp.full(x_T.shape[:1], weight))
        return samplers.sample(keys, denoise_fn, step_fn, schedule, z_T)

    return jax.lax.map(at, weights)
