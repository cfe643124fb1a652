"""Sets of images to score: arrays, files, a split of a data set, or samples of a run.

An `ImageSet` yields its images in batches, from any image on, and says what decides
them. `as_image_set` makes one of whatever a user gives, `from_split` of a run's data,
`drawn` of a run.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jax_diffusion import data
from jax_diffusion.pipeline import (
    BoundSampler,
    Run,
    SamplingOptions,
    bind_sampler,
    open_images,
    with_conditioning,
)
from jax_diffusion.runtime import checkpoint

Arrays = dict[str, np.ndarray]
Images = np.ndarray | str | os.PathLike
AS_THEY_ARE = ("folder", "npz")  # data sets that `data.open_images` opens, unresized


class ImageSet(NamedTuple):
    """Images to be scored.

    Attributes:
        n: the number of images.
        batches: batches(start) yields {"image": uint8 [b h w c], "label": int [b]}, and
            perhaps conditioning, of images start, start + 1, ..., n - 1.
        about: what decides the images, for the record. "image_shape" is (h, w, c).
    """

    n: int
    batches: Callable[[int], Iterator[Arrays]]
    about: dict[str, Any]


def from_reader(
    read: Callable[[np.ndarray], np.ndarray | tuple[np.ndarray, np.ndarray] | Arrays],
    n: int,
    *,
    batch_size: int,
    about: Mapping[str, Any] | None = None,
) -> ImageSet:
    """Returns the set of images 0, ..., n - 1, where read(rows) returns some of them.

    Args:
        read: function of row numbers [b] that returns images uint8 [b h w c], or both
            these and labels [b], or what `ImageSet.batches` yields.
        n: the number of images.
        batch_size: number of images in all batches but perhaps the last one.
        about: what decides the images.
    """

    def batches(start):
        for first in range(start, n, batch_size):
            rows = np.arange(first, min(first + batch_size, n))
            found = read(rows)
            if isinstance(found, dict):
                yield found
                continue
            images, labels = found if isinstance(found, tuple) else (found, 0 * rows)
            yield {"image": images, "label": labels}

    return ImageSet(n, batches, dict(about or {}))


def as_image_set(
    images: Images,
    n: int | None = None,
    *,
    split: str = "all",
    batch_size: int,
    like: Run | None = None,
    field: str = "images",
) -> ImageSet:
    """Returns the first n of some images as they are, neither resized nor cropped.

    Args:
        images: uint8 [n h w c]; or PATH or NAME:PATH, where PATH is of a folder or of a
            .npz or .npy file, and NAME a key of `data.DATASETS`.
        n: how many; default all.
        split: which split of a data set that has a NAME: "train", "test" or "all".
        batch_size: number of images in a batch.
        like: a run whose background and max_value of pictures apply, see `data.load`.
        field: what the images are, for errors.

    Raises:
        ValueError: if these are no images, or fewer than n.
    """
    about: dict[str, Any] = {"by": "array"}
    group = {} if like is None else dict(like.config.data)
    how = {k: group[k] for k in ("background", "max_value") if group.get(k) is not None}
    about |= how
    if isinstance(images, str | os.PathLike):
        about["by"] = os.fspath(images)
        name, path = data.parse_source(about["by"], field, must_exist=True)
        if name in AS_THEY_ARE:
            found = data.open_images(path or "", decoder=data.Decoder(**how))
            about["sha256"] = found.sha256
        else:
            about |= {"split": split, "flip": False}
            of_split: Any = dict(path=path, batch_size=1, train=False, **how)
            found = data.load(name, split, **of_split)
            found = found.examples
        read, count, shape = found.read, len(found), found.image_shape
    else:
        array = np.asarray(images)
        if array.dtype != np.uint8 or array.ndim != 4 or not array.size:
            raise ValueError(
                f"{field} must be uint8 [n h w c], PATH or NAME:PATH, got "
                f"{array.dtype} {array.shape}."
            )
        about["sha256"] = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
        read, count, shape = array.__getitem__, len(array), array.shape[1:]
    if n is not None and n > count:
        raise ValueError(f"n must be at most {count} images, got {n}.")
    about |= {"image_shape": [*shape], "batch_size": batch_size}
    return from_reader(read, n or count, batch_size=batch_size, about=about)


def network_of(run: Run) -> dict[str, Any]:
    """Returns what identifies a run's network: EMA, step and checksum of parameters."""
    return {"ema": run.ema, "step": run.step, "crc32": _crc32(run.params)}


def name_of_data(run: Run, source: str | None = None) -> str:
    """Returns NAME:PATH of the run's data or of others, or NAME without a path."""
    group = run.config.data
    return source or data.source_name(group.name, group.get("path"))


