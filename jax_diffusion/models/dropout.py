"""Dropout that also runs on meshes with Explicit axes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jax_diffusion.checks import placement


class Dropout(nn.Module):
    """`nn.Dropout`, whose mask lies on devices as the images do.

    Attributes:
        rate: of what is dropped, in [0, 1).
        deterministic: whether nothing is dropped.
    """

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.deterministic or self.rate == 0:
            return x
        kept = 1 - self.rate
        mask = jax.random.bernoulli(
            self.make_rng("dropout"), jnp.float32(kept), x.shape
        )
        mask = placement.beside(mask, x)
        return lax.select(mask, x / kept, jnp.zeros_like(x))
