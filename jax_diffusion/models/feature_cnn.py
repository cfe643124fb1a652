"""A small CNN classifier; its features give Frechet distances for small images.

    halve: convolutions of stride 2, each with norm and ReLU, until no side is above 4
    last:  one more convolution, of stride 1 and 64 channels
    head:  the mean over pixels, `pool`, and one linear layer, `logits`

As in Inception, the features are those before the last layer.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

MAX_SIDE = 4  # pixels of the largest side before the last convolution


class Features(NamedTuple):
    """The outputs of `FeatureCNN`, float32.

    Attributes:
        pool: features of each image, [b, 64].
        logits: logits of the labels, [b, num_classes].
    """

    pool: Float[Array, "b d"]
    logits: Float[Array, "b k"]


class FeatureCNN(nn.Module):
    """Computes features and logits of images of any size.

    Args of the call: images uint8 [b, h, w, c]. Returns `Features`.

    Attributes:
        num_classes: number of labels.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: UInt8[Array, "b h w c"]) -> Features:
        def block(h, channels, stride):
            h = nn.Conv(channels, (3, 3), stride, padding=1)(h)
            return jax.nn.relu(nn.GroupNorm(8)(h))

        h, channels = images.astype(jnp.float32) / 127.5 - 1, 32
        while max(h.shape[1:3]) > MAX_SIDE:
            h, channels = block(h, channels, 2), 64
        pool = block(h, 64, 1).mean(axis=(1, 2))
        return Features(pool, nn.Dense(self.num_classes)(pool))
