"""The Inception-v3 of published Frechet distances, its features and logits.

    stem:  five convolutions and two max pools, 299 x 299 x 3 -> 35 x 35 x 192
    Mixed: blocks of parallel branches, side by side as channels: three at 35 x 35, five
           at 17 x 17 and three at 8 x 8, where 2048 channels are left
    head:  the mean over pixels, `pool`, and one linear layer, `logits`

The network of Szegedy et al. (2016) as TensorFlow released it on 2015-12-05, which
Heusel et al. (2017) took for their FID, in the port to PyTorch of pytorch-fid, whose
names modules have. It differs from torchvision's: average pools do not count what is
padded, the last block has a max pool in their place, and there are 1008 classes. Batch
norms are part of the kernels and biases that they follow, see
`interop.inception_weights`.

Convolutions are in full float32 wherever they run: scores are compared.
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
SPATIAL_CHANNELS = 7  # of 768: so many that 17 x 17 pixels make about 2048 features


class Features(NamedTuple):
    """What the network says of each image, float32."""

    pool: Float[Array, "b 2048"]  # TF's pool_3, of FID
    spatial: Float[Array, "b 2023"]  # TF's mixed_6/conv, of sFID (Nash et al. 2021)
    logits: Float[Array, "b 1008"]  # without the bias, as for the Inception Score


class Convs(nn.Module):
    """What the network and its blocks share. Has no parameters itself."""

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
        """A convolution and a ReLU; kernel: a side, or height and width."""
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
        """Convolutions of (channels, kernel) each, the last of stride 2 if to halve."""
        for i, (channels, kernel) in enumerate(layers, start=1):
            last = halve and i == len(layers)
            options: Any = dict(stride=2, padding="VALID") if last else {}
            x = self.conv(x, f"{name}_{i}", channels, kernel, **options)
        return x


def side_by_side(*branches: Array) -> Array:
    return jnp.concatenate(branches, axis=-1)


def halving_max(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2))


def local_mean(x: Array) -> Array:
    """Of the 3 x 3 pixels around each, or as many of them as there are."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def local_max(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), padding="SAME")


class MixedA(Convs):
    """35 x 35 pixels: branches of 1x1, 5x5, 3x3 twice, and a pool."""

    pool_channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        return side_by_side(
            self.conv(x, "branch1x1", 64),
            self.chain(x, "branch5x5", (48, 1), (64, 5)),
            self.chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3)),
            self.conv(local_mean(x), "branch_pool", self.pool_channels),
        )


class MixedB(Convs):
    """35 x 35 pixels to 17 x 17."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return side_by_side(
            self.conv(x, "branch3x3", 384, 3, stride=2, padding="VALID"),
            self.chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3), halve=True),
            halving_max(x),
        )


class MixedC(Convs):
    """17 x 17 pixels: branches of 1x1, 7x7 once and twice, and a pool.

    The 7x7 are rows and columns in turn.
    """

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        first, row, column = (self.channels, 1), (1, 7), (7, 1)
        across, down = (self.channels, row), (self.channels, column)
        return side_by_side(
            self.conv(x, "branch1x1", 192),
            self.chain(x, "branch7x7", first, across, (192, column)),
            self.chain(x, "branch7x7dbl", first, down, across, down, (192, row)),
            self.conv(local_mean(x), "branch_pool", 192),
        )


class MixedD(Convs):
    """17 x 17 pixels to 8 x 8."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        first, row, column = (192, 1), (192, (1, 7)), (192, (7, 1))
        return side_by_side(
            self.chain(x, "branch3x3", first, (320, 3), halve=True),
            self.chain(x, "branch7x7x3", first, row, column, (192, 3), halve=True),
            halving_max(x),
        )


class MixedE(Convs):
    """8 x 8 pixels: branches of 1x1, 3x3 once and twice, and a pool.

    The last 3x3 of a branch is a row and a column side by side.
    """

    pool: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        once = self.conv(x, "branch3x3_1", 384)
        twice = self.chain(x, "branch3x3dbl", (448, 1), (384, 3))
        return side_by_side(
            self.conv(x, "branch1x1", 320),
            self.conv(once, "branch3x3_2a", 384, (1, 3)),
            self.conv(once, "branch3x3_2b", 384, (3, 1)),
            self.conv(twice, "branch3x3dbl_3a", 384, (1, 3)),
            self.conv(twice, "branch3x3dbl_3b", 384, (3, 1)),
            self.conv(self.pool(x), "branch_pool", 192),
        )


class Inception(Convs):
    """Features and logits of images; see the module's docstring.

    `spatial` are the first 7 channels of the block Mixed_6d, [17, 17, 7] flattened, and
    `logits` lack the bias, both as in guided-diffusion's evaluator.

    Args of the call: images uint8 [b, h, w, c], c = 1 or 3. Returns `Features`.

    Raises:
        ValueError: for other images, and for none.
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
        # Its first branch comes first; TensorFlow calls that mixed_6/conv.
        spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x = MixedC(192, name="Mixed_6e")(x)
        x = MixedD(name="Mixed_7a")(x)
        x = MixedE(local_mean, name="Mixed_7b")(x)
        x = MixedE(local_max, name="Mixed_7c")(x)
        pool = jnp.mean(x, axis=(1, 2))
        fc = nn.Dense(1008, use_bias=False, precision=Precision.HIGHEST, name="fc")
        return Features(pool, spatial, fc(pool))


def prepare(images: Shaped[Array | np.ndarray, "..."]) -> Float[Array, "b 299 299 3"]:
    """Images in [-1, 1] as the network takes them.

    Those of another size than 299 x 299 are resized as pytorch-fid does it: bilinear
    between the centres of pixels, without smoothing where images shrink, PyTorch's
    `interpolate(align_corners=False)`. (TensorFlow 1 took another grid, and scores
    after it differ a little.) One channel is repeated to three.

    Args:
        images: uint8 [b, h, w, c], c = 1 or 3.

    Raises:
        ValueError: for other images, and for none.
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
