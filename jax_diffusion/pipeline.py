"""A trained run, and functions that draw from it: what the programs share."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from jax_diffusion import config as settings
from jax_diffusion import data, diffusion, guidance, samplers, tasks
from jax_diffusion.config import Config
from jax_diffusion.diffusion import DenoiseFn, Objective
from jax_diffusion.models import bind, num_classes
from jax_diffusion.runtime import checkpoint, sharding
from jax_diffusion.schedules import NoiseSchedule
from jax_diffusion.training.step import ema_name

SAMPLERS = {
    "ddpm": samplers.ddpm_step,
    "ddim": samplers.ddim_step,
    "dpmpp_2m": samplers.dpmpp_2m_step,
    "heun": samplers.heun_step,
}
Rows = Mapping[str, np.ndarray]  # what differs by image, [n, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained network and all that is needed to use it."""

    config: Config
    model: nn.Module
    params: PyTree
    objective: Objective | None  # None of a classifier
    image_shape: tuple[int, ...]
    ema: str  # which average `params` are, or "none"

    @property
    def null_label(self) -> int | None:
        """What the network was told where labels were hidden; None if never."""
        hides = self.config.get("label_dropout")
        return num_labels(self.model, self.config) if hides else None

    @property
    def num_labels(self) -> int:
        """How many labels there are to draw; 1 of a network that takes none."""
        return num_labels(self.model, self.config)


def num_labels(model: nn.Module, config: Config) -> int:
    """How many labels there are to draw: one less where the last means hidden."""
    hidden = 1 if config.get("label_dropout") else 0
    return (num_classes(model) or 1) - hidden


def load_run(workdir: str | Path, ema: str | None = None) -> Run:
    """Reads the newest checkpoint of a workdir.

    Args:
        ema: which average of the parameters, such as "0.999"; default the first of the
            config's; "none" for the parameters themselves.

    Raises:
        ValueError: if there is no checkpoint, or no such average.
    """
    record = checkpoint.load_record(workdir)
    config: Config = ConfigDict(record["config"])
    schedule = settings.make_schedule(config.schedule)
    objective = settings.make_objective(config.objective, schedule)
    image_shape = tuple(record["image_shape"])
    model = settings.make_model(config.model, objective, image_shape[-1])
    if ema is None:  # a converted checkpoint is one average already
        ema = ema_name(config.ema_decays[0]) if config.ema_decays else "none"
    params = checkpoint.load_params(workdir, ema=None if ema == "none" else ema)
    return Run(config, model, params, objective, image_shape, ema)


def open_split(config: Config, split: str, **changes: Any) -> data.Batches:
    """One split of the data of a config, in order and unflipped."""
    group = {**config.data, "split": split, "flip": False, **changes}
    return settings.call(data.load, group, "config.data", train=False)


def load_images(
    run: Run, source: str | None, split: str, *, batch_size: int
) -> data.Batches:
    """One split, in order and unflipped, of the run's data set or of NAME:PATH.

    Raises:
        ValueError: if it cannot be read or its images have not the size of the run's.
    """
    changes: dict[str, Any] = dict(batch_size=batch_size)
    if source is not None:
        name, _, path = source.partition(":")
        changes |= dict(name=name, path=path or None, image_size=run.image_shape[0])
        changes["in_memory"] = None  # that was said of the run's own
    batches = open_split(run.config, split, **changes)
    if batches.image_shape != run.image_shape:
        raise ValueError(
            f"images must be {run.image_shape}, as the run's, got "
            f"{batches.image_shape}."
        )
    return batches


def make_sampler(
    model: nn.Module,
    objective: Objective | None,
    image_shape: tuple[int, ...],
    *,
    sampler: str = "ddim",
    clip: bool = True,
    threshold: float | None = None,
    null_label: int | None = None,
    classifier: nn.Module | None = None,
    reclip: bool = True,
    task: str = "generate",
    options: tasks.Options | None = None,
    on_step: Callable[[Any], None] | None = None,
) -> Callable[..., Any]:
    """Builds a compiled draw(params, schedule, seed, rows, numbers) -> frames.

    Frames are float32 [k, b, h, w, c], k as the task has it. `params` hold the network
    as "model" and perhaps a "classifier". `rows` have for each image its "ids", its
    "label", and "low_res" or "image" if the network or the task wants them. `numbers`
    are "eta" of DDIM, and, for guidance, "scale", "rescale", "low" and "high" (without
    a classifier) or "classifier_scale", "low" and "high". Schedules padded to one
    length, and all numbers, share one compilation.

    Args:
        clip: the predicted x_0, to [-1, 1], or to its own quantile `threshold`.
        null_label: of classifier-free guidance.
        reclip: clip x_0 again after a classifier has shifted it, which guided-diffusion
            does not; "ddpm" shifts its mean, and there is nothing to clip.
        on_step: called on the host with the timestep of every step.

    Raises:
        ValueError: for an unknown sampler or task, or a network that is a classifier.
    """
    if objective is None:
        raise ValueError("the run must be of a denoiser, got a classifier's.")
    step_fn = settings.choose("sampler", sampler, SAMPLERS)
    run_task = settings.choose("task", task, tasks.TASKS)
    options = options or tasks.Options()
    clipped = _clipping(clip, threshold)

    @jax.jit
    def draw(params, schedule, seed, rows, numbers):
        denoise_fn = _labelled(
            model, objective, params["model"], schedule, rows, numbers, null_label
        )
        denoise_fn = clipped(denoise_fn)
        if classifier is not None:
            denoise_fn = _classified(
                denoise_fn, classifier, params["classifier"], schedule, rows, numbers
            )
            if reclip and sampler != "ddpm":  # which shifts its mean instead
                denoise_fn = clipped(guidance.shift_x_0(denoise_fn, schedule))
        eta = {"eta": numbers["eta"]} if sampler == "ddim" else {}
        step = functools.partial(step_fn, **eta)
        if on_step is not None:
            step = samplers.watch(step, on_step)
        job = tasks.SamplingContext(seed, rows, denoise_fn, step, schedule, image_shape)
        return run_task(job, options)

    return draw


