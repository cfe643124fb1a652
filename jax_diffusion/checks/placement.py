"""Where the axis of images lies on devices, for meshes with Explicit axes.

On such a mesh, the default of `jax.make_mesh`, the type of an array says which of its
axes is split over devices, and JAX refuses an operation of which it cannot tell how the
result shall lie. The answer is always the same here: a batch [b, ...] is split along
its first axis, and whatever is computed of it stays with it. Elsewhere, on one device
or on meshes with Auto axes, these functions are the plain operations.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree


def of_batch(x: Any, ndim: int) -> NamedSharding | None:
    """Returns the sharding of an array [b, ...] of rank `ndim` that lies as x does.

    None if the first axis of x [b, ...] is not known to be split over an Explicit mesh.

    >>> of_batch(jnp.ones((2, 3)), 2) is None
    True
    """
    sharding = jax.typeof(x).sharding
    if not jnp.ndim(x) or sharding.spec[0] is None:
        return None
    spec = PartitionSpec(sharding.spec[0], *[None] * (ndim - 1))
    return NamedSharding(sharding.mesh, spec)


def beside(value: Any, x: Any) -> Array:
    """Returns `value` [b, ...], lying on devices as x [b, ...] does.

    >>> beside(jnp.arange(2), jnp.ones((2, 3)))
    Array([0, 1], dtype=int32)
    """
    wanted, now = of_batch(x, jnp.ndim(value)), jax.typeof(value).sharding
    if wanted is None or now.spec == wanted.spec:
        return value
    if isinstance(x, Tracer) or isinstance(value, Tracer):
        return jax.sharding.reshard(value, wanted)
    return jax.device_put(value, x.sharding.update(spec=wanted.spec))


def rows(table: Any, index: Any, mode: str = "clip") -> Array:
    """Returns the rows of a table [n, ...] that `index`, int [b], names: [b, ...].

    `mode` is that of `jnp.take`: what becomes of an index out of range.

    >>> rows(jnp.array([5.0, 6.0]), jnp.array([1, 1, 0])).tolist()
    [6.0, 6.0, 5.0]
    """
    sharding = of_batch(index, jnp.ndim(index) + jnp.ndim(table) - 1)
    if sharding is None:
        return jnp.take(table, index, axis=0, mode=mode)
    at = jnp.asarray(table).at[index]
    return at.get(mode=mode, out_sharding=sharding, wrap_negative_indices=False)


def reshape(x: Any, shape: tuple[int, ...]) -> Array:
    """Returns x [b, ...] in another shape [b, ...]; the first axis stays as it lies.

    >>> reshape(jnp.ones((2, 3, 4)), (2, 12)).shape
    (2, 12)
    """
    return jnp.reshape(x, shape, out_sharding=of_batch(x, len(shape)))


def everywhere(tree: PyTree) -> PyTree:
    """Returns arrays of which every device holds all, for work that is not split.

    >>> everywhere((jnp.arange(2), jnp.arange(3)))
    (Array([0, 1], dtype=int32), Array([0, 1, 2], dtype=int32))
    """

    def gather(a):
        sharding = jax.typeof(a).sharding
        if all(axis is None for axis in sharding.spec):
            return a
        return jax.sharding.reshard(a, NamedSharding(sharding.mesh, PartitionSpec()))

    return jax.tree.map(gather, tree)


def on_mesh(tree: PyTree, x: Any) -> PyTree:
    """Returns arrays on the mesh of x [b, ...]; those without one are copied to it.

    JAX cannot differentiate by a parameter that is on no mesh if images are on one.

    >>> on_mesh({"w": jnp.arange(2)}, jnp.ones((2, 3)))
    {'w': Array([0, 1], dtype=int32)}
    """
    sharding = of_batch(x, 1)
    if sharding is None:
        return tree
    whole = NamedSharding(sharding.mesh, PartitionSpec())

    def put(a):
        on_none = jax.typeof(a).sharding.mesh.empty
        return jax.sharding.reshard(a, whole) if on_none else a

    return jax.tree.map(put, tree)
