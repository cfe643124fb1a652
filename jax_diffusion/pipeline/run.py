"""Loads a trained run, and opens the images that belong to it."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from jax_diffusion import checks, data
from jax_diffusion import config as configs
from jax_diffusion.config import Config
from jax_diffusion.diffusion import Objective
from jax_diffusion.models import Network, check_takes, traits
from jax_diffusion.pipeline.options import SamplingOptions
from jax_diffusion.runtime import checkpoint
from jax_diffusion.training.averages import (
    MAX_WIDTH,
    average_names,
    ema_name,
    width_name,
    width_of,
)
from jax_diffusion.training.post_hoc_ema import load_width


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained network and all that is needed to use it.

    Attributes:
        config: the config of its training.
        model: the network.
        params: its parameters.
        objective: how its output is read; None for a classifier.
        image_shape: (h, w, c).
        ema: which average `params` are, such as "0.9999" or "width=0.1", or "none".
        step: the number of updates made.
        workdir: where it was loaded from; None for a checkpoint of another code.
        class_names: what the labels are called; None where they are numbers only, as
            of checkpoints of version 0.1 and of other codes.
    """

    config: Config
    model: Network
    params: PyTree = dataclasses.field(repr=False)
    objective: Objective | None
    image_shape: tuple[int, ...]
    ema: str = "none"
    step: int = 0
    workdir: Path | None = None
    class_names: tuple[str, ...] | None = None

    @property
    def takes_labels(self) -> bool:
        """Whether labels matter to the network: it takes them, or tells them apart."""
        known = traits(self.model)
        return known.num_classes is not None or known.num_labels is not None

    @property
    def conditioning(self) -> tuple[str, ...]:
        """Names of what the network takes of `data.conditioning`."""
        return tuple(name for name in traits(self.model).null if name != "label")

    @property
    def null(self) -> dict[str, Any] | None:
        """What means no conditioning, by name; None if nothing was ever hidden."""
        return traits(self.model).null if self.config.get("label_dropout") else None

    @property
    def null_label(self) -> int | None:
        """The label of `null`; None if there is none."""
        return (self.null or {}).get("label")

    @property
    def num_labels(self) -> int:
        """The number of labels that it knows; 1 for a network that takes none."""
        hidden, known = 1 if self.config.get("label_dropout") else 0, traits(self.model)
        return known.num_labels or max(known.num_classes or 1, 1 + hidden) - hidden


def load_run(
    workdir: str | os.PathLike,
    ema: str | float | None = None,
    *,
    ema_width: float | None = None,
) -> Run:
    """Loads the newest checkpoint of a workdir.

    Args:
        workdir: a folder that `train` or `convert` has made.
        ema: which average of the parameters, such as "0.999"; by default the first of
            the config's; "none" for the parameters themselves; "width=0.1" as below.
        ema_width: relative width of an average by a power function, for a run with
            config.ema_widths: one of these, or any that can be reconstructed from
            snapshots, see `training.post_hoc_ema`.

    Raises:
        ValueError: if there is no checkpoint, or no such average.
    """
    checks.path("workdir", workdir, "the path of a folder")
    if ema_width is not None:
        checks.number("ema_width", ema_width, above=0, at_most=MAX_WIDTH)
        if ema is not None:
            rule = "ema must be left out where `ema_width` is given"
            raise ValueError(f"{rule}, got {checks.shown(ema)}.")
        ema = width_name(ema_width)
    if isinstance(ema, float):
        ema = ema_name(ema)
    if not isinstance(ema, str | None):
        raise ValueError(
            f"ema must be a name such as '0.999', got {checks.shown(ema)}."
        )
    workdir = Path(workdir)
    record = checkpoint.load_record(workdir)
    config = configs.of_record(record)
    image_shape = tuple(record["image_shape"])
    built = configs.build(config, image_shape[-1])
    widths = config.get("ema_widths", ())  # which runs of old have not
    if ema is None:  # a converted checkpoint is one average already
        ema = [*average_names(config.ema_decays, widths), "none"][0]
    width = width_of(ema)
    if width is None:
        name = None if ema == "none" else ema
        step, params = checkpoint.load_step_params(workdir, ema=name)
    else:
        step, params = load_width(workdir, widths, width)
    run = Run(
        config,
        built.model,
        params,
        built.objective,
        image_shape,
        ema,
        step=step,
        workdir=workdir,
        class_names=names_of_record(record),
    )
    shape = " x ".join(map(str, image_shape))
    line = f"{workdir}: step {step}, ema {ema}, images of {shape}"
    if run.takes_labels:
        names = data.in_words(run.class_names or (), data.SHOWN)
        line += f", {run.num_labels} classes{f' ({names})' * bool(names)}"
    data.LOGGER.info("%s", line)
    return run


