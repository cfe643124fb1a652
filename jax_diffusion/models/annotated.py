"""The U-Net of the annotated DDPM (Rogge & Rasul 2022, the first edition of the text).

    emb  = MLP(sinusoids of t)
    stem: 7x7 convolution
    down: per level 2 blocks, linear attention, keep as the level's skip, halve
    mid:  block, attention, block
    up:   per level but the first [h, skip], 2 blocks, linear attention, double
    out:  block without time embedding, 1x1 convolution

A block is "ConvNeXt-like" (a depthwise 7x7 convolution, then two 3x3 convolutions with
norms of one group: not the block of the ConvNeXt paper) or a ResNet block. The defaults
are the published network of 2,996,315 parameters. That network stores a skip of the
first level but never reads it, so all features pass through half the resolution.
`full_skip=True` corrects this: the last block takes [h, skip of the first level].

Layers start as PyTorch's do, none at zero. All convolution kernels, transposed ones
included, are PyTorch's with their axes permuted to (2, 3, 1, 0). Norms, softmax, time
embedding and output are always float32; `dtype` is that of convolutions and attention.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_diffusion.checks import placement
from jax_diffusion.models import cpu_convs
from jax_diffusion.models.layers import check_inputs, check_sizes, layer_init
from jax_diffusion.models.torch_layers import (
    Projections,
    TorchLayers,
    attend,
    gelu,
)


class DepthwiseConv(nn.Module):
    """Depthwise 7x7 convolution with bias: [b, h, w, c] -> [b, h, w, c]."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        init, c = layer_init("torch", 7 * 7), x.shape[-1]
        kernel = self.param("kernel", init["kernel_init"], (7, 7, 1, c))
        bias = self.param("bias", init["bias_init"], (c,))
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        return cpu_convs.depthwise_conv(x, kernel) + bias.reshape(1, 1, 1, c)


