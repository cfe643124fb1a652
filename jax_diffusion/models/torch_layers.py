"""Layers that start as PyTorch's do, for networks from short PyTorch codes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jax_diffusion.checks import placement
from jax_diffusion.models import cpu_convs
from jax_diffusion.models.attention import full_attention
from jax_diffusion.models.layers import GroupNorm, layer_init, timestep_embedding

gelu = functools.partial(nn.gelu, approximate=False)


class TorchLayers(nn.Module):
    """Base class of blocks whose layers start as PyTorch's do; has no layers itself.

    Attributes:
        dtype: dtype of convolutions and attention; all else is float32.
    """

    dtype: DTypeLike = jnp.float32

    def conv(self, x, features, *, name, size=3, stride=1, padding=None, bias=True):
        """Convolves with a `size` x `size` kernel, by default padded symmetrically."""
        init = layer_init("torch", size * size * x.shape[-1])
        padding = size // 2 if padding is None else padding
        pointwise = size == stride == 1 and padding == 0
        return nn.Conv(
            features,
            (size, size),
            strides=stride,
            padding=(padding, padding),
            use_bias=bias,
            dtype=self.dtype,
            conv_general_dilated=cpu_convs.pointwise_conv if pointwise else None,
            name=name,
            **init,
        )(x)

    def dense(self, x, features, *, name):
        """Applies a linear layer in float32."""
        return nn.Dense(features, name=name, **layer_init("torch", x.shape[-1]))(x)

    def norm(self, x, *, name, num_groups=1):
        """Applies group norm in float32, with the variance of centered values."""
        return GroupNorm(num_groups, 1e-5, name=name)(x)

    def embed(self, timesteps, channels):
        """Embeds timesteps [b] as float32 [b, 4 channels]: sinusoids and an MLP."""
        emb = timestep_embedding(timesteps, channels, order="sin_cos", endpoint=True)
        emb = gelu(self.dense(emb, 4 * channels, name="time_0"))
        return self.dense(emb, 4 * channels, name="time_1")


class Projections(nn.Module):
    """Queries, keys and values of every pixel, for each head.

    The kernel is that of one 1x1 convolution without bias. Its parts are multiplied one
    by one: so the backward pass need not put their gradients together.

    Args of the call: x [b, h, w, c]. Returns three of [b, h * w, num_heads, head_dim].

    Attributes:
        num_heads: number of attention heads.
        head_dim: channels of each head.
        dtype: dtype of the computation.
    """

    num_heads: int
    head_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> list[Array]:
        b, height, width, c = x.shape
        init = layer_init("torch", c)["kernel_init"]
        shape = (1, 1, c, 3 * self.num_heads * self.head_dim)
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        x = x.astype(self.dtype)
        out = (b, height * width, self.num_heads, self.head_dim)
        return [
            placement.reshape(cpu_convs.pointwise_conv(x, part), out)
            for part in jnp.split(kernel, 3, axis=-1)
        ]


def attend(q, k, v, *, linear, implementation):
    """Applies `linear_attention`, or `full_attention` by that implementation."""
    if linear:
        return linear_attention(q, k, v)
    return full_attention(q, k, v, implementation=implementation)


def linear_attention(
    q: Float[Array, "b n head d"],
    k: Float[Array, "b m head d"],
    v: Float[Array, "b m head e"],
) -> Float[Array, "b n head e"]:
    """Computes softmax(q) (softmax(k)^T v) / sqrt(d), in time linear in the pixels.

    The softmax of q is over d, that of k over the pixels (Shen et al. 2018).

    Args:
        q: queries of n pixels, [b, n, head, d].
        k: keys of m pixels, [b, m, head, d].
        v: values of m pixels, [b, m, head, e].

    Returns:
        [b, n, head, e].
    """
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    # With heads before pixels, products of matrices need no further transposition.
    q, k, v = (jnp.moveaxis(a, 1, 2) for a in (q, k, v))
    q = scale * jax.nn.softmax(q.astype(jnp.float32), axis=-1)
    k = jax.nn.softmax(k.astype(jnp.float32), axis=2)
    context = jnp.einsum("bhmd,bhme->bhde", k.astype(dtype), v)
    return jnp.moveaxis(jnp.einsum("bhnd,bhde->bhne", q.astype(dtype), context), 1, 2)
