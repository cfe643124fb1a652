"""The U-Net of DDPM, DDIM, Improved DDPM, guided diffusion and `google/ddpm-*`.

    emb = MLP(sinusoids of t) + embedding of the label
    down: per level num_res_blocks x (ResBlock, attention at some sizes), halve
    mid:  ResBlock, attention, ResBlock
    up:   per level (num_res_blocks + 1) x (ResBlock on [h, skip], attention), double

The systems differ in small ways, each a field of `UNet`; the defaults are Improved
DDPM's. Norms, softmax, time embedding and output are float32 whatever the dtype.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_diffusion.models.layers import (
    Layers,
    check_halvings,
    pool,
    repeat,
    timestep_embedding,
)

CHOICES = {
    "resample": ("conv", "pool", "resblock"),
    "embedding_order": ("cos_sin", "sin_cos"),
    "down_padding": ("symmetric", "bottom_right"),
    "init_style": ("openai", "ho", "torch"),
}


class ResBlock(Layers):
    """Two convolutions of size 3 with a skip, modulated by the timestep embedding.

    The last convolution starts at zero, so a new block is the identity (up to its skip
    projection). With `resample`, both ways are resampled before the first convolution.
    """

    channels: int = 128
    dropout: float = 0.0
    scale_shift: bool = True  # emb modulates the norm (Improved), else is added (Ho)
    resample: str | None = None  # "halve" or "double"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *d c"], emb: Float[Array, "b e"], train: bool
    ) -> Float[Array, "b *d_out c_out"]:
        h = self.norm(x, name="norm_in", silu=True)
        if self.resample == "halve":
            h, x = pool(h), pool(x)
        double = self.resample == "double"
        h = self.conv(h, self.channels, name="conv_in", double=double)
        x = repeat(x) if double else x

        width = (1 + self.scale_shift) * self.channels
        emb = self.dense(nn.silu(emb), width, name="emb")
        if self.scale_shift:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = self.norm(h, name="norm_out", scale=scale, shift=shift, silu=True)
        else:
            emb = jnp.expand_dims(emb, tuple(range(1, x.ndim - 1)))
            h = self.norm(h + emb, name="norm_out", silu=True)

        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = self.conv(h, self.channels, name="conv_out", zero=True)
        if x.shape[-1] != self.channels:
            x = self.dense(x, self.channels, name="skip", dtype=self.dtype)
        return x + h


class Attention(Layers):
    """Self-attention over all pixels, with a skip; the output starts at zero."""

    num_heads: int = 1
    head_channels: int | None = None  # decides num_heads by the channels, if given

    @nn.compact
    def __call__(self, x: Float[Array, "b *d c"]) -> Float[Array, "b *d c"]:
        b, c = x.shape[0], x.shape[-1]
        size = self.head_channels or c // self.num_heads
        h = self.norm(x, name="norm").reshape(b, -1, c)
        qkv = self.dense(h, 3 * c, name="qkv", dtype=self.dtype, fused=3)
        # [b, pixels, head, channels of a head] each; softmax is float32 inside.
        q, k, v = jnp.moveaxis(qkv.reshape(b, -1, 3, c // size, size), 2, 0)
        # Its pixels x pixels weights are computed again rather than kept.
        h = jax.checkpoint(jax.nn.dot_product_attention)(q, k, v).reshape(x.shape)
        return x + self.dense(h, c, name="out", dtype=self.dtype, zero=True)


class Trunk(Layers):
    """The way down and the middle, and all that a U-Net and a classifier share."""

    channels: int = 128
    multipliers: Sequence[int | float] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = (16,)  # heights in pixels
    num_heads: int = 1
    head_channels: int | None = None  # instead of num_heads
    dropout: float = 0.0
    scale_shift: bool = True
    resample: str = "conv"  # of RESAMPLES: how levels are halved and doubled
    embedding_order: str = "cos_sin"  # or "sin_cos"
    embedding_endpoint: bool = False
    down_padding: str = "symmetric"  # or "bottom_right"
    # What the backward pass computes again: the blocks but for what a policy of
    # `jax.checkpoint_policies` saves, such as "nothing_saveable"; None, nothing.
    remat: str | None = None

    def widths(self) -> list[int]:
        """Channels of every level."""
        return [round(m * self.channels) for m in self.multipliers]

    def shared(self) -> dict[str, Any]:
        """The fields of `Layers`, for the blocks inside."""
        names = ("init_style", "num_groups", "norm_epsilon", "dtype")
        return {name: getattr(self, name) for name in names}

    def heads(self) -> dict[str, Any]:
        """The fields that tell how attention is split."""
        return dict(num_heads=self.num_heads, head_channels=self.head_channels)

    def embed(self, timesteps):
        """The timesteps as [b, 4 channels]."""
        emb = timestep_embedding(
            timesteps,
            self.channels,
            order=self.embedding_order,
            endpoint=self.embedding_endpoint,
        )
        emb = nn.silu(self.dense(emb, 4 * self.channels, name="time_0"))
        return self.dense(emb, 4 * self.channels, name="time_1")

    def blocks(self, emb, train):
        """block(h, channels, name) and attend(h, name), with all that they share."""
        res_block, attention = ResBlock, Attention
        if self.remat is not None:
            policy = getattr(jax.checkpoint_policies, self.remat)
            res_block = nn.remat(ResBlock, policy=policy, static_argnums=(3,))
            attention = nn.remat(Attention, policy=policy)

        def block(h, channels, name, resample=None):
            return res_block(
                channels=channels,
                dropout=self.dropout,
                scale_shift=self.scale_shift,
                resample=resample,
                name=name,
                **self.shared(),
            )(h, emb, train)

        def attend(h, name, always=False):
            height = h.shape[max(1, h.ndim - 3)]
            if not always and height not in self.attention_resolutions:
                return h
            options = self.shared() | self.heads()
            return attention(name=f"{name}_attention", **options)(h)

        return block, attend

    def descend(self, x, block, attend):
        """The output of every stage on the way down, and of the middle."""
        widths = self.widths()
        stages = [h := self.conv(x, widths[0], name="conv_in")]
        for level, width in enumerate(widths):
            for i in range(self.num_res_blocks):
                h = attend(block(h, width, f"down_{level}_{i}"), f"down_{level}_{i}")
                stages.append(h)
            if level < len(widths) - 1:
                stages.append(h := self._halve(h, f"down_{level}_halve", block))
        h = block(h, h.shape[-1], "mid_0")
        h = attend(h, "mid", always=True)
        return stages, block(h, h.shape[-1], "mid_1")

    def _halve(self, h, name, block):
        if self.resample == "resblock":
            return block(h, h.shape[-1], name, resample="halve")
        if self.resample == "pool":
            return pool(h)
        padding = (0, 1) if self.down_padding == "bottom_right" else (1, 1)
        return self.conv(h, h.shape[-1], name=name, stride=2, padding=padding)

    def check(self, x):
        """Raises ValueError unless the image fits the levels and the widths split."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {choices}, got {getattr(self, name)!r}."
                )
        if self.remat is not None and not hasattr(jax.checkpoint_policies, self.remat):
            raise ValueError(
                f"remat must name a policy of jax.checkpoint_policies, got "
                f"{self.remat!r}."
            )
        check_halvings(x, len(self.multipliers) - 1)
        name = "num_heads" if self.head_channels is None else "head_channels"
        heads = getattr(self, name)
        for width in self.widths():
            if not width or width % self.num_groups or width % heads:
                raise ValueError(
                    f"channels must be divisible by num_groups = {self.num_groups} and "
                    f"by {name} = {heads}, got {width}."
                )


