"""32-bit digests of arrays, which do not depend on how an array is sharded."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jax_diffusion.runtime.files import leaves_by_name


def digests(tree: PyTree) -> dict[str, int]:
    """Computes 32 bits for each leaf, by its path, to find changed bits.

    Each word of the leaf is mixed with its place, and all are added mod 2^32. So the
    digest is the same however the leaf is sharded, and in NumPy and JAX, while a change
    of any one bit changes it.
    """
    named = leaves_by_name(tree)
    in_memory = jax.default_backend() == "cpu" and jax.process_count() == 1
    if in_memory or not any(isinstance(a, jax.Array) for a in named.values()):
        with np.errstate(over="ignore"):  # wrapping around is meant
            return {name: int(_digest(np.asarray(a), np)) for name, a in named.items()}
    return {name: int(d) for name, d in jax.device_get(_digests(named)).items()}


@jax.jit
def _digests(named):
    return {name: _digest(a, jnp) for name, a in named.items()}


def _digest(a, xp):
    words = a.reshape(-1) if a.ndim == 0 else a
    if words.dtype.itemsize != 4 or words.dtype == bool:
        words = words.astype(xp.float32)  # of two bytes or one: exact
    words = words.view(xp.uint32)
    place = xp.zeros((), xp.uint32)
    for axis, size in enumerate(words.shape):
        shape = [1] * words.ndim
        shape[axis] = size
        place = place * xp.uint32(size) + xp.arange(size, dtype=xp.uint32).reshape(
            shape
        )
    words = words ^ (place * xp.uint32(0x9E3779B1) + xp.uint32(0x7F4A7C15))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # murmur3's finish
        words = (words ^ (words >> xp.uint32(shift))) * xp.uint32(factor)
    return xp.sum(words ^ (words >> xp.uint32(16)), dtype=xp.uint32)
