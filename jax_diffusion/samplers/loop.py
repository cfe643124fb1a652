"""The state of a sampler, and the one scan over sampling steps."""

import dataclasses
from typing import Any, NamedTuple, Protocol, TypeVar, overload, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import checks
from jax_diffusion.checks import placement
from jax_diffusion.diffusion import DenoiseFn, check_schedule_of
from jax_diffusion.samplers.noise import keys_of_step
from jax_diffusion.schedules import NoiseSchedule, check_batch, check_schedule


class SampleState(NamedTuple):
    """What a sampler carries from one step to the next.

    A step that needs more, as a longer history or log weights, carries a NamedTuple, or
    a dataclass that is a pytree, with these fields and its own: see `sample`. Steps and
    wrappers of ours replace these three and leave the others as they are.

    Attributes:
        x: [b, ...] the sample, at the noise level that the last step has reached.
        x_0: [b, ...] the last prediction of the clean data; zeros before the first.
        log_snr: [b, 1, ...] log(signal^2 / noise^2) of the level where x_0 was
            predicted; -inf before the first prediction.
    """

    x: Array
    x_0: Array
    log_snr: Array


@runtime_checkable
class StateLike(Protocol):
    """What has the fields of `SampleState`, and perhaps others."""

    @property
    def x(self) -> Array:
        """[b, ...] the sample."""
        ...

    @property
    def x_0(self) -> Array:
        """[b, ...] the last prediction."""
        ...

    @property
    def log_snr(self) -> Array:
        """[b, 1, ...] the level of the last prediction."""
        ...


State = TypeVar("State", bound=StateLike)


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


def start(x_T: Float[Array, "b *d"]) -> SampleState:
    """The state before the first step: x = x_T [b, ...], and no prediction yet.

    Raises:
        ValueError: unless x_T is a float array with an axis [b].
    """
    checks.data("x_T", x_T, ("b", ...))
    x_T = jnp.asarray(x_T)
    shape = x_T.shape[:1] + (1,) * (x_T.ndim - 1)
    dtype = jnp.promote_types(x_T.dtype, jnp.float32)
    no_level = jnp.full_like(x_T, -jnp.inf, dtype, shape)  # varies in shard_map as x_T
    return SampleState(x_T, jnp.zeros_like(x_T), placement.beside(no_level, x_T))


