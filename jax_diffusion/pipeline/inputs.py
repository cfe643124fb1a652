"""Reads what sampling starts from, and checks that it fits the run.

That is: labels, images of tasks, small images to enlarge, a classifier that guides.
"""

import os
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_diffusion import checks, data
from jax_diffusion import config as configs
from jax_diffusion.models import check_takes, traits
from jax_diffusion.pipeline.options import SamplingOptions
from jax_diffusion.pipeline.run import (
    Run,
    fit_labels,
    load_run,
    old_names,
    open_images,
    workdir_and_ema,
)
from jax_diffusion.pipeline.tasks import TaskOptions


def load_other(field: str, workdir: str | os.PathLike, ema: str | None = None) -> Run:
    """`load_run` of a second run; errors begin with the field that names it."""
    try:
        return load_run(workdir, ema)
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
    check_noised_alike("classifier", other, run)
    return other


def load_guides(run: Run, options: SamplingOptions) -> dict[str, Run]:
    """Loads the runs that guide another one: "classifier" and "guide", if given."""
    guides = {}
    if options.classifier is not None:
        guides["classifier"] = load_classifier(options.classifier, run)
    if options.guide_with is not None:
        guides["guide"] = load_guide(options.guide_with, run)
    return guides


def load_guide(workdir: str | os.PathLike, run: Run) -> Run:
    """Loads a weaker run that guides another one, of WORKDIR or WORKDIR:EMA.

    Raises:
        ValueError: unless it is of a denoiser, of such images, noised by such a
            schedule, and takes the same labels or none.
    """
    other = load_other("guide_with", *workdir_and_ema(workdir))
    if other.objective is None:
        raise ValueError(f"guide_with must be a denoiser's run, got {workdir}.")
    check_noised_alike("guide_with", other, run)
    known, theirs = traits(run.model), traits(other.model)
    if theirs.low_res != known.low_res:
        raise ValueError(
            "guide_with must take small images if the run does and not otherwise, got "
            f"{workdir}."
        )
    for name in ("cond_dim", "token_dim"):
        if getattr(theirs, name) not in (0, getattr(known, name)):
            raise ValueError(
                f"guide_with must take what the run takes of cond and tokens, {name} = "
                f"{getattr(known, name)}, or none, got {getattr(theirs, name)}."
            )
    own, others = (
        r.class_names or f"{r.num_labels if r.takes_labels else 'no'} classes"
        for r in (run, other)
    )
    differ = not run.takes_labels or run.num_labels != other.num_labels
    differ |= None not in (run.class_names, other.class_names) and own != others
    if other.takes_labels and differ:
        own, others = (
            a if isinstance(a, str) else data.in_words(a) for a in (own, others)
        )
        raise ValueError(
            f"guide_with must have the run's classes, {own}, or take none, got "
            f"{others}."
        )
    return other


def check_noised_alike(field: str, other: Run, run: Run) -> None:
    """Raises ValueError unless two runs have the same images and the same schedule."""
    if other.image_shape != run.image_shape:
        raise ValueError(
            f"{field} must be of images {run.image_shape}, as the run's, got "
            f"{other.image_shape}."
        )
    # One process can be written in several ways.
    ours, theirs = (configs.make_schedule(r.config.schedule) for r in (run, other))
    same = jax.tree.map(partial(np.array_equal, equal_nan=True), ours, theirs)
    if not all(jax.tree.leaves(same)):
        raise ValueError(
            f"{field} must have the run's schedule, {dict(run.config.schedule)}, "
            f"got {dict(other.config.schedule)}."
        )


