"""Convolutions that have a fast form for the CPU, which XLA does not find itself.

All equal the plain convolution up to rounding. On accelerators they are that
convolution, except 1 x 1 ones, which are products of matrices everywhere. The platform
is chosen when a program is lowered, not when it is traced, so an export for several
platforms holds the right form for each.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jax_diffusion.checks import placement
from jax_diffusion.models import resampling

# The matrix product does width / size times the work of the convolution, about twice
# that for blocks of several rows, which are copied less often. Backward on two cores,
# milliseconds by blocks of one row, by blocks and by XLA's convolution: images
# [128, 28, 28, 28]: 92, 72, 490; [128, 14, 14, 56]: 31, 22, 350.
MAX_BANDED_WIDTH = 128
MAX_BLOCK = (
    256  # pixels of a block of rows: the matrix has about their square for each channel
)


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
    ways = dict(cpu=_banded_conv, default=_grouped_conv)
    return lax.platform_dependent(x, kernel, **ways)


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
    """Multiplies blocks of image rows, and what the kernel sees of their neighbors, by
    a matrix that holds the kernel in bands."""
    b, height, width, c = x.shape
    size, half = kernel.shape[0], kernel.shape[0] // 2
    most = max(1, MAX_BLOCK // width)
    rows = max(n for n in range(1, 1 + min(height, most)) if height % n == 0)
    seen = rows + size - 1

    def taps(num_in, num_out, before):  # [size, num_in, num_out]: 1 where they meet
        offset = np.subtract.outer(np.arange(num_in), np.arange(num_out)) + before
        return (offset == np.arange(size)[:, None, None]).astype(kernel.dtype)

    band = jnp.einsum(
        "ijc,iyY,jxX->cyxYX",
        kernel[:, :, 0],
        taps(seen, rows, 0),
        taps(width, width, half),
    )
    lines = jnp.moveaxis(x, -1, 0)
    lines = jnp.pad(lines, ((0, 0), (0, 0), (half, half), (0, 0)))
    starts = range(0, height, rows)
    lines = jnp.stack([lines[:, :, i : i + seen] for i in starts], axis=2)
    y = jnp.einsum(
        "cbnk,ckx->cbnx",
        lines.reshape(c, b, len(starts), seen * width),
        band.reshape(c, seen * width, rows * width),
    )
    return placement.reshape(jnp.moveaxis(y, 0, -1), x.shape)


def pointwise_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "1 1 c d"],
    *args: Any,
    **options: Any,
) -> Float[Array, "b h w d"]:
    """Multiplies every pixel by a matrix: `conv_general_dilated` of an `nn.Conv`.

    As a convolution, its gradient by the kernel takes up to twenty times as long on the
    CPU.

    Args:
        x: images [b, h, w, c].
        kernel: [1, 1, c, d].
        args: ignored, as they are the defaults: `nn.Conv` passes them.
        options: ignored.

    Returns:
        [b, h, w, d].
    """
    del args, options
    return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))


def conv_of_doubled(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "3 3 c d"],
    strides: Any = (1, 1),
    padding: Any = ((1, 1), (1, 1)),
    **options: Any,
) -> Float[Array, "b h2 w2 d"]:
    """Convolves `resampling.repeat(x)`: `conv_general_dilated` of an `nn.Conv`.

    On the CPU, x is never doubled. Each output sees three rows of the doubled image,
    two of which are the same row of x, so their weights can be added beforehand; the
    same holds for columns. Each of the four positions in a block of 2 x 2 outputs is
    then a 2 x 2 convolution of x: 16 multiplications in place of 36, and half the time,
    forward and backward.

    Args:
        x: images [b, h, w, c].
        kernel: [3, 3, c, d].
        strides: ignored, as padding and options: they are the defaults.
        padding: ignored.
        options: ignored.

    Returns:
        [b, 2 h, 2 w, d].
    """
    del strides, padding, options

    def sums(kernel, axis):
        """Adds up the kernel's three rows to two, for even and for odd output rows."""
        above, middle, below = jnp.split(kernel, 3, axis)
        even = jnp.concatenate([above, middle + below], axis)
        return even, jnp.concatenate([above + middle, below], axis)

    def plain(x, kernel):
        return _conv(resampling.repeat(x), kernel, [(1, 1)] * 2)

    ways = dict(cpu=functools.partial(_doubling_conv, sums), default=plain)
    return lax.platform_dependent(x, kernel, **ways)


def conv_transpose(
    x: Float[Array, "b h w c"], kernel: Float[Array, "4 4 d c"]
) -> Float[Array, "b h2 w2 d"]:
    """Doubles images as PyTorch's ConvTranspose2d(c, d, 4, stride=2, padding=1) does.

    Input pixel m and the kernel's pixel i meet in output pixel 2 m + i - 1. On the CPU,
    the four positions in a block of 2 x 2 outputs are 2 x 2 convolutions of x.

    Args:
        x: images [b, h, w, c].
        kernel: [4, 4, d, c], PyTorch's with its axes permuted to (2, 3, 1, 0).

    Returns:
        [b, 2 h, 2 w, d].
    """

    def pixels(kernel, axis):
        """The kernel's rows that meet in even and in odd output rows."""
        first, second, third, fourth = jnp.split(kernel, 4, axis)
        even = jnp.concatenate([fourth, second], axis)
        return even, jnp.concatenate([third, first], axis)

    def plain(x, kernel):
        return _conv(x, jnp.flip(kernel, (0, 1)), [(2, 2)] * 2, lhs_dilation=(2, 2))

    ways = dict(cpu=functools.partial(_doubling_conv, pixels), default=plain)
    return lax.platform_dependent(x, kernel.swapaxes(2, 3), **ways)


def _doubling_conv(halves, x, kernel):
    """Convolves x for each position in blocks of 2 x 2 outputs, and interleaves.

    Args:
        halves: (kernel, axis) -> its 2 rows along that axis for even output rows, which
            see input rows u - 1 and u, and those for odd ones, which see u and u + 1.
        x: images [b, h, w, c].
        kernel: [n, n, c, d].
    """
    outputs = [
        _conv(x, part, [(1 - i, i), (1 - j, j)])
        for i, rows in enumerate(halves(kernel, 0))
        for j, part in enumerate(halves(rows, 1))
    ]
    b, h, w, c = outputs[0].shape
    y = placement.reshape(jnp.stack(outputs, axis=3), (b, h, w, 2, 2, c))
    return placement.reshape(y.swapaxes(2, 3), (b, 2 * h, 2 * w, c))


def _conv(x, kernel, padding, **options):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=layout, **options
    )
