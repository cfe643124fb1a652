"""Loads checkpoints of other codes, and our own .safetensors files, as a `Run`.

`load_checkpoint` reads four kinds of checkpoints:

    a released file    .pt, .pth, .ckpt, .bin or .safetensors, known by its name:
                       `released.RELEASED` lists the names
    a file of yours    the same formats; a config describes the network, and `layout`
                       names the code that it comes from
    a folder           of Hugging Face diffusers, with config.json and the weights
    our own file       .safetensors as `exporting.to_safetensors` writes it, with the
                       config inside

No pickled code is ever run, and PyTorch need not be installed.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from jax_diffusion import checks, data
from jax_diffusion import config as configs
from jax_diffusion.config import Config
from jax_diffusion.interop import (
    dit_layout,
    foreign,
    hub_folders,
    layouts,
    lucidrains_layout,
)
from jax_diffusion.interop.recognize import suggestions
from jax_diffusion.interop.released import RELEASED, REPRODUCES
from jax_diffusion.interop.state_dicts import StateDict, read_state_dict
from jax_diffusion.interop.tensors import Tensor, as_float32
from jax_diffusion.pipeline import Run
from jax_diffusion.runtime import checkpoint, files, workdirs
from jax_diffusion.runtime.untrusted import parse_json

# Key of the metadata of our own .safetensors: config and image shape, as JSON.
RECORD = "jax_diffusion"


class Checkpoint(NamedTuple):
    """A checkpoint as it is read.

    Attributes:
        params: parameters under our names.
        config: the config of the network and its process, as a plain dict.
        image_shape: (h, w, c).
    """

    params: PyTree
    config: Config
    image_shape: tuple[int, ...]


def load_checkpoint(
    path: str | os.PathLike,
    *,
    name: str | None = None,
    config: Config | None = None,
    layout: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    ignore_objects: bool = False,
    allow_nonfinite: bool = False,
) -> Run:
    """Loads a checkpoint of any kind, without making a workdir.

    Args:
        path: a file, or a folder of Hugging Face diffusers.
        name: name of a released checkpoint; by default the name of the file.
        config: a config as for training, for a network that is not a released one. Of
            a folder without a noise schedule, it tells schedule and objective.
        layout: how the code that wrote the file names its tensors, one of
            `layouts.LAYOUTS`, "lucidrains" or "dit"; only used with a config. By
            default it is recognized.
        image_size: side of the images in pixels, or (h, w); only used with a config,
            where config.data does not tell it.
        ignore_objects: whether objects beside the tensors of a pickle are left out.
            Nothing of them is run.
        allow_nonfinite: whether weights may be NaN or infinite.

    Returns:
        The run, as `load_run` returns it for a workdir. Its `ema` is "none": the file
        holds one set of parameters.

    Raises:
        ValueError: if the file is unknown or damaged, or is not of that network.
    """
    params, known, image_shape = read_checkpoint(
        path,
        name=name,
        config=config,
        layout=layout,
        image_size=image_size,
        ignore_objects=ignore_objects,
        allow_nonfinite=allow_nonfinite,
    )
    # The file holds one set of parameters, so there are no EMAs to choose from.
    averages = dict(ema_decays=(), ema_widths=())
    record = {"config": {**known, **averages}, "format": configs.FORMAT}
    plain = configs.of_record(record).to_json()  # as a workdir would hold it
    built = configs.build(known, image_shape[-1])
    return Run(
        config=configs.of_record({**record, "config": json.loads(plain)}),
        model=built.model,
        params=params,
        objective=built.objective,
        image_shape=image_shape,
        ema="none",
    )


def import_checkpoint(
    path: str | os.PathLike, workdir: str | os.PathLike, **options: Any
) -> Run:
    """Makes a workdir of a checkpoint, for the programs `sample` and `evaluate`.

    Args:
        path: a file or a folder, as for `load_checkpoint`.
        workdir: folder to make; it must not hold a run.
        options: keywords of `load_checkpoint`.

    Returns:
        The run that the workdir holds.

    Raises:
        ValueError: as `load_checkpoint` does, or if the workdir holds a run or anything
            else. Nothing is written then.
    """
    files.check_output("workdir", workdir, "folder")
    if checkpoint.latest_step(Path(workdir)) is not None:
        raise ValueError(f"workdir must be new, and {str(workdir)!r} holds a run.")
    workdirs.check_new(Path(workdir))
    run = load_checkpoint(path, **options)
    workdirs.check_new(Path(workdir), run.config.data.get("path"))
    record = {
        "config": json.loads(run.config.to_json()),
        "image_shape": list(run.image_shape),
        "window": [],
        "format": configs.FORMAT,
        "source": Path(path).name,
    }
    checkpoint.save_params(Path(workdir), run.params, record)
    return run


def read_checkpoint(
    path: str | os.PathLike,
    *,
    name: str | None = None,
    config: Config | None = None,
    layout: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    ignore_objects: bool = False,
    allow_nonfinite: bool = False,
) -> Checkpoint:
    """Reads parameters and config of a checkpoint of any kind, as `load_checkpoint`.

    Args:
        path: a file, or a folder of Hugging Face diffusers.
        name: as for `load_checkpoint`, like all others.

    Returns:
        The checkpoint; its parameters are NumPy arrays. No network is built of it.

    Raises:
        ValueError: if the file is unknown or damaged, or is not of that network.
    """
    names = ("name", "layout", "image_size", "ignore_objects", "allow_nonfinite")
    configs.check_signature(read_checkpoint, locals(), names)
    if config is not None and not hasattr(config, "items"):
        raise ValueError(
            "config must be a config, as load_config reads it from a file, got "
            f"{checks.shown(config)}."
        )
    checks.path("checkpoint", path, "a file or folder")
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"checkpoint must be a file or folder, got {str(path)!r}, where nothing is."
        )
    if path.is_dir():
        given = dict(name=name, layout=layout, image_size=image_size)
        for field, value in given.items():
            if value is not None:
                raise ValueError(f"{field} is for files, got {value!r} and a folder.")
        folder = hub_folders.read_folder(path, config, ignore_objects=ignore_objects)
        params = _params(*folder, "diffusers", allow_nonfinite)
        return Checkpoint(params, folder.config, folder.image_shape)
    try:
        found = read_state_dict(path, ignore_objects=ignore_objects)
    except ValueError as error:
        if str(error).startswith("ignore_objects"):  # it can, without them
            raise
        rule = "checkpoint must be a file that can be read"
        raise ValueError(f"{rule}, got: {error}") from error
    if RECORD in found.metadata:
        return read_own_file(path, found, config, allow_nonfinite)
    if config is not None:
        theirs = layout or found.layout or "openai"
        image_shape = image_shape_of(found, config, image_size)
        params = _params(found.tensors, config, image_shape, theirs, allow_nonfinite)
        return Checkpoint(params, config, image_shape)
    if image_size is not None:
        raise ValueError(f"image_size is for files with a config, got {image_size}.")
    name = name or path.stem
    if name not in RELEASED:
        raise ValueError(
            f"name must be that of a released checkpoint, got {name!r}"
            f"{suggestions(found, RELEASED)}"
        )
    row = RELEASED[name]
    known = foreign.config_of(row.model, row.schedule, row.objective, row.data)
    known["reproduces"] = REPRODUCES.get(name, "")
    image_shape = (row.image_size, row.image_size, 3)
    params = _params(found.tensors, known, image_shape, row.layout, allow_nonfinite)
    return Checkpoint(params, known, image_shape)


def read_own_file(
    path: Path, found: StateDict, config: Config | None, allow_nonfinite: bool
) -> Checkpoint:
    """Reads what `exporting.to_safetensors` has written, or somebody in its name.

    Args:
        path: the file, for errors.
        found: its tensors and metadata.
        config: in place of the file's own, which may name no code; None for that.
        allow_nonfinite: whether weights may be NaN or infinite.

    Raises:
        ValueError: if the record is damaged, or the tensors are not of its network.
    """
    try:
        record = parse_json(found.metadata[RECORD])
        known, image_shape = foreign.check_record(record)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{path} must hold a whole record: {reason}.") from error
    if config is None:
        foreign.check_no_code(known, path)
    else:
        known = config
    _, shapes = foreign.model_and_shapes(known, image_shape, found.tensors)
    wanted: dict[str, Any] = flatten_dict(shapes, sep=".")
    layouts.check_same(
        {key: leaf.shape for key, leaf in wanted.items()},
        {key: tensor.shape for key, tensor in found.tensors.items()},
    )
    params = {
        key: as_float32(key, tensor, allow_nonfinite=allow_nonfinite)
        for key, tensor in found.tensors.items()
    }
    return Checkpoint(unflatten_dict(params, sep="."), known, image_shape)


# Layout -> the tensor of the first convolution, whose second axis tells the channels.
FIRST = {
    "openai": "input_blocks.0.0.weight",
    "ddpm": "conv_in.weight",
    "diffusers": "conv_in.weight",
    "lucidrains": "init_conv.weight",
    "dit": "x_embedder.proj.weight",
}


def image_shape_of(
    found: StateDict, config: Config, image_size: int | tuple[int, int] | None
) -> tuple[int, int, int]:
    """Finds (h, w, c) of the images of a network that a config describes.

    Args:
        found: its tensors, which tell c.
        config: its config, of which group data may tell h and w.
        image_size: h and w, if the config does not. Without both, the data are read.

    Raises:
        ValueError: if the data have to be read and cannot be.
    """
    group = config["data"]
    size = image_size or group.get("image_size")
    first = found.tensors.get(FIRST.get(found.layout or "", ""))
    if size is None or first is None or first.ndim < 2:
        try:
            return configs.call(data.load, group, "config.data").image_shape
        except ValueError as error:
            raise ValueError(
                "image_size must be given where config.data has none and its images "
                f"cannot be read, got none: {error}"
            ) from error
    h, w = (size, size) if isinstance(size, int) else size
    model = config["model"]
    folded = (1 + bool(model.get("low_res"))) * model.get("block_size", 1) ** 2
    return (h, w, first.shape[1] // folded)


def _params(
    tensors: Mapping[str, Tensor],
    config: Config,
    image_shape: tuple[int, ...],
    layout: str,
    allow_nonfinite: bool,
) -> PyTree:
    model, shapes = foreign.model_and_shapes(config, image_shape, tensors)
    if layout == lucidrains_layout.NAME:
        return lucidrains_layout.from_lucidrains(
            tensors, model, shapes, allow_nonfinite=allow_nonfinite
        )
    if layout == dit_layout.NAME:
        return dit_layout.from_dit(
            tensors, model, shapes, image_shape, allow_nonfinite=allow_nonfinite
        )
    wanted = layouts.leaves(shapes, layout, layouts.heads_of(model))
    return layouts.from_torch(tensors, wanted, allow_nonfinite=allow_nonfinite)
