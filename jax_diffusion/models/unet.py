"""The U-Net of DDPM, DDIM, Improved DDPM, guided diffusion and `google/ddpm-*`.

    emb = MLP(sinusoids of t) + embedding of the label + dense(cond)
    down: per level num_res_blocks x (ResBlock, attention at some sizes), halve
    mid:  ResBlock, attention, ResBlock
    up:   per level (num_res_blocks + 1) x (ResBlock on [h, skip], attention), double
    attention: self-attention, then cross-attention to tokens if there are any

The systems differ in small ways, each of which is a field of `UNet`; the defaults are
those of Improved DDPM. Norms, softmax, time embedding and output are always float32;
`dtype` is the dtype of convolutions and attention.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_diffusion import checks
from jax_diffusion.checks import placement
from jax_diffusion.models.attention import Attention, CrossAttention
from jax_diffusion.models.dropout import Dropout
from jax_diffusion.models.folding import fold, unfold
from jax_diffusion.models.inputs import check_conditioning
from jax_diffusion.models.layers import (
    Layers,
    check_inputs,
    check_sizes,
    timestep_embedding,
)
from jax_diffusion.models.resampling import pool, repeat

# The fields of `Trunk` with a choice, and their values.
CHOICES = {
    "resample": ("conv", "pool", "resblock"),
    "embedding_order": ("cos_sin", "sin_cos"),
    "down_padding": ("symmetric", "bottom_right"),
    "init_style": ("openai", "ho", "torch"),
}


# Of `jax.checkpoint_policies`, those without arguments.
POLICIES = (
    *("nothing_saveable", "everything_saveable", "dots_saveable", "checkpoint_dots"),
    *("dots_with_no_batch_dims_saveable", "checkpoint_dots_with_no_batch_dims"),
)


class ResBlock(Layers):
    """Residual block: two convolutions of size 3, modulated by the time embedding.

    The last convolution starts at zero, so a new block is the identity, up to the
    projection of its skip connection.

    Args of the call: x [b, *spatial, c]; emb float32 [b, e]; train, whether dropout is
    on. Returns [b, *spatial, channels], spatial axes resampled if asked for.

    Attributes:
        channels: number of output channels.
        dropout: rate of dropout before the last convolution.
        scale_shift: whether emb scales and shifts the second norm (Improved DDPM) or is
            added before it (Ho et al.).
        resample: None, "halve" or "double": how branch and skip connection are
            resampled before the first convolution.
    """

    channels: int = 128
    dropout: float = 0.0
    scale_shift: bool = True
    resample: str | None = None

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

        h = Dropout(self.dropout, deterministic=not train)(h)
        h = self.conv(h, self.channels, name="conv_out", zero=True)
        if x.shape[-1] != self.channels:
            x = self.dense(x, self.channels, name="skip", dtype=self.dtype)
        return x + h


class Trunk(Layers):
    """The way down and the middle, which `UNet` and `NoisyClassifier` share.

    Attributes:
        channels: channels of the first level.
        multipliers: channels of each level, in multiples of `channels`; one per level.
        num_res_blocks: residual blocks per level on the way down; one more on the way
            up.
        attention_resolutions: image heights in pixels at which blocks have attention.
        num_heads: attention heads.
        head_channels: channels of each attention head; if given, in place of num_heads.
        dropout: rate of dropout in residual blocks.
        scale_shift: whether the time embedding scales and shifts norms (Improved DDPM)
            or is added (Ho et al.).
        resample: how levels are halved and doubled: "conv", a convolution of stride 2
            and one after doubling; "pool", without convolutions; "resblock", a residual
            block that resamples (guided-diffusion).
        embedding_order: "cos_sin" or "sin_cos", see `timestep_embedding`.
        embedding_endpoint: see `timestep_embedding`.
        down_padding: padding of the convolutions of stride 2: "symmetric", or
            "bottom_right" (Ho et al., DDIM).
        remat: name of a policy of `jax.checkpoint_policies`, such as
            "nothing_saveable": the backward pass computes all that it does not save
            again, block by block. None: the backward pass computes nothing again.
        attention_implementation: how softmax attention is computed, the argument
            `implementation` of `jax.nn.dot_product_attention`: None, JAX chooses;
            "xla"; "cudnn", the flash attention of NVIDIA GPUs, in bfloat16 or float16,
            with gradients but without derivatives in forward mode (`jax.jvp`).
    """

    channels: int = 128
    multipliers: Sequence[int | float] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = (16,)
    num_heads: int = 1
    head_channels: int | None = None
    dropout: float = 0.0
    scale_shift: bool = True
    resample: str = "conv"
    embedding_order: str = "cos_sin"
    embedding_endpoint: bool = False
    down_padding: str = "symmetric"
    remat: str | None = None
    attention_implementation: str | None = None

    def __post_init__(self):
        """Raises ValueError for a field that is out of range or does not fit others."""
        check_sizes(self)
        for name, choices in CHOICES.items():
            checks.choice(name, getattr(self, name), choices)
        if self.remat is not None:
            checks.choice("remat", self.remat, POLICIES)
        for height in self.attention_resolutions:
            checks.integer("attention_resolutions", height, at_least=1)
        name = "num_heads" if self.head_channels is None else "head_channels"
        heads = getattr(self, name)
        for width in self.widths():
            if not width or width % self.num_groups or width % heads:
                raise ValueError(
                    f"channels must be divisible by num_groups = {self.num_groups} and "
                    f"by {name} = {heads}, got {width}."
                )
        super().__post_init__()

    def widths(self) -> list[int]:
        """Returns the number of channels of every level."""
        return [round(m * self.channels) for m in self.multipliers]

    def shared(self) -> dict[str, Any]:
        """Returns the fields of `Layers` by name, for the blocks inside."""
        names = ("init_style", "num_groups", "norm_epsilon", "dtype")
        return {name: getattr(self, name) for name in names}

    def heads(self) -> dict[str, Any]:
        """Returns the fields that split attention into heads, by name."""
        return dict(num_heads=self.num_heads, head_channels=self.head_channels)

    def embed(self, timesteps):
        """Embeds timesteps [b] as float32 [b, 4 channels]: sinusoids and an MLP."""
        emb = timestep_embedding(
            timesteps,
            self.channels,
            order=self.embedding_order,
            endpoint=self.embedding_endpoint,
        )
        emb = nn.silu(self.dense(emb, 4 * self.channels, name="time_0"))
        return self.dense(emb, 4 * self.channels, name="time_1")

    def blocks(self, emb, train, tokens=None, tokens_mask=None):
        """Returns block(h, channels, name) and attend(h, name), all else bound.

        Args:
            emb: time embedding, float32 [b, e].
            train: whether dropout is on.
            tokens, tokens_mask: of `CrossAttention`, which follows if they are given.
        """
        res_block, attention, cross_attention = ResBlock, Attention, CrossAttention
        if self.remat is not None:
            policy = getattr(jax.checkpoint_policies, self.remat)
            res_block = nn.remat(ResBlock, policy=policy, static_argnums=(3,))
            attention = nn.remat(Attention, policy=policy)
            cross_attention = nn.remat(CrossAttention, policy=policy)

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
            options["implementation"] = self.attention_implementation
            h = attention(name=f"{name}_attention", **options)(h)
            if tokens is None:
                return h
            across = cross_attention(name=f"{name}_cross_attention", **options)
            return across(h, tokens, tokens_mask)

        return block, attend

    def descend(self, x, block, attend):
        """Computes the way down and the middle.

        Args:
            x: images [b, *spatial, c].
            block: first result of `blocks`.
            attend: second result of `blocks`.

        Returns:
            The list of the outputs of all stages on the way down, which are the skips
            of a U-Net, and the output of the middle.
        """
        widths = self.widths()
        stages = [h := self.conv(x, widths[0], name="conv_in")]
        for level, width in enumerate(widths):
            for i in range(self.num_res_blocks):
                h = attend(block(h, width, f"down_{level}_{i}"), f"down_{level}_{i}")
                stages.append(h)
            if level < len(widths) - 1:
                stages.append(
                    h := self.resize(h, f"down_{level}_halve", block, "halve")
                )
        h = block(h, h.shape[-1], "mid_0")
        h = attend(h, "mid", always=True)
        return stages, block(h, h.shape[-1], "mid_1")

    def resize(self, h, name, block, how):
        """Halves or doubles all spatial axes between levels, as `resample` says.

        Args:
            h: features [b, *spatial, c].
            name: name of the layer; "pool" has none.
            block: first result of `blocks`.
            how: "halve" or "double".

        Returns:
            Features [b, *resized, c].
        """
        if self.resample == "resblock":
            return block(h, h.shape[-1], name, resample=how)
        if self.resample == "pool":
            return pool(h) if how == "halve" else repeat(h)
        if how == "double":
            return self.conv(h, h.shape[-1], name=name, double=True)
        padding = (0, 1) if self.down_padding == "bottom_right" else (1, 1)
        return self.conv(h, h.shape[-1], name=name, stride=2, padding=padding)


class UNet(Trunk):
    """U-Net of x_t and its timestep; the docstring of the module shows its structure.

    Args of the call: x float32 [b, h, w, c], or sequences [b, n, c], or volumes
    [b, d, h, w, c], whose depth d is never halved; timesteps float32 [b]; label int32
    [b] if num_classes is set; low_res [b, h_low, w_low, c] if low_res is set; cond
    [b, cond_dim], tokens [b, n, token_dim] and tokens_mask bool [b, n], None for all
    of them, if their size is set. Returns float32 [b, h, w, out_channels].

    Attributes:
        out_channels: channels of the output.
        num_classes: number of labels; None for a network that takes no label.
        low_res: whether the network also takes low-resolution images, which are resized
            and stacked onto x (super-resolution).
        block_size: side of the blocks of pixels that are folded into channels before
            the network and unfolded after it (Ho et al.'s space_to_depth); 1 for none.
        cond_dim: length of the vectors `cond`, which a dense layer adds to the time
            embedding; zeros mean none. 0 for a network that takes none.
        token_dim: length of each token; a set of n of them is attended to wherever
            pixels attend to each other, without regard to their order. Tokens that are
            masked have no influence, and all of them masked means none. 0 for a
            network that takes none.

    Further attributes are those of `Trunk` and `Layers`.

    Raises:
        ValueError: if the image cannot be halved often enough, if channels cannot be
            divided into groups or heads, or if an input is missing, not wanted or of
            another shape.

    >>> model, t = UNet(multipliers=(1, 2), out_channels=1), jnp.zeros(2)
    >>> for shape in ((2, 64, 1), (2, 5, 16, 16, 1)):  # of sequences, and of volumes
    ...     given = jax.random.key(0), jnp.zeros(shape), t
    ...     jax.eval_shape(model.init_with_output, *given)[0].shape
    (2, 64, 1)
    (2, 5, 16, 16, 1)
    """

    out_channels: int = 3
    num_classes: int | None = None
    low_res: bool = False
    block_size: int = 1
    cond_dim: int = 0
    token_dim: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *d c"],
        timesteps: Float[Array, "b"],
        label: Int[Array, "b"] | None = None,
        *,
        low_res: Float[Array, "b *d_low c_low"] | None = None,
        cond: Float[Array, "..."] | None = None,
        tokens: Float[Array, "..."] | None = None,
        tokens_mask: Bool[Array, "..."] | None = None,
        train: bool = False,
    ) -> Float[Array, "b *d c_out"]:
        self._check_low_res(low_res)
        check_conditioning(self, x, label, cond, tokens, tokens_mask)
        if low_res is not None:
            shape = x.shape[:-1] + low_res.shape[-1:]
            small = jax.image.resize(low_res, shape, "bilinear")
            x = jnp.concatenate([x, small], axis=-1)
        x = fold(x, self.block_size)
        check_inputs(x, timesteps, len(self.multipliers) - 1)
        emb = self.embed(timesteps)
        if label is not None and self.num_classes is not None:
            init = nn.initializers.normal(1.0)  # as torch.nn.Embedding
            size = 4 * self.channels
            table = nn.Embed(self.num_classes, size, embedding_init=init, name="label")
            emb = emb + placement.rows(table.embedding, label, mode="fill")
        if cond is not None:
            emb = emb + self.dense(cond, 4 * self.channels, name="cond")
        block, attend = self.blocks(emb, train, tokens, tokens_mask)

        skips, h = self.descend(x, block, attend)
        for level, width in reversed(list(enumerate(self.widths()))):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = attend(block(h, width, f"up_{level}_{i}"), f"up_{level}_{i}")
            if level > 0:
                h = self.resize(h, f"up_{level}_double", block, "double")

        h = self.norm(h, name="norm_out", silu=True)
        features = self.out_channels * self.block_size**2
        h = self.conv(h, features, name="conv_out", zero=True, dtype=jnp.float32)
        return unfold(h, self.block_size)

    def _check_low_res(self, low_res):
        if (low_res is None) == self.low_res:
            wanted = "needs" if self.low_res else "takes no"
            raise ValueError(
                f"a U-Net with low_res = {self.low_res} {wanted} low_res images, "
                f"got {'none' if low_res is None else 'some'}."
            )
