"""Attention of pixels to each other, and to tokens that say what is wanted."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jax_diffusion.checks import placement
from jax_diffusion.models.layers import Layers


class Attention(Layers):
    """Self-attention over all pixels, added to its input; it starts at zero.

    Args of the call: x [b, *spatial, c]. Returns the same shape.

    Attributes:
        num_heads: number of attention heads.
        head_channels: channels of each head; if given, it determines num_heads.
    """

    num_heads: int = 1
    head_channels: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b *d c"]) -> Float[Array, "b *d c"]:
        b, c = x.shape[0], x.shape[-1]
        size = self.head_channels or c // self.num_heads
        h = self.norm(x, name="norm").reshape(b, -1, c)
        qkv = self.dense(h, 3 * c, name="qkv", dtype=self.dtype, fused=3)
        # [b, pixels, head, channels of a head] each; softmax is float32 inside.
        q, k, v = jnp.moveaxis(qkv.reshape(b, -1, 3, c // size, size), 2, 0)
        # The pixels x pixels attention weights are computed again, not kept.
        h = jax.checkpoint(jax.nn.dot_product_attention)(q, k, v)
        h = placement.reshape(h, x.shape)
        return x + self.dense(h, c, name="out", dtype=self.dtype, zero=True)


class CrossAttention(Layers):
    """Attention of all pixels to tokens (Rombach et al. 2022), added to its input.

    It starts at zero. Tokens that are masked have no influence, whatever they are, NaN
    too: their keys are not attended to, and where all are masked, their values are 0.

    Args of the call: x [b, *spatial, c]; tokens [b, n, d]; tokens_mask bool [b, n],
    which of them count, None for all. Returns [b, *spatial, c].

    Attributes:
        num_heads: number of attention heads.
        head_channels: channels of each head; if given, it determines num_heads.
    """

    num_heads: int = 1
    head_channels: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *d c"],
        tokens: Float[Array, "b n d_token"],
        tokens_mask: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "b *d c"]:
        (b, n), c = tokens.shape[:2], x.shape[-1]
        size = self.head_channels or c // self.num_heads
        if tokens_mask is None:
            tokens_mask = jnp.ones_like(tokens[:, :, 0], bool)
        tokens = jnp.where(tokens_mask[:, :, None], tokens, 0)
        h = self.norm(x, name="norm").reshape(b, -1, c)
        q = self.dense(h, c, name="q", dtype=self.dtype)
        kv = self.dense(tokens, 2 * c, name="kv", dtype=self.dtype, fused=2)
        k, v = jnp.moveaxis(kv.reshape(b, n, 2, c // size, size), 2, 0)
        v = jnp.where(tokens_mask[:, :, None, None], v, 0)
        attend = jax.checkpoint(jax.nn.dot_product_attention)
        q = q.reshape(b, -1, c // size, size)
        h = attend(q, k, v, mask=tokens_mask[:, None, None, :])
        h = placement.reshape(h, x.shape)
        return x + self.dense(h, c, name="out", dtype=self.dtype, zero=True)
