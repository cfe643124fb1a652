"""Fast forms, for the CPU, of two convolutions that XLA computes slowly there.

Both equal the plain convolution up to rounding. On accelerators the plain convolution
is used.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jax_diffusion.checks import placement

# The matrix product does width / size times the work of the convolution. Forward and
# backward on two cores, it takes 20 ms and XLA's convolution 109 ms for images
# [64, 28, 28, 18]; 140 and 218 for [4, 128, 128, 32]; 284 and 220 for
# [1, 256, 256, 32].
MAX_BANDED_WIDTH = 128


def depthwise_conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "size size 1 c"]
) -> Float[Array, "b h w c"]:
    """Convolves every channel with its own kernel, padded with zeros.

    XLA's depthwise convolution is slow on the CPU, its gradients most of all. There it
    is computed as a matrix product if the width is `MAX_BANDED_WIDTH` or less.

    Args:
        x: images [b, h, w, c].
        kernel: [size, size, 1, c], size odd.

    Returns:
        [b, h, w, c].
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
    """Multiplies blocks of `size` image rows by band matrices of the kernel's rows."""
    b, height, width, c = x.shape
    size = kernel.shape[0]
    offset = np.subtract.outer(np.arange(width), np.arange(width)) + size // 2
    is_tap = offset == np.arange(size)[:, None, None]
    band = jnp.einsum("ijc,jXx->ciXx", kernel[:, :, 0], is_tap.astype(kernel.dtype))

    lines = jnp.moveaxis(x, -1, 0)
    lines = jnp.pad(lines, ((0, 0), (0, 0), (size // 2, size // 2), (0, 0)))
    lines = jnp.stack([lines[:, :, i : i + height] for i in range(size)], axis=3)
    y = jnp.einsum(
        "cbhk,ckx->cbhx",
        lines.reshape(c, b, height, size * width),
        band.reshape(c, size * width, width),
    )
    return jnp.moveaxis(y, 0, -1)


def conv_of_doubled(
    x: Array, kernel: Array, strides: Any, padding: Any, **options: Any
) -> Array:
    """Convolves `layers.repeat(x)` with a 3 x 3 kernel, without ever doubling x.

    Each output sees three rows of the doubled image, two of which are the same row of
    x, so their weights can be added beforehand; the same holds for columns. Each of the
    four positions in a block of 2 x 2 outputs is then a 2 x 2 convolution of x: 16
    multiplications in place of 36. On the CPU, forward and backward take half the time.

    Args:
        x: images [b, h, w, c].
        kernel: [3, 3, c, d].
        strides: ignored, as padding and options: `nn.Conv` passes them.
        padding: ignored; the result is that of padding by one pixel.
        options: ignored.

    Returns:
        [b, 2 h, 2 w, d].
    """

    def convolve(x, kernel, padding):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def halves(kernel, axis):
        """Adds up the kernel's three rows to two, for even and for odd output rows."""
        above, middle, below = jnp.split(kernel, 3, axis)
        even = jnp.concatenate([above, middle + below], axis)
        return even, jnp.concatenate([above + middle, below], axis)

    outputs = [
        convolve(x, part, [(1 - i, i), (1 - j, j)])
        for i, rows in enumerate(halves(kernel, 0))
        for j, part in enumerate(halves(rows, 1))
    ]
    b, h, w, c = outputs[0].shape
    y = placement.reshape(jnp.stack(outputs, axis=3), (b, h, w, 2, 2, c))
    return placement.reshape(y.swapaxes(2, 3), (b, 2 * h, 2 * w, c))
