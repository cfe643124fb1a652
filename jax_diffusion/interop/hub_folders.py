"""Reads folders of Hugging Face diffusers: pipelines, networks, training checkpoints.

A pipeline has unet/ and scheduler/. A network alone has config.json and its weights,
and its noise schedule must come from a config unless a scheduler lies beside it.
`checkpoint-500` of a training script has unet/, and unet_ema/ with the average, which
is preferred; the scheduler is that of the pipeline around it.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from jax_diffusion.config import Config
from jax_diffusion.interop import diffusers_config, foreign, layouts
from jax_diffusion.interop.state_dicts import read_state_dict
from jax_diffusion.interop.tensors import Tensor
from jax_diffusion.runtime.untrusted import read_json

# File of the weights; the name goes on with .fp16 for half precision, then one of ENDS.
WEIGHTS = "diffusion_pytorch_model"
ENDS = (".safetensors", ".bin")
INDEX = ".index.json"  # lists the shards of weights in several files
SCHEDULER = "scheduler_config.json"
MAX_SHARDS = 1000
INNER = re.compile(r"checkpoint-\d+|unet|unet_ema")  # folders inside of a pipeline's


class Folder(NamedTuple):
    """What a folder holds: tensors by name, a whole config, and (h, w, c)."""

    tensors: dict[str, Tensor]
    config: Config
    image_shape: tuple[int, int, int]


def read_folder(
    path: Path, config: Config | None = None, *, ignore_objects: bool = False
) -> Folder:
    """Reads a folder of Hugging Face diffusers.

    Args:
        path: the folder.
        config: tells schedule, objective and all else but the network; by default the
            folder tells the first two, and the config trains on with images from the
            folder data/.
        ignore_objects: see `torch_files.read_torch`.

    Raises:
        ValueError: if a file is missing or damaged, or if we do not support the network
            or the scheduler.
    """
    inner = [path / "unet_ema", path / "unet"]
    model = next((p for p in inner if (p / "config.json").is_file()), path)
    fields = read_json(model / "config.json")
    network = dict(name="unet", **diffusers_config.unet_from_config(fields))
    h, w = diffusers_config.sides_of(fields)
    size = h if h == w else (h, w)
    if config is None:
        schedule, objective = diffusers_config.process_from_scheduler(
            read_json(find_scheduler(path, model))
        )
        images = dict(name="folder", path="data", image_size=size, batch_size=64)
        config = foreign.config_of(network, schedule, objective, images)
    else:
        config = {**config, "model": network}
    tensors = layouts.new_diffusers_names(open_weights(model, ignore_objects))
    return Folder(tensors, config, (h, w, fields["in_channels"]))


def find_scheduler(path: Path, model: Path) -> Path:
    """Finds the file of the scheduler in a folder, or in the pipeline around it.

    Args:
        path: the folder that is read.
        model: the folder of its network, `path` itself or one inside.

    Raises:
        ValueError: if there is none.
    """
    around = [path, model]
    for _ in range(2):
        if INNER.fullmatch(around[-1].absolute().name):
            around.append(around[-1].absolute().parent)
    places = [folder / inside for folder in around for inside in ("scheduler", ".")]
    for place in places:
        if (place / SCHEDULER).is_file():
            return place / SCHEDULER
    raise ValueError(
        f"config must be given for {path}, which has no {SCHEDULER} to tell the noise "
        "schedule and the objective, got none."
    )


def open_weights(model: Path, ignore_objects: bool) -> dict[str, Tensor]:
    """Opens the weights of a network, in one file or in shards, whole or in fp16.

    Args:
        model: the folder of the network.
        ignore_objects: see `torch_files.read_torch`.

    Raises:
        ValueError: if there are none, or they are damaged.
    """
    for variant in ("", ".fp16"):
        for end in ENDS:
            stem = f"{WEIGHTS}{variant}{end}"
            if (model / stem).is_file():
                return _read(model / stem, ignore_objects)
            indices = [f"{stem}{INDEX}"]
            if variant:
                indices += [f"{WEIGHTS}{end}.index{variant}.json"]
            for index in indices:
                if (model / index).is_file():
                    return open_shards(model / index, ignore_objects)
    raise ValueError(f"{model} must hold {WEIGHTS}.safetensors or .bin, got neither.")


def _read(file: Path, ignore_objects: bool) -> dict[str, Tensor]:
    return read_state_dict(file, ignore_objects=ignore_objects).tensors


def open_shards(index: Path, ignore_objects: bool) -> dict[str, Tensor]:
    """Opens the weights of a network that lie in several files.

    Args:
        index: the file that tells which tensor is where.
        ignore_objects: see `torch_files.read_torch`.

    Raises:
        ValueError: if the index names other files than those beside it, or a file lacks
            a tensor.
    """
    places: Any = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(file, str) and re.fullmatch(r"[\w.-]+", file)
        for file in places.values()
    ):
        raise ValueError(
            f"{index} must have a weight_map from tensors to files beside it, got none."
        )
    names = sorted(set(places.values()))
    if not 1 <= len(names) <= MAX_SHARDS:
        raise ValueError(
            f"{index} must name 1 to {MAX_SHARDS} files, got {len(names)}."
        )
    for name in names:
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent / name} must be there, got no such file.")
    shards = {name: _read(index.parent / name, ignore_objects) for name in names}
    missing = [n for n, file in places.items() if n not in shards[file]]
    if missing:
        raise ValueError(
            f"{index} must name tensors that its files have, got {missing[0]!r:.80}."
        )
    return {name: shards[file][name] for name, file in places.items()}
