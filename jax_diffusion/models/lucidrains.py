"""The U-Net of lucidrains' denoising-diffusion-pytorch, version 2.3.1.

    emb  = MLP(sinusoids of t)
    stem: 7x7 convolution
    down: per level block, keep, block, attention, keep, halve and widen
    mid:  block, attention, block
    up:   per level 2 x (block on [h, skip]), attention, double and narrow
    out:  block on [h, stem], 1x1 convolution

Attention is linear at all levels but the innermost, where it is full, as in the middle;
both kinds also attend to a few learned keys and values. Norms are RMS norms over
channels. The innermost level is widened but not halved. The defaults are the network of
the README, which has 35,711,491 parameters.

Left out: self-conditioning and random or learned Fourier features of t.

Layers start as PyTorch's do, none at zero; kernels are PyTorch's with their axes
permuted to (2, 3, 1, 0). Norms, softmax, time embedding and output are always float32;
`dtype` is the dtype of convolutions and attention.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_diffusion.checks import placement
from jax_diffusion.models.dropout import Dropout
from jax_diffusion.models.layers import check_inputs, check_sizes
from jax_diffusion.models.resampling import repeat
from jax_diffusion.models.torch_layers import (
    Projections,
    TorchLayers,
    attend,
)


def pixel_unshuffle(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c4"]:
    """Folds blocks of 2x2 pixels into channels, ordered [channel, row, column].

    Args:
        x: images [b, h, w, c], h and w even.

    Returns:
        [b, h / 2, w / 2, 4 c], PyTorch's `pixel_unshuffle`.
    """
    b, height, width, c = x.shape
    x = placement.reshape(x, (b, height // 2, 2, width // 2, 2, c))
    x = x.transpose(0, 1, 3, 5, 2, 4)
    return placement.reshape(x, (b, height // 2, width // 2, 4 * c))


class RMSNorm(nn.Module):
    """RMS norm over the c channels, gain sqrt(c) x / |x|, in float32."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        c = x.shape[-1]
        gain = self.param("scale", nn.initializers.ones, (c,)).reshape(1, 1, 1, c)
        x = x.astype(jnp.float32)
        square = jnp.sum(x**2, axis=-1, keepdims=True)
        # The square of PyTorch's lower bound of |x|; so the gradient exists at x = 0.
        return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24)) * gain * c**0.5


class Block(TorchLayers):
    """Residual block: two 3x3 convolutions, each with norm and SiLU.

    The time embedding scales and shifts the output of the first norm.

    Args of the call: x [b, h, w, c]; emb float32 [b, e]; train, whether dropout is on.
    Returns [b, h, w, channels].

    Attributes:
        channels: number of output channels.
        dropout: rate of dropout before the second convolution.
    """

    channels: int = 64
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"], train: bool
    ) -> Float[Array, "b h w c_out"]:
        h = RMSNorm(name="norm_in")(self.conv(x, self.channels, name="conv_in"))
        emb = self.dense(nn.silu(emb), 2 * self.channels, name="emb")
        scale, shift = jnp.split(emb[:, None, None, :], 2, axis=-1)
        h = nn.silu(h * (1 + scale) + shift)
        h = Dropout(self.dropout, deterministic=not train)(h)
        h = RMSNorm(name="norm_out")(self.conv(h, self.channels, name="conv_out"))
        if x.shape[-1] != self.channels:
            x = self.conv(x, self.channels, name="skip", size=1)
        return x + nn.silu(h)


