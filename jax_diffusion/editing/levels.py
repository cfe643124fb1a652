"""Down from a noise level: SDEdit, DDIM inversion and back, from between two noises."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import checks, diffusion, samplers
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.samplers import StepFn
from jax_diffusion.schedules import NoiseSchedule, check_schedule, check_step


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
        keys: one for each image.
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
    level = jnp.full(x.shape[:1], t, jnp.int32)
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
        keys: one for each image.
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

    Args:
        keys: one for each image; DDIM with eta = 0 does not use them.
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
        keys: one for each pair; all weights share the noise that steps add.
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