def from_split(
    run: Run,
    split: str,
    n: int | None = None,
    *,
    source: str | None = None,
    batch_size: int,
    labels: bool = False,
) -> ImageSet:
    """Returns the first n images of a split of the run's data, unflipped.

    Args:
        n: how many; default all.
        source: PATH or NAME:PATH of a data set in place of the run's.
        labels: whether the run's network is told their labels and conditioning.

    Raises:
        ValueError: if the data cannot be read, have fewer images than n, or lack labels
            that the network knows.
    """
    of_split: dict[str, Any] = dict(batch_size=batch_size, labels=labels)
    batches = open_images(run, source, split, field="data", **of_split)
    if n is not None and n > batches.num_examples:
        raise ValueError(
            f"bpd_images must be at most {batches.num_examples}, the images of "
            f"{split!r}, got {n}."
        )
    n = n or batches.num_examples
    about = {
        "by": name_of_data(run, source),
        "split": split,
        "flip": False,
        "batch_size": batch_size,
        "image_shape": [*batches.image_shape],
        "images": n,
    }
    if batches.conditioning:
        about["conditioning"] = data.record_of(batches.conditioning)
    return from_reader(batches.read, n, batch_size=batch_size, about=about)


def drawn(
    sampler: BoundSampler,
    n: int,
    *,
    seed: int,
    batch_size: int,
    about: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    params: PyTree = None,
) -> ImageSet:
    """Returns the set of n samples of a run, which are drawn when they are asked for.

    Args:
        sampler: what draws them, of each label in turn.
        n: how many.
        seed: of all samples.
        batch_size: number of images that are drawn together, at most.
        about: for the record, see `about_samples`.
        mesh: the devices; default all.
        params: parameters of the network, in place of the run's.
    """

    def batches(start):
        made = sampler.batches(
            n - start,
            first=start,
            seed=seed,
            batch_size=min(batch_size, n),
            mesh=mesh,
            params=params,
        )
        for frames, labels in made:
            yield {"image": frames[-1], "label": labels}

    return ImageSet(n, batches, dict(about or {}))


def from_run(
    run: Run,
    n: int,
    *,
    options: SamplingOptions,
    seed: int,
    batch_size: int,
    paired: SamplingOptions | None = None,
) -> ImageSet:
    """Returns the set of n samples of a run, with the record of how they are drawn.

    Args:
        run: of a denoiser.
        n: how many.
        options: how they are drawn.
        seed: of all samples.
        batch_size: number of images that are drawn together, at most.
        paired: the same options with conditioning and labels of images.

    Raises:
        ValueError: if an option does not fit the run.
    """
    sampler = bind_sampler(run, paired or options, one_program=False)
    about = {
        "sampler": options.sampler,
        "clip": options.clip,
        "steps": sampler.choices["steps"],
        "spacing": sampler.choices["spacing"],
        "eta": options.eta,
        "quantize": options.rounding,
        "seed": seed,
        "batch_size": batch_size,
        "image_shape": [*run.image_shape],
        "network": network_of(run),
    }
    for name in ("noise", "conditioning"):
        if name in sampler.choices:
            about[name] = sampler.choices[name]
    for name, value in changed_options(options).items():
        if name not in {*about, "rounding"}:
            about[name] = value
    if paired is not None and paired.label is not options.label:
        (about["labels"],) = data.record_of({"": sampler.rows["label"]}).values()
    if options.classifier is not None:
        about["classifier_crc32"] = _crc32(sampler.params["classifier"])
    if options.guide_with is not None:
        about["guide_crc32"] = _crc32(sampler.params["guide"])
    return drawn(sampler, n, seed=seed, batch_size=batch_size, about=about)


def changed_options(options: SamplingOptions) -> dict[str, Any]:
    """Returns the fields that are not as by default, as plain values for JSON.

    Arrays of conditioning are left out: `BoundSampler.choices` has their digests.
    """
    changed = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if field.name == "cond" and not isinstance(value, str):
            continue
        value = np.asarray(value).tolist()
        if value != field.default:
            changed[field.name] = value
    return changed


def open_samples(
    run_or_images: Run | Images,
    n: int | None,
    reference: ImageSet | None,
    options: SamplingOptions,
    seed: int,
    **of_data: Any,
) -> ImageSet:
    """Returns the images to score: those that are given, or samples of a run.

    Args:
        run_or_images: images, or a run.
        n: how many; default all images, or as many samples as the reference has.
        reference: what they are compared with; None for moments, beside which as many
            samples are drawn as the split of the run's data has images.
        options: how samples are drawn; by default conditioning, and labels with it, are
            those of the images of the split, in turn.
        seed: of the samples.
        of_data: split, source and batch_size, as `from_split` takes them.
    """
    size = of_data["batch_size"]
    if not isinstance(run_or_images, Run):
        return as_image_set(run_or_images, n, batch_size=size)
    if n is None and reference is not None:
        n = reference.n
    if n is None:
        try:
            n = from_split(run_or_images, **of_data).n
        except ValueError as error:
            raise ValueError(
                f"n must be given where the reference has no images, got None: {error}"
            ) from error
    paired = None
    if run_or_images.conditioning and options.cond is None:
        batches = open_images(
            run_or_images,
            of_data["source"],
            of_data["split"],
            batch_size=size,
            field="data",
        )
        rows = np.arange(min(n, batches.num_examples))
        paired = with_conditioning(run_or_images, options, batches.beside(rows))
    how: dict[str, Any] = dict(options=options, seed=seed, batch_size=size)
    return from_run(run_or_images, n, paired=paired, **how)


def _crc32(params: PyTree) -> int:
    digests = json.dumps(checkpoint.digests(params), sort_keys=True)
    return zlib.crc32(digests.encode())
