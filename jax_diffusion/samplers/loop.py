"""The one scan over sampling steps, and what it checks."""

from typing import Any, Protocol, overload, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import checks
from jax_diffusion.checks import placement, signatures
from jax_diffusion.diffusion import DenoiseFn, check_denoise_fn, check_schedule_of
from jax_diffusion.samplers.noise import keys_of_step
from jax_diffusion.samplers.state import (
    SampleState,
    State,
    StateLike,
    check_fields,
    check_state,
    first_state,
    traits_of,
)
from jax_diffusion.schedules import NoiseSchedule, check_batch, check_chain


@runtime_checkable
class StepFn(Protocol):
    """One step of a sampler: step(keys, denoise_fn, schedule, state, t) -> state.

    `jax_diffusion.samplers` says what each argument is.
    """

    def __call__(
        self,
        keys: Array,
        denoise_fn: DenoiseFn,
        schedule: NoiseSchedule,
        state: Any,
        t: Array,
        /,
    ) -> StateLike:
        """Returns a state like `state`, at the level of t - 1."""
        ...


STEP_ARGUMENTS = "(keys, denoise_fn, schedule, state, t)"  # in words, for errors


def check_step_fn(name: str, step_fn: Any) -> None:
    """Raises ValueError unless `step_fn`, the argument `name`, is called as a step."""
    checks.function(name, step_fn, STEP_ARGUMENTS)
    signatures.takes(name, step_fn, *STEP_ARGUMENTS.strip("()").split(", "))


@overload
def sample_frames(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    step_fn: StepFn,
    schedule: NoiseSchedule,
    x_T: Float[Array, "b *d"],
    *,
    num_frames: int,
    ts: Int[Array, "n"] | None = None,
) -> SampleState: ...
@overload
def sample_frames(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    step_fn: StepFn,
    schedule: NoiseSchedule,
    *,
    num_frames: int,
    ts: Int[Array, "n"] | None = None,
    state: State,
) -> State: ...
def sample_frames(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    step_fn: StepFn,
    schedule: NoiseSchedule,
    x_T: Float[Array, "b *d"] | None = None,
    *,
    num_frames: int,
    ts: Int[Array, "n"] | None = None,
    state: Any = None,
) -> Any:
    """Runs `step_fn` over `ts`, keeping `num_frames` evenly spaced states and the last.

    DDPM algorithm 2, of any sampler; `p_sample_loop_progressive` of improved-diffusion.
    Memory grows with `num_frames`, not with the number of steps. Steps are recomputed
    in the backward pass, so reverse-mode memory grows with steps times image only.

    Args:
        keys: typed keys [b], one for each image, see `image_keys`. The noise of an
            image at a step depends on its key and on the row t of the step alone.
        denoise_fn: the network as a denoiser, called with x_t and t.
        step_fn: the sampler's step, such as `ddim_step`.
        schedule: the steps to take.
        x_T: [b, ...], where to start; noise for generation, or data for inversion.
        ts: int32 [n], rows as they are visited, one after the other, negative ones
            skipped: all downwards, default T - 1 to 0, or upwards if the step does so.
            A row that comes back would get the same noise again: sample in several
            calls then, with another number folded into keys, as `editing.repaint` does.
        num_frames: a divisor of the length of `ts`.
        state: where to start instead of x_T, see `sample`.

    Returns:
        SampleState, or what `state` is, with a leading axis [num_frames] on every leaf.
        Rows added by `schedules.pad` are skipped: first frames may be x_T as it was.

    Raises:
        ValueError: if num_frames does not divide the number of steps, ts, where known,
            repeats or leaves out a row, or goes another way than a step of this
            package, arguments do not fit each other, denoise_fn is made with another
            schedule, or denoise_fn or step_fn takes or returns something else.
    """
    check_denoise_fn(denoise_fn)
    check_step_fn("step_fn", step_fn)
    check_chain(schedule, may_rise=True)
    check_schedule_of(denoise_fn, schedule)
    first = first_state(x_T, state, step_fn)
    checks.keys("keys", keys, first.x.shape[0])
    keys = placement.beside(keys, first.x)
    if ts is None:
        ts, way = schedule.steps[::-1], -1
    else:
        checks.array("ts", ts, "int", ("n",))
        checks.rows("ts", ts, schedule.num_steps, negative=True)
        way = check_order(ts)
    if way * traits_of(step_fn)["way"] < 0:
        wanted, got = ("down", "up") if way > 0 else ("up", "down")
        rule = f"ts must go {wanted} as step_fn does"
        raise ValueError(f"{rule}, got rows that go {got}.")
    num_steps = ts.shape[0]
    checks.integer("num_frames", num_frames)
    if num_frames < 1 or num_steps % num_frames:
        raise ValueError(f"num_frames must divide {num_steps} steps, got {num_frames}.")

    def visit(state, t):
        t = like_batch(t, state.x)
        with keys_of_step(keys):
            try:
                new = step_fn(keys, denoise_fn, schedule, state, t)
            except AttributeError as error:
                if not isinstance(error.obj, SampleState):
                    raise
                raise ValueError(
                    f"step_fn must do with the fields {SampleState._fields} of a state "
                    f"unless `sample` is given one with more, got {error.name!r} read."
                ) from error
        check_state(new, state)
        return new

    visit = jax.checkpoint(visit, prevent_cse=False)  # a scan cannot merge steps anyway

    def one(state, t):
        return jax.lax.cond(t < 0, lambda s, _: s, visit, state, t), None

    def frame(state, ts):
        state, _ = jax.lax.scan(one, state, ts)
        return state, state

    _, frames = jax.lax.scan(frame, first, ts.reshape(num_frames, -1))
    return frames


