"""Parameters of our networks under the names of other codes, in both directions.

A layout is how a code stores a network: "openai" (improved- and guided-diffusion),
"openai_new" (guided-diffusion with `use_new_attention_order`), "ddpm" (the DDIM
repository, and Ho et al.'s checkpoints as converted for it) and "diffusers". From it
and the shapes of our parameters follow the name and shape of every tensor, so that a
state dict is checked as a whole before any of it is used.

Kernels are [*size, in, out] here and [out, in, *size] there. Our `qkv` is one dense
layer whose outputs are [(q, k, v), head, channel].
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

OPENAI_LAYERS = {
    "norm_in": ["in_layers.0"],
    "conv_in": ["in_layers.2"],
    "emb": ["emb_layers.1"],
    "norm_out": ["out_layers.0"],
    "conv_out": ["out_layers.3"],
    "skip": ["skip_connection"],
    "norm": ["norm"],
    "qkv": ["qkv"],
    "out": ["proj_out"],
    # of a classifier's attention pool, whose qkv is always in our order
    "qkv_proj": ["qkv_proj"],
    "c_proj": ["c_proj"],
}
DDPM_LAYERS = {
    "norm_in": ["norm1"],
    "conv_in": ["conv1"],
    "emb": ["temb_proj"],
    "norm_out": ["norm2"],
    "conv_out": ["conv2"],
    "skip": ["nin_shortcut"],
    "norm": ["norm"],
    "qkv": ["q", "k", "v"],
    "out": ["proj_out"],
}
DIFFUSERS_LAYERS = DDPM_LAYERS | {
    "emb": ["time_emb_proj"],
    "skip": ["conv_shortcut"],
    "norm": ["group_norm"],
    "qkv": ["to_q", "to_k", "to_v"],
    "out": ["to_out.0"],
}
# As diffusers called them until its version 0.13, and the files on its hub still do.
OLD_DIFFUSERS = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v."}
OLD_DIFFUSERS |= {".proj_attn.": ".to_out.0."}

LEAVES = {"bias": "bias", "positions": "positional_embedding"}  # else weight
TRANSPOSED = ("kernel", "positions")


class Leaf(NamedTuple):
    """One parameter of ours and the tensors that hold it elsewhere."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: list[str]  # of the tensors: one, or three of a split qkv
    their_shape: tuple[int, ...]  # of each of them
    heads: int | None  # of a qkv whose outputs are [head, (q, k, v), channel] there


