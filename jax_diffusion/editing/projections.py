"""Projections of images onto what is known of them: to colorize, to enlarge."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_diffusion import checks
from jax_diffusion.checks import placement


def gray(x: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
    """Replaces every channel by the mean of the channels: the projection to colorize.

    Takes images x [b, ..., c] and returns images of the same shape.

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
