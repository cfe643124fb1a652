"""Keys for images, and the noise that is drawn with them."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import checks
from jax_diffusion.checks import placement

# The keys that `sample` gives to a step while the step is traced.
_given: ContextVar[Any] = ContextVar("keys_of_step", default=None)


@contextlib.contextmanager
def keys_of_step(keys: Any, instead_of: Any = None) -> Iterator[None]:
    """Makes `normal` refuse `keys` while a step is traced: each row has the same ones.

    Args:
        keys: what the step is given.
        instead_of: keys that must be refused already, or nothing changes: a loop that
            is not `sample`'s may give other keys to every step, and refuses none.
    """
    if instead_of is not None and instead_of is not _given.get():
        yield
        return
    token = _given.set(keys)
    try:
        yield
    finally:
        _given.reset(token)


def image_keys(key: Key[Array, ""], ids: Int[Array, "b"]) -> Key[Array, "b"]:
    """Makes one key for each image from the run's key and the images' numbers.

    So an image is the same in any batch, as with the seeds of EDM's `generate.py`.

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


def fold_in(
    keys: Key[Array, "b"], number: int | Int[Array, ""] | Int[Array, "b"]
) -> Key[Array, "b"]:
    """Makes other keys [b] for the same images: `jax.random.fold_in` for many keys.

    A step draws with `fold_in(keys, t)`: noise of an image at a row of the schedule.

    Args:
        keys: typed keys [b], one for each image.
        number: says what the new keys are for: a row t, or a second purpose; one for
            all images, or [b].

    Raises:
        ValueError: unless keys are typed keys [b], and number is one integer or [b].
    """
    checks.keys("keys", keys)
    axis = None
    if isinstance(number, np.ndarray):
        checks.array("number", number, "integer", keys.shape[: number.ndim])
        for one in number.flat:
            checks.integer("number", one, at_least=0, at_most=2**32 - 1)
        number = jnp.asarray(number.astype(np.uint32))
    if isinstance(number, jax.Array):
        axis = 0 if number.ndim else None
        checks.array("number", number, "integer", keys.shape[: number.ndim])
        number = placement.beside(number, keys) if number.ndim else number
        keys = placement.beside(keys, number)
    else:
        checks.integer("number", number, at_least=0, at_most=2**32 - 1)
    return jax.vmap(jax.random.fold_in, in_axes=(0, axis))(keys, number)


def normal(keys: Key[Array, "b"], shape: tuple[int, ...]) -> Float[Array, "b *d"]:
    """Draws standard normal noise [b, *shape], as x_T or in a step (DDPM algorithm 2).

    It is float32 whatever the dtype of images, so that a key means the same noise in
    all of them.

    Args:
        keys: typed keys [b], one for each image; within a step those of the row,
            `fold_in(keys, t)`.
        shape: of one image.

    Raises:
        ValueError: unless keys are typed keys [b], and shape is one; and if they are
            what `sample` gives to every step, without a row folded in.

    >>> normal(image_keys(jax.random.key(0), jnp.arange(2)), (8, 8, 3)).shape
    (2, 8, 8, 3)
    """
    checks.keys("keys", keys)
    if keys is _given.get():
        raise ValueError(
            "keys of noise in a step must be those of its row, samplers.fold_in(keys, "
            "t), or with a number of your own for the same noise at every step, got "
            "keys as the step is given them."
        )
    if not isinstance(shape, tuple | list):
        raise ValueError(f"shape must be that of an image, got {checks.shown(shape)}.")
    for axis in shape:
        checks.integer("shape's axes", axis, at_least=0)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
