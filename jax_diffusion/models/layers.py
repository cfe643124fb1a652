"""What the networks share: how their layers are made, initialised and resampled.

Images are [b, *spatial, c] with one, two or three spatial axes. Of three, the first is
not resampled (guided-diffusion's video networks).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jax_diffusion.models.cpu_convs import conv_of_doubled


def layer_init(
    style: str, fan_in: int, *, zero: bool = False, fused: int = 1
) -> dict[str, Any]:
    """Initialisers of one linear or convolutional layer.

    Args:
        style: "torch": uniform up to 1 / sqrt(fan_in), biases too, as the DDIM
            repository; "openai": the same, but exact zeros where `zero`; "ho": Glorot
            uniform, zero biases, a variance of 1e-10 where `zero`.
        zero: for a layer whose output should vanish at first.
        fused: how many layers of equal size the kernel holds side by side.
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


# So many numbers, a MiB of them, are cheaper to norm again in the backward pass than to
# keep with all that the gradient needs.
MIN_RECOMPUTED = 2**18


class Layers(nn.Module):
    """What every block shares: how its layers are made. Has no parameters itself."""

    init_style: str = "openai"
    num_groups: int = 32
    norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32

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
        """A convolution of size 3 over every spatial axis, padded symmetrically; with
        `double`, of images doubled before."""
        n, convolve = x.ndim - 2, None
        if double and n == 2 and jax.default_backend() == "cpu":
            convolve = conv_of_doubled
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
        """A linear layer over the last axis: of images, a convolution of size 1."""
        init = layer_init(self.init_style, x.shape[-1], **init_options)
        return nn.Dense(features, dtype=dtype, name=name, **init)(x)

    def norm(self, x, *, name, scale=None, shift=None, silu=False):
        """Group norm, times 1 + scale and plus shift if those [b, c] are given, and a
        SiLU after it if asked for."""
        norm = GroupNorm(self.num_groups, self.norm_epsilon, silu, name=name)
        return norm(x, scale, shift)


class GroupNorm(nn.Module):
    """Group norm in float32 whatever comes in (Wu & He 2018), and a SiLU after it.

    Sums over pixels come first, channel by channel, as they lie in memory side by side;
    groups are made of the few numbers that are left. All that follows is elementwise,
    and the backward pass computes it again from those numbers: that costs less than to
    write it to memory and to read it back.
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
        normalise = self._normalise
        if x.size >= MIN_RECOMPUTED:
            policy = jax.checkpoint_policies.save_only_these_names("rows")
            normalise = jax.checkpoint(normalise, policy=policy)
        return normalise(x, gain[None], bias[None], scale, shift)

    def _normalise(self, x, gain, bias, scale, shift):
        b, c, pixels = x.shape[0], x.shape[-1], tuple(range(1, x.ndim - 1))

        def of_group(means):  # [b, c], the mean of each channel's group
            groups = means.reshape(b, self.num_groups, c // self.num_groups)
            means = jnp.mean(groups, axis=-1, keepdims=True)
            return jnp.broadcast_to(means, groups.shape).reshape(b, c)

        def everywhere(row):  # [b, c] -> [b, 1, ..., c]
            return jnp.expand_dims(row, pixels)

        x = x.astype(jnp.float32)
        mean = checkpoint_name(of_group(jnp.mean(x, axis=pixels)), "rows")
        x = x - everywhere(mean)
        # Of the centred values, as PyTorch does: E[x^2] - E[x]^2 would cancel.
        variance = checkpoint_name(of_group(jnp.mean(x**2, axis=pixels)), "rows")
        gain = gain * lax.rsqrt(variance + self.epsilon)
        if scale is not None:
            gain, bias = gain * (1 + scale), bias * (1 + scale)
        if shift is not None:
            bias = bias + shift
        y = x * everywhere(gain) + everywhere(jnp.broadcast_to(bias, (b, c)))
        return nn.silu(y) if self.silu else y


def check_halvings(x: Float[Array, "b *d c"], halvings: int) -> None:
    """Raises ValueError unless the axes that are resampled can be halved so often."""
    resampled = x.shape[-3:-1] if x.ndim > 3 else x.shape[1:2]
    if any(size % 2**halvings for size in resampled):
        raise ValueError(
            f"height and width must be divisible by {2**halvings} to be halved "
            f"{halvings} times, got {' x '.join(map(str, resampled))}."
        )


def scales(num_axes: int) -> tuple[int, ...]:
    """By how much each of one, two or three spatial axes is resampled."""
    return (1, 2, 2) if num_axes == 3 else (2,) * num_axes


def pool(x: Float[Array, "b *d c"]) -> Float[Array, "b *d_out c"]:
    """Halves by averaging."""
    factors = scales(x.ndim - 2)
    return nn.avg_pool(x, factors, factors)


def repeat(x: Float[Array, "b *d c"]) -> Float[Array, "b *d_out c"]:
    """Doubles by repeating, which is nearest-neighbour interpolation."""
    for axis, factor in enumerate(scales(x.ndim - 2), start=1):
        x = jnp.repeat(x, factor, axis=axis) if factor > 1 else x
    return x


def timestep_embedding(
    t: Float[Array, "b"],
    dim: int,
    *,
    max_period: float = 10_000.0,
    order: str = "cos_sin",
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


gelu = functools.partial(nn.gelu, approximate=False)


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
