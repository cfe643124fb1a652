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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree
from ml_collections import ConfigDict

from jax_diffusion import checkpoint, data, sample, settings, training
from jax_diffusion.models import diffusers_config, torch_files, weights
from jax_diffusion.models.encoder import Encoder
from jax_diffusion.models.released import RELEASED
from jax_diffusion.models.unet import UNet
from jax_diffusion.sample import Run
from jax_diffusion.settings import Config

FORMATS = ("openai", "diffusers", "safetensors")
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
    if path.is_dir():
        tensors, config, image_shape = _read_folder(path)
        params = _params(tensors, config, image_shape, "diffusers")
    elif path.suffix == ".safetensors" and (ours := _read_ours(path)) is not None:
        params, config, image_shape = ours
    else:
        if config is None:
            config, image_shape, layout = _released(name or path.stem)
        else:
            batches = settings.call(data.load, config.data, "config.data")
            image_shape = batches.image_shape
        params = _params(_read_file(path), config, image_shape, layout)
    record = {
        "config": json.loads(ConfigDict(config).to_json()),
        "image_shape": list(image_shape),
        "window": [],
        "source": path.name,
    }
    checkpoint.save_params(workdir, params, record)
    count = sum(array.size for array in jax.tree.leaves(params))
    print(f"{path}: {count:,} parameters of a {config['model']['name']} in {workdir}")


def _released(name: str) -> tuple[Config, tuple[int, ...], str]:
    found = settings.choose("the name of a released checkpoint", name, RELEASED)
    config = _config(found.model, found.schedule, found.objective, found.data)
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
    schedule = settings.make_schedule(config["schedule"])
    objective = settings.make_objective(config["objective"], schedule)
    model = settings.make_model(config["model"], objective, image_shape[-1])
    inputs = training.example_inputs(model, image_shape)
    return model, jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))


def _params(tensors, config, image_shape, layout) -> PyTree:
    model, shapes = _shapes(config, image_shape)
    wanted = weights.leaves(shapes["params"], layout, _heads_of(model))
    return weights.from_torch(tensors, wanted)


def _heads_of(model):
    if not isinstance(model, UNet | Encoder):
        raise ValueError(
            "only the networks 'unet' and 'encoder' have a place in other layouts, got "
            f"{type(model).__name__}."
        )
    size = model.head_channels
    return lambda channels: channels // size if size else model.num_heads


