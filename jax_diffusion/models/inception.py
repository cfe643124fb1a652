"""Inception-v3 as it is used for published FID values.

    stem:  five convolutions and two max pools, 299 x 299 x 3 -> 35 x 35 x 192
    Mixed: blocks of parallel branches whose channels are concatenated: three at
           35 x 35, five at 17 x 17 and three at 8 x 8 pixels, the last of 2048 channels
    head:  the mean over pixels, `pool`, and one linear layer, `logits`

This is the network of Szegedy et al. (2016) that TensorFlow released on 2015-12-05 and
Heusel et al. (2017) chose for FID. Modules have the names of pytorch-fid, its port to
PyTorch. It differs from torchvision's Inception-v3: average pools leave out padding,
the last block has a max pool in place of the average pool, and there are 1008 classes.
The batch norms are merged into the convolutions before them when the weights are
loaded (`interop.inception_weights`).

Convolutions have full float32 precision on every device, so that scores are comparable.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float, Shaped

SIZE = 299  # pixels of a side, as the network was trained
SPATIAL_CHANNELS = 7  # of 768: 17 x 17 x 7 = 2023 features, about as many as `pool` has


class Features(NamedTuple):
    """The outputs of `Inception` for each image, float32.

    Attributes:
        pool: features for FID, TensorFlow's pool_3, [b, 2048].
        spatial: features for sFID (Nash et al. 2021), TensorFlow's mixed_6/conv,
            [b, 2023].
        logits: logits without bias, for the Inception score, [b, 1008].
    """

    pool: Float[Array, "b 2048"]
    spatial: Float[Array, "b 2023"]
    logits: Float[Array, "b 1008"]


class Convs(nn.Module):
    """Base class of the network and its blocks: makes their layers, has none itself."""

    def conv(
        self,
        x: Float[Array, "b h w c"],
        name: str,
        channels: int,
        kernel: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        padding: str = "SAME",
    ) -> Float[Array, "b h2 w2 d"]:
        """Applies a convolution and a ReLU.

        Args:
            x: [b, h, w, c].
            name: name of the layer.
            channels: number of output channels.
            kernel: side of the kernel, or height and width.
            stride: 1 or 2.
            padding: "SAME" or "VALID".
        """
        conv = nn.Conv(
            channels,
            kernel if isinstance(kernel, tuple) else (kernel, kernel),
            stride,
            padding,
            precision=Precision.HIGHEST,
            name=name,
        )
        return nn.relu(conv(x))

    def chain(self, x, name, *layers, halve=False):
        """Applies convolutions of (channels, kernel) each; `halve`: the last halves."""
        for i, (channels, kernel) in enumerate(layers, start=1):
            last = halve and i == len(layers)
            options: Any = dict(stride=2, padding="VALID") if last else {}
            x = self.conv(x, f"{name}_{i}", channels, kernel, **options)
        return x


def concatenate(*branches: Array) -> Array:
    """Concatenates the channels of branches [b, h, w, c]."""
    return jnp.concatenate(branches, axis=-1)


def halving_max(x: Array) -> Array:
    """Halves images [b, h, w, c] by the maximum of 3 x 3 pixels."""
    return nn.max_pool(x, (3, 3), (2, 2))


def local_mean(x: Array) -> Array:
    """Averages the 3 x 3 pixels around each pixel, without any padding."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def local_max(x: Array) -> Array:
    """Takes the maximum of the 3 x 3 pixels around each pixel."""
    return nn.max_pool(x, (3, 3), padding="SAME")


class MixedA(Convs):
    """Block at 35 x 35 pixels: branches of 1x1, of 5x5, of two 3x3, and a pool."""

    pool_channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        return concatenate(
            self.conv(x, "branch1x1", 64),
            self.chain(x, "branch5x5", (48, 1), (64, 5)),
            self.chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3)),
            self.conv(local_mean(x), "branch_pool", self.pool_channels),
        )


class MixedB(Convs):
    """Block from 35 x 35 to 17 x 17 pixels."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return concatenate(
            self.conv(x, "branch3x3", 384, 3, stride=2, padding="VALID"),
            self.chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3), halve=True),
            halving_max(x),
        )


class MixedC(Convs):
    """Block at 17 x 17 pixels: branches of 1x1, of one 7x7, of two 7x7, and a pool.

    Every 7x7 convolution is a 1x7 and a 7x1 convolution.
    """

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        first, row, column = (self.channels, 1), (1, 7), (7, 1)
        across, down = (self.channels, row), (self.channels, column)
        return concatenate(
            self.conv(x, "branch1x1", 192),
            self.chain(x, "branch7x7", first, across, (192, column)),
            self.chain(x, "branch7x7dbl", first, down, across, down, (192, row)),
            self.conv(local_mean(x), "branch_pool", 192),
        )


class MixedD(Convs):
    """Block from 17 x 17 to 8 x 8 pixels."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        first, row, column = (192, 1), (192, (1, 7)), (192, (7, 1))
        return concatenate(
            self.chain(x, "branch3x3", first, (320, 3), halve=True),
            self.chain(x, "branch7x7x3", first, row, column, (192, 3), halve=True),
            halving_max(x),
        )