def leaves(
    params: PyTree, layout: str, heads_of: Callable[[int], int] = lambda channels: 1
) -> list[Leaf]:
    """The tensors in which a layout stores the parameters of a network.

    Args:
        params: arrays, or anything with shapes.
        layout: a key of `LAYOUTS`.
        heads_of: the number of attention heads at a number of channels; for "openai",
            where it decides the order of the rows of qkv.

    Raises:
        ValueError: if the layout has no place for one of the layers.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {sorted(LAYOUTS)}, got {layout!r}.")
    places_of, layers, axes = LAYOUTS[layout]
    places, found = places_of(params), []
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    for path, array in flat.items():
        *inside, kind = path[1:]
        layer = inside[0] if inside else ""
        suffixes = layers.get(layer) if inside else [""]
        if path[0] not in places or suffixes is None:
            raise ValueError(
                f"layout {layout!r} must have a place for every layer, got "
                f"{'.'.join(path)}, for which it has none."
            )
        stem, leaf = places[path[0]], LEAVES.get(kind, "weight")
        names = [".".join(filter(None, (stem, s, leaf))) for s in suffixes]
        shape = theirs = tuple(array.shape)
        if kind in TRANSPOSED:
            theirs = (shape[-1], shape[-2], *shape[:-2])
            theirs += (1,) * axes.get(layer or path[0], 0)
        theirs = (theirs[0] // len(names), *theirs[1:])
        split = layer == "qkv" and layout == "openai"
        heads = heads_of(shape[-1] // 3) if split else None
        found.append(Leaf(path, shape, names, theirs, heads))
    return found


def from_torch(tensors: Mapping[str, np.ndarray], wanted: list[Leaf]) -> PyTree:
    """Our parameters from a state dict, in float32.

    Raises:
        ValueError: one that names every tensor that is missing, unexpected or of
            another shape; nothing is taken in part.
    """
    shapes = {name: leaf.their_shape for leaf in wanted for name in leaf.names}
    check_same(shapes, {name: np.shape(array) for name, array in tensors.items()})
    ours: dict[tuple[str, ...], np.ndarray] = {}
    for path, shape, names, _, heads in wanted:
        array = np.concatenate([np.asarray(tensors[n], np.float32) for n in names])
        if heads is not None:
            array = _swap_leading(array, heads, 3)
        if path[-1] in TRANSPOSED:
            array = np.moveaxis(array, (0, 1), (-1, -2)).reshape(shape)
        ours[path] = np.ascontiguousarray(array)
    return unflatten_dict(ours)


def to_torch(params: PyTree, wanted: list[Leaf]) -> dict[str, np.ndarray]:
    """The state dict of our parameters; the inverse of `from_torch`, bit for bit."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    tensors = {}
    for path, _, names, their_shape, heads in wanted:
        array = np.asarray(flat[path], np.float32)
        if path[-1] in TRANSPOSED:
            array = np.moveaxis(array, (-1, -2), (0, 1))
        if heads is not None:
            array = _swap_leading(array, 3, heads)
        for name, part in zip(names, np.split(array, len(names)), strict=True):
            tensors[name] = np.ascontiguousarray(part).reshape(their_shape)
    return tensors


def new_diffusers_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors under the names that diffusers gives them today."""
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in OLD_DIFFUSERS.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def _swap_leading(array, first, second):
    """[first, second, rest] -> [second, first, rest] within axis 0."""
    split = array.reshape(first, second, -1, *array.shape[1:])
    return split.swapaxes(0, 1).reshape(array.shape)


def check_same(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Raises a ValueError that lists all differences between two dicts of shapes."""
    lines = [f"{n} {wanted[n]} is missing" for n in wanted if n not in got]
    lines += [f"{n} {got[n]} is unexpected" for n in got if n not in wanted]
    both = [n for n in wanted if n in got and tuple(got[n]) != tuple(wanted[n])]
    lines += [f"{n} should be {wanted[n]} and is {got[n]}" for n in both]
    if lines:
        raise ValueError(
            "a checkpoint must have exactly the tensors of its network, got "
            f"{len(lines)} differences: {'; '.join(lines)}."
        )


# Where the modules of a network stand in each layout


def _size(params: PyTree) -> tuple[int, int]:
    """Levels of a network, and its residual blocks in each of them."""
    names = [name.split("_") for name in params if name.startswith("down_")]
    blocks = [n for n in names if len(n) == 3 and n[2].isdigit()]
    return 1 + max(int(n[1]) for n in blocks), 1 + max(int(n[2]) for n in blocks)


def _openai(params: PyTree) -> dict[str, str]:
    levels, blocks = _size(params)
    places = {
        "time_0": "time_embed.0",
        "time_1": "time_embed.2",
        "label": "label_emb",
        "conv_in": "input_blocks.0.0",
        "mid_0": "middle_block.0",
        "mid_attention": "middle_block.1",
        "mid_1": "middle_block.2",
        "norm_out": "out.0",
        "conv_out": "out.2",
        # the heads of a classifier
        "pool": "out.2",
        "conv_logits": "out.3",
        "hidden": "out.0",
        "norm_hidden": "out.1",
        "logits": "out.3" if "norm_hidden" in params else "out.2",
    }
    down, up = 1, 0
    for level in range(levels):
        for i in range(blocks):
            places[f"down_{level}_{i}"] = f"input_blocks.{down}.0"
            places[f"down_{level}_{i}_attention"] = f"input_blocks.{down}.1"
            down += 1
        module = f"down_{level}_halve"  # takes a number even if it only averages
        conv = ".op" if "kernel" in params.get(module, ()) else ""
        places[module] = f"input_blocks.{down}.0{conv}"
        down += 1
    for level in reversed(range(levels)):
        for i in range(blocks + 1):
            places[f"up_{level}_{i}"] = f"output_blocks.{up}.0"
            places[f"up_{level}_{i}_attention"] = f"output_blocks.{up}.1"
            up += 1
        after = 1 + (f"up_{level}_{blocks}_attention" in params)
        module = f"up_{level}_double"
        conv = ".conv" if "kernel" in params.get(module, ()) else ""
        places[module] = f"output_blocks.{up - 1}.{after}{conv}"
    return places


