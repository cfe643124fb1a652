"""Layers that the networks share: initialization, norms, convolutions, time embedding.

Images are [b, *spatial, c] with one, two or three spatial axes. The first of three axes
is time and is never resampled, as in guided-diffusion's 3-D networks.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jax_diffusion import checks
from jax_diffusion.models import cpu_convs
from jax_diffusion.models.resampling import repeat, scales


def layer_init(
    style: str, fan_in: int, *, zero: bool = False, fused: int = 1
) -> dict[str, Any]:
    """Returns the initializers of a linear or convolutional layer.

    Args:
        style: "torch": kernel and bias uniform in +-1 / sqrt(fan_in), PyTorch's default
            and the DDIM repository's. "openai": the same, but zeros for a `zero` layer.
            "ho": kernel Glorot uniform, or of variance 1e-10 for a `zero` layer; bias
            zero.
        fan_in: number of inputs of each output.
        zero: whether the output of the layer should vanish at initialization.
        fused: number of layers of equal size that the kernel holds side by side.

    Returns:
        "kernel_init" and "bias_init", arguments of `nn.Conv` and `nn.Dense`.
    """
    if style == "ho":
        # Glorot's fan_out counts one of the fused layers, not all.
        scale = 1e-10 if zero else (1 + fused) / 2
        kernel = nn.initializers.variance_scaling(scale, "fan_avg", "uniform")
        return {"kernel_init": kernel, "bias_init": nn.initializers.zeros}
    if zero and style == "openai":
        zeros = nn.initializers.zeros
        return {"kernel_init": zeros, "bias_init": zeros}
    bound = fan_in**-0.5

    def bias(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return {"kernel_init": kernel, "bias_init": bias}


IMPLEMENTATIONS = ("xla", "cudnn")  # of jax.nn.dot_product_attention
DTYPES = ("float32", "bfloat16", "float16", "float64")
MAX_CHANNELS = 65_536  # of any layer: larger numbers are mistakes, not networks
MAX_LEVELS = 16

# Fields of networks that are integers, the least and the largest.
SIZES = (
    ("channels", 4, MAX_CHANNELS),  # the time embedding needs four
    ("out_channels", 1, MAX_CHANNELS),
    *(("num_res_blocks", 0, 1000), ("depth", 1, 1000)),
    ("num_groups", 1, MAX_CHANNELS),
    ("num_heads", 1, MAX_CHANNELS),
    ("head_channels", 1, MAX_CHANNELS),
    ("head_dim", 1, MAX_CHANNELS),
    ("num_memory", 0, MAX_CHANNELS),
    ("expansion", 1, 1000),
    *(("block_size", 1, 1000), ("patch_size", 1, 1000)),
    ("num_classes", 1, 2**24),
    *((name, 0, MAX_CHANNELS) for name in ("cond_dim", "token_dim")),
    ("num_labels", 1, 2**24),
)

# From this many values on (1 MiB), computing a norm again in the backward pass is
# cheaper than keeping its intermediate results.
MIN_RECOMPUTED = 2**18


class Layers(nn.Module):
    """Base class of the blocks of `UNet`: makes their layers, has none itself.

    Attributes:
        init_style: "openai", "ho" or "torch", see `layer_init`.
        num_groups: number of groups of every group norm.
        norm_epsilon: added to the variance in every norm.
        dtype: dtype of convolutions and attention; all else is float32.
    """

    init_style: str = "openai"
    num_groups: int = 32
    norm_epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    def conv(
        self,
        x: Float[Array, "b *d c"],
        features: int,
        *,
        name: str,
        stride: int = 1,
        padding: tuple[int, int] = (1, 1),
        zero: bool = False,
        dtype: Any = None,
        double: bool = False,
    ) -> Float[Array, "b *d_out c_out"]:
        """Convolves with a kernel of size 3 along every spatial axis.

        Args:
            x: images [b, *spatial, c].
            features: number of output channels.
            name: name of the layer.
            stride: 1, or 2 to halve the image.
            padding: pixels before and after each spatial axis.
            zero: whether the output vanishes at initialization.
            dtype: dtype of the computation; by default the block's.
            double: whether the image is doubled (`repeat`) before.
        """
        n, convolve = x.ndim - 2, None
        if double and n == 2:
            convolve = cpu_convs.conv_of_doubled
        elif double:
            x = repeat(x)
        init = layer_init(self.init_style, 3**n * x.shape[-1], zero=zero)
        return nn.Conv(
            features,
            (3,) * n,
            strides=scales(n) if stride == 2 else 1,
            padding=(padding,) * n,
            dtype=dtype or self.dtype,
            conv_general_dilated=convolve,
            name=name,
            **init,
        )(x)

    def dense(self, x, features, *, name, dtype=jnp.float32, **init_options):
        """Applies a linear layer to the last axis: a 1 x 1 convolution of images."""
        init = layer_init(self.init_style, x.shape[-1], **init_options)
        return nn.Dense(features, dtype=dtype, name=name, **init)(x)

    def norm(self, x, *, name, scale=None, shift=None, silu=False):
        """Applies `GroupNorm`, with a scale and a shift [b, c] if they are given."""
        norm = GroupNorm(self.num_groups, self.norm_epsilon, silu, name=name)
        return norm(x, scale, shift)


class GroupNorm(nn.Module):
    """Group norm (Wu & He 2018) in float32, then scale and shift, then perhaps a SiLU.

    Means over pixels are taken first, channel by channel, because channels are
    contiguous in memory; only these [b, c] means are averaged over groups. Everything
    after that is elementwise. For large images the backward pass computes it again from
    the means, which is cheaper than to write it to memory and to read it back.

    Args of the call: x [b, *spatial, c]; scale and shift float32 [b, c] or None: the
    output is y (1 + scale) + shift. Returns float32 [b, *spatial, c].

    Attributes:
        num_groups: number of groups; it divides the channels.
        epsilon: added to the variance.
        silu: whether a SiLU follows.
    """

    num_groups: int
    epsilon: float
    silu: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *d c"],
        scale: Float[Array, "b c"] | None = None,
        shift: Float[Array, "b c"] | None = None,
    ) -> Float[Array, "b *d c"]:
        gain = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        normalize = self._normalize
        if x.size >= MIN_RECOMPUTED:
            policy = jax.checkpoint_policies.save_only_these_names("rows")
            normalize = jax.checkpoint(normalize, policy=policy)
        return normalize(x, gain[None], bias[None], scale, shift)

    def _normalize(self, x, gain, bias, scale, shift):
        b, c, pixels = x.shape[0], x.shape[-1], tuple(range(1, x.ndim - 1))

        def group_means(means):  # of channels -> of each channel's group, [b, c]
            groups = means.reshape(b, self.num_groups, c // self.num_groups)
            means = jnp.mean(groups, axis=-1, keepdims=True)
            return jnp.broadcast_to(means, groups.shape).reshape(b, c)

        def everywhere(row):  # [b, c] -> [b, 1, ..., c]
            return jnp.expand_dims(row, pixels)

        x = x.astype(jnp.float32)
        mean = checkpoint_name(group_means(jnp.mean(x, axis=pixels)), "rows")
        x = x - everywhere(mean)
        # Of the centered values, as in PyTorch: E[x^2] - E[x]^2 would cancel.
        variance = checkpoint_name(group_means(jnp.mean(x**2, axis=pixels)), "rows")
        gain = gain * lax.rsqrt(variance + self.epsilon)
        if scale is not None:
            gain, bias = gain * (1 + scale), bias * (1 + scale)
        if shift is not None:
            bias = bias + shift
        y = x * everywhere(gain) + everywhere(jnp.broadcast_to(bias, (b, c)))
        return nn.silu(y) if self.silu else y


def check_sizes(network: Any) -> None:
    """Checks the fields that networks share, by name, as far as they have them.

    Args:
        network: a whole network.

    Raises:
        ValueError: that begins with the name of the field.
    """
    for name, least, most in SIZES:
        value = getattr(network, name, None)
        if value is not None:
            checks.integer(name, value, at_least=least, at_most=most)
    if hasattr(network, "dropout"):
        checks.number("dropout", network.dropout, at_least=0, below=1)
    if hasattr(network, "norm_epsilon"):
        checks.number("norm_epsilon", network.norm_epsilon, above=0)
    multipliers = getattr(network, "multipliers", (1,))
    if not 1 <= len(multipliers) <= MAX_LEVELS:
        raise ValueError(
            f"multipliers must be 1 to {MAX_LEVELS} numbers, got {multipliers}."
        )
    for factor in multipliers:
        checks.number("multipliers", factor, above=0, at_most=MAX_CHANNELS)
    widest = max(multipliers) * network.channels
    if widest > MAX_CHANNELS:
        raise ValueError(
            f"multipliers of channels = {network.channels} must make at most "
            f"{MAX_CHANNELS} channels, got {widest:.0f}."
        )
    try:
        known = jnp.dtype(network.dtype).name in DTYPES
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"dtype must be one of {DTYPES}, got {network.dtype!r}.")
    implementation = getattr(network, "attention_implementation", None)
    if implementation is not None:
        checks.choice("attention_implementation", implementation, IMPLEMENTATIONS)
    halves = (jnp.bfloat16, jnp.float16)
    if implementation == "cudnn" and jnp.dtype(network.dtype) not in halves:
        raise ValueError(
            "attention_implementation may be 'cudnn' with dtype bfloat16 or float16 "
            f"only, got dtype {jnp.dtype(network.dtype).name}."
        )


def check_inputs(x: Any, timesteps: Any, halvings: int) -> None:
    """Raises ValueError unless x are images that fit a network, with timesteps [b]."""
    checks.data("x", x, ("b", ...))
    checks.array("timesteps", timesteps, "any", x.shape[:1])
    check_halvings(x, halvings)


def check_halvings(x: Float[Array, "b *d c"], halvings: int) -> None:
    """Raises ValueError unless images can be halved `halvings` times.

    Args:
        x: images [b, *spatial, c].
        halvings: number of times that the resampled axes are halved.
    """
    if x.ndim < 3:
        raise ValueError(
            "x must have an axis of length, or of height and width, between batch and "
            f"channels, got shape {x.shape}."
        )
    resampled = x.shape[-3:-1] if x.ndim > 3 else x.shape[1:2]
    if any(size % 2**halvings for size in resampled):
        found = " x ".join(map(str, resampled))
        data = ("sequence", "image", "video")[min(x.ndim, 5) - 3]
        sizes = "length" if x.ndim == 3 else "height and width"
        raise ValueError(
            f"multipliers must fit the {data}: its {sizes} must be divisible by "
            f"{2**halvings} to be halved {halvings} times, got {found}."
        )


def timestep_embedding(
    t: Float[Array, "b"],
    dim: int,
    *,
    max_period: float = 10_000.0,
    order: str = "cos_sin",
    endpoint: bool = False,
) -> Float[Array, "b dim"]:
    """Returns sinusoids of t at frequencies from 1 down to 1 / max_period.

    Args:
        t: timesteps [b], fractions allowed.
        dim: number of columns; if odd, the last column is zero.
        max_period: the lowest frequency is 1 / max_period.
        order: which half comes first: "cos_sin" (OpenAI), "sin_cos" (Ho et al., DDIM).
        endpoint: whether the lowest frequency itself is included (Ho et al., DDIM).
            OpenAI's code stops one frequency above it.

    Returns:
        float32 [b, dim].
    """
    half = dim // 2
    exponents = np.arange(half) / (half - 1 if endpoint else half)
    freqs = jnp.asarray(np.exp(-np.log(max_period) * exponents), jnp.float32)
    angles = t.astype(jnp.float32)[:, None] * freqs[None, :]
    waves = [jnp.cos(angles), jnp.sin(angles)]
    if order == "sin_cos":
        waves.reverse()
    return jnp.pad(jnp.concatenate(waves, axis=-1), ((0, 0), (0, dim % 2)))
