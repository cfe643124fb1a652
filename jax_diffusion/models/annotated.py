"""The U-Net of the annotated DDPM (Rogge & Rasul 2022, the first edition of the text).

    emb  = MLP(sinusoids of t)
    stem: 7x7 convolution
    down: per level 2 blocks, linear attention, keep as the level's skip, halve
    mid:  block, attention, block
    up:   per level but the first [h, skip], 2 blocks, linear attention, double
    out:  a block that is not told t, 1x1 convolution

A block is "ConvNeXt-like" (a depthwise 7x7 convolution, then two of 3x3 with one group
per norm: not the block of the ConvNeXt paper) or a ResNet's. The defaults are the
published network of 2,996,315 parameters. It keeps a skip of the first level, too, but
never reads it: all that reaches the output has been through half the resolution.
`full_skip=True` mends that: the last block takes [h, skip of the first level].

Layers start as PyTorch's do, none at zero. All convolution kernels, those that double
included, are PyTorch's with the axes in the order (2, 3, 1, 0). Norms, softmax, time
embedding and output are float32 whatever the dtype.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_diffusion.models.layers import check_halvings, layer_init
from jax_diffusion.models.unet import timestep_embedding

gelu = functools.partial(nn.gelu, approximate=False)

# Forward and backward, on two cores of a CPU: the product takes 20 ms where XLA's
# convolution takes 109 (64x28x28x18), 140 for 218 (4x128x128x32), 284 for 220
# (1x256x256x32). It does width / size times the work.
MAX_BANDED_WIDTH = 128


def depthwise_conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "size size 1 c"]
) -> Float[Array, "b h w c"]:
    """Every channel convolved with its own kernel of odd size, padded with zeros.

    XLA's convolution of this kind is slow on the CPU, above all its gradients. There it
    is a product of matrices instead, equal but for rounding.
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
    """Rows of `size` lines, times the matrix that a row of kernels is: a band."""
    b, height, width, c = x.shape
    size = kernel.shape[0]
    offset = np.subtract.outer(np.arange(width), np.arange(width)) + size // 2
    is_tap = offset == np.arange(size)[:, None, None]
    band = jnp.einsum("ijc,jXx->ciXx", kernel[:, :, 0], is_tap.astype(kernel.dtype))

    lines = jnp.moveaxis(x, -1, 0)
    lines = jnp.pad(lines, ((0, 0), (0, 0), (size // 2, size // 2), (0, 0)))
    lines = jnp.stack([lines[:, :, i : i + height] for i in range(size)], axis=3)
    y = jnp.einsum(
        "cnk,ckx->cnx",
        lines.reshape(c, b * height, size * width),
        band.reshape(c, size * width, width),
    )
    return jnp.moveaxis(y.reshape(c, b, height, width), 0, -1)


class TorchLayers(nn.Module):
    """What the blocks share: layers as PyTorch makes them. Has no parameters itself."""

    dtype: Any = jnp.float32

    def conv(self, x, features, *, name, size=3, stride=1, padding=None, bias=True):
        """A convolution of `size` x `size`, padded symmetrically unless told."""
        init = layer_init("torch", size * size * x.shape[-1])
        padding = size // 2 if padding is None else padding
        return nn.Conv(
            features,
            (size, size),
            strides=stride,
            padding=(padding, padding),
            use_bias=bias,
            dtype=self.dtype,
            name=name,
            **init,
        )(x)

    def dense(self, x, features, *, name):
        """A linear layer in float32."""
        return nn.Dense(features, name=name, **layer_init("torch", x.shape[-1]))(x)

    def norm(self, x, *, name, num_groups=1):
        """Group norm in float32, of the true variance."""
        return nn.GroupNorm(
            num_groups,
            epsilon=1e-5,
            use_fast_variance=False,
            dtype=jnp.float32,
            name=name,
        )(x)

    def embed(self, timesteps, channels):
        """The timestep as [b, 4 channels]."""
        emb = timestep_embedding(timesteps, channels, order="sin_cos", endpoint=True)
        emb = gelu(self.dense(emb, 4 * channels, name="time_0"))
        return self.dense(emb, 4 * channels, name="time_1")


class DepthwiseConv(nn.Module):
    """`depthwise_conv` of 7x7 and its bias."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        init, c = layer_init("torch", 7 * 7), x.shape[-1]
        kernel = self.param("kernel", init["kernel_init"], (7, 7, 1, c))
        bias = self.param("bias", init["bias_init"], (c,))
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        return depthwise_conv(x, kernel) + bias.reshape(1, 1, 1, c)


class ConvNextBlock(TorchLayers):
    """Depthwise 7x7, plus emb, then 3x3 to a multiple of the channels and back."""

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
    """Two of 3x3, norm and SiLU, emb added between; with a skip."""

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


def linear_attention(
    q: Float[Array, "b n head d"],
    k: Float[Array, "b m head d"],
    v: Float[Array, "b m head e"],
) -> Float[Array, "b n head e"]:
    """softmax(q) (softmax(k)^T v) / sqrt(d), in time linear in the pixels.

    q's softmax is over d, k's over the pixels (Shen et al. 2018).
    """
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    q = scale * jax.nn.softmax(q.astype(jnp.float32), axis=-1)
    k = jax.nn.softmax(k.astype(jnp.float32), axis=1)
    context = jnp.einsum("bmhd,bmhe->bhde", k.astype(dtype), v)
    return jnp.einsum("bnhd,bhde->bnhe", q.astype(dtype), context)


class Attention(TorchLayers):
    """Self-attention over all pixels, on the norm of x and added to x.

    The linear kind ends with another norm.
    """

    linear: bool = False
    num_heads: int = 4
    head_dim: int = 32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        h = self.norm(x, name="norm")
        inner = self.num_heads * self.head_dim
        qkv = self.conv(h, 3 * inner, name="qkv", size=1, bias=False)
        # [b, pixels, head, channels of a head] each
        q, k, v = jnp.moveaxis(
            qkv.reshape(b, height * width, 3, self.num_heads, self.head_dim), 2, 0
        )
        attend = linear_attention if self.linear else jax.nn.dot_product_attention
        h = attend(q, k, v).reshape(b, height, width, inner)
        h = self.conv(h, c, name="out", size=1)
        return x + (self.norm(h, name="norm_out") if self.linear else h)


class AnnotatedUNet(TorchLayers):
    """Predicts from x_t and its timestep; see the module's docstring.

    Args of the call: x float32 [b, h, w, c]; timesteps float32 [b]. Returns float32
    [b, h, w, out_channels]. Training or not makes no difference: nothing is dropped.

    Raises:
        ValueError: if the image cannot be halved often enough, or if the channels of
            ResNet blocks cannot be grouped, as the published 28 cannot by 8.
    """

    out_channels: int = 1
    channels: int = 28
    multipliers: Sequence[int] = (1, 2, 4)
    use_convnext: bool = True
    expansion: int = 2  # of ConvNeXt blocks
    num_groups: int = 8  # of ResNet blocks
    num_heads: int = 4
    head_dim: int = 32
    full_skip: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        timesteps: Float[Array, "b"],
        *,
        train: bool = False,
    ) -> Float[Array, "b h w c_out"]:
        del train
        self._check(x)
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
            h = self._double(h, f"up_{level}_double")

        if self.full_skip:
            h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = block(channels=self.channels, name="block_out")(h)
        h = self.conv(h, self.out_channels, name="conv_out", size=1)
        return h.astype(jnp.float32)

    def _blocks(self):
        """What a level is made of, with all that its parts share filled in."""
        if self.use_convnext:
            block = functools.partial(ConvNextBlock, expansion=self.expansion)
        else:
            block = functools.partial(ResNetBlock, num_groups=self.num_groups)
        block = functools.partial(block, dtype=self.dtype)
        attention = functools.partial(
            Attention,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
        )

        def stage(h, emb, width, name):
            for i in range(2):
                h = block(channels=width, name=f"{name}_{i}")(h, emb)
            return attention(linear=True, name=f"{name}_attention")(h)

        return stage, block, attention

    def _double(self, h, name):
        """PyTorch's ConvTranspose2d(c, c, 4, stride=2, padding=1), its weights' axes
        in the order (2, 3, 1, 0)."""
        c = h.shape[-1]
        return nn.ConvTranspose(
            c,
            (4, 4),
            strides=(2, 2),
            padding=[(2, 2), (2, 2)],  # of the dilated image: size - 1 - PyTorch's
            transpose_kernel=True,
            dtype=self.dtype,
            name=name,
            **layer_init("torch", 4 * 4 * c),
        )(h)

    def _check(self, x):
        check_halvings(x, len(self.multipliers) - 1)
        if not self.use_convnext and self.channels % self.num_groups:
            raise ValueError(
                f"channels of ResNet blocks must be divisible by num_groups = "
                f"{self.num_groups}, got {self.channels}."
            )
