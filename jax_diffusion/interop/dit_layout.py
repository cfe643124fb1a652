"""Names and shapes of facebookresearch/DiT, beside those of our `DiT`.

Its state dicts also hold the fixed embedding of positions, which is no parameter here:
it is checked when they are read, and made when they are written.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from jax_diffusion.interop.layouts import Leaf, check_same, from_torch, to_torch
from jax_diffusion.interop.tensors import as_float32
from jax_diffusion.models.dit import DiT, positions

NAME = "dit"  # of the layout
POSITIONS = "pos_embed"

# Our layers, and those in a block -> theirs.
PLACES = {
    "patches": "x_embedder.proj",
    "time_0": "t_embedder.mlp.0",
    "time_1": "t_embedder.mlp.2",
    "label": "y_embedder.embedding_table",
    "out_modulation": "final_layer.adaLN_modulation.1",
    "out": "final_layer.linear",
}
IN_BLOCK = {
    "modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "out": "attn.proj",
    "mlp_0": "mlp.fc1",
    "mlp_1": "mlp.fc2",
}


def leaves(params: PyTree) -> list[Leaf]:
    """Lists the tensors in which a DiT is stored there, but for its positions.

    Args:
        params: parameters of a `DiT`, or a tree of `jax.ShapeDtypeStruct`.

    Raises:
        ValueError: for a layer that the official network does not have.
    """
    found = []
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    for path, array in flat.items():
        module, *layer, kind = path
        stem = PLACES.get(module)
        if layer:
            number = module.removeprefix("block_")
            stem = f"blocks.{number}.{IN_BLOCK[layer[0]]}"
        if stem is None:
            raise ValueError(
                f"layout {NAME!r} must have a place for every layer, got "
                f"{'.'.join(path)}, for which it has none."
            )
        shape = theirs = tuple(array.shape)
        if kind == "kernel":
            theirs = (shape[-1], shape[-2], *shape[:-2])
        name = f"{stem}.{'bias' if kind == 'bias' else 'weight'}"
        found.append(Leaf(path, shape, [name], theirs, None))
    return found


def from_dit(
    tensors: Mapping[str, Any],
    model: Any,
    shapes: PyTree,
    image_shape: tuple[int, ...],
    *,
    allow_nonfinite: bool = False,
) -> PyTree:
    """Makes parameters of a `DiT` of an official state dict, in float32.

    Args:
        tensors: arrays, or tensors in a file, by the official names.
        model: the network that a config describes.
        shapes: shapes of our parameters, a tree of `jax.ShapeDtypeStruct`.
        image_shape: (h, w, c).
        allow_nonfinite: whether weights may be NaN or infinite.

    Returns:
        A tree of NumPy arrays.

    Raises:
        ValueError: if tensors are missing, unexpected, of another shape, not of floats
            or not finite; if positions are not the fixed ones; or if the network is
            another.
    """
    if not isinstance(model, DiT):
        raise ValueError(
            "config.model.name must be 'dit' to read tensors that are named as DiT's, "
            f"got {type(model).__name__}."
        )
    wanted, fixed = leaves(shapes), position_embedding(model, image_shape)
    theirs = {name: leaf.their_shape for leaf in wanted for name in leaf.names}
    got = {name: np.shape(array) for name, array in tensors.items()}
    check_same({POSITIONS: fixed.shape} | theirs, got)
    given = as_float32(POSITIONS, tensors[POSITIONS])
    # Half precision rounds by 2^-9 at most.
    if (error := np.abs(given - fixed).max()) > 0.004:
        raise ValueError(
            f"{POSITIONS} must be the fixed sinusoids of columns and rows, got numbers "
            f"that are off by {error:.3g}."
        )
    rest = {name: tensor for name, tensor in tensors.items() if name != POSITIONS}
    return from_torch(rest, wanted, allow_nonfinite=allow_nonfinite)


def to_dit(
    params: PyTree, model: DiT, image_shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Makes an official state dict of our parameters: the inverse of `from_dit`.

    Args:
        params: parameters of a `DiT`.
        model: the network.
        image_shape: (h, w, c).

    Returns:
        float32 arrays by the official names.
    """
    tensors = to_torch(params, leaves(params))
    return {POSITIONS: position_embedding(model, image_shape)} | tensors


def position_embedding(model: DiT, image_shape: tuple[int, ...]) -> np.ndarray:
    """Returns the fixed embedding of the patches of an image, float32 [1, n, c]."""
    height, width = (size // model.patch_size for size in image_shape[:2])
    return positions(height, width, model.channels)[None]
