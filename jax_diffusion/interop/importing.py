"""Loads checkpoints of other codes, and our own .safetensors files, as a `Run`.

Four kinds of checkpoints can be read:

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

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from jax_diffusion import config as configs
from jax_diffusion import data
from jax_diffusion.config import Config
from jax_diffusion.interop import diffusers_config, layouts, torch_files
from jax_diffusion.interop.released import RELEASED, REPRODUCES
from jax_diffusion.models import Network, example_inputs
from jax_diffusion.pipeline import Run
from jax_diffusion.registry import choose
from jax_diffusion.runtime import checkpoint

# File of the weights in a diffusers folder; the name ends in .safetensors or .bin.
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
# Key of the metadata of our own .safetensors: config and image shape, as JSON.
RECORD = "jax_diffusion"
# Keys under which a training checkpoint holds its network, the EMA first.
STATE_DICTS = ("ema", "ema_model", "state_dict", "model")


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
    layout: str = "openai",
) -> Run:
    """Loads a checkpoint of any kind, without making a workdir.

    Args:
        path: a file, or a folder of Hugging Face diffusers.
        name: name of a released checkpoint; by default the name of the file.
        config: a config as for training, for a network that is not a released one.
        layout: how the code that wrote the file names its tensors, one of
            `layouts.LAYOUTS`; only used with a config.

    Returns:
        The run, as `load_run` returns it for a workdir. Its `ema` is "none": the file
        holds one set of parameters.

    Raises:
        ValueError: if the file is unknown or damaged, or is not of that network.
    """
    params, known, image_shape = read_checkpoint(
        path, name=name, config=config, layout=layout
    )
    # The file holds one set of parameters, so there are no EMAs to choose from.
    record = {"config": {**known, "ema_decays": ()}, "format": configs.FORMAT}
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
    path: str | os.PathLike,
    workdir: str | os.PathLike,
    *,
    name: str | None = None,
    config: Config | None = None,
    layout: str = "openai",
) -> Run:
    """Makes a workdir of a checkpoint, for the programs `sample` and `evaluate`.

    Args:
        path: a file or a folder, as for `load_checkpoint`.
        workdir: folder to make; it must not hold a run.
        name: as for `load_checkpoint`.
        config: as for `load_checkpoint`.
        layout: as for `load_checkpoint`.

    Returns:
        The run that the workdir holds.

    Raises:
        ValueError: as `load_checkpoint` does, or if the workdir holds a run. Nothing is
            written then.
    """
    run = load_checkpoint(path, name=name, config=config, layout=layout)
    record = {
        "config": json.loads(run.config.to_json()),
        "image_shape": list(run.image_shape),
        "window": [],
        "format": configs.FORMAT,
        "source": Path(path).name,
    }
    checkpoint.save_params(Path(workdir), run.params, record)
    return run


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the state dict in a file, its EMA if the file holds several.

    Args:
        path: a .safetensors file or a file of PyTorch: a state dict, a dict with one
            under a name of `STATE_DICTS`, or the list of the DDIM repository.

    Returns:
        Arrays by name, without the prefix "module." of data-parallel training.

    Raises:
        ValueError: if the file is damaged or holds no state dict.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return torch_files.read_safetensors(path)[0]
    tree: Any = torch_files.read_torch(path)
    if isinstance(tree, list):  # the DDIM repository: model, optimizer, ..., EMA
        dicts = [item for item in tree if _is_state_dict(item)]
        tree = dicts[-1] if dicts else tree
    for name in STATE_DICTS:
        if isinstance(tree, Mapping) and _is_state_dict(tree.get(name)):
            tree = tree[name]
    if not _is_state_dict(tree):
        raise ValueError(
            f"{path} must hold tensors by name, got a {type(tree).__name__} of others."
        )
    return {name.removeprefix("module."): array for name, array in tree.items()}


def _is_state_dict(tree: Any) -> bool:
    return (
        isinstance(tree, Mapping)
        and bool(tree)
        and all(isinstance(name, str) for name in tree)
        and all(isinstance(array, np.ndarray) for array in tree.values())
    )


def read_checkpoint(
    path: str | os.PathLike,
    *,
    name: str | None = None,
    config: Config | None = None,
    layout: str = "openai",
) -> Checkpoint:
    """Reads parameters and config of a checkpoint of any kind, as `load_checkpoint`.

    Args:
        path: a file, or a folder of Hugging Face diffusers.
        name: as for `load_checkpoint`.
        config: as for `load_checkpoint`.
        layout: as for `load_checkpoint`.

    Returns:
        The checkpoint; its parameters are NumPy arrays. No network is built of it.

    Raises:
        ValueError: if the file is unknown or damaged, or is not of that network.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"a checkpoint must be a file or folder, got {str(path)!r}.")
    if path.is_dir():
        return read_diffusers(path)
    if path.suffix == ".safetensors":
        tensors, metadata = torch_files.read_safetensors(path)
        if RECORD in metadata:
            record = configs.upgrade(json.loads(metadata[RECORD]))
            known, image_shape = record["config"], tuple(record["image_shape"])
            _, shapes = model_and_shapes(known, image_shape)
            wanted: dict[str, Any] = flatten_dict(shapes, sep=".")
            layouts.check_same(
                {key: leaf.shape for key, leaf in wanted.items()},
                {key: array.shape for key, array in tensors.items()},
            )
            return Checkpoint(unflatten_dict(tensors, sep="."), known, image_shape)
    else:
        tensors = read_state_dict(path)
    if config is not None:
        batches = configs.call(data.load, config["data"], "config.data")
        image_shape = batches.image_shape
        params = _params(tensors, config, image_shape, layout)
        return Checkpoint(params, config, image_shape)
    name = name or path.stem
    found = choose("the name of a released checkpoint", name, RELEASED)
    known = _config(found.model, found.schedule, found.objective, found.data)
    known["reproduces"] = REPRODUCES.get(name, "")
    image_shape = (found.image_size, found.image_size, 3)
    params = _params(tensors, known, image_shape, found.layout)
    return Checkpoint(params, known, image_shape)


