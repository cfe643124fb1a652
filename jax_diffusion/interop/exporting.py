"""Writes a run into files that other codes read; `WRITERS` lists the formats.

    openai       a .pt file for improved-diffusion, and a .json with its arguments
    dit          the same for facebookresearch/DiT, of the network `DiT`
    diffusers    a folder for Hugging Face's DDPMPipeline
    safetensors  parameters under our own names, with the config inside; the program
                 `convert` and `load_checkpoint` read it again

A network or a process that the other code cannot compute is refused.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jax_diffusion import config as configs
from jax_diffusion.interop import (
    diffusers_config,
    diffusers_levels,
    dit_layout,
    layouts,
    safetensors_files,
    torch_files,
)
from jax_diffusion.interop.hub_folders import WEIGHTS
from jax_diffusion.interop.importing import RECORD
from jax_diffusion.models.dit import DiT
from jax_diffusion.models.unet import UNet
from jax_diffusion.pipeline import Run
from jax_diffusion.registry import choose
from jax_diffusion.runtime import files
from jax_diffusion.schedules import Levels

# Fields of `UNet` with the values that improved-diffusion's UNetModel supports.
OPENAI_FIELDS = dict(
    embedding_order=("cos_sin",),
    embedding_endpoint=(False,),
    down_padding=("symmetric",),
    num_groups=(32,),
    norm_epsilon=(1e-5,),
    resample=("conv",),
    head_channels=(None,),
    block_size=(1,),
    cond_dim=(0,),
    token_dim=(0,),
)
OPENAI_MEANS = {"eps": "EPSILON", "x_0": "START_X", "mu": "PREVIOUS_X"}


def export_run(
    run: Run, to: str, out: str | os.PathLike, *, drop_variance: bool = False
) -> None:
    """Writes a run in a format of another code.

    A network that predicts its variance has twice the channels. DDPMPipeline of
    diffusers draws with it; its DDIMPipeline and most others cannot.

    Args:
        run: a trained run.
        to: a key of `WRITERS`.
        out: file or folder to write; it must not exist.
        drop_variance: whether to write the network without the variance that it
            predicts, by `without_variance`.

    Raises:
        ValueError: for an unknown format, if `out` exists or has the wrong suffix, if
            the other code cannot compute what this run does, or if there is no variance
            to drop.
    """
    if drop_variance:
        run = without_variance(run)
    writer = choose("to", to, WRITERS)
    files.check_output("out", out, "folder" if to == "diffusers" else "file")
    if Path(out).exists():
        raise ValueError(f"out must name a new file or folder, got {str(out)!r}.")
    writer(run, Path(out))


def learns_variance(run: Run) -> bool:
    """Whether the network of a run predicts its variance, in a second half of channels.

    Args:
        run: any run.
    """
    return run.objective is not None and run.objective.learns_variance


def without_variance(run: Run) -> Run:
    """Returns a run whose network predicts the mean as before, and no variance.

    Its samplers take the posterior's variance ("fixed_small") where they need one.

    Args:
        run: a run whose network is a `UNet` or `DiT` and predicts its variance.

    Raises:
        ValueError: if it is not.
    """
    objective: Any = run.objective
    if not learns_variance(run) or not isinstance(run.model, UNet | DiT):
        raise ValueError(
            "drop_variance is for a 'unet' or 'dit' that predicts its variance, got "
            f"{type(run.model).__name__} that does not."
        )
    last = "conv_out" if isinstance(run.model, UNet) else "out"
    channels = run.model.out_channels

    def first_half(array):  # of the channels of every pixel of a folded block
        pixels = array.reshape(*array.shape[:-1], -1, channels)
        kept = pixels[..., : channels // 2]
        return kept.reshape(*array.shape[:-1], -1)

    params = dict(run.params)
    params[last] = jax.tree.map(first_half, run.params[last])
    config = run.config.copy_and_resolve_references()
    config.objective = dict(mean_type=objective.mean_type, var_type="fixed_small")
    built = configs.build(config, run.image_shape[-1])
    return dataclasses.replace(
        run,
        config=config,
        model=built.model,
        objective=built.objective,
        params=params,
    )


def to_openai(run: Run, out: Path) -> None:
    """Writes a .pt file for improved-diffusion, and a .json file beside it.

    The .json holds what `openai_arguments` returns.

    Args:
        run: a run whose network is a `UNet`.
        out: name of the .pt file.

    Raises:
        ValueError: if the name does not end in .pt or .pth, if the .json exists, or if
            improved-diffusion cannot compute what this run does.
    """
    _write_pt(run, out, openai_arguments, lambda: state_dict(run, "openai"))


def to_dit(run: Run, out: Path) -> None:
    """Writes a .pt file for facebookresearch/DiT, and a .json file beside it.

    The .json holds what `dit_arguments` returns.

    Args:
        run: a run whose network is a `DiT`.
        out: name of the .pt file.

    Raises:
        ValueError: if the name does not end in .pt or .pth, if the .json exists, or if
            the official code cannot compute what this run does.
    """
    known: Any = (run.params, run.model, run.image_shape)
    _write_pt(run, out, dit_arguments, lambda: dit_layout.to_dit(*known))


def _write_pt(
    run: Run,
    out: Path,
    arguments: Callable[[Run], dict[str, Any]],
    tensors: Callable[[], dict[str, np.ndarray]],
) -> None:
    flags = out.with_suffix(".json")
    if out.suffix not in (".pt", ".pth") or flags.exists():
        raise ValueError(f"out must end in .pt and be new, got {str(out)!r}.")
    text = json.dumps(arguments(run), indent=2) + "\n"
    content = torch_files.torch_content(tensors())
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_all_atomic({out: content, flags: text})


def dit_arguments(run: Run) -> dict[str, dict[str, Any]]:
    """Returns the arguments with which facebookresearch/DiT builds the same model.

    Args:
        run: a run whose network is a `DiT`.

    Returns:
        {"model": ..., "diffusion": ...}: plain keyword arguments of its DiT, and of its
        GaussianDiffusion.

    Raises:
        ValueError: if the official code cannot compute what this run does.
    """
    model, (h, w, c) = run.model, run.image_shape
    if not isinstance(model, DiT) or model.num_classes is None or h != w:
        labels = getattr(model, "num_classes", None)
        raise ValueError(
            "the network must be a 'dit' with labels, of square images, to be written "
            f"for DiT, got {type(model).__name__} with num_classes = {labels}, of "
            f"{h} x {w} images."
        )
    dropout = run.config.get("label_dropout", 0.0)
    arguments = dict(
        input_size=h,
        patch_size=model.patch_size,
        in_channels=c,
        hidden_size=model.channels,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
        class_dropout_prob=dropout,
        num_classes=model.num_classes - bool(dropout),
        learn_sigma=learns_variance(run),
    )
    return {"model": arguments, "diffusion": gaussian_diffusion_arguments(run)}


def openai_arguments(run: Run) -> dict[str, dict[str, Any]]:
    """Returns the arguments with which improved-diffusion builds the same model.

    Args:
        run: a run whose network is a `UNet`.

    Returns:
        {"model": ..., "diffusion": ...}: plain keyword arguments of its UNetModel
        (SuperResModel for a network with low_res), and of its GaussianDiffusion.

    Raises:
        ValueError: if improved-diffusion cannot compute what this run does.
    """
    model = _unet(run)
    differing = []
    if model.multipliers[0] != 1 or any(m != int(m) for m in model.multipliers):
        differing.append(f"multipliers = {model.multipliers}")
    diffusers_config.check_fields(
        "the network must be one that improved-diffusion can compute",
        vars(model),
        OPENAI_FIELDS,
        differing,
    )
    heights = [run.image_shape[0] >> i for i in range(len(model.multipliers))]
    arguments = dict(
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
    return {"model": arguments, "diffusion": gaussian_diffusion_arguments(run)}


def gaussian_diffusion_arguments(run: Run) -> dict[str, Any]:
    """Returns the arguments of OpenAI's GaussianDiffusion, which DiT's is as well.

    Raises:
        ValueError: if it cannot compute the process of this run.
    """
    objective: Any = run.objective
    schedule = run.config.schedule
    check_not_preconditioned(objective)
    return dict(
        betas=configs.make_betas(schedule).tolist(),
        model_mean_type=choose(
            "the mean_type for improved-diffusion", objective.mean_type, OPENAI_MEANS
        ),
        model_var_type=objective.var_type.upper(),
        rescale_timesteps=schedule.get("rescale_timesteps", False),
    )


def check_not_preconditioned(objective: Any) -> None:
    """Raises ValueError for a preconditioned network: no code has one on a chain."""
    if objective.precondition:
        raise ValueError(
            "precondition must be False for other codes to read the output of a chain's"
            " network, got True."
        )


def to_diffusers(run: Run, out: Path) -> None:
    """Writes a folder that `diffusers.DDPMPipeline.from_pretrained` loads.

    No pipeline of diffusers draws with a scheduler of EDM; of such a run the folder has
    network and scheduler, and they draw by a loop of one's own:

        unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
        scheduler = EDMEulerScheduler.from_pretrained(folder, subfolder="scheduler")
        scheduler.set_timesteps(18)
        x = torch.randn(1, 3, 32, 32) * scheduler.config.sigma_max
        for t in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x).prev_sample

    Args:
        run: a run whose network is a `UNet`.
        out: the folder.

    Raises:
        ValueError: if diffusers cannot compute this network or this process.
    """
    unet = diffusers_config.config_from_unet(_unet(run), run.image_shape)
    schedule = run.config.schedule
    pipeline: str | None = "DDPMPipeline"
    if isinstance(betas := configs.make_process(schedule), Levels):
        scheduler, pipeline = diffusers_levels.scheduler_of_levels(
            dict(schedule), cast(Any, run.objective)
        )
    else:
        check_not_preconditioned(run.objective)
        scheduler = diffusers_config.scheduler_from_process(
            betas, run.objective, schedule.get("rescale_timesteps", False)
        )
    index = {
        "_class_name": pipeline,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    tensors = state_dict(run, "diffusers")
    content: dict[str, files.Content] = {
        f"unet/{WEIGHTS}.safetensors": safetensors_files.safetensors_content(
            tensors, {"format": "pt"}
        ),
        "unet/config.json": json.dumps(unet, indent=2) + "\n",
        "scheduler/scheduler_config.json": json.dumps(scheduler, indent=2) + "\n",
    }
    if pipeline is not None:
        content["model_index.json"] = json.dumps(index, indent=2) + "\n"
    for name in content:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
    files.write_all_atomic({out / name: text for name, text in content.items()})


def to_safetensors(run: Run, out: Path) -> None:
    """Writes parameters under our own names, with config and image shape as metadata.

    Args:
        run: a run of any network.
        out: name of the .safetensors file.

    Raises:
        ValueError: if the name does not end in .safetensors.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"out must end in .safetensors, got {str(out)!r}.")
    record = dict(
        config=json.loads(run.config.to_json()),
        image_shape=run.image_shape,
        format=configs.FORMAT,
    )
    tensors: dict[str, Any] = flatten_dict(run.params, sep=".")
    safetensors_files.write_safetensors(out, tensors, {RECORD: json.dumps(record)})


WRITERS: dict[str, Callable[[Run, Path], None]] = {
    "openai": to_openai,
    "dit": to_dit,
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


def state_dict(run: Run, layout: str) -> dict[str, np.ndarray]:
    """Returns the parameters of a run as another code names and stores them.

    Args:
        run: a run whose network is a `UNet` or a `NoisyClassifier`.
        layout: a key of `layouts.LAYOUTS`.

    Raises:
        ValueError: if the layout has no place for one of the layers.
    """
    wanted = layouts.leaves(run.params, layout, layouts.heads_of(run.model))
    return layouts.to_torch(run.params, wanted)
