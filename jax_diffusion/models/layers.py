"""What the networks share: how their layers are made, initialised and resampled.

Images are [b, *spatial, c] with one, two or three spatial axes. Of three, the first is
not resampled (guided-diffusion's video networks).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
        convolve: Callable[..., Array] | None = None,
    ) -> Float[Array, "b *d_out c_out"]:
        """A convolution of size 3 over every spatial axis, padded symmetrically.

        `convolve` computes it in another way than XLA's own convolution.
        """
        n = x.ndim - 2
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
