"""Convolutions that have a fast form for the CPU, which XLA does not find itself.

All equal the plain convolution up to rounding, and on accelerators they are the plain
convolution. The platform is chosen when a program is lowered, not when it is traced, so
an export for several platforms holds the right form for each.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jax_diffusion.checks import placement
from jax_diffusion.models import resampling

# XLA computes the gradient by a kernel as one convolution whose window is the whole
# image; for large images that is slow. As a matrix product for each of the kernel's
# pixels, milliseconds with jax 0.10 on two cores, 3 x 3 kernels, before and after:
# images [128, 28, 28, 28 -> 56]: 226, 38; [128, 14, 14, 112 -> 56]: 194, 26;
# [8, 32, 32, 128 -> 128]: 38, 17; [8, 16, 16, 256 -> 256]: 10.9, 11.6;
# [64, 8, 8, 32 -> 32]: 0.8, 1.0.
MIN_PIXELS = 49  # of an image, from which on there are matrix products

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


def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c d"],
    strides: tuple[int, ...],
    padding: Any,
    lhs_dilation: tuple[int, ...] = (1, 1),
    **options: Any,
) -> Float[Array, "b h_out w_out d"]:
    """Convolves images; an argument `conv_general_dilated` of `nn.Conv`.

    On the CPU, the gradient by the kernel is computed as one matrix product for each
    pixel of the kernel if images have `MIN_PIXELS` or more. Derivatives of every order
    and both modes exist.

    Args:
        x: images [b, h, w, c].
        kernel: [kh, kw, c, d].
        strides: 1 or more along height and width.
        padding: pixels before and after, along height and width.
        lhs_dilation: 2 to put a zero between pixels of x, along height and width.
        options: ignored, as they are the defaults: `nn.Conv` passes them.

    Returns:
        [b, h_out, w_out, d].
    """
    del options
    if kernel.shape[:2] == (1, 1) and tuple(strides) == (1, 1):
        return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
    static = tuple(strides), tuple(map(tuple, padding)), tuple(lhs_dilation)
    pixels = x.shape[1] * x.shape[2]
    if pixels < MIN_PIXELS or placement.of_batch(x, x.ndim) is not None:
        return _plain_conv(x, kernel, *static)
    return _conv(x, kernel, *static)


def _plain_conv(x, kernel, strides, padding, dilation):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        lhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


_conv = jax.custom_jvp(_plain_conv, nondiff_argnums=(2, 3, 4))


@functools.partial(_conv.defjvp, symbolic_zeros=True)
def _conv_jvp(strides, padding, dilation, primals, tangents):
    def way(convolve):
        static = dict(strides=strides, padding=padding, dilation=dilation)
        return functools.partial(convolve, **static)

    # What is linear in the kernel's tangent: of this, the backward pass takes the
    # transpose only. It keeps x, not all views of x.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def by_kernel(x, tangent):
        ways = dict(cpu=way(_conv_by_products), default=way(_plain_conv))
        return lax.platform_dependent(x, tangent, **ways)

    (x, kernel), (of_x, of_kernel) = primals, tangents
    terms = []
    if not isinstance(of_x, SymbolicZero):
        terms.append(way(_plain_conv)(of_x, kernel))
    if not isinstance(of_kernel, SymbolicZero):
        terms.append(by_kernel(x, of_kernel))
    return way(_plain_conv)(x, kernel), sum(terms[1:], terms[0])


def _conv_by_products(x, kernel, strides, padding, dilation):
    """Adds up products of the image with each pixel of the kernel, moved to its place.

    Pixel m of the image meets pixel i of the kernel at dilation m + before - i.
    """

    def moved(image, at):
        margins = []
        for i, size, n, stride, (before, after), r in zip(
            *(at, kernel.shape[:2], x.shape[1:3], strides, padding, dilation),
            strict=True,
        ):
            length = r * (n - 1) + 1  # with the zeros between pixels
            last = (before + length + after - size) // stride * stride
            margins.append((before - i, last + 1 - length - (before - i), r - 1))
        zero = jnp.zeros((), image.dtype)
        image = lax.pad(image, zero, [(0, 0, 0), *margins, (0, 0, 0)])
        return image[:, :: strides[0], :: strides[1]]

    def product(image, at):
        return lax.dot_general(image, kernel[at], (((3,), (0,)), ((), ())))

    terms = []
    for at in itertools.product(*map(range, kernel.shape[:2])):
        spread = max(dilation) > 1  # then the image is moved when it is small
        terms.append(moved(product(x, at), at) if spread else product(moved(x, at), at))
    return sum(terms[1:], terms[0])


def conv_of_doubled(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "3 3 c d"],
    strides: Any = (1, 1),
    padding: Any = ((1, 1), (1, 1)),
    **options: Any,
) -> Float[Array, "b h2 w2 d"]:
    """Convolves `resampling.repeat(x)`; an argument `conv_general_dilated` of `nn.Conv`.

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
    ways = dict(cpu=_conv_of_doubled, default=_double_and_convolve)
    return lax.platform_dependent(x, kernel, **ways)


def _double_and_convolve(x, kernel):
    return _plain_conv(resampling.repeat(x), kernel, (1, 1), [(1, 1)] * 2, (1, 1))


def _conv_of_doubled(x, kernel):
    def halves(kernel, axis):
        """Adds up the kernel's three rows to two, for even and for odd output rows."""
        above, middle, below = jnp.split(kernel, 3, axis)
        even = jnp.concatenate([above, middle + below], axis)
        return even, jnp.concatenate([above + middle, below], axis)

    outputs = [
        conv(x, part, (1, 1), [(1 - i, i), (1 - j, j)])
        for i, rows in enumerate(halves(kernel, 0))
        for j, part in enumerate(halves(rows, 1))
    ]
    b, h, w, c = outputs[0].shape
    y = placement.reshape(jnp.stack(outputs, axis=3), (b, h, w, 2, 2, c))
    return placement.reshape(y.swapaxes(2, 3), (b, 2 * h, 2 * w, c))