def read_diffusers(path: Path) -> Checkpoint:
    """Reads a folder of Hugging Face diffusers.

    Args:
        path: folder of a pipeline, with unet/ and scheduler/, or of one model, with
            config.json, scheduler_config.json and the weights.

    Returns:
        The checkpoint. Its config trains on with images from the folder data/.

    Raises:
        ValueError: if a file is missing or damaged, or if we do not support the network
            or the scheduler.
    """
    model = path / "unet" if (path / "unet").is_dir() else path
    scheduler = path / "scheduler" if (path / "scheduler").is_dir() else path
    unet = _read_json(model / "config.json")
    arguments = dict(name="unet", **diffusers_config.unet_from_config(unet))
    schedule, objective = diffusers_config.process_from_scheduler(
        _read_json(scheduler / "scheduler_config.json")
    )
    size = diffusers_config.side_of(unet)
    images = dict(name="folder", path="data", image_size=size, batch_size=64)
    config = _config(arguments, schedule, objective, images)
    found = [model / f"{DIFFUSERS_WEIGHTS}{end}" for end in (".safetensors", ".bin")]
    found = [file for file in found if file.is_file()]
    if not found:
        raise ValueError(
            f"{model} must hold {DIFFUSERS_WEIGHTS}.safetensors or .bin, got neither."
        )
    tensors = layouts.new_diffusers_names(read_state_dict(found[0]))
    image_shape = (size, size, unet["in_channels"])
    params = _params(tensors, config, image_shape, "diffusers")
    return Checkpoint(params, config, image_shape)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON file, got {error}.") from None


def _config(model, schedule, objective, data_set) -> Config:
    """Completes what is known of a network to a config, with which it can train on."""
    sampling = dict(sampler="ddim", steps=50, spacing="sections", eta=0.0, n=64)
    return dict(
        seed=0,
        data=data_set,
        schedule=schedule,
        objective=objective,
        timesteps=dict(name="uniform"),
        model=model,
        optimizer=dict(lr=1e-4),
        ema_decays=(),
        ema_warmup=True,
        total_steps=1,
        log_every=100,
        save_every=10_000,
        sample_every=10_000,
        sampling=sampling if objective else None,
    )


def model_and_shapes(
    config: Config, image_shape: tuple[int, ...]
) -> tuple[Network, PyTree]:
    """Builds the network of a config, and the shapes of its parameters.

    Args:
        config: a config; groups schedule, objective and model are read.
        image_shape: (h, w, c).

    Returns:
        The network, and a tree of `jax.ShapeDtypeStruct`; nothing is computed.
    """
    model: Any = configs.build(config, image_shape[-1]).model
    inputs = example_inputs(model, image_shape)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))
    return model, shapes["params"]


def _params(tensors, config, image_shape, layout) -> PyTree:
    model, shapes = model_and_shapes(config, image_shape)
    wanted = layouts.leaves(shapes, layout, layouts.heads_of(model))
    return layouts.from_torch(tensors, wanted)
