"""Denoising diffusion in JAX: pure functions, and a trainer that uses them.

    import jax_diffusion as jd
    jd.train(jd.load_config("digits"), "runs/digits")
    run = jd.load_run("runs/digits")
    images = jd.sample_images(run, n=64, sampler="ddim", steps=50)
    results = jd.evaluate(run, metrics=["pixel_distance", "bpd"])

The mathematics needs jax, numpy and jaxtyping, and takes a network from any library:

    checks        whether an argument is a number in its range; where arrays lie
    schedules     variances and noise levels -> NoiseSchedule
    spacing       which steps of a schedule to take
    diffusion     forward process, posterior, eps / x_0 / v / mu; the denoiser
    timesteps     which timesteps to train on
    losses        simple, variational and hybrid losses; weightings
    samplers      DDPM, DDIM, DPM-Solver++, Heun; one scan over steps; inpainting
    guidance      classifier-free, by a weaker network, a classifier, a measurement
    editing       RePaint, SDEdit, reconstruction; posterior sampling
    likelihood    bits/dim by the variational bound and by the ODE

Parts, which know nothing of each other:

    models        Flax networks: U-Nets, classifiers, Inception
    data          data sets -> uint8 batches that depend on (seed, step) only
    metrics       FID, KID, Inception score, precision and recall, on arrays
    interop       checkpoints of other codes, and ours for them
    runtime       checkpoints, sharding, logs, files, preemption
    plotting      grids of images, GIFs, curves
    export        a sampler as one file, without this package
    registry      looks names up, or imports "package.module:function"

What uses them, lowest first:

    training      train step, optimizer; from a config to a compiled step
    config        loads and checks configs; builds what they describe
    pipeline      a trained run as Python functions; inpaint, edit, ... by name
    evaluation    scores of runs and of images
    cli           flags that programs share

Programs, which `python -m jax_diffusion` lists:

    train         a config -> a trained run
    sample        images of a run, guided and edited; its sampler as one file
    evaluate      scores of a run, or of any images
    convert       checkpoints of other codes -> runs, and runs for other codes
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from jax_diffusion import (
    checks,
    diffusion,
    editing,
    guidance,
    likelihood,
    losses,
    samplers,
    schedules,
    spacing,
    timesteps,
)

if TYPE_CHECKING:
    from jax_diffusion.config import load_config
    from jax_diffusion.evaluation import evaluate
    from jax_diffusion.interop.importing import load_checkpoint
    from jax_diffusion.pipeline import Run, SamplingOptions, load_run, sample_images
    from jax_diffusion.train import train

__version__ = "0.2.0"
__all__ = [
    "Run",
    "SamplingOptions",
    "checks",
    "cli",
    "config",
    "convert",
    "data",
    "diffusion",
    "editing",
    "evaluate",
    "evaluation",
    "export",
    "guidance",
    "interop",
    "likelihood",
    "load_checkpoint",
    "load_config",
    "load_run",
    "losses",
    "metrics",
    "models",
    "pipeline",
    "plotting",
    "registry",
    "runtime",
    "sample",
    "sample_images",
    "samplers",
    "schedules",
    "spacing",
    "timesteps",
    "train",
    "training",
]

# Loaded on first use, so that importing the package stays light.
LAZY = {
    "Run": "jax_diffusion.pipeline",
    "SamplingOptions": "jax_diffusion.pipeline",
    "evaluate": "jax_diffusion.evaluation",
    "load_checkpoint": "jax_diffusion.interop.importing",
    "load_config": "jax_diffusion.config",
    "load_run": "jax_diffusion.pipeline",
    "sample_images": "jax_diffusion.pipeline",
    "tasks": "jax_diffusion.pipeline",
    "train": "jax_diffusion.train",
}

MODULES = ("data", "metrics", "models", "interop", "runtime", "plotting", "export")
MODULES += ("registry", "training", "config", "pipeline", "evaluation", "cli")
MODULES += ("sample", "convert")


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return importlib.import_module(f"jax_diffusion.{name}")
    if name not in LAZY:
        raise AttributeError(f"module 'jax_diffusion' has no attribute {name!r}")
    found = getattr(importlib.import_module(LAZY[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*__all__, *MODULES, "__version__"})


class _Package(types.ModuleType):
    """Keeps `train` and `evaluate` functions, although modules have these names, too.

    Otherwise importing the module jax_diffusion.train would replace the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in LAZY and isinstance(value, types.ModuleType):
            value = __getattr__(name)  # of another module, in the case of evaluate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
