"""From noise to images and back: x_T, DDIM inversion, slerp, interpolation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import checks, diffusion
from jax_diffusion.checks import placement
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.samplers.loop import StepFn, like_batch, sample
from jax_diffusion.samplers.noise import fold_in, image_keys, normal
from jax_diffusion.samplers.steps import ddim_inversion_step
from jax_diffusion.schedules import NoiseSchedule, check_chain, check_step


def pure_noise(
    keys: Key[Array, "b"], schedule: NoiseSchedule, shape: tuple[int, ...]
) -> Float[Array, "b *d"]:
    """Draws x_T, which sampling starts from: `normal` at the noise of the last level.

    x_T of DDPM algorithm 2, and of EDM (Karras et al. 2022), algorithm 1.

    Its standard deviation is the noise of `next` in the last row: 1 where the last
    level preserves variance, as in chains of betas, and elsewhere that level's noise.

    Args:
        keys: typed keys [b], one for each image.
        schedule: the steps to take.
        shape: of one image.

    Returns:
        x_T [b, *shape], float32.

    Raises:
        ValueError: unless keys are typed keys [b], and schedule and shape are such.

    >>> from jax_diffusion.schedules import edm_levels, from_levels
    >>> schedule = from_levels(*edm_levels(10, sigma_max=80.0))
    >>> keys = image_keys(jax.random.key(0), jnp.arange(2))
    >>> (pure_noise(keys, schedule, (3,)) / normal(keys, (3,))).round(3)[0].tolist()
    [80.0, 80.0, 80.0]
    """
    check_chain(schedule, may_rise=True)
    return schedule.next.noise[-1] * normal(keys, shape)


def invert(
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    x_0: Float[Array, "b *d"],
    *,
    t: int | Int[Array, ""] | None = None,
) -> Float[Array, "b *d"]:
    """Finds the x_t from which DDIM with eta = 0 returns to x_0 (DDIM inversion).

    The ODE of Song et al. 2021, eq. 14, from data to noise, exact up to an error of the
    order of the step size. x_0 is taken to be at the noise
    level of step 0, from which steps go up to the level of step t.

    Args:
        denoise_fn: not clipped: what clipping removes cannot be recovered.
        schedule: the steps to take.
        x_0: [b, ...] data.
        t: the step to stop at, one number; default T - 1, where `sample` starts.

    Returns:
        x_t, [b, ...].

    Raises:
        ValueError: if t is no step of the schedule, where it is known, or arguments do
            not fit each other.
    """
    check_chain(schedule)
    checks.data("x_0", x_0, ("b", ...))
    if t is not None:
        check_step(schedule, t)
    rows = jnp.arange(schedule.num_steps, dtype=jnp.int32)
    above = jnp.append(schedule.visited[1:], False)  # the last row goes nowhere
    ts = jnp.where(above if t is None else above & (rows < t), rows, -1)
    keys = image_keys(jax.random.key(0), rows[:1].repeat(x_0.shape[0]))  # not used
    return sample(keys, denoise_fn, ddim_inversion_step, schedule, x_0, ts=ts)


def slerp(
    x: Float[Array, "b *d"], y: Float[Array, "b *d"], weight: Float[Array, "b"]
) -> Float[Array, "b *d"]:
    """Spherical interpolation of noise, image by image (Song et al. 2021, eq. 67).

    Unlike a straight line this keeps the norm, and with it the noise level. Parallel
    images are interpolated linearly.

    Args:
        x, y: noise [b, ...].
        weight: [b], 0 gives x and 1 gives y.

    Returns:
        [b, ...], between x and y.

    Raises:
        ValueError: unless x, y and weight are float arrays of such shapes.

    >>> x, y = jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 2.0]])
    >>> slerp(x, y, jnp.array([0.5])).round(3)
    Array([[1.414, 1.414]], dtype=float32)
    """
    checks.data("x", x, ("b", ...))
    checks.data("y", y, x.shape)
    checks.array("weight", weight, "float", x.shape[:1])
    weight = weight.astype(jnp.result_type(x, y, jnp.float32))
    shape = (-1,) + (1,) * (x.ndim - 1)
    wide = weight.dtype  # squares of float16 overflow
    flat_x, flat_y = (
        placement.reshape(a, (a.shape[0], -1)).astype(wide) for a in (x, y)
    )
    weight = placement.beside(weight, x)
    squares = jnp.sum(flat_x**2, axis=-1) * jnp.sum(flat_y**2, axis=-1)
    cosine = jnp.sum(flat_x * flat_y, axis=-1) / jnp.sqrt(jnp.maximum(squares, 1e-30))
    largest = 1 - 1e-7  # arccos has no derivative at 1, and float32 no angle below 3e-4
    angle = jnp.arccos(jnp.clip(cosine, -largest, largest))
    sine = jnp.sin(angle)
    straight = sine < 1e-3
    safe = jnp.where(straight, 1.0, sine)
    of_x = jnp.where(straight, 1 - weight, jnp.sin((1 - weight) * angle) / safe)
    of_y = jnp.where(straight, weight, jnp.sin(weight * angle) / safe)
    between = of_x.reshape(shape) * x + of_y.reshape(shape) * y
    return between.astype(jnp.result_type(x, y))


def interpolate(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    step_fn: StepFn,
    schedule: NoiseSchedule,
    x_a: Float[Array, "b *d"],
    x_b: Float[Array, "b *d"],
    weights: Float[Array, "n"],
    *,
    t: int,
) -> Float[Array, "n b *d"]:
    """Images between x_a and x_b, mixed at noise level t (Ho et al. 2020, fig. 8).

    Noises both to level t with independent noise, mixes (1 - w) x_a + w x_b, and
    samples from t down to 0, both included. All weights share one draw of noise.

    Args:
        keys: typed keys [b], one for each pair of images.
        denoise_fn: the network as a denoiser.
        step_fn: the sampler's step.
        schedule: the steps to take.
        x_a, x_b: data [b, ...].
        weights: [n], 0 for x_a and 1 for x_b.
        t: the level at which noised images are mixed, in [0, T).

    Returns:
        [n, b, ...]: a row of images for each weight; 0 gives reconstructions of x_a, 1
        of x_b.

    Raises:
        ValueError: unless 0 <= t < T, rows added by `schedules.pad` not counted, and
            arguments fit each other.
    """
    check_step(schedule, t)
    checks.data("x_a", x_a, ("b", ...))
    checks.data("x_b", x_b, x_a.shape)
    checks.keys("keys", keys, x_a.shape[0])
    checks.array("weights", weights, "float", ("n",))
    keys_a, keys_b, keys_steps = (fold_in(keys, i) for i in range(3))
    weights = weights.astype(jnp.result_type(x_a, jnp.float32))
    level = like_batch(t, x_a)
    noised_a, noised_b = (
        diffusion.q_sample(schedule, x_0, level, normal(k, x_0.shape[1:]))
        for x_0, k in ((x_a, keys_a), (x_b, keys_b))
    )
    ts = jnp.arange(t, -1, -1, dtype=jnp.int32)

    def at(weight):
        x_t = (1 - weight) * noised_a + weight * noised_b
        x_t = x_t.astype(jnp.result_type(x_a))
        return sample(keys_steps, denoise_fn, step_fn, schedule, x_t, ts=ts)

    return jax.lax.map(at, weights)
