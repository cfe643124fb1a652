"""Reads what sampling starts from, and checks that it fits the run.

That is: labels, images of tasks, small images to enlarge, a classifier that guides.
"""

import os
from typing import Any

import numpy as np

from jax_diffusion import data
from jax_diffusion.models import traits
from jax_diffusion.pipeline.options import SamplingOptions
from jax_diffusion.pipeline.run import Run, load_run, open_images
from jax_diffusion.pipeline.tasks import TaskOptions


def load_other(field: str, workdir: str | os.PathLike) -> Run:
    """`load_run` of a second run; errors begin with the field that names it."""
    try:
        return load_run(workdir)
    except ValueError as error:
        raise ValueError(
            f"{field} must be a workdir that can be loaded, got: {error}"
        ) from error


def load_classifier(workdir: str | os.PathLike, run: Run) -> Run:
    """Loads a classifier of noisy images that fits a run.

    Raises:
        ValueError: unless it is one, of such images, noised by such a schedule.
    """
    other = load_other("classifier", workdir)
    if other.objective is not None:
        raise ValueError(f"classifier must be a classifier's run, got {workdir}.")
    if other.image_shape != run.image_shape:
        raise ValueError(
            f"classifier must be of images {run.image_shape}, as the run's, got "
            f"{other.image_shape}."
        )
    if dict(other.config.schedule) != dict(run.config.schedule):
        raise ValueError(
            f"classifier must have the run's schedule, {dict(run.config.schedule)}, "
            f"got {dict(other.config.schedule)}."
        )
    return other


def check_inputs(
    run: Run, options: SamplingOptions, task: TaskOptions, upsample: Run | None
) -> None:
    """Checks that task, sampler and second stage fit the run.

    Raises:
        ValueError: if one of them does not fit, with the reason.
    """
    row, channels = task.row, run.image_shape[-1]
    if row.needs_noise and not (options.row.adds_noise or options.eta):
        raise ValueError(
            f"task {task.task!r} needs noise in its steps, by sampler ddpm or by eta, "
            f"got {options.sampler!r}."
        )
    if row.channels not in (None, channels):
        raise ValueError(
            f"task {task.task!r} needs images of {row.channels} channels, got "
            f"{channels}."
        )
    enlarges = traits(run.model).low_res
    if (task.low_res is not None) != enlarges:
        raise ValueError(
            "low_res must be given for a network with low_res and for no other, got "
            f"{task.low_res!r}."
        )
    if upsample is None:
        return
    if task.task != "generate":
        raise ValueError(f"upsample is for the task generate, got {task.task!r}.")
    if not traits(upsample.model).low_res:
        raise ValueError(
            f"upsample must be a run of a network with low_res, got {upsample.workdir}."
        )
    if upsample.image_shape[-1] != channels:
        raise ValueError(
            f"upsample must have {channels} channels, as the images, got "
            f"{upsample.image_shape[-1]}."
        )
    known = traits(upsample.model).num_classes
    if known is not None and known < run.num_labels:
        raise ValueError(f"upsample must know {run.num_labels} labels, got {known}.")


def read_rows(
    run: Run, options: SamplingOptions, task: TaskOptions, classifier: Any
) -> dict[str, np.ndarray]:
    """Reads labels, and images to start from or to enlarge.

    Args:
        classifier: the network that guides, or None.

    Returns:
        Arrays [k, ...] by name, "label" int32 and perhaps "image", "next" or "low_res"
        uint8; image i has row i of each, in turn.

    Raises:
        ValueError: if something cannot be read, or does not fit the run.
    """
    num_classes = traits(run.model).num_classes
    rows: dict[str, np.ndarray] = {}
    labels = None
    if task.low_res is not None:
        rows["low_res"], labels = _read_low_res(task.low_res, run)
    if task.row.from_images:
        if isinstance(task.images, np.ndarray):
            images, _ = data.check_arrays(task.images, None)
        else:
            batches = open_images(run, task.images, task.split, batch_size=1, gray=True)
            images, labels = batches.images, batches.labels
        if images.shape[-1] == 1 and run.image_shape[-1] == 3:  # gray is a color, too
            images = np.repeat(images, 3, axis=-1)
        if images.shape[1:] != run.image_shape:
            raise ValueError(
                f"images must be {run.image_shape}, as the run's, got "
                f"{images.shape[1:]}."
            )
        rows["image"] = images
        if task.row.takes_next:
            rows["next"] = np.roll(rows["image"], -1, axis=0)
    known = run.num_labels if num_classes is not None else None
    if classifier is not None:
        answers = traits(classifier).num_labels or 1
        known = answers if known is None else min(known, answers)
    wanted = options.labels(known)
    if wanted is not None:
        labels = wanted
    elif labels is None or known is None:
        labels = np.arange(known or 1)
    elif labels.max() >= known:
        raise ValueError(
            f"labels of the images must be below {known}, got {labels.max()}."
        )
    return {**rows, "label": labels.astype(np.int32)}


def _read_low_res(low_res: Any, run: Run) -> tuple[np.ndarray, np.ndarray | None]:
    """Images to enlarge and their labels, if they have any."""
    known, channels = traits(run.model).num_classes, run.image_shape[-1]
    if isinstance(low_res, np.ndarray):
        images, labels = low_res, None
        if low_res.dtype != np.float32:
            images, _ = data.check_arrays(low_res, None)
    else:
        images, labels = data.load_npz("all", low_res, None)
    if images.shape[-1] != channels:
        raise ValueError(
            f"low_res must have {channels} channels, got {images.shape[-1]}."
        )
    if known is not None and labels is not None and labels.max() >= known:
        raise ValueError(f"low_res must have labels below {known}, got {labels.max()}.")
    return images, labels