def _ddpm(params: PyTree) -> dict[str, str]:
    levels, blocks = _size(params)
    places = {
        "time_0": "temb.dense.0",
        "time_1": "temb.dense.1",
        "mid_0": "mid.block_1",
        "mid_attention": "mid.attn_1",
        "mid_1": "mid.block_2",
    }
    places |= {name: name for name in ("conv_in", "norm_out", "conv_out")}
    for level in range(levels):
        for way in ("down", "up"):
            for i in range(blocks + 1):
                places[f"{way}_{level}_{i}"] = f"{way}.{level}.block.{i}"
                places[f"{way}_{level}_{i}_attention"] = f"{way}.{level}.attn.{i}"
        places[f"down_{level}_halve"] = f"down.{level}.downsample.conv"
        places[f"up_{level}_double"] = f"up.{level}.upsample.conv"
    return _without_blocks(places, params)


def _diffusers(params: PyTree) -> dict[str, str]:
    levels, blocks = _size(params)
    places = {
        "time_0": "time_embedding.linear_1",
        "time_1": "time_embedding.linear_2",
        "label": "class_embedding",
        "conv_in": "conv_in",
        "mid_0": "mid_block.resnets.0",
        "mid_attention": "mid_block.attentions.0",
        "mid_1": "mid_block.resnets.1",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    for level in range(levels):
        stages = {"down": level, "up": levels - 1 - level}  # in the order of use
        for way, stage in stages.items():
            stem = f"{way}_blocks.{stage}"
            for i in range(blocks + 1):
                places[f"{way}_{level}_{i}"] = f"{stem}.resnets.{i}"
                places[f"{way}_{level}_{i}_attention"] = f"{stem}.attentions.{i}"
        places[f"down_{level}_halve"] = f"down_blocks.{level}.downsamplers.0.conv"
        places[f"up_{level}_double"] = (
            f"up_blocks.{levels - 1 - level}.upsamplers.0.conv"
        )
    return _without_blocks(places, params)


def _without_blocks(places: dict[str, str], params: PyTree) -> dict[str, str]:
    """Only the places of convolutions that resample, not those of blocks that do."""
    names = [n for n in params if n.endswith(("_halve", "_double"))]
    blocks = [name for name in names if "kernel" not in params[name]]
    return {name: place for name, place in places.items() if name not in blocks}


OPENAI_AXES = {"skip": 2, "qkv": 1, "out": 1, "qkv_proj": 1, "c_proj": 1}
OPENAI_AXES |= {"conv_logits": 2}

# Places of modules, names of their layers, and how many axes of size 1 a code gives to
# layers that are dense here.
LAYOUTS: dict[str, tuple[Callable[..., dict[str, str]], dict, dict[str, int]]] = {
    "openai": (_openai, OPENAI_LAYERS, OPENAI_AXES),
    "openai_new": (_openai, OPENAI_LAYERS, OPENAI_AXES),
    "ddpm": (_ddpm, DDPM_LAYERS, {"skip": 2, "qkv": 2, "out": 2}),
    "diffusers": (_diffusers, DIFFUSERS_LAYERS, {"skip": 2}),
}