def advance(state: State, **fields: Array) -> State:
    """Replaces fields of a state, each in the dtype that it has; keeps the others."""
    dtypes = {name: jnp.result_type(getattr(state, name)) for name in fields}
    typed = {name: jnp.asarray(a, dtypes[name]) for name, a in fields.items()}
    replace: Any = getattr(type(state), "_replace", dataclasses.replace)
    return replace(state, **typed)


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

    Memory grows with `num_frames`, not with the number of steps. Steps are recomputed
    in the backward pass, so reverse-mode memory grows with steps times image only.

    Args:
        keys: one for each image, see `image_keys`. The noise of an image at a step
            depends on its key and on the row t of the step alone.
        denoise_fn: the network as a denoiser, called with x_t and t.
        step_fn: the sampler's step, such as `ddim_step`.
        schedule: the steps to take.
        x_T: where to start; noise for generation, or data for inversion.
        ts: rows as they are visited, one after the other: all upwards or all
            downwards, negative ones skipped; default T - 1 to 0. A row that comes back
            would get the same noise again: sample in several calls then, with another
            number folded into keys, as `editing.repaint` does.
        num_frames: a divisor of the length of `ts`.
        state: where to start instead of x_T, see `sample`.

    Returns:
        SampleState, or what `state` is, with a leading axis [num_frames] on every leaf.

    Raises:
        ValueError: if num_frames does not divide the number of steps, ts, where known,
            repeats or leaves out a row, arguments do not fit each other, denoise_fn is
            made with another schedule, or denoise_fn or step_fn returns something else.
    """
    checks.function("denoise_fn", denoise_fn, "(x_t, t)")
    checks.function("step_fn", step_fn, STEP_ARGUMENTS)
    check_schedule(schedule)
    check_schedule_of(denoise_fn, schedule)
    first = first_state(x_T, state)
    checks.keys("keys", keys, first.x.shape[0])
    keys = placement.beside(keys, first.x)
    if ts is None:
        ts = schedule.steps[::-1]
    else:
        checks.array("ts", ts, "int", ("n",))
        checks.rows("ts", ts, schedule.num_steps, negative=True)
        check_order(ts)
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

    Of x_T [b, ...] it returns the last x, [b, ...]; of a state it returns the last
    state. So a chain may be cut anywhere, and is the same chain to the bit. (That of
    x_T is another program for XLA, which may round otherwise.)

        state = samplers.start(x_T)
        state = sample(..., state=state, ts=ts[:7])
        state = sample(..., state=state, ts=ts[7:])

    A state of your own has the fields of `SampleState` and others, of any shape:
    Weighted(*samplers.start(x_T), log_weight=jnp.zeros(4)).

    `keys`, `denoise_fn`, `step_fn`, `schedule` and `ts` are those of `sample_frames`,
    which says what raises ValueError.

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


def first_state(x_T: Any, state: Any) -> Any:
    """Returns the state where a chain starts: of x_T, or the given one.

    Args:
        x_T: [b, ...], or None.
        state: with the fields of `SampleState`, or None. Its leaves become arrays.

    Raises:
        ValueError: if both are given, or what is given is none.
    """
    if state is None:
        return start(x_T)
    if x_T is not None:
        raise ValueError(f"state must be given without x_T, got {checks.shown(x_T)}.")
    check_fields(state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf is state:
            rule = "state must be a pytree, such as register_dataclass makes"
            raise ValueError(f"{rule}, got {checks.shown(state)}.")
        if not hasattr(leaf, "shape") and not isinstance(leaf, bool | int | float):
            name = f"state{jax.tree_util.keystr(path)}"
            raise ValueError(f"{name} must be an array, got {checks.shown(leaf)}.")
    x = state.x
    checks.data("state.x_0", state.x_0, x.shape)
    checks.data("state.log_snr", state.log_snr, x.shape[:1] + (1,) * (x.ndim - 1))
    return jax.tree.map(jnp.asarray, state)


def check_order(ts: Any) -> None:
    """Raises ValueError unless rows go up or down by 1, where they are known.

    A step goes to the next row, whatever comes after it. Negative ones are skipped.

    >>> check_order(jnp.array([3, 2, -1, 3, -1]))
    Traceback (most recent call last):
    ValueError: ts must be different rows, got 3 twice.
    """
    if not checks.known(ts):
        return
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


def check_step_arguments(
    keys: Any, denoise_fn: Any, schedule: Any, state: Any, t: Any
) -> Array:
    """Raises ValueError unless the arguments of a sampler's step fit each other.

    `keys`, `denoise_fn`, `schedule`, `state` and `t` are those of a step, see
    `jax_diffusion.samplers`. A traced t may be an integer of no axis, as in a scan of
    somebody else.

    Returns:
        t as an array [b].
    """
    checks.function("denoise_fn", denoise_fn, "(x_t, t)")
    check_fields(state)
    check_batch(schedule, t, **{"state.x": state.x})
    check_schedule_of(denoise_fn, schedule)
    checks.keys("keys", keys, state.x.shape[0])
    t = jnp.asarray(t)
    return t if t.ndim else like_batch(t, state.x)


def like_batch(t: Any, x: Array) -> Array:
    """Returns t int32 [b], the same for all images of x [b, ...], lying as x does.

    It is like x so that within shard_map it varies as x does, and what a step takes of
    its row with it.
    """
    return placement.beside(jnp.full_like(x, t, jnp.int32, x.shape[:1]), x)


def check_fields(state: Any) -> None:
    """Raises ValueError unless a state has the fields of SampleState, and x is data."""
    kind = type(state)
    replaceable = hasattr(kind, "_replace") or hasattr(kind, "__dataclass_fields__")
    if not replaceable or not all(hasattr(state, name) for name in SampleState._fields):
        rule = "state must be a SampleState, such as samplers.start makes"
        raise ValueError(f"{rule}, got {checks.shown(state)}.")
    checks.data("state.x", state.x, ("b", ...))


def check_state(new: Any, old: Any) -> None:
    """Raises ValueError unless a step returns a state, `new`, like its `old` one.

    Otherwise the scan would say so, in words that name neither.
    """
    rule = "step_fn must return a state like the one that it is given"
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(f"{rule}, got {checks.shown(new)}.")
    leaves = jax.tree_util.tree_leaves_with_path(old)
    for (path, b), a in zip(leaves, jax.tree.leaves(new), strict=True):
        if (jnp.shape(a), jnp.result_type(a)) != (b.shape, b.dtype):
            name = jax.tree_util.keystr(path).lstrip(".")
            raise ValueError(
                f"{rule}, with {name} {checks.shown(b)}, got {checks.shown(a)}."
            )
