"""Translates parameters between our names and the state dicts of other codes.

A layout, a key of `LAYOUTS`, is how a code names and stores tensors of a network:

    openai      improved-diffusion and guided-diffusion
    openai_new  guided-diffusion with `use_new_attention_order`
    ddpm        the DDIM repository, and Ho et al.'s checkpoints as converted for it
    diffusers   Hugging Face diffusers

The layout and the shapes of our parameters determine the name and shape of every tensor
(`leaves`), so a state dict is checked as a whole before any tensor is used.

Our kernels have the axes [*size, in, out], PyTorch's [out, in, *size]. Our `qkv` is one
dense layer whose outputs are ordered [(q, k, v), head, channel].
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from jax_diffusion.interop.tensors import as_float32
from jax_diffusion.models.noisy_classifier import NoisyClassifier
from jax_diffusion.models.unet import UNet

# Our layers inside a block -> the tensors' names there; several if qkv is split.
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
    # The attention pool of a classifier, whose qkv is always ordered as ours.
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
# Names of diffusers up to version 0.13 -> today's; the files on its hub have the old.
OLD_DIFFUSERS = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v."}
OLD_DIFFUSERS |= {".proj_attn.": ".to_out.0."}

# Our parameters of a layer -> PyTorch's; all others are "weight".
LEAVES = {"bias": "bias", "positions": "positional_embedding"}
TRANSPOSED = ("kernel", "positions")


class Leaf(NamedTuple):
    """One of our parameters, and the tensors that hold it in another code.

    Attributes:
        path: names that lead to the parameter in our tree.
        shape: shape of the parameter.
        names: names of the tensors: one, or three for q, k and v.
        their_shape: shape of each tensor.
        heads: number of attention heads if the parameter is a qkv whose outputs the
            other code orders [head, (q, k, v), channel]; else None.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: list[str]
    their_shape: tuple[int, ...]
    heads: int | None


def heads_of(model: Any) -> Callable[[int], int]:
    """Returns f(channels) -> number of attention heads of a network, for `leaves`.

    Args:
        model: a `UNet` or a `NoisyClassifier`.

    Raises:
        ValueError: for any other network: no layout has a place for it.
    """
    if not isinstance(model, UNet | NoisyClassifier):
        raise ValueError(
            "only the networks 'unet' and 'noisy_classifier' have a place in other "
            f"layouts, got {type(model).__name__}."
        )
    size = model.head_channels
    return lambda channels: channels // size if size else model.num_heads


def leaves(
    params: PyTree, layout: str, heads_of: Callable[[int], int] = lambda channels: 1
) -> list[Leaf]:
    """Lists the tensors in which a layout stores the parameters of a network.

    Args:
        params: our parameters, or a tree of `jax.ShapeDtypeStruct`.
        layout: a key of `LAYOUTS`.
        heads_of: f(channels) -> number of attention heads. Only "openai" needs it: the
            heads decide the order of the rows of its qkv.

    Returns:
        A `Leaf` for each parameter.

    Raises:
        ValueError: for an unknown layout, or if it has no place for one of the layers.
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


def from_torch(
    tensors: Mapping[str, Any], wanted: list[Leaf], *, allow_nonfinite: bool = False
) -> PyTree:
    """Makes our parameters of a state dict, in float32.

    Args:
        tensors: arrays, or tensors in a file, by PyTorch's names.
        wanted: the tensors that the network has, from `leaves`.
        allow_nonfinite: whether weights may be NaN or infinite.

    Returns:
        A tree of NumPy arrays.

    Raises:
        ValueError: if tensors are missing, unexpected or of another shape; the error
            names all of them. Or if they are not of floats, or not finite.
    """
    shapes = {name: leaf.their_shape for leaf in wanted for name in leaf.names}
    check_same(shapes, {name: np.shape(array) for name, array in tensors.items()})
    ours: dict[tuple[str, ...], np.ndarray] = {}
    for path, shape, names, _, heads in wanted:
        parts = [
            as_float32(n, tensors[n], allow_nonfinite=allow_nonfinite) for n in names
        ]
        array = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if heads is not None:
            array = _swap_leading(array, heads, 3)
        if path[-1] in TRANSPOSED:
            array = np.moveaxis(array, (0, 1), (-1, -2)).reshape(shape)
        ours[path] = np.ascontiguousarray(array)
    return unflatten_dict(ours)


def to_torch(params: PyTree, wanted: list[Leaf]) -> dict[str, np.ndarray]:
    """Makes a state dict of our parameters: the exact inverse of `from_torch`.

    Args:
        params: our parameters.
        wanted: the tensors to make, from `leaves`.

    Returns:
        float32 arrays by PyTorch's names.
    """
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
    """Returns the tensors under the names that diffusers gives them today.

    Args:
        tensors: a state dict of any version of diffusers.
    """
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in OLD_DIFFUSERS.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def _swap_leading(array, first, second):
    """Reorders axis 0 from [first, second, rest] to [second, first, rest]."""
    split = array.reshape(first, second, -1, *array.shape[1:])
    return split.swapaxes(0, 1).reshape(array.shape)


def check_same(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Raises a ValueError that lists all differences between two dicts of shapes.

    Args:
        wanted: shapes of the network's tensors by name.
        got: shapes of the checkpoint's tensors by name.
    """
    lines = [f"{n} {wanted[n]} is missing" for n in wanted if n not in got]
    lines += [f"{n} {got[n]} is unexpected" for n in got if n not in wanted]
    both = [n for n in wanted if n in got and tuple(got[n]) != tuple(wanted[n])]
    lines += [f"{n} should be {wanted[n]} and is {got[n]}" for n in both]
    if lines:
        raise ValueError(
            "a checkpoint must have exactly the tensors of its network, got "
            f"{len(lines)} differences: {'; '.join(lines)}."
        )


# The next functions return the place of each module of a network in one layout, such as
# {"mid_0": "middle_block.0"}.


def _size(params: PyTree) -> tuple[int, int]:
    """Returns the number of levels, and of residual blocks in each level."""
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
        # The heads of a classifier.
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
        module = f"down_{level}_halve"  # counted even if it only averages
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
        stages = {"down": level, "up": levels - 1 - level}  # numbered as they are used
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
    """Drops the places of residual blocks that resample: a layout has none for them."""
    names = [n for n in params if n.endswith(("_halve", "_double"))]
    blocks = [name for name in names if "kernel" not in params[name]]
    return {name: place for name, place in places.items() if name not in blocks}


OPENAI_AXES = {"skip": 2, "qkv": 1, "out": 1, "qkv_proj": 1, "c_proj": 1}
OPENAI_AXES |= {"conv_logits": 2}

# Layout -> places of modules, names of layers, and for layers that are dense here and
# convolutions there: how many axes of size 1 their kernels have there.
LAYOUTS: dict[str, tuple[Callable[..., dict[str, str]], dict, dict[str, int]]] = {
    "openai": (_openai, OPENAI_LAYERS, OPENAI_AXES),
    "openai_new": (_openai, OPENAI_LAYERS, OPENAI_AXES),
    "ddpm": (_ddpm, DDPM_LAYERS, {"skip": 2, "qkv": 2, "out": 2}),
    "diffusers": (_diffusers, DIFFUSERS_LAYERS, {"skip": 2}),
}