def check_inputs(
    run: Run, options: SamplingOptions, task: TaskOptions, upsample: Run | None
) -> None:
    """Checks that task, sampler and second stage fit the run.

    Raises:
        ValueError: if one of them does not fit, with the reason.
    """
    row, channels = task.row, run.image_shape[-1]
    adds_noise = options.row.adds_noise or options.eta or options.churn
    if row.needs_noise and not adds_noise:
        raise ValueError(
            f"task {task.task!r} needs noise in its steps, by `sampler` ddpm or by "
            f"`eta`, got {options.sampler!r}."
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
            f"{checks.shown(task.low_res)}."
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


class Inputs(NamedTuple):
    """What `read_inputs` returns.

    Attributes:
        rows: arrays [k, ...] by name, "label" int32 and perhaps "image", "next" or
            "low_res" uint8 and conditioning; image i has row i of each, in turn.
        guide_labels: the classifier's label for each label, int32; None if they agree.
        upsample_labels: the second stage's, likewise.
        class_names: what the labels are called; None where they are numbers only.
    """

    rows: dict[str, np.ndarray]
    guide_labels: np.ndarray | None = None
    upsample_labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None


def read_inputs(
    run: Run,
    options: SamplingOptions,
    task: TaskOptions,
    guide: Run | None = None,
    upsample: Run | None = None,
) -> Inputs:
    """Reads labels, and images to start from or to enlarge.

    Labels are those of the first network that takes any: of the run, of the classifier
    or of the second stage. The others are told the label of the same name, or of the
    same number where one side does not know names.

    Args:
        run: what draws.
        options: its labels; they replace those of the images.
        task: its images.
        guide: a classifier that guides.
        upsample: a second stage.

    Raises:
        ValueError: if something cannot be read, or does not fit the run; or if labels
            are needed, and neither the images have any nor `options`.
    """
    owner = next((r for r in (run, guide, upsample) if r and r.takes_labels), None)
    known = None if owner is None else owner.num_labels
    guide_labels = _labels_of(guide, owner)
    upsample_labels = _labels_of(upsample, owner)
    names = None if owner is None else owner.class_names
    if guide_labels is not None and not names:  # up to the last one that both know
        known = 1 + int(np.flatnonzero(guide_labels >= 0).max(initial=-1))
    wanted = options.labels(known, names)
    rows, labels, told = read_images(run, task, owner if wanted is None else None)
    if wanted is not None:
        labels = wanted
    elif known is None:
        labels = np.zeros(1, np.int32)
    elif labels is None:
        if rows or (owner is upsample and upsample is not None):
            what = "images have none" if rows else "the run draws without"
            raise ValueError(
                f"label must be given for a network that takes labels where {what}, "
                "got None."
            )
        labels = np.arange(known)
        if guide_labels is not None:  # all that both know
            labels = labels[guide_labels[:known] >= 0]
    for field, table in (("classifier", guide_labels), ("upsample", upsample_labels)):
        if table is not None:
            check_known(field, labels, table, names)
    tables = [
        None if table is None or (table == np.arange(len(table))).all() else table
        for table in (guide_labels, upsample_labels)
    ]
    told = check_told(run, upsample, options, told)
    rows = {**rows, **told, "label": labels.astype(np.int32)}
    return Inputs(rows, *tables, class_names=names)


def check_told(
    run: Run, upsample: Run | None, options: SamplingOptions, told: data.Conditioning
) -> data.Conditioning:
    """Returns the conditioning that run and second stage take, [k, ...] by name.

    Args:
        run, upsample: the networks.
        options: its `cond` replaces what the images have.
        told: that of the images of a task.

    Raises:
        ValueError: if it is missing, not wanted, or of another length.
    """
    given = options.conditioning()
    runs = [one for one in (run, upsample) if one is not None]
    wanted = {name for one in runs for name in one.conditioning}
    for name in given:
        if name not in wanted:
            own = f"takes {' and '.join(sorted(wanted))}" if wanted else "takes neither"
            raise ValueError(
                "cond must hold what the network takes of cond and tokens, got "
                f"{name} for one that {own}."
            )
    told = given or told
    if wanted and not told:
        raise ValueError(
            "cond must be given for a network that takes "
            f"{' and '.join(sorted(wanted - {'tokens_mask'}))}, got None."
        )
    for one in runs:
        check_takes(one.model, told)
    return {name: told[name] for name in told if name in wanted}


def check_known(
    field: str, labels: np.ndarray, table: np.ndarray, names: tuple[str, ...] | None
) -> None:
    """Raises ValueError if a second network does not know a label that is drawn."""
    missing = [i for i in np.unique(labels) if table[i] < 0]
    if len(labels) and not missing:
        return
    if not names:
        known = int((table >= 0).sum())
        raise ValueError(f"{field} must know {len(table)} labels, got {known}.")
    unknown = data.in_words([names[i] if i < len(names) else i for i in missing])
    raise ValueError(
        f"{field} must know all labels that are drawn, got one that does not know "
        f"{unknown or data.in_words(names)}."
    )


def _labels_of(other: Run | None, owner: Run | None) -> np.ndarray | None:
    """The label in another network of each label of `owner`, -1 for none."""
    if other is None or owner is None or not other.takes_labels:
        return None
    table = np.arange(owner.num_labels)
    own, others = _names_beside(owner, other), _names_beside(other, owner)
    # A number is a name to the side whose classes are all called by numbers.
    if others is None and (called := data.numbers_called(own)):
        own, others = _as_text(called), _as_text(range(other.num_labels))
    elif own is None and (called := data.numbers_called(others)):
        own, others = _as_text(range(owner.num_labels)), _as_text(called)
    if own and others:
        table = np.full(owner.num_labels, -1)
        found = data.label_table(own, others)
        table[: len(found)] = found[: len(table)]
    return np.where(table < other.num_labels, table, -1).astype(np.int32)


def _as_text(numbers: Iterable[int]) -> tuple[str, ...]:
    return tuple(map(str, numbers))


def _names_beside(run: Run, other: Run) -> tuple[str, ...] | None:
    """What a run's labels are called; of one of version 0.1, as its own folder tells.

    If the folder cannot be read, the names of `other` are taken, where it has as many:
    sorted as text, as that version sorted the classes of a folder.
    """
    if run.class_names is not None:
        return run.class_names
    names = old_names(run)
    if names == () and len(other.class_names or ()) == run.num_labels:
        return tuple(sorted(other.class_names or ()))
    return names


def as_images(field: str, images: Any) -> np.ndarray:
    """Returns an array of images as uint8 [n h w c]; errors begin with the field."""
    try:
        return data.check_arrays(images, None)[0]
    except ValueError as error:
        raise ValueError(str(error).replace("images", field, 1)) from error


def read_images(
    run: Run, task: TaskOptions, owner: Run | None
) -> tuple[dict[str, np.ndarray], np.ndarray | None, data.Conditioning]:
    """Images of a task or to enlarge, their labels and conditioning.

    Args:
        run: what draws.
        task: names the images.
        owner: the run whose labels they need; None if they need none.
    """
    rows: dict[str, np.ndarray] = {}
    examples, field = None, "images"
    is_array = np.ndarray | jax.Array
    low_res: Any = task.low_res
    given: Any = task.images
    if low_res is not None:
        field = "low_res"
        if isinstance(low_res, is_array):
            if low_res.dtype == np.float32:
                checks.array("low_res", low_res, "float", ("n", "h", "w", "c"))
                rows["low_res"] = np.asarray(low_res)
            else:
                rows["low_res"] = as_images("low_res", low_res)
        else:
            examples = data.open_stored(low_res, field)
    elif task.row.from_images:
        if isinstance(given, is_array):
            rows["image"] = as_images("images", given)
        else:
            split = task.split_of_images
            of_split: Any = dict(batch_size=1, gray=True, labels=False)
            examples = open_images(run, given, split, **of_split).examples
    labels, told = None, {}
    if examples is not None:
        batch = examples.read_batch(np.arange(len(examples)))
        rows["low_res" if field == "low_res" else "image"] = batch.pop("image")
        told = {name: a for name, a in batch.items() if name != "label"}
        if owner is not None:
            own = given is None and low_res is None and owner is run
            remedy = "; give `label` instead"
            examples = fit_labels(examples, owner, field, own=own, remedy=remedy)
            labels = examples.labels
    for name, images in rows.items():
        gray = name == "image" and images.shape[-1] == 1
        if gray and run.image_shape[-1] == 3:  # it is a color, too
            images = rows[name] = np.repeat(images, 3, axis=-1)
        wrong = images.shape[1:] != run.image_shape
        if name == "image" and wrong:
            array = isinstance(given, is_array)
            got = checks.shown(given) if array else images.shape[1:]
            raise ValueError(
                f"images must be [n h w c] with (h, w, c) {run.image_shape}, as the "
                f"run's, got {got}."
            )
        if name == "low_res" and images.shape[-1] != run.image_shape[-1]:
            raise ValueError(
                f"low_res must have {run.image_shape[-1]} channels, got "
                f"{images.shape[-1]}."
            )
    if task.row.takes_next:
        rows["next"] = np.roll(rows["image"], -1, axis=0)
    return rows, labels, told
