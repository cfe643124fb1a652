"""The Diffusion Transformer (DiT) of Peebles & Xie 2023: a transformer on patches.

    emb = MLP(sinusoids of t) + embedding of the label + linear(cond)
    x = linear(patches of the image) + sinusoids of their row and column
    depth times: x += gate attention(norm(x)), x += gate MLP(norm(x))
    patches of the output = linear(norm(x))

Norms have no parameters: scales, shifts and gates are linear functions of SiLU(emb)
that start at zero (adaLN-Zero), so a new block is the identity. `PUBLISHED` has the
sizes of the paper; DiT-XL/2 is `DiT(**PUBLISHED["XL"], patch_size=2)`. The paper trains
it on the latents of an autoencoder, 4 channels of an eighth of the image's size.

Norms, softmax, embeddings, modulation and output are always float32; `dtype` is the
dtype of the other linear layers, of attention and of x.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_diffusion import checks
from jax_diffusion.checks import placement
from jax_diffusion.models.attention import full_attention
from jax_diffusion.models.folding import unfold
from jax_diffusion.models.inputs import check_conditioning
from jax_diffusion.models.layers import check_inputs, check_sizes, timestep_embedding
from jax_diffusion.models.unet import POLICIES

PUBLISHED: dict[str, dict[str, int]] = {
    "S": dict(channels=384, depth=12, num_heads=6),
    "B": dict(channels=768, depth=12, num_heads=12),
    "L": dict(channels=1024, depth=24, num_heads=16),
    "XL": dict(channels=1152, depth=28, num_heads=16),
}

FREQUENCIES = 256  # columns of the sinusoids of t

Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
ZeroDense = functools.partial(nn.Dense, kernel_init=nn.initializers.zeros)


class Block(nn.Module):
    """Attention over all patches, then an MLP, each modulated; starts as the identity.

    Args of the call: x [b, n, c]; emb float32 [b, c]. Returns [b, n, c].

    Attributes:
        num_heads: number of attention heads.
        mlp_channels: width of the hidden layer of the MLP.
        implementation: see `full_attention`.
        dtype: dtype of attention, MLP and result.
    """

    num_heads: int
    mlp_channels: int
    implementation: str | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], emb: Float[Array, "b c"]
    ) -> Float[Array, "b n c"]:
        b, n, c = x.shape
        rows = ZeroDense(6 * c, name="modulation")(nn.silu(emb))
        shift, scale, gate, *of_mlp = jnp.split(rows[:, None], 6, axis=-1)

        h = norm(x, shift, scale)
        qkv = Dense(3 * c, dtype=self.dtype, name="qkv")(h)
        qkv = qkv.reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        implementation = self.implementation
        h = full_attention(q, k, v, implementation=implementation, recompute=True)
        h = placement.reshape(h, x.shape)
        h = Dense(c, dtype=self.dtype, name="out")(h)
        x = (x + gate * h).astype(self.dtype)

        shift, scale, gate = of_mlp
        h = norm(x, shift, scale)
        h = nn.gelu(Dense(self.mlp_channels, dtype=self.dtype, name="mlp_0")(h))
        h = Dense(c, dtype=self.dtype, name="mlp_1")(h)
        return (x + gate * h).astype(self.dtype)


class DiT(nn.Module):
    """Diffusion Transformer; the docstring of the module shows its structure.

    Args of the call: x float32 [b, h, w, c]; timesteps float32 [b]; label int32 [b] if
    num_classes is set; cond [b, cond_dim] if cond_dim is set; train is ignored, as
    there is no dropout. Returns float32 [b, h, w, out_channels].

    Attributes:
        channels: width of every token, divisible by 4 and by num_heads.
        depth: number of blocks.
        num_heads: attention heads.
        patch_size: side of a patch in pixels; it divides height and width.
        mlp_ratio: width of the MLPs' hidden layers in multiples of channels.
        out_channels: channels of the output.
        num_classes: number of labels; None for a network that takes no label.
        cond_dim: length of the vectors `cond`, which a linear layer adds to emb; 0 for
            a network that takes none. The official network has no such layer.
        remat: name of a policy of `jax.checkpoint_policies`, as of `UNet`.
        attention_implementation: None, "xla" or "cudnn", as of `UNet`.
        dtype: dtype of linear layers and attention.

    Raises:
        ValueError: if patches do not fill the image, if a field is out of range, or if
            label or cond is missing, not wanted or of another shape.
    """

    channels: int = 384
    depth: int = 12
    num_heads: int = 6
    patch_size: int = 2
    mlp_ratio: float = 4.0
    out_channels: int = 3
    num_classes: int | None = None
    cond_dim: int = 0
    remat: str | None = None
    attention_implementation: str | None = None
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        """Raises ValueError for a field that is out of range or does not fit others."""
        check_sizes(self)
        checks.number("mlp_ratio", self.mlp_ratio, above=0, at_most=1000)
        if self.channels % 4 or self.channels % self.num_heads:
            raise ValueError(
                "channels must be divisible by 4 and by num_heads = "
                f"{self.num_heads}, got {self.channels}."
            )
        if self.remat is not None:
            checks.choice("remat", self.remat, POLICIES)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *d c"],
        timesteps: Float[Array, "b"],
        label: Int[Array, "b"] | None = None,
        *,
        cond: Float[Array, "b c_cond"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b *d c_out"]:
        self.check_call(x, timesteps, label, cond)
        emb = timestep_embedding(timesteps, FREQUENCIES)
        normal = nn.initializers.normal(0.02)
        dense = functools.partial(nn.Dense, self.channels, kernel_init=normal)
        emb = dense(name="time_1")(nn.silu(dense(name="time_0")(emb)))
        if label is not None and self.num_classes is not None:
            size = self.num_classes, self.channels
            table = nn.Embed(*size, embedding_init=normal, name="label")
            emb = emb + placement.rows(table.embedding, label, mode="fill")
        if cond is not None:
            emb = emb + Dense(self.channels, name="cond")(cond)

        x = nn.Conv(
            self.channels,
            (self.patch_size,) * 2,
            strides=self.patch_size,
            padding="VALID",
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform((0, 1, 2), 3),
            name="patches",
        )(x)
        b, height, width, c = x.shape
        tokens = placement.reshape(x, (b, height * width, c))
        tokens = (tokens + positions(height, width, c)[None]).astype(self.dtype)
        block = Block
        if self.remat is not None:
            policy = getattr(jax.checkpoint_policies, self.remat)
            block = nn.remat(Block, policy=policy)
        for i in range(self.depth):
            sizes = self.num_heads, round(self.mlp_ratio * c)
            sizes = *sizes, self.attention_implementation
            tokens = block(*sizes, dtype=self.dtype, name=f"block_{i}")(tokens, emb)

        rows = ZeroDense(2 * c, name="out_modulation")(nn.silu(emb))
        h = norm(tokens, *jnp.split(rows[:, None], 2, axis=-1))
        h = ZeroDense(self.out_channels * self.patch_size**2, name="out")(h)
        h = placement.reshape(h, (b, height, width, h.shape[-1]))
        return unfold(h, self.patch_size)

    def check_call(self, x, timesteps, label, cond):
        """Raises ValueError for inputs of a call that do not fit this network."""
        check_inputs(x, timesteps, halvings=0)
        if x.ndim != 4:
            raise ValueError(f"x must be images [b, h, w, c], got shape {x.shape}.")
        if any(size % self.patch_size for size in x.shape[1:3]):
            raise ValueError(
                "patch_size must divide height and width of the images, got "
                f"{self.patch_size} for {x.shape[1]} x {x.shape[2]}."
            )
        check_conditioning(self, x, label, cond)


def norm(
    x: Float[Array, "b n c"], shift: Float[Array, "b 1 c"], scale: Float[Array, "b 1 c"]
) -> Float[Array, "b n c"]:
    """Applies layer norm without parameters in float32, then a scale and a shift."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(x**2, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(variance + 1e-6) * (1 + scale) + shift


def positions(height: int, width: int, channels: int) -> Float[np.ndarray, "n c"]:
    """Returns the position embedding of every patch: sinusoids of column, then of row.

    Each half has the sines, then the cosines, of channels / 4 frequencies from 1 down
    to above 1 / 10,000.

    Args:
        height: number of patches from top to bottom.
        width: number of patches from left to right.
        channels: number of channels, divisible by 4.

    Returns:
        float32 [height * width, channels], row by row.
    """
    freqs = 10_000.0 ** -(np.arange(channels // 4) / (channels / 4))
    row, column = np.divmod(np.arange(height * width), width)
    angles = [place[:, None] * freqs for place in (column, row)]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1).astype(np.float32)
