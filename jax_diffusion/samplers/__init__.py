"""Samplers: one function a step, and the one scan that runs it.

A step is `step(keys, denoise_fn, schedule, state, t) -> state`. What changes the step
wraps it (`share_noise`); what changes the prediction wraps the denoiser
(`diffusion.clip_x_0`). Nothing here is jitted: call it inside your own `jax.jit`, with
parameters, schedule, keys and eta as arguments.

There is one key per image. The noise of an image at a step depends on its key and on
the steps still to go, not on the batch around it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import diffusion
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.schedules import NoiseSchedule, check_step, take


class SampleState(NamedTuple):
    """All that a sampler carries from one step to the next."""

    x: Array  # [b, ...] the sample
    x_0: Array  # [b, ...] the last prediction of the clean data
    log_snr: Array  # [b, 1, ...] where x_0 was predicted; -inf before the first time


StepFn = Callable[..., SampleState]  # (keys, denoise_fn, schedule, state, t) -> state


def image_keys(key: Key[Array, ""], ids: Int[Array, "b"]) -> Key[Array, "b"]:
    """One key for each image, from the run's key and the image's own number."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)


def fold_in(keys: Key[Array, "b"], number: int | Int[Array, ""]) -> Key[Array, "b"]:
    """Other keys of the same images, for another purpose or step."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def normal(keys: Key[Array, "b"], shape: tuple[int, ...]) -> Float[Array, "b *d"]:
    """Standard normal noise, one draw of the given shape for each key: x_T."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def ddpm_step(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: SampleState,
    t: Int[Array, "b"],
) -> SampleState:
    """One step of ancestral sampling from t to t - 1 (Ho et al. 2020, algorithm 2).

    The mean is that of q(x_{t-1} | x_t, x_0) at the predicted x_0, the variance the
    predicted one. The last step, t = 0, adds no noise.
    """
    prediction = denoise_fn(state.x, t)
    mean = diffusion.guided_mean(schedule, prediction, state.x, t)
    level = take(schedule, t, state.x.ndim).now
    std = jnp.where(t.reshape(level.noise.shape) == 0, 0.0, 1.0)
    std = std * jnp.exp(0.5 * prediction.log_var)
    x = mean + std * normal(keys, state.x.shape[1:])
    return SampleState(x, prediction.x_0, level.log_snr)


def ddim_step(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: SampleState,
    t: Int[Array, "b"],
    *,
    eta: float | Float[Array, ""] = 0.0,
) -> SampleState:
    """One step of DDIM from t to t - 1 (Song et al. 2021, eq. 12 and 16).

    eta = 0 is deterministic; eta = 1 adds as much noise as ancestral sampling with the
    posterior variance (`fixed_small`). The predicted variance is not used. eps is that
    of the predicted x_0 after any clipping, as in improved-diffusion.
    """
    c = take(schedule, t, state.x.ndim)
    x_0 = _x_0(denoise_fn, schedule, state.x, t)
    eps = (state.x - c.now.signal * x_0) / c.now.noise
    ratio = c.prev.noise / c.now.noise
    sigma = eta * ratio * jnp.sqrt(c.betas)  # eq. 16
    # prev.noise^2 - sigma^2, as a sum of positive terms: the difference would cancel.
    # The bound keeps the gradient by eta finite at t = 0, where all of it is zero.
    kept = (1 - eta**2) + eta**2 * ratio**2 * (1 - c.betas)
    direction = c.prev.noise * jnp.sqrt(jnp.maximum(kept, 1e-20))
    x = c.prev.signal * x_0 + direction * eps + sigma * normal(keys, state.x.shape[1:])
    return SampleState(x, x_0, c.now.log_snr)


def ddim_inversion_step(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: SampleState,
    t: Int[Array, "b"],
) -> SampleState:
    """One deterministic step of DDIM the other way, from t up to t + 1.

    Do not clip the denoiser: what is clipped cannot be found again.
    """
    del keys
    c = take(schedule, t, state.x.ndim)
    x_0 = _x_0(denoise_fn, schedule, state.x, t)
    return SampleState(_carry(state.x, x_0, c.now, c.next), x_0, c.now.log_snr)


def dpmpp_2m_step(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: SampleState,
    t: Int[Array, "b"],
) -> SampleState:
    """One step of DPM-Solver++(2M) from t to t - 1 (Lu et al. 2022, algorithm 2).

    A step of DDIM with eta = 0 and, for x_0, the line in log-SNR through this
    prediction and the last one, at the middle of the step. Deterministic, of second
    order; the first step and the last, endless in log-SNR, are of first order.
    """
    del keys
    c = take(schedule, t, state.x.ndim)
    x_0 = _x_0(denoise_fn, schedule, state.x, t)
    step = c.prev.log_snr - c.now.log_snr
    last_step = c.now.log_snr - state.log_snr  # infinite before there is a last x_0
    finite = jnp.isfinite(step) & jnp.isfinite(last_step) & (last_step > 0)
    weight = jnp.where(finite, step, 0.0) / jnp.where(finite, 2 * last_step, 1.0)
    ahead = x_0 + weight * (x_0 - state.x_0)
    return SampleState(_carry(state.x, ahead, c.now, c.prev), x_0, c.now.log_snr)