class Double(nn.Module):
    """Doubles images as PyTorch's ConvTranspose2d(c, c, 4, 2, padding=1) does.

    Args of the call: h [b, h, w, c]. Returns [b, 2 h, 2 w, c] of dtype `dtype`.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        c = h.shape[-1]
        init = layer_init("torch", 4 * 4 * c)
        kernel = self.param("kernel", init["kernel_init"], (4, 4, c, c))
        bias = self.param("bias", init["bias_init"], (c,))
        h, kernel, bias = (a.astype(self.dtype) for a in (h, kernel, bias))
        return cpu_convs.conv_transpose(h, kernel) + bias.reshape(1, 1, 1, c)


class ConvNextBlock(TorchLayers):
    """Depthwise 7x7 convolution, plus emb, then 3x3 to more channels and 3x3 back.

    Args of the call: x [b, h, w, c]; emb float32 [b, e] or None. Returns
    [b, h, w, channels].

    Attributes:
        channels: number of output channels.
        expansion: channels between the 3x3 convolutions, in multiples of `channels`.
    """

    channels: int = 28
    expansion: int = 2

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"] | None = None
    ) -> Float[Array, "b h w c_out"]:
        h = DepthwiseConv(self.dtype, name="depthwise")(x)
        if emb is not None:
            h = h + self.dense(gelu(emb), h.shape[-1], name="emb")[:, None, None, :]
        h = self.norm(h, name="norm_in")
        h = gelu(self.conv(h, self.expansion * self.channels, name="conv_in"))
        h = self.conv(self.norm(h, name="norm_out"), self.channels, name="conv_out")
        if x.shape[-1] != self.channels:
            x = self.conv(x, self.channels, name="skip", size=1)
        return x + h


class ResNetBlock(TorchLayers):
    """Residual block: two 3x3 convolutions, each with norm and SiLU; emb in between.

    Args of the call: x [b, h, w, c]; emb float32 [b, e] or None. Returns
    [b, h, w, channels].

    Attributes:
        channels: number of output channels.
        num_groups: number of groups of the norms.
    """

    channels: int = 28
    num_groups: int = 8

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"] | None = None
    ) -> Float[Array, "b h w c_out"]:
        h = self.conv(x, self.channels, name="conv_in")
        h = nn.silu(self.norm(h, name="norm_in", num_groups=self.num_groups))
        if emb is not None:
            h = h + self.dense(nn.silu(emb), h.shape[-1], name="emb")[:, None, None, :]
        h = self.conv(h, self.channels, name="conv_out")
        h = nn.silu(self.norm(h, name="norm_out", num_groups=self.num_groups))
        if x.shape[-1] != self.channels:
            x = self.conv(x, self.channels, name="skip", size=1)
        return x + h


class Attention(TorchLayers):
    """Self-attention over all pixels of the normalized x, added to x.

    Args of the call: x [b, h, w, c]. Returns the same shape.

    Attributes:
        linear: whether attention is linear (`linear_attention`, and a norm after it) or
            full.
        num_heads: number of attention heads.
        head_dim: channels of each head.
        implementation: of full attention, see `full_attention`.
    """

    linear: bool = False
    num_heads: int = 4
    head_dim: int = 32
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        h = self.norm(x, name="norm")
        inner = self.num_heads * self.head_dim
        heads = Projections(self.num_heads, self.head_dim, self.dtype, name="qkv")
        q, k, v = heads(h)
        h = attend(q, k, v, linear=self.linear, implementation=self.implementation)
        h = placement.reshape(h, (b, height, width, inner))
        h = self.conv(h, c, name="out", size=1)
        return x + (self.norm(h, name="norm_out") if self.linear else h)


class AnnotatedUNet(TorchLayers):
    """U-Net of x_t and its timestep; the docstring of the module shows its structure.

    Args of the call: x float32 [b, h, w, c]; timesteps float32 [b]; train changes
    nothing, as there is no dropout. Returns float32 [b, h, w, out_channels].

    Attributes:
        out_channels: channels of the output.
        channels: channels of the first level.
        multipliers: channels of each level, in multiples of `channels`; one per level.
        use_convnext: whether blocks are `ConvNextBlock` or `ResNetBlock`.
        expansion: see `ConvNextBlock`.
        num_groups: see `ResNetBlock`.
        num_heads: number of attention heads.
        head_dim: channels of each attention head.
        full_skip: whether the last block reads the skip of the first level.
        attention_implementation: of full attention, None, "xla" or "cudnn", as of
            `UNet`.
        dtype: dtype of convolutions and attention.

    Raises:
        ValueError: if the image cannot be halved often enough, or if the channels of
            ResNet blocks are not divisible by num_groups (28 and 8 are not).
    """

    out_channels: int = 1
    channels: int = 28
    multipliers: Sequence[int] = (1, 2, 4)
    use_convnext: bool = True
    expansion: int = 2
    num_groups: int = 8
    num_heads: int = 4
    head_dim: int = 32
    full_skip: bool = False
    attention_implementation: str | None = None

    def __post_init__(self):
        """Raises ValueError for a field that is out of range or does not fit others."""
        check_sizes(self)
        if not self.use_convnext and self.channels % self.num_groups:
            raise ValueError(
                f"channels of ResNet blocks must be divisible by num_groups = "
                f"{self.num_groups}, got {self.channels}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        timesteps: Float[Array, "b"],
        *,
        train: bool = False,
    ) -> Float[Array, "b h w c_out"]:
        del train
        check_inputs(x, timesteps, len(self.multipliers) - 1)
        stage, block, attention = self._blocks()
        widths = [self.channels * multiplier for multiplier in self.multipliers]
        emb = self.embed(timesteps, self.channels)

        h = self.conv(x, self.channels // 3 * 2, name="conv_in", size=7)
        skips = []
        for level, width in enumerate(widths):
            h = stage(h, emb, width, f"down_{level}")
            skips.append(h)
            if level < len(widths) - 1:
                name = f"down_{level}_halve"
                h = self.conv(h, width, name=name, size=4, stride=2, padding=1)

        h = block(channels=h.shape[-1], name="mid_0")(h, emb)
        h = attention(name="mid_attention")(h)
        h = block(channels=h.shape[-1], name="mid_1")(h, emb)

        for level in reversed(range(1, len(widths))):
            h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = stage(h, emb, widths[level - 1], f"up_{level}")
            h = Double(self.dtype, name=f"up_{level}_double")(h)

        if self.full_skip:
            h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = block(channels=self.channels, name="block_out")(h)
        h = self.conv(h, self.out_channels, name="conv_out", size=1)
        return h.astype(jnp.float32)

    def _blocks(self):
        """Returns stage(h, emb, width, name), block, attention: shared fields bound."""
        if self.use_convnext:
            block = functools.partial(ConvNextBlock, expansion=self.expansion)
        else:
            block = functools.partial(ResNetBlock, num_groups=self.num_groups)
        block = functools.partial(block, dtype=self.dtype)
        attention = functools.partial(
            Attention,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            implementation=self.attention_implementation,
            dtype=self.dtype,
        )

        def stage(h, emb, width, name):
            for i in range(2):
                h = block(channels=width, name=f"{name}_{i}")(h, emb)
            return attention(linear=True, name=f"{name}_attention")(h)

        return stage, block, attention