def _read_file(path: Path) -> dict[str, np.ndarray]:
    """The state dict in a file, however it is wrapped."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)[0]
    tree = torch_files.read_torch(path)
    if isinstance(tree, list):  # the DDIM repository: model, ..., average
        dicts = [item for item in tree if _is_state_dict(item)]
        tree = dicts[-1] if dicts else {}
    for name in STATE_DICTS:
        if isinstance(tree, Mapping) and _is_state_dict(tree.get(name)):
            tree = tree[name]
    if not _is_state_dict(tree):
        raise ValueError(
            f"{path} must hold tensors by name, got {type(tree).__name__}."
        )
    return {name.removeprefix("module."): array for name, array in tree.items()}


def _is_state_dict(tree: Any) -> bool:
    return (
        isinstance(tree, Mapping)
        and bool(tree)
        and all(isinstance(array, np.ndarray) for array in tree.values())
    )


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="flax") as file:
            names = list(file.keys())
            tensors = {name: np.asarray(file.get_tensor(name)) for name in names}
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} must be a whole .safetensors file, got {error}."
        ) from None


def _read_ours(path: Path):
    """Parameters, config and image shape of a file that `to_safetensors` wrote."""
    tensors, metadata = _read_safetensors(path)
    if "jax_diffusion" not in metadata:
        return None
    record = json.loads(metadata["jax_diffusion"])
    params = unflatten_dict(tensors, sep=".")
    config, image_shape = record["config"], tuple(record["image_shape"])
    expected = jax.tree.map(
        lambda a: a.shape, _shapes(config, image_shape)[1]["params"]
    )
    if jax.tree.map(np.shape, params) != expected:
        raise ValueError(
            f"{path} must have the parameters of its own config, got others."
        )
    return params, config, image_shape


def _read_folder(path: Path):
    """Tensors, config and image shape of a Hugging Face folder, pipeline or model."""
    model = path / "unet" if (path / "unet").is_dir() else path
    scheduler = path / "scheduler" if (path / "scheduler").is_dir() else path
    unet = _read_json(model / "config.json")
    schedule, objective = diffusers_config.process_from_scheduler(
        _read_json(scheduler / "scheduler_config.json")
    )
    kwargs = dict(name="unet", **diffusers_config.unet_from_config(unet))
    size, channels = unet["sample_size"], unet["in_channels"]
    config = _config(
        kwargs,
        schedule,
        objective,
        dict(name="folder", path="data", image_size=size, batch_size=64),
    )
    stem = "diffusion_pytorch_model"
    found = [model / f"{stem}{end}" for end in (".safetensors", ".bin")]
    found = [file for file in found if file.is_file()]
    if not found:
        raise ValueError(f"{model} must hold {stem}.safetensors or .bin, got neither.")
    tensors = weights.new_diffusers_names(_read_file(found[0]))
    return tensors, config, (size, size, channels)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON file, got {error}.") from None


def to_openai(run: Run, out: Path) -> None:
    """Writes a `.pt` for improved-diffusion, and its flags in a `.json` beside it.

    Raises:
        ValueError: if improved-diffusion's U-Net cannot compute what this one does.
    """
    model: Any = run.model
    _check_fields(model, OPENAI_FIELDS, "improved-diffusion")
    torch_files.write_torch(out, _tensors(run, "openai"))
    height = run.image_shape[0]
    flags = dict(
        image_size=height,
        in_channels=run.image_shape[-1],
        model_channels=model.channels,
        out_channels=model.out_channels,
        num_res_blocks=model.num_res_blocks,
        attention_resolutions=[height // r for r in model.attention_resolutions],
        channel_mult=list(model.multipliers),
        num_heads=model.num_heads,
        num_classes=model.num_classes,
        use_scale_shift_norm=model.scale_shift,
        dropout=model.dropout,
    )
    out.with_suffix(".json").write_text(json.dumps(flags, indent=2) + "\n")


def to_diffusers(run: Run, out: Path) -> None:
    """Writes a folder that `diffusers.DDPMPipeline.from_pretrained` loads.

    Raises:
        ValueError: if diffusers cannot compute what this network or process does.
    """
    from safetensors.numpy import save_file

    unet = diffusers_config.config_from_unet(run.model, run.image_shape)
    table = settings.make_betas(run.config.schedule)
    scheduler = diffusers_config.scheduler_from_process(
        table, run.objective, run.config.schedule.get("rescale_timesteps", False)
    )
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    tensors = _tensors(run, "diffusers")
    files = {
        "model_index.json": index,
        "unet/config.json": unet,
        "scheduler/scheduler_config.json": scheduler,
    }
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    save_file(tensors, out / "unet" / "diffusion_pytorch_model.safetensors")


def to_safetensors(run: Run, out: Path) -> None:
    """Writes parameters under our own names, and config and image shape as metadata."""
    from safetensors.numpy import save_file

    record = {
        "config": json.loads(run.config.to_json()),
        "image_shape": run.image_shape,
    }
    tensors = {
        k: np.ascontiguousarray(v) for k, v in flatten_dict(run.params, sep=".").items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out, metadata={"jax_diffusion": json.dumps(record)})


def _tensors(run: Run, layout: str) -> dict[str, np.ndarray]:
    wanted = weights.leaves(run.params, layout, _heads_of(run.model))
    return weights.to_torch(run.params, wanted)


def _check_fields(model: Any, fields: Mapping[str, Any], who: str) -> None:
    differing = [
        f"{name} = {getattr(model, name)!r}"
        for name, value in fields.items()
        if getattr(model, name) != value
    ]
    if differing:
        raise ValueError(
            f"{who} must have such a U-Net, got {', '.join(differing)}, which it has not."
        )


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
    write = {
        "openai": to_openai,
        "diffusers": to_diffusers,
        "safetensors": to_safetensors,
    }
    writer = settings.choose("--to", args.to, write)
    if args.out is None or Path(args.out).exists():
        raise ValueError(f"--out must name a new file or folder, got {args.out!r}.")
    writer(sample.load_run(args.workdir, args.ema), Path(args.out))
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
    parser.add_argument("--to", help=f"what to write: {', '.join(FORMATS)}")
    parser.add_argument("--out", help="where to write it")
    parser.add_argument("--ema", help="such as 0.999; none for the raw parameters")
    convert(parser.parse_args())


if __name__ == "__main__":
    settings.run_program(main)
