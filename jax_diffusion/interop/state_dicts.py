"""Finds the network in a checkpoint, however its trainer has wrapped it.

A file may hold a state dict, or a dict or list with one, beside an optimizer and others
of its kind. An average of the parameters is preferred. Wrappers give tensors a prefix,
such as `module.` or `ema_model.model.`: it is found by the first layer of the time
embedding, which every layout names in its own way.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax_diffusion.interop import file_kinds
from jax_diffusion.interop.safetensors_files import read_safetensors
from jax_diffusion.interop.tensors import Tensor, check_sizes
from jax_diffusion.interop.torch_files import read_torch

# Names under which trainers keep averages of the network, and the network.
AVERAGES = ("ema", "ema_model", "model_ema", "ema_state_dict", "ema_params")
AVERAGES += ("params_ema", "g_ema", "ema_unet", "ema_net", "averaged", "shadow")
STATE_DICTS = (
    *AVERAGES,
    *("state_dict", "model", "model_state_dict", "module", "net", "network", "unet"),
    *("params", "weights", "model_state", "generator", "checkpoint"),
)
AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?|shadow)([._]|$)", re.IGNORECASE)
# A tensor that every network of a layout has -> the layout.
ANCHORS = {
    "time_embed.0.weight": "openai",
    "temb.dense.0.weight": "ddpm",
    "time_embedding.linear_1.weight": "diffusers",
    "init_conv.weight": "lucidrains",
    "t_embedder.mlp.0.weight": "dit",
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
    tensors = _Search(path).find(tree)
    if tensors is None:
        kind = "dict" if isinstance(tree, Mapping) else type(tree).__name__
        keys = f": {[*tree]!r:.200}" if isinstance(tree, Mapping) else ""
        raise ValueError(
            f"{path} must hold tensors by name, got a {kind} of others{keys}."
        )
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


class _Search:
    """Finds a state dict in a tree, each part of which is looked at once."""

    def __init__(self, path: Path):
        self.path = path
        self.seen: dict[int, dict[str, Tensor] | None] = {}

    def find(self, tree: Any) -> dict[str, Tensor] | None:
        """Returns the tensors of the state dict in a tree; None if there is none."""
        if id(tree) not in self.seen:
            self.seen[id(tree)] = None  # a tree may hold itself
            self.seen[id(tree)] = self.look(tree)
        return self.seen[id(tree)]

    def look(self, tree: Any) -> dict[str, Tensor] | None:
        """`find` of a tree that was not looked at yet."""
        if isinstance(tree, list):  # the DDIM repository: model, optimizer, ..., EMA
            found = [self.find(item) for item in tree if isinstance(item, Mapping)]
            return next((item for item in reversed(found) if item is not None), None)
        if not isinstance(tree, Mapping) or "shadow_params" in tree:
            return None
        for name in STATE_DICTS:
            inside = self.find(tree.get(name))
            if inside is not None:
                return inside if name in AVERAGES else self.average_beside(tree, inside)
        decays = [key for key in tree if isinstance(key, float) and 0 < key < 1]
        for decay in sorted(decays, reverse=True):
            inside = self.find(tree[decay])
            if inside is not None:
                if len(decays) > 1:
                    warnings.warn(
                        f"{self.path}: of the averages {sorted(decays)!r:.200}, that "
                        f"of {decay} is read.",
                        stacklevel=2,
                    )
                return inside
        tensors = {
            name: tensor
            for name, tensor in tree.items()
            if isinstance(name, str) and isinstance(tensor, Tensor)
        }
        return tensors or None

    def average_beside(
        self, tree: Mapping[Any, Any], raw: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns an average that stands beside a network as a list, or the network."""
        for name, entry in tree.items():
            if not isinstance(name, str) or not AVERAGE.search(name):
                continue
            listed = entry.get("shadow_params") if isinstance(entry, Mapping) else entry
            if isinstance(listed, list) and [
                getattr(a, "shape", None) for a in listed
            ] == [tensor.shape for tensor in raw.values()]:
                return dict(zip(raw, listed, strict=True))
            if has_array(entry):
                warnings.warn(
                    f"{self.path}: {name!r:.80} is not understood as an average of the "
                    "network, whose last parameters are read instead.",
                    stacklevel=2,
                )
        return raw


def has_array(tree: Any) -> bool:
    """Tells whether a tree holds an array, numbers not counted."""
    seen, rest = set(), [tree]
    while rest:
        item = rest.pop()
        if isinstance(item, Tensor) and item.ndim:  # a number may be its decay
            return True
        if isinstance(item, Mapping | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            rest += item.values() if isinstance(item, Mapping) else item
    return False


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
    prefix = min(prefixes, key=lambda prefix: (not AVERAGE.search(prefix), len(prefix)))
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    # Buffers of a process, such as betas: parameters of all layouts have a dot.
    for name in [n for n in found if "." not in n and found[n].ndim < 2]:
        del found[name]
    used = {f"{prefix}{name}" for name in found}
    averaged = {}
    if not AVERAGE.search(prefix):
        averaged = average_without_dots(tensors, prefix, [*found])
    if averaged:
        used = {*averaged.values()}
        found = {name: tensors[theirs] for name, theirs in averaged.items()}
    left = [name for name in tensors if name not in used]
    left.sort(key=lambda name: not AVERAGE.search(name))  # the warning names the first
    return found, prefixes[prefix], left


def average_without_dots(
    tensors: Mapping[str, Tensor], prefix: str, names: list[str]
) -> dict[str, str]:
    """Finds the average of latent-diffusion, which drops the dots of names.

    Args:
        tensors: a state dict.
        prefix: of the network in it.
        names: of the network's tensors, without the prefix.

    Returns:
        The names of the average's tensors by those of the network; {} if it has none.
    """
    roots = {
        f"{name.partition('model_ema.')[0]}model_ema."
        for name in tensors
        if "model_ema." in name
    }
    parts = prefix.split(".")
    for root in roots:
        for skipped in range(len(parts)):
            inner = "".join(parts[skipped:])
            found = {name: root + inner + name.replace(".", "") for name in names}
            if all(theirs in tensors for theirs in found.values()):
                return found
    return {}
