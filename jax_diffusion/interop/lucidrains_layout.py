"""Names and shapes of lucidrains' U-Net, denoising-diffusion-pytorch 2, beside ours.

Its tensors differ from ours in more than their order: gains of norms have two axes of
size 1 on each side, and learned keys and values are ordered in two ways.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from jax_diffusion.interop.layouts import check_same
from jax_diffusion.interop.tensors import as_float32
from jax_diffusion.models.lucidrains import LucidrainsUNet

NAME = "lucidrains"  # of the layout

# Our layers in a residual block, and in attention -> theirs.
BLOCK = {
    "conv_in": "block1.proj",
    "norm_in": "block1.norm",
    "conv_out": "block2.proj",
    "norm_out": "block2.norm",
    "emb": "mlp.1",
    "skip": "res_conv",
}
ATTENTION = {"norm": "norm", "qkv": "to_qkv"}
LEAVES = {"kernel": "weight", "bias": "bias", "scale": "g"}


def names(params: PyTree) -> dict[tuple[str, ...], str]:
    """Returns the name of the tensor that holds each of our parameters.

    Args:
        params: parameters of a `LucidrainsUNet`, or their shapes.

    Returns:
        Their names by the path in our tree.
    """
    levels = 1 + max(int(n.split("_")[1]) for n in params if n.startswith("down_"))
    places = {
        "conv_in": "init_conv",
        "time_0": "time_mlp.1",
        "time_1": "time_mlp.3",
        "mid_0": "mid_block1",
        "mid_attention": "mid_attn",
        "mid_1": "mid_block2",
        "block_out": "final_res_block",
        "conv_out": "final_conv",
    }
    for level in range(levels):
        for way, stage in (("down", level), ("up", levels - 1 - level)):
            stem = f"{way}s.{stage}"
            for part, name in enumerate(("0", "1", "attention")):
                places[f"{way}_{level}_{name}"] = f"{stem}.{part}"
        places[f"down_{level}_halve"] = f"downs.{level}.3.1"
        places[f"down_{level}_widen"] = f"downs.{level}.3"
        places[f"up_{level}_double"] = f"ups.{levels - 1 - level}.3.1"
        places[f"up_{level}_narrow"] = f"ups.{levels - 1 - level}.3"
    found: dict[tuple[str, ...], str] = {}
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    for path in flat:
        module, *inside, kind = path
        stem, leaf = places[module], LEAVES.get(kind, "")
        if kind == "memory":
            stem, leaf = f"{stem}.mem_kv", ""
        elif module.endswith("attention"):
            linear = "norm_out" in params[module]  # then to_out is two layers
            outer = {"out": "to_out.0" if linear else "to_out", "norm_out": "to_out.1"}
            stem = f"{stem}.{(ATTENTION | outer)[inside[0]]}"
        elif inside:
            stem = f"{stem}.{BLOCK[inside[0]]}"
        found[path] = f"{stem}.{leaf}".rstrip(".")
    return found


def from_lucidrains(
    tensors: Mapping[str, Any],
    model: Any,
    shapes: PyTree,
    *,
    allow_nonfinite: bool = False,
) -> PyTree:
    """Makes parameters of a `LucidrainsUNet` of a state dict, in float32.

    Args:
        tensors: arrays, or tensors in a file, by lucidrains' names.
        model: the network that a config describes.
        shapes: shapes of our parameters, a tree of `jax.ShapeDtypeStruct`.
        allow_nonfinite: whether weights may be NaN or infinite.

    Returns:
        A tree of NumPy arrays.

    Raises:
        ValueError: if tensors are missing, unexpected, of another shape, not of floats,
            or not finite; or if the network is another.
    """
    if not isinstance(model, LucidrainsUNet):
        raise ValueError(
            "config.model.name must be 'lucidrains' to read tensors that are named as "
            f"lucidrains', got {type(model).__name__}."
        )
    where = names(shapes)
    flat: dict[tuple[str, ...], Any] = flatten_dict(shapes)
    orders = {path: _order(path, leaf.ndim, shapes) for path, leaf in flat.items()}
    wanted = {}
    for path, leaf in flat.items():
        theirs = tuple(leaf.shape[axis] for axis in orders[path])
        wanted[where[path]] = (1, *theirs, 1, 1) if path[-1] == "scale" else theirs
    check_same(wanted, {name: np.shape(array) for name, array in tensors.items()})
    ours: dict[tuple[str, ...], np.ndarray] = {}
    for path, name in where.items():
        array = as_float32(name, tensors[name], allow_nonfinite=allow_nonfinite)
        if path[-1] == "scale":
            array = array.reshape(-1)
        array = np.transpose(array, np.argsort(orders[path]))
        ours[path] = np.ascontiguousarray(array)
    return unflatten_dict(ours)


def _order(path: tuple[str, ...], ndim: int, shapes: PyTree) -> tuple[int, ...]:
    """Returns our axes of a parameter in the order of theirs."""
    axes = tuple(range(ndim))
    if path[-1] == "memory":  # ours: [k or v, number, head, channel]
        linear = "norm_out" in shapes[path[0]]
        return (0, 2, 3, 1) if linear else (0, 2, 1, 3)
    if path[-1] == "kernel":
        return (*axes[-1:], *axes[-2:-1], *axes[:-2])
    return axes