def heun_step(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: SampleState,
    t: Int[Array, "b"],
) -> SampleState:
    """One step of Heun's method from t to t - 1, in log-SNR, with two evaluations.

    A step of DDIM with eta = 0, then again with the mean of x_0 at both its ends:
    DPM-Solver++(2S) with r = 1 (Lu et al. 2022). Deterministic, of second order; the
    last step, endless in log-SNR, is one of DDIM. Averaging eps instead (Karras et al.
    2022) breaks down on a long step from where hardly any signal is left.
    """
    del keys
    c = take(schedule, t, state.x.ndim)
    x_0 = _x_0(denoise_fn, schedule, state.x, t)
    x = _carry(state.x, x_0, c.now, c.prev)
    end_x_0 = _x_0(denoise_fn, schedule, x, jnp.maximum(t - 1, 0))
    mean = jnp.where(c.prev.noise > 0, (x_0 + end_x_0) / 2, x_0)
    return SampleState(_carry(state.x, mean, c.now, c.prev), x_0, c.now.log_snr)


def _x_0(denoise_fn, schedule, x, t):
    """What steps that follow the score take the clean data to be."""
    return diffusion.guided_x_0(schedule, denoise_fn(x, t), t)


def _carry(x, x_0, now, to):
    """x at another level, with the eps that it has if x_0 is the clean data."""
    return to.signal * x_0 + to.noise * (x - now.signal * x_0) / now.noise


def inpaint(
    step_fn: StepFn,
    x_known: Float[Array, "b *d"],
    mask: Array | Callable[[Array], Array],
) -> StepFn:
    """Steps that end in what is known, at the noise of their end (Song et al. 2021).

    The last step returns known pixels exactly. See `editing.repaint`, too.

    Args:
        x_known: data; what is not known of them is ignored.
        mask: 1 where pixels are known, else 0, to broadcast against data; or a function
            of images, an orthogonal projection on what is known of them.

    Raises:
        ValueError: if the mask does not fit the data.
    """
    project = mask if callable(mask) else functools.partial(_masked, mask, x_known)

    def step(keys, denoise_fn, schedule, state, t):
        state = step_fn(keys, denoise_fn, schedule, state, t)
        prev = take(schedule, t, x_known.ndim).prev
        keys = fold_in(keys, 1)  # the step itself has drawn with the keys as they are
        known = prev.signal * x_known + prev.noise * normal(keys, x_known.shape[1:])
        return state._replace(x=state.x - project(state.x) + project(known))

    return step


def share_noise(
    step_fn: StepFn, key: Key[Array, ""] | Key[Array, "b"], *, until: int
) -> StepFn:
    """The steps t >= until draw the same noise for all images that have the same key.

    With a shared x_T too, they part ways after (until = T - repeat_noise_steps of Ho).
    """

    def step(keys, denoise_fn, schedule, state, t):
        shared = jax.vmap(jax.random.fold_in)(jnp.broadcast_to(key, t.shape), t)
        data = jnp.where(
            t[:, None] >= until, jax.random.key_data(shared), jax.random.key_data(keys)
        )
        keys = jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys))
        return step_fn(keys, denoise_fn, schedule, state, t)

    return step


def watch(step_fn: StepFn, on_step: Callable[[Array], None]) -> StepFn:
    """Steps that tell the host their t, as they are made: for a progress bar."""

    def step(keys, denoise_fn, schedule, state, t):
        jax.debug.callback(on_step, t[0])
        return step_fn(keys, denoise_fn, schedule, state, t)

    return step


def start(x_T: Float[Array, "b *d"]) -> SampleState:
    """The state before the first step: noise, and no prediction yet."""
    no_level = jnp.full(x_T.shape[:1] + (1,) * (x_T.ndim - 1), -jnp.inf)
    return SampleState(x_T, jnp.zeros_like(x_T), no_level)


def sample_frames(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    step_fn: StepFn,
    schedule: NoiseSchedule,
    x_T: Float[Array, "b *d"],
    *,
    num_frames: int,
    ts: Int[Array, "n"] | None = None,
) -> SampleState:
    """Runs `step_fn` over `ts`, keeping `num_frames` evenly spaced states and the last.

    Memory grows with `num_frames`, not with the number of steps. Steps are recomputed
    in the backward pass, so reverse-mode memory grows with steps times image only.

    Args:
        keys: one per image, see `image_keys`.
        x_T: where to start; noise for generation, or data for inversion.
        ts: timesteps as they are visited, negative ones skipped; default T - 1 to 0.
        num_frames: a divisor of the length of `ts`.

    Returns:
        SampleState with a leading axis [num_frames] on every field.

    Raises:
        ValueError: if num_frames does not divide the number of steps.
    """
    if ts is None:
        ts = schedule.steps[::-1]
    num_steps = ts.shape[0]
    if num_frames < 1 or num_steps % num_frames:
        raise ValueError(f"num_frames must divide {num_steps} steps, got {num_frames}.")

    def visit(state, to_go_and_t):
        to_go, t = to_go_and_t
        step_keys = fold_in(keys, to_go)
        t = jnp.full(x_T.shape[:1], t, jnp.int32)
        return step_fn(step_keys, denoise_fn, schedule, state, t)

    visit = jax.checkpoint(visit, prevent_cse=False)  # a scan cannot merge steps anyway

    def one(state, to_go_and_t):
        skip = to_go_and_t[1] < 0
        return jax.lax.cond(skip, lambda s, _: s, visit, state, to_go_and_t), None

    def frame(state, chunk):
        state, _ = jax.lax.scan(one, state, chunk)
        return state, state

    # Noise is keyed by the steps still to go, so that skipped rows, which come first
    # in a padded schedule, do not change it.
    steps = (jnp.arange(num_steps, dtype=jnp.int32)[::-1], ts)
    chunks = jax.tree.map(lambda a: a.reshape(num_frames, -1), steps)
    _, frames = jax.lax.scan(frame, start(x_T), chunks)
    return frames


