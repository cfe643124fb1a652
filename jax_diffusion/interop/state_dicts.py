"""Finds the network in a checkpoint, however its trainer has wrapped it.

A file may hold a state dict, or a dict or list with one, beside an optimizer and others
of its kind. An average of the parameters is preferred. Wrappers give tensors a prefix,
such as `module.` or `ema_model.model.`: it is found by the first layer of the time
embedding, which every layout names in its own way.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax_diffusion.interop import file_kinds
from jax_diffusion.interop.safetensors_files import read_safetensors
from jax_diffusion.interop.tensors import Tensor, check_sizes
from jax_diffusion.interop.torch_files import read_torch

# Names under which trainers keep the network, averages first.
STATE_DICTS = (
    *("ema", "ema_model", "model_ema", "ema_state_dict", "ema_params", "averaged"),
    *("state_dict", "model", "model_state_dict", "module", "net", "network", "unet"),
)
# A tensor that every network of a layout has -> the layout.
ANCHORS = {
    "time_embed.0.weight": "openai",
    "temb.dense.0.weight": "ddpm",
    "time_embedding.linear_1.weight": "diffusers",
    "init_conv.weight": "lucidrains",
}


class StateDict(NamedTuple):
    """The tensors of one network.

    Attributes:
        tensors: by name, without the prefixes of wrappers.
        layout: how they are named, a key of `layouts.LAYOUTS`; None if that is unknown.
        metadata: strings of a .safetensors file.
    """

    tensors: dict[str, Tensor]
    layout: str | None
    metadata: dict[str, str]


def read_state_dict(path: Path, *, ignore_objects: bool = False) -> StateDict:
    """Reads the network in a file, its average if the file holds several.

    Args:
        path: a .safetensors file or a file of PyTorch, whatever its name ends in.
        ignore_objects: see `torch_files.read_torch`.

    Returns:
        The state dict; no number has been read yet.

    Raises:
        ValueError: if the file is damaged or holds no state dict.
    """
    metadata: dict[str, str] = {}
    named = path.suffix == ".safetensors" and not file_kinds.is_torch(path)
    if named or file_kinds.is_safetensors(path):
        tree, metadata = read_safetensors(path)
    else:
        tree = read_torch(path, ignore_objects=ignore_objects)
    tensors = _find(tree)
    if tensors is None:
        kind = "dict" if isinstance(tree, Mapping) else type(tree).__name__
        raise ValueError(f"{path} must hold tensors by name, got a {kind} of others.")
    if not all(name.isprintable() for name in tensors):
        raise ValueError(f"{path} must have printable names, got one that is not.")
    found, layout, left = unwrap(tensors)
    if left:
        warnings.warn(
            f"{path}: {len(found)} tensors of the network are read, and {len(left)} "
            f"others are left out, such as {left[0]!r}.",
            stacklevel=2,
        )
    check_sizes(found, path, path.stat().st_size)
    return StateDict(found, layout, metadata)


def _find(tree: Any) -> dict[str, Tensor] | None:
    """Returns the tensors of the state dict in a tree; None if there is none."""
    if isinstance(tree, list):  # the DDIM repository: model, optimizer, ..., EMA
        found = [_find(item) for item in tree if isinstance(item, Mapping)]
        return next((item for item in reversed(found) if item is not None), None)
    if not isinstance(tree, Mapping):
        return None
    for name in STATE_DICTS:
        inside = _find(tree.get(name))
        if inside is not None:
            return inside
    tensors = {
        name: tensor
        for name, tensor in tree.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    return tensors or None


def unwrap(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], str | None, list[str]]:
    """Removes the prefixes that wrappers give to the tensors of a network.

    Args:
        tensors: a state dict.

    Returns:
        The tensors of the network, an average if there are several; their layout, or
        None if it is unknown, and then only the prefix `module.` is removed; and the
        names of the tensors that are left out.
    """
    prefixes = {}
    for name in tensors:
        for anchor, layout in ANCHORS.items():
            if name == anchor or name.endswith(f".{anchor}"):
                prefixes[name.removesuffix(anchor)] = layout
    if not prefixes:
        return {n.removeprefix("module."): a for n, a in tensors.items()}, None, []
    prefix = min(prefixes, key=lambda prefix: ("ema" not in prefix, len(prefix)))
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    left = [name for name in tensors if not name.startswith(prefix)]
    return found, prefixes[prefix], left