@overload
def sample(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    step_fn: StepFn,
    schedule: NoiseSchedule,
    x_T: Float[Array, "b *d"],
    *,
    ts: Int[Array, "n"] | None = None,
) -> Float[Array, "b *d"]: ...
@overload
def sample(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    step_fn: StepFn,
    schedule: NoiseSchedule,
    *,
    ts: Int[Array, "n"] | None = None,
    state: State,
) -> State: ...
def sample(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    step_fn: StepFn,
    schedule: NoiseSchedule,
    x_T: Float[Array, "b *d"] | None = None,
    *,
    ts: Int[Array, "n"] | None = None,
    state: Any = None,
) -> Any:
    """Runs `step_fn` over `ts` from x_T, or from a state, and returns the end.

    DDPM algorithm 2, of any sampler.

    Given x_T, it returns the last x [b, ...]; given a state, the last state, from which
    the chain goes on bit for bit. (A chain from x_T is another program for XLA, which
    may round otherwise.)

        state = samplers.start(x_T, step_fn)
        state = sample(..., state=state, ts=ts[:7])
        state = sample(..., state=state, ts=ts[7:])

    A state of your own has the fields of `SampleState` and others, of any shape:
    Weighted(*samplers.start(x_T), log_weight=jnp.zeros(4)). On a mesh with Explicit
    axes, those with an axis [b] that lie nowhere are put beside x.

    Args:
        keys: typed keys [b], one for each image.
        denoise_fn, step_fn, schedule: those of `sample_frames`.
        x_T: [b, ...], where to start.
        ts: int32 [n], rows as they are visited, as for `sample_frames`.
        state: where to start instead of x_T.

    Returns:
        x [b, ...], or a state.

    Raises:
        ValueError: as `sample_frames` does.

    >>> from jax_diffusion import diffusion, samplers, schedules
    >>> schedule = schedules.make_schedule(schedules.cosine_betas(4))
    >>> v_objective = diffusion.Objective(mean_type="v")
    >>> denoise_fn = diffusion.denoiser(lambda x, t: 0 * x, schedule, v_objective)
    >>> keys = samplers.image_keys(jax.random.key(0), jnp.arange(2))
    >>> x_T = samplers.normal(keys, (3,))
    >>> sample(keys, denoise_fn, samplers.ddim_step, schedule, x_T).shape
    (2, 3)
    """
    given: Any = dict(x_T=x_T, state=state)
    frames = sample_frames(
        keys, denoise_fn, step_fn, schedule, num_frames=1, ts=ts, **given
    )
    return frames.x[-1] if state is None else jax.tree.map(lambda a: a[-1], frames)


def check_order(ts: Any) -> int:
    """Returns whether rows go up or down: 1, -1, or 0 if that is not known.

    A step goes to the next row, whatever comes after it. Negative ones are skipped.

    Raises:
        ValueError: unless they go up or down by 1, where they are known.

    >>> check_order(jnp.array([3, 2, -1, 3, -1]))
    Traceback (most recent call last):
    ValueError: ts must be different rows, got 3 twice.
    """
    if not checks.known(ts):
        return 0
    rows = np.asarray(jax.device_get(ts)).astype(np.int64)
    rows = rows[rows >= 0]
    found, counts = np.unique(rows, return_counts=True)
    if np.any(counts > 1):
        twice = found[counts > 1][-1]
        raise ValueError(f"ts must be different rows, got {twice} twice.")
    way = np.diff(rows)
    wrong = np.flatnonzero((way != way[:1]) | (abs(way) != 1))
    if wrong.size:
        before, after = rows[wrong[0] : wrong[0] + 2]
        raise ValueError(
            f"ts must be consecutive rows, got {after} after {before}; for fewer steps "
            "there is make_schedule(keep=)."
        )
    return int(way[0]) if way.size else 0


def check_step_arguments(
    keys: Any, denoise_fn: Any, schedule: Any, state: Any, t: Any, **may_rise: bool
) -> Array:
    """Returns t as an array [b] that lies as state.x does.

    `keys`, `denoise_fn`, `schedule`, `state` and `t` are those of a step, see
    `jax_diffusion.samplers`. A traced t may be an integer of no axis, as in a scan of
    somebody else. `may_rise` is for `check_chain`.

    Raises:
        ValueError: unless they fit each other.
    """
    check_denoise_fn(denoise_fn)
    check_fields(state)
    check_chain(schedule, **may_rise)
    check_batch(schedule, t, **{"state.x": state.x})
    check_schedule_of(denoise_fn, schedule)
    checks.keys("keys", keys, state.x.shape[0])
    t = jnp.asarray(t)
    return placement.beside(t, state.x) if t.ndim else like_batch(t, state.x)


def like_batch(t: Any, x: Array) -> Array:
    """Returns t int32 [b], the same for all images of x [b, ...], lying as x does.

    It is like x so that within shard_map it varies as x does, and what a step takes of
    its row with it.
    """
    return placement.beside(jnp.full_like(x, t, jnp.int32, x.shape[:1]), x)
