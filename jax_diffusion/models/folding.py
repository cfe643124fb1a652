"""Blocks of pixels folded into channels and back: Ho et al.'s space_to_depth."""

from jaxtyping import Array, Float

from jax_diffusion.checks import placement


def fold(x: Float[Array, "b *d c"], size: int) -> Float[Array, "b *d_out c_out"]:
    """Folds blocks of size x size pixels into channels, ordered [row, column, channel].

    Args:
        x: images [b, h, w, c].
        size: side of a block; 1 changes nothing.

    Returns:
        [b, h / size, w / size, size^2 c].

    Raises:
        ValueError: if height or width is not divisible by `size`, or x has neither.
    """
    if size == 1:
        return x
    if x.ndim != 4:
        raise ValueError(f"x must be images [b, h, w, c], got shape {x.shape}.")
    b, h, w, c = x.shape
    if h % size or w % size:
        raise ValueError(f"block_size must divide {h} x {w} images, got {size}.")
    x = placement.reshape(x, (b, h // size, size, w // size, size, c)).swapaxes(2, 3)
    return placement.reshape(x, (b, h // size, w // size, size * size * c))


def unfold(x: Float[Array, "b *d c"], size: int) -> Float[Array, "b *d_out c_out"]:
    """Unfolds channels into blocks of size x size pixels: the inverse of `fold`."""
    if size == 1:
        return x
    b, h, w, c = x.shape
    x = placement.reshape(x, (b, h, w, size, size, c // size**2)).swapaxes(2, 3)
    return placement.reshape(x, (b, h * size, w * size, c // size**2))
