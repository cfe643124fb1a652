"""The state of a sampler, keys for images, and the one scan over sampling steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import checks
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.schedules import NoiseSchedule, check_batch, check_schedule


class SampleState(NamedTuple):
    """What a sampler carries from one step to the next.

    A solver that needs more of the past than this carries it here.

    Attributes:
        x: [b, ...] the sample, at the noise level that the last step has reached.
        x_0: [b, ...] the last prediction of the clean data; zeros before the first.
        log_snr: [b, 1, ...] log(signal^2 / noise^2) of the level where x_0 was
            predicted; -inf before the first prediction.
    """

    x: Array
    x_0: Array
    log_snr: Array


StepFn = Callable[..., SampleState]
"""One step of a sampler: step(keys, denoise_fn, schedule, state, t) -> state.

`jax_diffusion.samplers` says what each argument is.
"""

STEP_ARGUMENTS = "(keys, denoise_fn, schedule, state, t)"  # in words, for errors


def image_keys(key: Key[Array, ""], ids: Int[Array, "b"]) -> Key[Array, "b"]:
    """Makes one key for each image from the run's key and the images' numbers.

    Args:
        key: the key of the run.
        ids: int [b], the number of each image. The same number gives the same key
            whatever the batch.

    Returns:
        Typed keys [b].

    Raises:
        ValueError: unless key is one typed key, and ids are integers [b].

    >>> image_keys(jax.random.key(0), jnp.arange(3)).shape
    (3,)
    """
    checks.key("key", key)
    checks.array("ids", ids, "integer", ("b",))
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)


def fold_in(keys: Key[Array, "b"], number: int | Int[Array, ""]) -> Key[Array, "b"]:
    """Makes other keys [b] for the same images: `jax.random.fold_in` for many keys.

    Args:
        keys: one for each image.
        number: says what the new keys are for: a step, or a second purpose.

    Raises:
        ValueError: unless keys are typed keys [b], and number is one integer.
    """
    checks.keys("keys", keys)
    if isinstance(number, jax.Array):
        checks.array("number", number, "integer", ())
    else:
        checks.integer("number", number, at_least=0, at_most=2**32 - 1)
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def normal(keys: Key[Array, "b"], shape: tuple[int, ...]) -> Float[Array, "b *d"]:
    """Draws standard normal noise [b, *shape], as x_T or within a step.

    Args:
        keys: one for each image.
        shape: of one image.

    Raises:
        ValueError: unless keys are typed keys [b], and shape is one.

    >>> normal(image_keys(jax.random.key(0), jnp.arange(2)), (8, 8, 3)).shape
    (2, 8, 8, 3)
    """
    checks.keys("keys", keys)
    if not isinstance(shape, tuple | list):
        raise ValueError(f"shape must be that of an image, got {checks.shown(shape)}.")
    for axis in shape:
        checks.integer("shape's axes", axis, at_least=0)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def start(x_T: Float[Array, "b *d"]) -> SampleState:
    """The state before the first step: x = x_T [b, ...], and no prediction yet.

    Raises:
        ValueError: unless x_T is a float array with an axis [b].
    """
    checks.data("x_T", x_T, ("b", ...))
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
        keys: one for each image, see `image_keys`. The noise of an image at a step
            depends on its key and on how many steps are still to go.
        denoise_fn: the network as a denoiser, called with x_t and t.
        step_fn: the sampler's step, such as `ddim_step`.
        schedule: the steps to take.
        x_T: where to start; noise for generation, or data for inversion.
        ts: timesteps as they are visited, negative ones skipped; default T - 1 to 0.
        num_frames: a divisor of the length of `ts`.

    Returns:
        SampleState with a leading axis [num_frames] on every field.

    Raises:
        ValueError: if num_frames does not divide the number of steps, arguments do not
            fit each other, or denoise_fn or step_fn returns something else.
    """
    checks.function("denoise_fn", denoise_fn, "(x_t, t)")
    checks.function("step_fn", step_fn, STEP_ARGUMENTS)
    check_schedule(schedule)
    checks.data("x_T", x_T, ("b", ...))
    checks.keys("keys", keys, x_T.shape[0])
    if ts is None:
        ts = schedule.steps[::-1]
    else:
        checks.array("ts", ts, "int", ("n",))
        checks.rows("ts", ts, schedule.num_steps, negative=True)
    num_steps = ts.shape[0]
    checks.integer("num_frames", num_frames)
    if num_frames < 1 or num_steps % num_frames:
        raise ValueError(f"num_frames must divide {num_steps} steps, got {num_frames}.")

    def visit(state, to_go_and_t):
        to_go, t = to_go_and_t
        step_keys = fold_in(keys, to_go)
        t = jnp.full(x_T.shape[:1], t, jnp.int32)
        new = step_fn(step_keys, denoise_fn, schedule, state, t)
        check_state(new, state)
        return new

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
    """Runs `step_fn` over `ts` and returns the last x, [b, ...] as x_T.

    `keys`, `denoise_fn`, `step_fn`, `schedule`, `x_T` and `ts` are those of
    `sample_frames`, which says what raises ValueError.

    >>> from jax_diffusion import diffusion, samplers, schedules
    >>> schedule = schedules.make_schedule(schedules.cosine_betas(4))
    >>> v_objective = diffusion.Objective(mean_type="v")
    >>> denoise_fn = diffusion.denoiser(lambda x, t: 0 * x, schedule, v_objective)
    >>> keys = image_keys(jax.random.key(0), jnp.arange(2))
    >>> x_T = normal(keys, (3,))
    >>> sample(keys, denoise_fn, samplers.ddim_step, schedule, x_T).shape
    (2, 3)
    """
    frames = sample_frames(
        keys, denoise_fn, step_fn, schedule, x_T, num_frames=1, ts=ts
    )
    return frames.x[-1]


def check_step_arguments(
    keys: Any, denoise_fn: Any, schedule: Any, state: Any, t: Any
) -> None:
    """Raises ValueError unless the arguments of a sampler's step fit each other.

    `keys`, `denoise_fn`, `schedule`, `state` and `t` are those of a step, see
    `jax_diffusion.samplers`. t may be an integer of no axis within `jax.vmap`.
    """
    checks.function("denoise_fn", denoise_fn, "(x_t, t)")
    if not all(hasattr(state, name) for name in SampleState._fields):
        rule = "state must be a SampleState, such as samplers.start makes"
        raise ValueError(f"{rule}, got {checks.shown(state)}.")
    check_batch(schedule, t, **{"state.x": state.x})
    checks.data("state.x", state.x, ("b", ...))
    checks.keys("keys", keys, state.x.shape[0])


def check_state(new: Any, old: SampleState) -> None:
    """Raises ValueError unless a step returns a state, `new`, like its `old` one.

    Otherwise the scan would say so, in words that name neither.
    """
    if jax.tree.structure(new) != jax.tree.structure(old):
        rule = "step_fn must return a state like the one that it is given"
        raise ValueError(f"{rule}, got {checks.shown(new)}.")
    pairs = zip(old._fields, jax.tree.leaves(new), jax.tree.leaves(old), strict=False)
    for name, a, b in pairs:
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(
                f"step_fn must return a state like the one that it is given, with "
                f"{name} {checks.shown(b)}, got {checks.shown(a)}."
            )
