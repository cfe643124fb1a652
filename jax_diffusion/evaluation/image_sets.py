"""Scores of samples, drawn or read, beside the images that they should look like."""

import hashlib
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_diffusion import cli, data, metrics, pipeline
from jax_diffusion.evaluation import bits_per_dim as evaluation
from jax_diffusion.evaluation import features as extractors
from jax_diffusion.evaluation import sample_quality as scoring
from jax_diffusion.evaluation.bits_per_dim import Evaluation
from jax_diffusion.evaluation.features import FeatureExtractor
from jax_diffusion.evaluation.sample_quality import Arrays, ImageSet, Reference
from jax_diffusion.metrics import Moments

MAX_PIXELS = 4096  # numbers of an image whose covariance is worth its time


def score_images(job: Evaluation, names: list[str]) -> None:
    """All scores of samples beside a reference."""
    samples = _samples(job)
    known, moments = _reference(job, names)
    shape = tuple(samples.about["image_shape"])
    _check_shapes(names, shape, known)
    chosen = [_extractor(job, name, shape) for name in scoring.needs(names)]
    used = {e.name: e.sha256 for e in chosen}
    job.about |= {"samples": samples.about, "extractors": used}
    drawn = job.args.images is None
    compute = scoring.features_of(samples, chosen, keep_images=drawn)
    keep = scoring.PAIR if drawn else ()
    found = job.collect("samples", compute, samples, keep, extractors=used)
    features: Arrays = {}
    if known is not None:
        compute = scoring.features_of(known, chosen)
        features = job.collect("reference", compute, known, (), extractors=used)
    if jax.process_index() > 0:
        return
    reference = _moments(scoring.by_extractor(features), moments)
    if job.args.save_moments:
        metrics.save_moments(job.args.save_moments, reference.moments["inception"])
    job.about["reference"] = {
        **(known.about if known is not None else {"moments": job.args.reference}),
        "sha256": {name: _digest(kinds) for name, kinds in reference.moments.items()},
    }
    job.clock("moments")
    for name in names:
        job.scores += scoring.compare(name, scoring.by_extractor(found), reference)
        job.clock(name)


def _moments(features: dict[str, Arrays], said: dict[str, Moments] | None) -> Reference:
    """The reference, its moments found of its features unless they were said."""
    found: dict[str, Any] = {} if said is None else {"inception": said}
    for name, kinds in features.items():
        if name not in found:
            found[name] = {
                k: metrics.moments(a) for k, a in kinds.items() if k != "logits"
            }
    return Reference(features, found)


def _check_shapes(names: list[str], shape: Any, known: ImageSet | None) -> None:
    """Only Inception takes images of any size."""
    if "pixel_distance" in names and math.prod(shape) > MAX_PIXELS:
        raise ValueError(
            f"pixel_distance is for images of up to {MAX_PIXELS} numbers, got {shape}."
        )
    if known is None or all(scoring.METRICS[n][0] == "inception" for n in names):
        return
    other = tuple(known.about["image_shape"])
    if other != shape:
        raise ValueError(
            "images and reference must be of one shape for features that are not "
            f"Inception's, got {shape} and {other}."
        )


def _samples(job: Evaluation) -> ImageSet:
    """Images to score: those that are given, or drawn from the run."""
    args, run = job.args, job.run
    if args.images is not None:
        return _pictures(args.images, args.n, args.batch_size)
    assert run is not None
    n = args.n
    if n is None:  # as many as the reference has
        n = len(evaluation.images_of(job, args.reference_split).examples)
    options = cli.sampling_options(args)
    bound = pipeline.bind_sampler(run, options, one_program=False)
    about = {
        "sampler": args.sampler,
        "clip": not args.no_clip,
        "steps": bound.choices["steps"],
        "spacing": bound.choices["spacing"],
        "eta": args.eta,
        "quantize": args.quantize,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "image_shape": [*run.image_shape],
        "network": job.about["network"],
    }
    return scoring.drawn(
        bound, n=n, about=about, batch_size=args.batch_size, seed=args.seed
    )


def _reference(job: Evaluation, names: list[str]) -> tuple[ImageSet | None, Any]:
    """Images to compare with, and moments that were said to be theirs."""
    args = job.args
    if args.reference is None:
        return evaluation.split_of(job, args.reference_split), None
    moments = None
    if metrics.holds_moments(args.reference):
        others = [n for n in names if scoring.METRICS[n][0] != "inception"]
        if others:
            raise ValueError(
                "a reference of moments is for Inception's features, and --metrics "
                f"has {others[0]!r}."
            )
        moments = metrics.load_moments(args.reference)
        if not {scoring.METRICS[n][1] for n in names} & {
            *scoring.NEEDS_REFERENCE_FEATURES
        }:
            return None, moments
    return _pictures(args.reference, None, args.batch_size), moments


def _pictures(path: str, n: int | None, batch_size: int) -> ImageSet:
    found = data.open_images(path)
    if n is not None and n > len(found):
        raise ValueError(f"--n must be at most {len(found)} images, got {n}.")

    def read(rows):
        return found.read(rows), np.zeros(len(rows), np.int32)

    about = {"by": path, "image_shape": [*found.image_shape], "sha256": found.sha256}
    about["batch_size"] = batch_size
    return scoring.stored(read, n or len(found), batch_size, about)


def _extractor(
    job: Evaluation, name: str, image_shape: tuple[int, ...]
) -> FeatureExtractor:
    if name == "pixels":
        return extractors.pixels()
    if name == "inception":
        sha256 = job.args.inception_sha256
        url = job.args.inception_url
        return extractors.inception(job.args.inception, url=url, sha256=sha256)
    return extractors.load_classifier(_classifier_path(job), image_shape)


def _classifier_path(job: Evaluation) -> Path:
    if job.args.feature_classifier:
        return Path(job.args.feature_classifier)
    if job.out is None:
        raise ValueError(
            "classifier metrics need --feature-classifier FILE, got no file."
        )
    return job.out / "classifier.npz"


def train_classifier(job: Evaluation) -> None:
    """Trains the extractor of small images on the run's labelled data."""
    assert job.run is not None
    args, found = job.args, {}
    for split in ("train", "test"):
        found[split] = evaluation.images_of(job, split)
    told = extractors.train_classifier(
        _classifier_path(job),
        found["train"],
        found["test"],
        seed=args.seed,
        data_name=evaluation.name_of_data(job),
    )
    if jax.process_index() == 0:
        print(
            f"classifier: {told['accuracy']:.3f} of {found['test'].num_examples} test "
            f"images right, {told['seconds']:.0f} s: {_classifier_path(job)}"
        )
    job.clock("train_classifier")


def _digest(moments: Any) -> str:
    """SHA-256 of moments as they are in memory."""
    digest = hashlib.sha256()
    for name in sorted(moments):
        for array in (moments[name].mean, moments[name].cov):
            digest.update(np.ascontiguousarray(array, np.float64).tobytes())
    return digest.hexdigest()
