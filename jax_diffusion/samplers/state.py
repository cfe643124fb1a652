"""The state of a sampler: what it carries from one step to the next."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, overload, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_diffusion import checks
from jax_diffusion.checks import placement


class SampleState(NamedTuple):
    """What a sampler carries from one step to the next.

    A step that needs more, as log weights, carries a NamedTuple, or a dataclass that is
    a pytree, with these fields and its own: see `sample`. Steps and wrappers of ours
    replace these three, and `earlier` of `MultistepState`, and leave the others.

    Attributes:
        x: [b, ...] the sample, at the noise level that the last step has reached.
        x_0: [b, ...] the last prediction of the clean data; zeros before the first.
        log_snr: [b, 1, ...] log(signal^2 / noise^2) of the level where x_0 was
            predicted; -inf before the first prediction.
    """

    x: Array
    x_0: Array
    log_snr: Array


class Past(NamedTuple):
    """An earlier prediction.

    Attributes:
        x_0: [b, ...] the prediction of the clean data; zeros before there is one.
        log_snr: [b, 1, ...] of the level where it was made; -inf before that.
    """

    x_0: Array
    log_snr: Array


class MultistepState(NamedTuple):
    """A `SampleState` that keeps predictions before the last one, as `start` makes it.

    Attributes:
        x, x_0, log_snr: those of `SampleState`.
        earlier: the predictions before x_0, the newest first.
    """

    x: Array
    x_0: Array
    log_snr: Array
    earlier: tuple[Past, ...]


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


Function = TypeVar("Function", bound=Callable[..., Any])


def marked(*, num_earlier: int = 0, way: int = 0) -> Callable[[Function], Function]:
    """Marks a step with what its callers have to know.

    Args:
        num_earlier: how many predictions before the last one it reads, for `start`.
        way: by how many rows it goes on, -1 or 1; 0, not known.
    """

    def mark(step_fn: Any) -> Any:
        step_fn.step_traits = {"num_earlier": num_earlier, "way": way}
        return step_fn

    return mark


def traits_of(step_fn: Any) -> dict[str, int]:
    """Returns the marks of `step_fn`, or of what it wraps by `functools` or `jax.jit`.

    A wrapper of another kind copies them: @marked(**traits_of(step_fn)).
    """
    while step_fn is not None and not hasattr(step_fn, "step_traits"):
        inner = getattr(step_fn, "func", None)
        step_fn = getattr(step_fn, "__wrapped__", inner)
    return getattr(step_fn, "step_traits", {"num_earlier": 0, "way": 0})


@overload
def start(x_T: Float[Array, "b *d"]) -> SampleState: ...
@overload
def start(x_T: Float[Array, "b *d"], step_fn: Callable[..., Any]) -> Any: ...
def start(x_T: Float[Array, "b *d"], step_fn: Callable[..., Any] | None = None) -> Any:
    """The state before the first step: x = x_T [b, ...], and no prediction yet.

    Args:
        x_T: [b, ...], where to start.
        step_fn: the step that the state is for; one of several earlier predictions, as
            `unipc_step`, or a wrapper of it, gets a `MultistepState` that holds them.

    Raises:
        ValueError: unless x_T is a float array with an axis [b].

    >>> from jax_diffusion.samplers import unipc_step
    >>> len(start(jnp.zeros((2, 3)), unipc_step).earlier)
    2
    """
    checks.data("x_T", x_T, ("b", ...))
    x_T = jnp.asarray(x_T)
    shape = x_T.shape[:1] + (1,) * (x_T.ndim - 1)
    dtype = jnp.promote_types(x_T.dtype, jnp.float32)
    no_level = jnp.full_like(x_T, -jnp.inf, dtype, shape)  # varies in shard_map as x_T
    zeros = jnp.zeros_like(x_T)  # of an x_T closed over by jit, on no mesh
    none = Past(*(placement.beside(a, x_T) for a in (zeros, no_level)))
    number = traits_of(step_fn)["num_earlier"]
    state = SampleState(x_T, *none)
    return MultistepState(*state, (none,) * number) if number else state


def advance(state: State, **fields: Any) -> State:
    """Replaces fields of a state, each in the dtype that it has; keeps the others."""

    def cast(new, old):
        return jnp.asarray(new, jnp.result_type(old))

    typed = {k: jax.tree.map(cast, new, getattr(state, k)) for k, new in fields.items()}
    replace: Any = getattr(type(state), "_replace", dataclasses.replace)
    return replace(state, **typed)


def first_state(x_T: Any, state: Any, step_fn: Any) -> Any:
    """Returns the state where a chain starts: of x_T, or the given one.

    Args:
        x_T: [b, ...], or None.
        state: with the fields of `SampleState`, or None. Its leaves become arrays.
        step_fn: the step that is run.

    Raises:
        ValueError: if both are given, or what is given is none.
    """
    if state is None:
        return start(x_T, step_fn)
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
    return jax.tree.map(lambda a: beside_if_batch(jnp.asarray(a), x), state)


def beside_if_batch(leaf: Array, x: Array) -> Array:
    """Returns a leaf of a state: one with an axis [b] that lies nowhere, beside x."""
    batch = leaf.ndim > 0 and leaf.shape[0] == x.shape[0]
    split = any(axis is not None for axis in jax.typeof(leaf).sharding.spec)
    return placement.beside(leaf, x) if batch and not split else leaf


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
