"""Convolutions that XLA computes slowly on the CPU, in forms that it computes fast.

Both equal the plain convolution but for rounding. Accelerators keep the plain one.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

# Forward and backward, on two cores of a CPU: the product takes 20 ms where XLA's
# convolution takes 109 (64x28x28x18), 140 for 218 (4x128x128x32), 284 for 220
# (1x256x256x32). It does width / size times the work.
MAX_BANDED_WIDTH = 128


def depthwise_conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "size size 1 c"]
) -> Float[Array, "b h w c"]:
    """Every channel convolved with its own kernel of odd size, padded with zeros.

    XLA's convolution of this kind is slow on the CPU, above all its gradients. There it
    is a product of matrices instead, equal but for rounding.
    """
    if x.shape[2] > MAX_BANDED_WIDTH:
        return _grouped_conv(x, kernel)
    return jax.lax.platform_dependent(
        x, kernel, cpu=_banded_conv, default=_grouped_conv
    )


def _grouped_conv(x, kernel):
    padding = [(kernel.shape[0] // 2,) * 2] * 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _banded_conv(x, kernel):
    """Rows of `size` lines, times the matrix that a row of kernels is: a band."""
    b, height, width, c = x.shape
    size = kernel.shape[0]
    offset = np.subtract.outer(np.arange(width), np.arange(width)) + size // 2
    is_tap = offset == np.arange(size)[:, None, None]
    band = jnp.einsum("ijc,jXx->ciXx", kernel[:, :, 0], is_tap.astype(kernel.dtype))

    lines = jnp.moveaxis(x, -1, 0)
    lines = jnp.pad(lines, ((0, 0), (0, 0), (size // 2, size // 2), (0, 0)))
    lines = jnp.stack([lines[:, :, i : i + height] for i in range(size)], axis=3)
    y = jnp.einsum(
        "cnk,ckx->cnx",
        lines.reshape(c, b * height, size * width),
        band.reshape(c, size * width, width),
    )
    return jnp.moveaxis(y.reshape(c, b, height, width), 0, -1)


def conv_of_doubled(
    x: Array, kernel: Array, strides: Any, padding: Any, **options: Any
) -> Array:
    """A convolution of `layers.repeat(x)`, without ever doubling x.

    Of the three rows that an output sees, two are the same row of x, so their weights
    may be added first: four convolutions of 2 x 2 at the low resolution, one for each
    place in a block of 2 x 2 outputs, take 16 products in place of 36. On the CPU
    forward and backward take half the time; accelerators are left with one convolution.
    """

    def convolve(x, kernel, padding):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def halves(kernel, axis):
        """Its three rows, added up as an output in an even and an odd row sees x."""
        above, middle, below = jnp.split(kernel, 3, axis)
        even = jnp.concatenate([above, middle + below], axis)
        return even, jnp.concatenate([above + middle, below], axis)

    outputs = [
        convolve(x, part, [(1 - i, i), (1 - j, j)])
        for i, rows in enumerate(halves(kernel, 0))
        for j, part in enumerate(halves(rows, 1))
    ]
    b, h, w, c = outputs[0].shape
    y = jnp.stack(outputs, axis=3).reshape(b, h, w, 2, 2, c)
    return y.swapaxes(2, 3).reshape(b, 2 * h, 2 * w, c)
