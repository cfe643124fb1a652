"""The U-Net of Ho et al. (2020) and of Improved DDPM (Nichol & Dhariwal 2021).

    emb = MLP(sinusoids of t)
    down: per level num_res_blocks x (ResBlock, attention at some sizes), halve
    mid:  ResBlock, attention, ResBlock
    up:   per level (num_res_blocks + 1) x (ResBlock on [h, skip], attention), double

The systems differ in small ways, each a field of `UNet`; the defaults are Improved
DDPM's. Norms, softmax, time embedding and output are float32 whatever the dtype.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

InitStyle = Literal["torch", "ddpm"]


def timestep_embedding(
    t: Float[Array, "b"],
    dim: int,
    *,
    max_period: float = 10_000.0,
    order: Literal["cos_sin", "sin_cos"] = "cos_sin",
    endpoint: bool = False,
) -> Float[Array, "b dim"]:
    """Sinusoids of t at frequencies from 1 down to 1 / max_period, in float32.

    Args:
        t: timesteps, fractions allowed.
        dim: if odd, the last column is zero.
        order: which half comes first; OpenAI cos_sin, Ho et al. and DDIM sin_cos.
        endpoint: include the lowest frequency itself, i.e. divide by half - 1 (Ho et
            al., DDIM) and not by half (OpenAI).
    """
    half = dim // 2
    exponents = np.arange(half) / (half - 1 if endpoint else half)
    freqs = jnp.asarray(np.exp(-np.log(max_period) * exponents), jnp.float32)
    angles = t.astype(jnp.float32)[:, None] * freqs[None, :]
    waves = [jnp.cos(angles), jnp.sin(angles)]
    if order == "sin_cos":
        waves.reverse()
    return jnp.pad(jnp.concatenate(waves, axis=-1), ((0, 0), (0, dim % 2)))


def layer_init(
    style: InitStyle, fan_in: int, *, zero: bool = False, fused: int = 1
) -> dict[str, Any]:
    """Initialisers of one linear or convolutional layer.

    Args:
        style: "torch": uniform up to 1 / sqrt(fan_in), biases too (OpenAI); "ddpm":
            Glorot uniform, zero biases (Ho et al.).
        zero: for a layer whose output should vanish at first; exactly in "torch",
            to a variance of 1e-10 in "ddpm".
        fused: how many layers of equal size the kernel holds side by side.
    """
    if style == "ddpm":
        # Glorot's fan_out counts one of the fused layers, not all.
        scale = 1e-10 if zero else (1 + fused) / 2
        kernel = nn.initializers.variance_scaling(scale, "fan_avg", "uniform")
        return {"kernel_init": kernel, "bias_init": nn.initializers.zeros}
    if zero:
        zeros = nn.initializers.zeros
        return {"kernel_init": zeros, "bias_init": zeros}
    bound = fan_in**-0.5

    def bias(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return {"kernel_init": kernel, "bias_init": bias}


class Layers(nn.Module):
    """What every block shares: how its layers are made. Has no parameters itself."""

    init_style: InitStyle = "torch"
    num_groups: int = 32
    norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32

    def conv(self, x, features, *, name, size=3, stride=1, zero=False, padding=None):
        """A convolution of `size` x `size`, padded symmetrically unless told."""
        init = layer_init(self.init_style, size * size * x.shape[-1], zero=zero)
        padding = (size // 2, size // 2) if padding is None else padding
        return nn.Conv(
            features,
            (size, size),
            strides=stride,
            padding=(padding, padding),
            dtype=self.dtype,
            name=name,
            **init,
        )(x)

    def dense(self, x, features, *, name, dtype=jnp.float32, **init_options):
        """A linear layer over the last axis."""
        init = layer_init(self.init_style, x.shape[-1], **init_options)
        return nn.Dense(features, dtype=dtype, name=name, **init)(x)

    def norm(self, x, *, name):
        """Group norm in float32. The true variance, as PyTorch: the faster formula
        E[x^2] - E[x]^2 cancels."""
        return nn.GroupNorm(
            self.num_groups,
            epsilon=self.norm_epsilon,
            use_fast_variance=False,
            dtype=jnp.float32,
            name=name,
        )(x)


class ResBlock(Layers):
    """Two 3x3 convolutions with a skip, modulated by the timestep embedding.

    The last convolution starts at zero, so a new block is the identity (up to its skip
    projection).
    """

    channels: int = 128
    dropout: float = 0.0
    scale_shift: bool = True  # emb modulates the norm (Improved), else is added (Ho)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"], train: bool
    ) -> Float[Array, "b h w c_out"]:
        h = self.conv(
            nn.silu(self.norm(x, name="norm_in")), self.channels, name="conv_in"
        )

        width = (1 + self.scale_shift) * self.channels
        emb = self.dense(nn.silu(emb), width, name="emb")[:, None, None, :]
        if self.scale_shift:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = self.norm(h, name="norm_out") * (1 + scale) + shift
        else:
            h = self.norm(h + emb, name="norm_out")

        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        h = self.conv(h, self.channels, name="conv_out", zero=True)
        if x.shape[-1] != self.channels:
            x = self.conv(x, self.channels, name="skip", size=1)
        return x + h


class Attention(Layers):
    """Self-attention over all pixels, with a skip; the output starts at zero."""

    num_heads: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        h = self.norm(x, name="norm").reshape(b, height * width, c)
        qkv = self.dense(h, 3 * c, name="qkv", dtype=self.dtype, fused=3)
        # [b, pixels, head, channels of a head] each; softmax is float32 inside.
        q, k, v = jnp.moveaxis(
            qkv.reshape(b, -1, 3, self.num_heads, c // self.num_heads), 2, 0
        )
        h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return x + self.dense(h, c, name="out", dtype=self.dtype, zero=True)


class UNet(Layers):
    """Predicts from x_t and its timestep; see the module's docstring.

    Args of the call: x float32 [b, h, w, c]; timesteps float32 [b]; label int32 [b] if
    num_classes is set. Returns float32 [b, h, w, out_channels].

    Raises:
        ValueError: if the image cannot be halved often enough, if the channels cannot
            be grouped, or if labels are missing or not wanted.
    """

    out_channels: int = 3
    channels: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = (16,)  # heights in pixels
    num_heads: int = 1
    num_classes: int | None = None
    dropout: float = 0.0
    scale_shift: bool = True
    embedding_order: Literal["cos_sin", "sin_cos"] = "cos_sin"
    embedding_endpoint: bool = False
    down_padding: Literal["symmetric", "bottom_right"] = "symmetric"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        timesteps: Float[Array, "b"],
        label: Int[Array, "b"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b h w c_out"]:
        self._check(x, label)
        block, attention = self._blocks()
        emb = self._embed(timesteps, label)
        top = len(self.multipliers) - 1

        h = self.conv(x, self.channels, name="conv_in")
        skips = [h]
        for level, multiplier in enumerate(self.multipliers):
            for i in range(self.num_res_blocks):
                name = f"down_{level}_{i}"
                h = block(channels=multiplier * self.channels, name=name)(h, emb, train)
                if h.shape[1] in self.attention_resolutions:
                    h = attention(name=f"{name}_attention")(h)
                skips.append(h)
            if level < top:
                h = self._halve(h, f"down_{level}_halve")
                skips.append(h)

        h = block(channels=h.shape[-1], name="mid_0")(h, emb, train)
        h = attention(name="mid_attention")(h)
        h = block(channels=h.shape[-1], name="mid_1")(h, emb, train)

        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for i in range(self.num_res_blocks + 1):
                name = f"up_{level}_{i}"
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(channels=multiplier * self.channels, name=name)(h, emb, train)
                if h.shape[1] in self.attention_resolutions:
                    h = attention(name=f"{name}_attention")(h)
            if level > 0:
                h = self._double(h, f"up_{level}_double")

        h = nn.silu(self.norm(h, name="norm_out"))
        h = self.conv(h, self.out_channels, name="conv_out", zero=True)
        return h.astype(jnp.float32)

    def _blocks(self):
        """ResBlock and Attention with all that they share filled in."""
        shared = dict(
            init_style=self.init_style,
            num_groups=self.num_groups,
            norm_epsilon=self.norm_epsilon,
            dtype=self.dtype,
        )
        block = functools.partial(
            ResBlock, dropout=self.dropout, scale_shift=self.scale_shift, **shared
        )
        return block, functools.partial(Attention, num_heads=self.num_heads, **shared)

    def _embed(self, timesteps, label):
        """The timestep, and the label if there is one, as [b, 4 channels]."""
        emb = timestep_embedding(
            timesteps,
            self.channels,
            order=self.embedding_order,
            endpoint=self.embedding_endpoint,
        )
        emb = nn.silu(self.dense(emb, 4 * self.channels, name="time_0"))
        emb = self.dense(emb, 4 * self.channels, name="time_1")
        if self.num_classes is None:
            return emb
        init = nn.initializers.normal(1.0)  # as torch.nn.Embedding
        table = nn.Embed(
            self.num_classes, 4 * self.channels, embedding_init=init, name="label"
        )
        return emb + table(label)

    def _halve(self, h, name):
        padding = (0, 1) if self.down_padding == "bottom_right" else (1, 1)
        return self.conv(h, h.shape[-1], name=name, stride=2, padding=padding)

    def _double(self, h, name):
        h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)  # nearest neighbour
        return self.conv(h, h.shape[-1], name=name)

    def _check(self, x, label):
        factor = 2 ** (len(self.multipliers) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"height and width must be divisible by {factor} to be halved "
                f"{len(self.multipliers) - 1} times, got {x.shape[1]} x {x.shape[2]}."
            )
        if self.channels % self.num_groups or self.channels % self.num_heads:
            raise ValueError(
                f"channels must be divisible by num_groups = {self.num_groups} and by "
                f"num_heads = {self.num_heads}, got {self.channels}."
            )
        if (label is None) != (self.num_classes is None):
            wanted = "needs" if self.num_classes else "takes no"
            raise ValueError(
                f"a U-Net with num_classes = {self.num_classes} {wanted} labels, "
                f"got {'none' if label is None else 'some'}."
            )