class MemoryAttention(TorchLayers):
    """Attention of all pixels to each other and to learned keys and values, added to x.

    Args of the call: x [b, h, w, c]. Returns the same shape.

    Attributes:
        linear: whether attention is linear (`linear_attention`, and a norm after it) or
            full.
        num_heads: number of attention heads.
        head_dim: channels of each head.
        num_memory: number of learned keys, and of values, of each head.
        implementation: of full attention, see `full_attention`.
    """

    linear: bool = False
    num_heads: int = 4
    head_dim: int = 32
    num_memory: int = 4
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        h, inner = RMSNorm(name="norm")(x), self.num_heads * self.head_dim
        heads = Projections(self.num_heads, self.head_dim, self.dtype, name="qkv")
        q, k, v = heads(h)
        memory = self.param(
            "memory",
            nn.initializers.normal(1.0),
            (2, self.num_memory, self.num_heads, self.head_dim),
        )
        k_memory, v_memory = (
            placement.beside(jnp.broadcast_to(a[None], (b, *a.shape)), x)
            for a in memory.astype(self.dtype)
        )
        k = jnp.concatenate([k_memory, k], axis=1)
        v = jnp.concatenate([v_memory, v], axis=1)
        h = attend(q, k, v, linear=self.linear, implementation=self.implementation)
        h = placement.reshape(h, (b, height, width, inner))
        h = self.conv(h, c, name="out", size=1)
        return x + (RMSNorm(name="norm_out")(h) if self.linear else h)


class LucidrainsUNet(TorchLayers):
    """U-Net of x_t and its timestep; the docstring of the module shows its structure.

    Args of the call: x float32 [b, h, w, c]; timesteps float32 [b]. Returns float32
    [b, h, w, out_channels].

    Attributes:
        out_channels: channels of the output.
        channels: channels of the stem.
        multipliers: channels of each level, in multiples of `channels`; one per level.
        num_heads: number of attention heads.
        head_dim: channels of each attention head.
        num_memory: number of learned keys, and of values, of each attention head.
        dropout: rate of dropout in residual blocks.
        attention_implementation: of full attention, None, "xla" or "cudnn", as of
            `UNet`.
        dtype: dtype of convolutions and attention.

    Raises:
        ValueError: if the image cannot be halved often enough.
    """

    out_channels: int = 3
    channels: int = 64
    multipliers: Sequence[int] = (1, 2, 4, 8)
    num_heads: int = 4
    head_dim: int = 32
    num_memory: int = 4
    dropout: float = 0.0
    attention_implementation: str | None = None

    def __post_init__(self):
        """Raises ValueError for a field that is out of range."""
        check_sizes(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        timesteps: Float[Array, "b"],
        *,
        train: bool = False,
    ) -> Float[Array, "b h w c_out"]:
        check_inputs(x, timesteps, len(self.multipliers) - 1)
        emb = self.embed(timesteps, self.channels)
        block, attention = self._blocks(emb, train)
        inner = [self.channels * multiplier for multiplier in self.multipliers]
        outer = [self.channels, *inner[:-1]]
        top = len(inner) - 1

        stem = h = self.conv(x, self.channels, name="conv_in", size=7)
        skips = []
        for level, width in enumerate(outer):
            h = block(h, width, f"down_{level}_0")
            skips.append(h)
            h = block(h, width, f"down_{level}_1")
            h = attention(linear=level < top, name=f"down_{level}_attention")(h)
            skips.append(h)
            if level < top:
                h = pixel_unshuffle(h)
                h = self.conv(h, inner[level], name=f"down_{level}_halve", size=1)
            else:
                h = self.conv(h, inner[level], name=f"down_{level}_widen")

        h = block(h, inner[-1], "mid_0")
        h = attention(name="mid_attention")(h)
        h = block(h, inner[-1], "mid_1")

        for level in reversed(range(len(inner))):
            for i in range(2):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, inner[level], f"up_{level}_{i}")
            h = attention(linear=level < top, name=f"up_{level}_attention")(h)
            h = repeat(h) if level > 0 else h
            name = f"up_{level}_{'double' if level > 0 else 'narrow'}"
            h = self.conv(h, outer[level], name=name)

        h = block(jnp.concatenate([h, stem], axis=-1), self.channels, "block_out")
        h = self.conv(h, self.out_channels, name="conv_out", size=1)
        return h.astype(jnp.float32)

    def _blocks(self, emb, train):
        """Returns block(h, width, name) and attention, all that blocks share bound."""
        attention = functools.partial(
            MemoryAttention,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            num_memory=self.num_memory,
            implementation=self.attention_implementation,
            dtype=self.dtype,
        )

        def block(h, width, name):
            layers = Block(self.dtype, channels=width, dropout=self.dropout, name=name)
            return layers(h, emb, train)

        return block, attention