class UNet(Trunk):
    """Predicts from x_t and its timestep; see the module's docstring.

    Args of the call: x float32 [b, *spatial, c], mostly [b, h, w, c]; timesteps float32
    [b]; label int32 [b] if num_classes is set; low_res [b, h_low, w_low, c] if that is
    set. Returns float32 [b, *spatial, out_channels].

    Raises:
        ValueError: if the image cannot be halved often enough, if the channels cannot
            be grouped, or if label or low_res are missing or not wanted.
    """

    out_channels: int = 3
    num_classes: int | None = None
    low_res: bool = False  # sees a smaller image too: super-resolution
    block_size: int = 1  # pixels folded into channels, Ho et al.'s space_to_depth

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *d c"],
        timesteps: Float[Array, "b"],
        label: Int[Array, "b"] | None = None,
        *,
        low_res: Float[Array, "b *d_low c_low"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b *d c_out"]:
        self._check_inputs(label, low_res)
        if low_res is not None:
            shape = x.shape[:-1] + low_res.shape[-1:]
            small = jax.image.resize(low_res, shape, "bilinear")
            x = jnp.concatenate([x, small], axis=-1)
        x = fold(x, self.block_size)
        self.check(x)
        emb = self.embed(timesteps)
        if label is not None and self.num_classes is not None:
            init = nn.initializers.normal(1.0)  # as torch.nn.Embedding
            size = 4 * self.channels
            table = nn.Embed(self.num_classes, size, embedding_init=init, name="label")
            emb = emb + table(label)
        block, attend = self.blocks(emb, train)

        skips, h = self.descend(x, block, attend)
        for level, width in reversed(list(enumerate(self.widths()))):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = attend(block(h, width, f"up_{level}_{i}"), f"up_{level}_{i}")
            if level > 0:
                h = self._double(h, f"up_{level}_double", block)

        h = self.norm(h, name="norm_out", silu=True)
        features = self.out_channels * self.block_size**2
        h = self.conv(h, features, name="conv_out", zero=True, dtype=jnp.float32)
        return unfold(h, self.block_size)

    def _double(self, h, name, block):
        if self.resample == "resblock":
            return block(h, h.shape[-1], name, resample="double")
        if self.resample == "pool":
            return repeat(h)
        return self.conv(h, h.shape[-1], name=name, double=True)

    def _check_inputs(self, label, low_res):
        if (label is None) != (self.num_classes is None):
            wanted = "needs" if self.num_classes else "takes no"
            raise ValueError(
                f"a U-Net with num_classes = {self.num_classes} {wanted} labels, "
                f"got {'none' if label is None else 'some'}."
            )
        if (low_res is None) == self.low_res:
            wanted = "needs" if self.low_res else "takes no"
            raise ValueError(
                f"a U-Net with low_res = {self.low_res} {wanted} low_res images, "
                f"got {'none' if low_res is None else 'some'}."
            )


def fold(x: Float[Array, "b *d c"], size: int) -> Float[Array, "b *d_out c_out"]:
    """Moves blocks of size x size pixels into channels, [row, column, channel]."""
    if size == 1:
        return x
    b, h, w, c = x.shape
    if h % size or w % size:
        raise ValueError(f"images must divide into blocks of {size}, got {h} x {w}.")
    x = x.reshape(b, h // size, size, w // size, size, c).swapaxes(2, 3)
    return x.reshape(b, h // size, w // size, size * size * c)


def unfold(x: Float[Array, "b *d c"], size: int) -> Float[Array, "b *d_out c_out"]:
    """The inverse of `fold`."""
    if size == 1:
        return x
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, size, size, c // size**2).swapaxes(2, 3)
    return x.reshape(b, h * size, w * size, c // size**2)
