"""Checkpoints of other codes into workdirs, and runs into files that others read.

    python -m jax_diffusion.convert --checkpoint cifar10_uncond_50M_500K.pt \\
        --workdir runs/openai
    python -m jax_diffusion.convert --workdir runs/digits --to diffusers --out digits

In: `.pt`, `.pth`, `.ckpt`, `.bin` and `.safetensors` files, known by their names or
described by a config, and Hugging Face folders. Out: `openai`, a `.pt` for
improved-diffusion; `diffusers`, a folder for its DDPMPipeline; `safetensors`, with the
config inside, which can come in again.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree
from ml_collections import ConfigDict

from jax_diffusion import cli, data
from jax_diffusion import config as settings
from jax_diffusion.config import Config
from jax_diffusion.interop import diffusers_config, torch_files
from jax_diffusion.interop import layouts as weights
from jax_diffusion.interop.released import RELEASED, REPRODUCES
from jax_diffusion.models.unet import UNet
from jax_diffusion.pipeline import Run, load_run
from jax_diffusion.registry import lookup
from jax_diffusion.runtime import checkpoint
from jax_diffusion.training import step as training

Network = tuple[PyTree, Config, tuple[int, ...]]  # parameters, config, image shape

# What improved-diffusion's U-Net has fixed.
OPENAI_FIELDS = dict(
    embedding_order="cos_sin",
    embedding_endpoint=False,
    down_padding="symmetric",
    num_groups=32,
    norm_epsilon=1e-5,
    resample="conv",
    head_channels=None,
    block_size=1,
)
OPENAI_MEANS = {"eps": "EPSILON", "x_0": "START_X", "mu": "PREVIOUS_X"}
WEIGHTS = "diffusion_pytorch_model"  # of a diffusers folder, and .safetensors or .bin
RECORD = "jax_diffusion"  # metadata of our own .safetensors: the config, as JSON
# Names under which a training checkpoint holds its network, the average first.
STATE_DICTS = ("ema", "ema_model", "state_dict", "model")


def from_checkpoint(
    path: str | Path,
    workdir: str | Path,
    *,
    name: str | None = None,
    config: Config | None = None,
    layout: str = "openai",
) -> None:
    """Makes a workdir of somebody else's checkpoint, for `sample` and `evaluate`.

    Args:
        path: a file or a Hugging Face folder.
        name: in `released.RELEASED`; default that of the file.
        config: of a network that is not released, as for training; then `layout` tells
            how its tensors are stored, one of `weights.LAYOUTS`.

    Raises:
        ValueError: if the file is unknown, damaged, or not of that network; nothing is
            written then.
    """
    path = Path(path)
    params, known, image_shape = _read(path, name, config, layout)
    known = {**known, "ema_decays": ()}  # it is one average, or none
    record = {
        "config": json.loads(ConfigDict(known).to_json()),
        "image_shape": list(image_shape),
        "window": [],
        "format": settings.FORMAT,
        "source": path.name,
    }
    checkpoint.save_params(workdir, params, record)
    count = sum(array.size for array in jax.tree.leaves(params))
    print(f"{path}: {count:,} parameters of a {known['model']['name']} in {workdir}")


def _read(path: Path, name: str | None, config: Config, layout: str) -> Network:
    """Parameters, config and image shape of a checkpoint of any kind."""
    if not path.exists():
        raise ValueError(f"a checkpoint must be a file or folder, got {str(path)!r}.")
    if path.is_dir():
        return _read_folder(path)
    tensors, record = _read_file(path)
    if record is not None:
        return _read_ours(tensors, settings.upgrade(json.loads(record)))
    if config is None:
        config, image_shape, layout = _released(name or path.stem)
    else:
        batches = settings.call(data.load, config["data"], "config.data")
        image_shape = batches.image_shape
    return _params(tensors, config, image_shape, layout), config, image_shape


def _released(name: str) -> tuple[Config, tuple[int, ...], str]:
    found = lookup("the name of a released checkpoint", name, RELEASED)
    config = _config(found.model, found.schedule, found.objective, found.data)
    config["reproduces"] = REPRODUCES.get(name, "")
    return config, (found.image_size, found.image_size, 3), found.layout


def _config(model, schedule, objective, data_set) -> Config:
    """A whole config around what is known of a network."""
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


def _shapes(config: Config, image_shape: tuple[int, ...]) -> tuple[Any, PyTree]:
    """The model of a config and the shapes of its parameters, nothing computed."""
    model: Any = settings.build(config, image_shape[-1]).model
    inputs = training.example_inputs(model, image_shape)
    init: Any = model.init
    return model, jax.eval_shape(lambda: init(jax.random.key(0), **inputs))["params"]


def _params(tensors, config, image_shape, layout) -> PyTree:
    model, shapes = _shapes(config, image_shape)
    wanted = weights.leaves(shapes, layout, weights.heads_of(model))
    return weights.from_torch(tensors, wanted)


def _read_file(path: Path) -> tuple[dict[str, np.ndarray], str | None]:
    """The state dict in a file, however it is wrapped, and our own record if any."""
    if path.suffix == ".safetensors":
        tensors, metadata = torch_files.read_safetensors(path)
        return tensors, metadata.get(RECORD)
    tree: Any = torch_files.read_torch(path)
    if isinstance(tree, list):  # the DDIM repository: model, optimiser, ..., average
        dicts = [item for item in tree if _is_state_dict(item)]
        tree = dicts[-1] if dicts else tree
    for name in STATE_DICTS:
        if isinstance(tree, Mapping) and _is_state_dict(tree.get(name)):
            tree = tree[name]
    if not _is_state_dict(tree):
        raise ValueError(
            f"{path} must hold tensors by name, got a {type(tree).__name__} of others."
        )
    return {name.removeprefix("module."): array for name, array in tree.items()}, None


def _is_state_dict(tree: Any) -> bool:
    return (
        isinstance(tree, Mapping)
        and bool(tree)
        and all(isinstance(name, str) for name in tree)
        and all(isinstance(array, np.ndarray) for array in tree.values())
    )


def _read_ours(tensors: Mapping[str, np.ndarray], record: Any) -> Network:
    """Parameters, config and image shape of a file that `to_safetensors` wrote."""
    config, image_shape = record["config"], tuple(record["image_shape"])
    wanted: dict[str, Any] = flatten_dict(_shapes(config, image_shape)[1], sep=".")
    weights.check_same(
        {name: leaf.shape for name, leaf in wanted.items()},
        {name: array.shape for name, array in tensors.items()},
    )
    return unflatten_dict(tensors, sep="."), config, image_shape


def _read_folder(path: Path) -> Network:
    """Parameters, config and image shape of a Hugging Face pipeline or model."""
    model = path / "unet" if (path / "unet").is_dir() else path
    scheduler = path / "scheduler" if (path / "scheduler").is_dir() else path
    unet = _read_json(model / "config.json")
    kwargs = dict(name="unet", **diffusers_config.unet_from_config(unet))
    schedule, objective = diffusers_config.process_from_scheduler(
        _read_json(scheduler / "scheduler_config.json")
    )
    size = diffusers_config.side_of(unet)
    images = dict(name="folder", path="data", image_size=size, batch_size=64)
    config = _config(kwargs, schedule, objective, images)
    found = [model / f"{WEIGHTS}{end}" for end in (".safetensors", ".bin")]
    found = [file for file in found if file.is_file()]
    if not found:
        raise ValueError(
            f"{model} must hold {WEIGHTS}.safetensors or .bin, got neither."
        )
    tensors = weights.new_diffusers_names(_read_file(found[0])[0])
    image_shape = (size, size, unet["in_channels"])
    return _params(tensors, config, image_shape, "diffusers"), config, image_shape


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON file, got {error}.") from None


def to_openai(run: Run, out: Path) -> None:
    """Writes a `.pt` for improved-diffusion, and beside it a `.json`.

    That holds the arguments of its UNetModel, or SuperResModel of a network with
    low_res, and of its GaussianDiffusion.

    Raises:
        ValueError: if improved-diffusion cannot compute what this run does.
    """
    flags = out.with_suffix(".json")
    if out.suffix not in (".pt", ".pth") or flags.exists():
        raise ValueError(f"--out must end in .pt and be new, got {str(out)!r}.")
    content = {"model": _openai_model(run), "diffusion": _openai_diffusion(run)}
    torch_files.write_torch(out, _tensors(run, "openai"))
    flags.write_text(json.dumps(content, indent=2) + "\n")


def _openai_model(run: Run) -> dict[str, Any]:
    model = _unet(run)
    differing = [
        f"{name} = {getattr(model, name)!r}"
        for name, value in OPENAI_FIELDS.items()
        if getattr(model, name) != value
    ]
    if model.multipliers[0] != 1 or any(m != int(m) for m in model.multipliers):
        differing.append(f"multipliers = {model.multipliers}")
    if differing:
        raise ValueError(
            "the network must be one that improved-diffusion can compute, got "
            f"{', '.join(differing)}."
        )
    heights = [run.image_shape[0] >> i for i in range(len(model.multipliers))]
    return dict(
        in_channels=run.image_shape[-1],
        model_channels=model.channels,
        out_channels=model.out_channels,
        num_res_blocks=model.num_res_blocks,
        attention_resolutions=[
            2**i for i, h in enumerate(heights) if h in model.attention_resolutions
        ],
        channel_mult=[int(m) for m in model.multipliers],
        num_heads=model.num_heads,
        num_classes=model.num_classes,
        use_scale_shift_norm=model.scale_shift,
        dropout=model.dropout,
    )


def _openai_diffusion(run: Run) -> dict[str, Any]:
    objective: Any = run.objective
    schedule = run.config.schedule
    return dict(
        betas=settings.make_betas(schedule).tolist(),
        model_mean_type=lookup(
            "the mean_type for improved-diffusion", objective.mean_type, OPENAI_MEANS
        ),
        model_var_type=objective.var_type.upper(),
        rescale_timesteps=schedule.get("rescale_timesteps", False),
    )


def to_diffusers(run: Run, out: Path) -> None:
    """Writes a folder that `diffusers.DDPMPipeline.from_pretrained` loads.

    Raises:
        ValueError: if diffusers cannot compute what this network or process does.
    """
    unet = diffusers_config.config_from_unet(_unet(run), run.image_shape)
    schedule = run.config.schedule
    scheduler = diffusers_config.scheduler_from_process(
        settings.make_betas(schedule),
        run.objective,
        schedule.get("rescale_timesteps", False),
    )
    files = {
        "unet/config.json": unet,
        "scheduler/scheduler_config.json": scheduler,
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
    }
    tensors = _tensors(run, "diffusers")
    file = out / "unet" / f"{WEIGHTS}.safetensors"
    torch_files.write_safetensors(file, tensors, {"format": "pt"})
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def to_safetensors(run: Run, out: Path) -> None:
    """Writes parameters under our own names, and config and image shape as metadata."""
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {str(out)!r}.")
    record = dict(config=json.loads(run.config.to_json()), image_shape=run.image_shape)
    record["format"] = settings.FORMAT
    tensors: dict[str, Any] = flatten_dict(run.params, sep=".")
    torch_files.write_safetensors(out, tensors, {RECORD: json.dumps(record)})


WRITERS: dict[str, Callable[[Run, Path], None]] = {
    "openai": to_openai,
    "diffusers": to_diffusers,
    "safetensors": to_safetensors,
}


def _unet(run: Run) -> UNet:
    if not isinstance(run.model, UNet):
        raise ValueError(
            "only the network 'unet' can be written for others, got "
            f"{type(run.model).__name__}."
        )
    return run.model


def _tensors(run: Run, layout: str) -> dict[str, np.ndarray]:
    wanted = weights.leaves(run.params, layout, weights.heads_of(run.model))
    return weights.to_torch(run.params, wanted)


def convert(args: argparse.Namespace) -> None:
    """The program: in with --checkpoint, out with --to."""
    if (args.checkpoint is None) == (args.to is None):
        raise ValueError(
            f"one of --checkpoint and --to must be given, got "
            f"{'neither' if args.to is None else 'both'}."
        )
    if args.checkpoint is not None:
        config = settings.load_config(args.config) if args.config else None
        from_checkpoint(
            args.checkpoint,
            args.workdir,
            name=args.name,
            config=config,
            layout=args.layout,
        )
        return
    writer = lookup("--to", args.to, WRITERS)
    if args.out is None or Path(args.out).exists():
        raise ValueError(f"--out must name a new file or folder, got {args.out!r}.")
    writer(load_run(args.workdir, args.ema), Path(args.out))
    print(f"{args.workdir} as {args.to}: {args.out}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m jax_diffusion.convert",
        description=__doc__,
    )
    parser.add_argument("--workdir", required=True, help="to make, or of a run")
    parser.add_argument("--checkpoint", help="a file or a Hugging Face folder to read")
    parser.add_argument("--name", help="of a released one, if its file is called else")
    parser.add_argument("--config", help="of a network of your own, as for training")
    parser.add_argument(
        "--layout", default="openai", help=f"with --config: {sorted(weights.LAYOUTS)}"
    )
    parser.add_argument("--to", help=f"what to write: {', '.join(WRITERS)}")
    parser.add_argument("--out", help="where to write it")
    parser.add_argument("--ema", help="such as 0.999; none for the raw parameters")
    convert(parser.parse_args())


if __name__ == "__main__":
    cli.run_program(main)