def _clipping(clip, threshold) -> Callable[[DenoiseFn], DenoiseFn]:
    if not clip:
        return lambda denoise_fn: denoise_fn
    if threshold is None:
        return diffusion.clip_x_0
    return functools.partial(diffusion.threshold_x_0, quantile=threshold)


def _within(schedule, numbers, name, *, outside):
    low, high = (numbers.get(k, v) for k, v in (("low", 0.0), ("high", np.inf)))
    return guidance.within(schedule, numbers[name], low=low, high=high, outside=outside)


def _labelled(
    model, objective, params, schedule, rows, numbers, null_label
) -> DenoiseFn:
    """The denoiser that knows its label, and is guided by it if a scale is given."""

    def model_fn(x_t, timesteps, label, **more):
        return bind(model, params, label, **more)(x_t, timesteps)

    denoise_fn = diffusion.denoiser(model_fn, schedule, objective)
    label, more = rows["label"], {k: rows[k] for k in ("low_res",) if k in rows}
    if "scale" not in numbers:
        return functools.partial(denoise_fn, label=label, **more)
    scale = _within(schedule, numbers, "scale", outside=1.0)
    guided = guidance.classifier_free(
        denoise_fn, label, null_label, scale, rescale=numbers["rescale"]
    )
    return functools.partial(guided, **more)


def _classified(denoise_fn, classifier, params, schedule, rows, numbers) -> DenoiseFn:
    """The denoiser that a classifier guides to the label."""
    logits_fn = bind(classifier, params, rows["label"])
    log_prob = guidance.label_log_prob(logits_fn, rows["label"])
    scale = _within(schedule, numbers, "classifier_scale", outside=0.0)
    return guidance.classifier(denoise_fn, schedule, log_prob, scale)


def pick(arrays: Rows, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Rows for these images, going round; uint8 images are scaled to [-1, 1]."""
    rows = {name: a[ids % len(a)] for name, a in arrays.items()}
    return {
        name: data.from_uint8(a) if a.dtype == np.uint8 else a
        for name, a in rows.items()
    }


def generate(
    draw: Callable[..., Any],
    params: PyTree,
    schedule: NoiseSchedule,
    arrays: Rows,
    *,
    n: int,
    first: int = 0,
    seed: int = 0,
    numbers: Mapping[str, float] | None = None,
    batch_size: int = 256,
    rounding: str = "floor",
    mesh: Mesh | None = None,
    on_compiled: Callable[[float], None] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches of frames, uint8 [k, b, h, w, c], and their labels [b].

    Images are numbered first, ..., first + n - 1. On several hosts, all of them call it
    and get all images.

    Args:
        arrays: rows of `make_sampler` but "ids"; image i has row i of each, see `pick`.
        mesh: of the devices that share the work; default all.
        on_compiled: is told the seconds that compilation took.
    """
    mesh = mesh or sharding.make_mesh()
    params = sharding.replicate(mesh, params)
    scalars = {k: np.float32(v) for k, v in {"eta": 0.0, **(numbers or {})}.items()}
    for start in range(first, first + n, batch_size):
        ids = np.arange(start, start + batch_size, dtype=np.int32)  # one shape for all
        rows = sharding.shard_padded(mesh, {"ids": ids, **pick(arrays, ids)})
        inputs = (params, schedule, np.uint32(seed % 2**32), rows, scalars)
        if on_compiled is not None:
            begun = time.perf_counter()
            draw = draw.lower(*inputs).compile()  # type: ignore[attr-defined]
            on_compiled(time.perf_counter() - begun)
            on_compiled = None
        frames = sharding.fetch(draw(*inputs))
        keep = min(batch_size, first + n - start)
        labels = arrays["label"][ids % len(arrays["label"])]
        yield data.to_uint8(frames, rounding)[:, :keep], labels[:keep]
