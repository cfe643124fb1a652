"""A small convolutional classifier, whose features compare sets of small images.

    halve: convolutions of stride 2 until no side is above 4, each with norm and ReLU
    last:  one more of stride 1, of 64 channels
    head:  the mean over pixels, `pool`, and one linear layer, `logits`

As in Inception, the pooled features are those before the last layer.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

MAX_SIDE = 4  # pixels that are left to the last convolution


class Features(NamedTuple):
    """What the network says of each image, float32."""

    pool: Float[Array, "b d"]
    logits: Float[Array, "b k"]


class FeatureCNN(nn.Module):
    """Features and logits of uint8 images [b, h, w, c], of any size; see the module."""

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
