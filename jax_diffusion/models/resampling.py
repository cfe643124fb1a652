"""Halving and doubling of images. The first of three axes, time, stays as it is."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_diffusion.checks import placement


def scales(num_axes: int) -> tuple[int, ...]:
    """Returns the factors by which one, two or three spatial axes are resampled."""
    return (1, 2, 2) if num_axes == 3 else (2,) * num_axes


def pool(x: Float[Array, "b *d c"]) -> Float[Array, "b *d_out c"]:
    """Halves images by averaging blocks of pixels: [b, 2 h, 2 w, c] -> [b, h, w, c]."""
    factors = scales(x.ndim - 2)
    return nn.avg_pool(x, factors, factors)


def repeat(x: Float[Array, "b *d c"]) -> Float[Array, "b *d_out c"]:
    """Doubles images by nearest-neighbor interpolation: every pixel is repeated."""
    for axis, factor in enumerate(scales(x.ndim - 2), start=1):
        if factor > 1:
            layout = placement.of_batch(x, x.ndim)
            x = jnp.repeat(x, factor, axis=axis, out_sharding=layout)
    return x