def workdir_and_ema(source: str | os.PathLike) -> tuple[Path, str | None]:
    """Returns the parts of WORKDIR:EMA, or of WORKDIR@EMA; without EMA it is None.

    A path that is there as it is has no EMA.
    """
    text = os.fspath(source)
    for mark in "" if Path(text).expanduser().exists() else ":@":
        head, found, ema = text.rpartition(mark)
        if found and (place := Path(head).expanduser()).exists():
            return place, ema
    return Path(text).expanduser(), None


def names_of_record(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Returns the names of classes in the record of a checkpoint, if it has any."""
    names = record.get("class_names")
    return None if names is None else tuple(names)


def open_split(config: Config, split: str, **changes: Any) -> data.Batches:
    """Opens one split of the data of a config, in order and unflipped.

    Args:
        config: a whole config.
        split: "train", "test" or "all".
        changes: fields of config.data to replace.

    Raises:
        ValueError: if the data cannot be read, or a field is wrong.
    """
    given = {"split": split, "flip": False, "train": False, **changes}
    group = {k: v for k, v in with_effect(config.data).items() if k not in given}
    return configs.call(data.load, group, "config.data", **given)


def with_effect(group: Config) -> dict[str, Any]:
    """Returns the group data of a config without a path that has no effect.

    Runs of older versions may have one; `data.load` refuses it.
    """
    useless = ["path"] if group.get("name") in data.WITHOUT_PATH else []
    return {name: value for name, value in group.items() if name not in useless}


def open_images(
    run: Run,
    source: str | os.PathLike | None,
    split: str,
    *,
    batch_size: int,
    gray: bool = False,
    field: str = "images",
    labels: bool = True,
) -> data.Batches:
    """Opens one split of the run's data or of others, in order and unflipped.

    Args:
        run: its data and the shape of its images.
        source: PATH or NAME:PATH of a data set; None for the run's own.
        split: "train", "test" or "all".
        batch_size: number of images of a batch.
        gray: whether images with one channel are fine, whatever the run's have.
        field: what the images are, for errors.
        labels: whether labels and conditioning matter, to a network that takes them;
            then labels are matched with the run's, see `fit_labels`.

    Raises:
        ValueError: if it cannot be read, if its images differ in size from the run's,
            or if it lacks labels that the run knows, or conditioning that it takes.
    """
    changes: dict[str, Any] = dict(batch_size=batch_size)
    if source is not None:
        name, path = data.parse_source(source, field, must_exist=True)
        h, w, _ = run.image_shape
        changes |= dict(name=name, path=path, image_size=h if h == w else (h, w))
        changes["in_memory"] = None  # that was said of the run's own
    batches = open_split(run.config, split, **changes)
    fits = [run.image_shape, (*run.image_shape[:2], 1)]
    if batches.image_shape not in fits[: 2 if gray else 1]:
        raise ValueError(
            f"{field} must be {run.image_shape}, as the run's, got "
            f"{batches.image_shape}."
        )
    names = run.conditioning if labels else ()
    batches = dataclasses.replace(batches, conditioning_names=names)
    if labels:
        check_takes(run.model, batches.conditioning, f" of {field}")
    if not labels or not run.takes_labels:
        return batches
    examples = fit_labels(batches.examples, run, field, own=source is None)
    return dataclasses.replace(batches, examples=examples)


def with_conditioning(
    run: Run, options: SamplingOptions, batch: Mapping[str, np.ndarray]
) -> SamplingOptions:
    """Returns options with the conditioning and labels of a batch, if they have none.

    Args:
        run: whose network takes one of them, or both.
        options: their own `cond` and `label` are kept.
        batch: "label" int [k] in the run's numbers, and conditioning by name.
    """
    found: dict[str, Any] = {}
    if told := {name: batch[name] for name in run.conditioning}:
        found["cond"] = told
    if traits(run.model).num_classes is not None:
        labels, names = batch["label"].tolist(), run.class_names
        found["label"] = [names[i] for i in labels] if names else labels
    missing = {k: value for k, value in found.items() if getattr(options, k) is None}
    return dataclasses.replace(options, **missing)


def fit_labels(
    examples: data.Examples, run: Run, field: str, *, own: bool, remedy: str = ""
) -> data.Examples:
    """Returns the examples with the run's labels, by name where names are known.

    A run of version 0.1 does not know the names of its classes; those of its folder are
    numbered as that version numbered them.

    Args:
        examples: images and labels.
        run: whose network takes labels.
        field: what the examples are, for errors.
        own: whether they are the run's own data.
        remedy: what else can be done, for errors.

    Raises:
        ValueError: if there are no labels, or some that the run does not know.
    """
    names = run.class_names
    if names is None:
        # Numbers stay what they are to it; names are what its own folder calls them.
        if own and (examples.labeled or run.num_labels == 1):
            names = examples.old_class_names
        elif not own and examples.class_names:
            names = old_names(run)
    if names == () and examples.class_names:
        got = f"got {data.in_words(examples.class_names)}"
        if own:
            raise ValueError(
                f"{field} must have the classes of the run, which version 0.1 read "
                f"otherwise from this folder, {got}."
            )
        raise ValueError(
            f"{field} must have labels of the network, whose classes are known by "
            "number only, as its own folder cannot be read or has other classes now, "
            f"{got}{remedy}."
        )
    return data.fit_labels(examples, names, run.num_labels, field, remedy)


def old_names(run: Run) -> tuple[str, ...] | None:
    """What the labels of a run of version 0.1 are called, as its own folder tells.

    That version recorded no names, and sorted the classes of a folder as text.

    Args:
        run: without class names.

    Returns:
        The names by label; () if the folder cannot be read any more, or has other
        classes; None for other data, whose labels were numbers.
    """
    fields = run.config.get("data") or {}
    if fields.get("name") != "folder":
        return None
    try:
        found = data.open_examples("folder", "all", fields.get("path"), 1)
    except ValueError:
        return ()
    names = found.old_class_names or ()
    return names if len(names) == run.num_labels else ()


def match_classes(batches: data.Batches, saved: Mapping[str, Any]) -> data.Batches:
    """Returns the batches with the labels of the run that they continue.

    A checkpoint of version 0.1 has no names of classes; its labels were numbered as
    `Examples.old_class_names` are.

    Args:
        batches: the training images and their labels.
        saved: the record of the checkpoint.

    Raises:
        ValueError: if the classes are others.
    """
    examples, names = batches.examples, names_of_record(saved)
    if "class_names" not in saved:
        names = examples.old_class_names
    own = examples.class_names
    if {*(names or ())} != {*(own or ())}:
        told = [data.in_words(some) if some else "none" for some in (names, own)]
        then = "names that version 0.1 gave them" if names == () else told[0]
        raise ValueError(
            f"classes of the data must be those of the run that is continued, {then}, "
            f"got {told[1]}."
        )
    return dataclasses.replace(
        batches, examples=data.match(examples, names, "training images")
    )
