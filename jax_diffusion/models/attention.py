"""Attention of pixels to each other, and to tokens that say what is wanted."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jax_diffusion.checks import placement
from jax_diffusion.models.layers import Layers


def full_attention(
    q: Float[Array, "b n head d"],
    k: Float[Array, "b m head d"],
    v: Float[Array, "b m head d"],
    mask: Bool[Array, "b 1 1 m"] | None = None,
    *,
    implementation: str | None = None,
    recompute: bool = False,
) -> Float[Array, "b n head d"]:
    """Computes softmax(q k^T / sqrt(d)) v by `jax.nn.dot_product_attention`.

    Args:
        q: queries [b, n, head, d].
        k: keys [b, m, head, d].
        v: values [b, m, head, d].
        mask: which keys are attended to, bool [b, 1, 1, m]; None for all.
        implementation: that of `jax.nn.dot_product_attention`: None, "xla" or "cudnn".
        recompute: whether the backward pass computes the n x m weights again instead of
            keeping them. Flash attention, as cuDNN's, never keeps them.

    Returns:
        [b, n, head, d].

    Raises:
        ValueError: for "cudnn", if JAX finds no cuDNN, or cuDNN does not take these
            dtypes or sizes. Some limits of its backward pass are raised by JAX itself,
            as NotImplementedError.
    """
    chosen: Any = implementation
    attend = functools.partial(jax.nn.dot_product_attention, implementation=chosen)
    if implementation != "cudnn":
        attend = jax.checkpoint(attend) if recompute else attend
        return attend(q, k, v, mask=mask)
    if mask is not None:  # cuDNN takes one of every query, not one that broadcasts
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[1]))
    try:
        return attend(q, k, v, mask=mask)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            "attention_implementation must be None or 'xla' where cuDNN cannot compute "
            f"the attention, got 'cudnn' ({str(error).rstrip('.')})."
        ) from error


class Attention(Layers):
    """Self-attention over all pixels, added to its input; it starts at zero.

    Args of the call: x [b, *spatial, c]. Returns the same shape.

    Attributes:
        num_heads: number of attention heads.
        head_channels: channels of each head; if given, it determines num_heads.
        implementation: see `full_attention`.
    """

    num_heads: int = 1
    head_channels: int | None = None
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b *d c"]) -> Float[Array, "b *d c"]:
        b, c = x.shape[0], x.shape[-1]
        size = self.head_channels or c // self.num_heads
        h = self.norm(x, name="norm").reshape(b, -1, c)
        qkv = self.dense(h, 3 * c, name="qkv", dtype=self.dtype, fused=3)
        # [b, pixels, head, channels of a head] each; softmax is float32 inside.
        q, k, v = jnp.moveaxis(qkv.reshape(b, -1, 3, c // size, size), 2, 0)
        implementation = self.implementation
        h = full_attention(q, k, v, implementation=implementation, recompute=True)
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
        implementation: see `full_attention`.
    """

    num_heads: int = 1
    head_channels: int | None = None
    implementation: str | None = None

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
        h = full_attention(
            q.reshape(b, -1, c // size, size),
            *(k, v, tokens_mask[:, None, None, :]),
            implementation=self.implementation,
            recompute=True,
        )
        h = placement.reshape(h, x.shape)
        return x + self.dense(h, c, name="out", dtype=self.dtype, zero=True)