def sample(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    step_fn: StepFn,
    schedule: NoiseSchedule,
    x_T: Float[Array, "b *d"],
    *,
    ts: Int[Array, "n"] | None = None,
) -> Float[Array, "b *d"]:
    """Runs `step_fn` over `ts` and returns the last x. See `sample_frames`."""
    frames = sample_frames(
        keys, denoise_fn, step_fn, schedule, x_T, num_frames=1, ts=ts
    )
    return frames.x[-1]


def invert(
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    x_0: Float[Array, "b *d"],
    *,
    t: int | Int[Array, ""] | None = None,
) -> Float[Array, "b *d"]:
    """The x_t from which DDIM with eta = 0 returns to x_0, up to the step size.

    x_0 is taken to be at the level of step 0, from which steps go up to that of step t,
    by default T - 1, where `sample` starts. Do not clip the denoiser.
    """
    rows = jnp.arange(schedule.num_steps, dtype=jnp.int32)
    above = jnp.append(schedule.visited[1:], False)  # the last row goes nowhere
    ts = jnp.where(above if t is None else above & (rows < t), rows, -1)
    keys = image_keys(jax.random.key(0), rows[:1].repeat(x_0.shape[0]))  # not used
    return sample(keys, denoise_fn, ddim_inversion_step, schedule, x_0, ts=ts)


def slerp(
    x: Float[Array, "b *d"], y: Float[Array, "b *d"], weight: Float[Array, "b"]
) -> Float[Array, "b *d"]:
    """Spherical interpolation of noise, image by image (Song et al. 2021, eq. 67).

    Unlike a straight line it keeps the norm, and with it the noise level. weight 0
    gives x and 1 gives y. Parallel images are interpolated linearly.
    """
    shape = (-1,) + (1,) * (x.ndim - 1)
    flat_x, flat_y = (a.reshape(a.shape[0], -1) for a in (x, y))
    squares = jnp.sum(flat_x**2, axis=-1) * jnp.sum(flat_y**2, axis=-1)
    cosine = jnp.sum(flat_x * flat_y, axis=-1) / jnp.sqrt(jnp.maximum(squares, 1e-30))
    largest = 1 - 1e-7  # arccos has no derivative at 1, and float32 no angle below 3e-4
    angle = jnp.arccos(jnp.clip(cosine, -largest, largest))
    sine = jnp.sin(angle)
    straight = sine < 1e-3
    safe = jnp.where(straight, 1.0, sine)
    of_x = jnp.where(straight, 1 - weight, jnp.sin((1 - weight) * angle) / safe)
    of_y = jnp.where(straight, weight, jnp.sin(weight * angle) / safe)
    return of_x.reshape(shape) * x + of_y.reshape(shape) * y


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

    Returns:
        One row of images for each weight; 0 gives reconstructions of x_a, 1 of x_b.

    Raises:
        ValueError: unless 0 <= t < T, rows added by `schedules.pad` not counted.
    """
    check_step(schedule, t)
    keys_a, keys_b, keys_steps = (fold_in(keys, i) for i in range(3))
    level = jnp.full(x_a.shape[:1], t, jnp.int32)
    noised_a, noised_b = (
        diffusion.q_sample(schedule, x_0, level, normal(k, x_0.shape[1:]))
        for x_0, k in ((x_a, keys_a), (x_b, keys_b))
    )
    ts = jnp.arange(t, -1, -1, dtype=jnp.int32)

    def at(weight):
        x_t = (1 - weight) * noised_a + weight * noised_b
        return sample(keys_steps, denoise_fn, step_fn, schedule, x_t, ts=ts)

    return jax.lax.map(at, weights)


def _masked(mask, x_known, x):
    known = x_known.shape
    shape = (1,) * (len(known) - np.ndim(mask)) + np.shape(mask)
    if len(shape) > len(known) or any(
        n not in (1, m) for n, m in zip(shape, known, strict=True)
    ):
        raise ValueError(f"the mask must fit data {known}, got shape {np.shape(mask)}.")
    return jnp.reshape(mask, shape) * x