class MixedE(Convs):
    """Block at 8 x 8 pixels: branches of 1x1, of one 3x3, of two 3x3, and a pool.

    The last 3x3 convolution of a branch is a 1x3 and a 3x1 convolution, concatenated.
    """

    pool: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        once = self.conv(x, "branch3x3_1", 384)
        twice = self.chain(x, "branch3x3dbl", (448, 1), (384, 3))
        return concatenate(
            self.conv(x, "branch1x1", 320),
            self.conv(once, "branch3x3_2a", 384, (1, 3)),
            self.conv(once, "branch3x3_2b", 384, (3, 1)),
            self.conv(twice, "branch3x3dbl_3a", 384, (1, 3)),
            self.conv(twice, "branch3x3dbl_3b", 384, (3, 1)),
            self.conv(self.pool(x), "branch_pool", 192),
        )


class Inception(Convs):
    """Computes features and logits of images of any size.

    As in guided-diffusion's evaluator, `spatial` are the first 7 channels of the block
    Mixed_6d, [17, 17, 7] flattened, and `logits` lack the bias.

    Args of the call: images uint8 [b, h, w, c], c = 1 or 3, b >= 1. Returns `Features`.

    Raises:
        ValueError: for images of another shape or dtype.
    """

    @nn.compact
    def __call__(self, images: Shaped[Array | np.ndarray, "..."]) -> Features:
        x = prepare(images)
        x = self.conv(x, "Conv2d_1a_3x3", 32, 3, stride=2, padding="VALID")
        x = self.conv(x, "Conv2d_2a_3x3", 32, 3, padding="VALID")
        x = halving_max(self.conv(x, "Conv2d_2b_3x3", 64, 3))
        x = self.conv(x, "Conv2d_3b_1x1", 80)
        x = halving_max(self.conv(x, "Conv2d_4a_3x3", 192, 3, padding="VALID"))
        x = MixedA(32, name="Mixed_5b")(x)
        x = MixedA(64, name="Mixed_5c")(x)
        x = MixedA(64, name="Mixed_5d")(x)
        x = MixedB(name="Mixed_6a")(x)
        x = MixedC(128, name="Mixed_6b")(x)
        x = MixedC(160, name="Mixed_6c")(x)
        x = MixedC(160, name="Mixed_6d")(x)
        # These are channels of the first branch, which TensorFlow calls mixed_6/conv.
        spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x = MixedC(192, name="Mixed_6e")(x)
        x = MixedD(name="Mixed_7a")(x)
        x = MixedE(local_mean, name="Mixed_7b")(x)
        x = MixedE(local_max, name="Mixed_7c")(x)
        pool = jnp.mean(x, axis=(1, 2))
        fc = nn.Dense(1008, use_bias=False, precision=Precision.HIGHEST, name="fc")
        return Features(pool, spatial, fc(pool))


def prepare(images: Shaped[Array | np.ndarray, "..."]) -> Float[Array, "b 299 299 3"]:
    """Scales images to [-1, 1], resizes them to 299 x 299 and repeats a gray channel.

    They are resized as pytorch-fid does: bilinear interpolation between the centers of
    pixels without antialiasing, PyTorch's `interpolate(align_corners=False)`.
    TensorFlow 1 used another grid; scores computed with it differ slightly.

    Args:
        images: uint8 [b, h, w, c], c = 1 or 3, b >= 1.

    Returns:
        float32 [b, 299, 299, 3].

    Raises:
        ValueError: for images of another shape or dtype.
    """
    shape = images.shape
    if images.dtype != jnp.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
        raise ValueError(
            "images must be uint8 [b, h, w, c] with c = 1 or 3, got "
            f"{images.dtype} of shape {shape}."
        )
    if not images.size:
        raise ValueError(f"images must have one pixel at least, got shape {shape}.")
    size = (shape[0], SIZE, SIZE, shape[3])
    x = jnp.asarray(images, jnp.float32) / 255
    x = jax.image.resize(x, size, "bilinear", antialias=False)
    return jnp.broadcast_to(2 * x - 1, (*size[:3], 3))
