"""Scores of images beside a reference: FID, KID, Inception score, precision, recall.

Every row of `METRICS` knows the feature extractor that it needs and the function that
computes its scores. `score_images` extracts the features of both image sets, which is
resumable, and calls the functions; the formulas are in `jax_diffusion.metrics`.
"""

import functools
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_diffusion import metrics
from jax_diffusion.evaluation import features
from jax_diffusion.evaluation.feature_classifier import load_feature_classifier
from jax_diffusion.evaluation.features import FeatureExtractor
from jax_diffusion.evaluation.image_sets import (
    Arrays,
    Images,
    ImageSet,
    as_image_set,
    from_split,
)
from jax_diffusion.evaluation.per_image import SAMPLES, collect
from jax_diffusion.evaluation.results import REAL, Clock, Result, Score
from jax_diffusion.metrics import Moments
from jax_diffusion.pipeline import Run

# A FID of fewer samples says so in its name: "fid_n2000".
MIN_FID_IMAGES = 10_000


class Reference(NamedTuple):
    """What samples are compared with, in the features of one extractor.

    Attributes:
        features: by kind, [m, ...]; empty if only moments are known.
        moments: of the features, by kind.
    """

    features: Mapping[str, np.ndarray]
    moments: Mapping[str, Moments]


class GivenMoments(NamedTuple):
    """Moments of a reference's Inception features that were read from a file.

    Attributes:
        path: of the file.
        moments: by kind of feature.
    """

    path: str
    moments: Mapping[str, Moments]


class Metric(NamedTuple):
    """A row of `METRICS`.

    Attributes:
        extractor: "inception", "classifier", "pixels", or a `FeatureExtractor`.
        compute: (name, features of the samples by kind, `Reference`) -> scores.
        needs_reference_features: whether moments of the reference are not enough.
        lower_is_better: whether the first score is a distance.
        max_numbers: how many numbers an image may have, height x width x channels.
        min_images: how many images must be scored at least.
    """

    extractor: str | FeatureExtractor
    compute: Callable[[str, Arrays, Reference], list[Score]]
    needs_reference_features: bool = False
    lower_is_better: bool = True
    max_numbers: int | None = None
    min_images: int = 1

    @property
    def extractor_name(self) -> str:
        """Name of the extractor, whose features the metric compares."""
        named = self.extractor
        return named if isinstance(named, str) else named.name


def _frechet(kind: str, *, fid: bool = False) -> Callable[..., list[Score]]:
    """Frechet distances, of samples and of as many real images, to the reference."""

    def compute(name, samples, reference):
        def named(n):
            return f"{name}_n{n}" if fid and n < MIN_FID_IMAGES else name

        found = metrics.moments(samples[kind])
        n = found.count
        value = metrics.frechet_distance(found, reference.moments[kind])
        scores = [Score(named(n), value, n)]
        known = reference.features.get(kind)
        n = 0 if known is None else min(n, len(known) // 2)
        if known is not None and n > known.shape[1]:  # moments of full rank
            order = np.random.default_rng(0).permutation(len(known))
            few, others = (metrics.moments(known[o]) for o in (order[:n], order[n:]))
            value = metrics.frechet_distance(few, others)
            scores.append(Score(named(n) + REAL, value, n))
        return scores

    return compute


def _inception_score(name, samples, reference):
    value, error = metrics.inception_score(samples["logits"])
    return [Score(name, value, len(samples["logits"]), error)]


def _kid(name, samples, reference):
    found, known = samples["pool"], reference.features["pool"]
    value, error = metrics.kernel_distance(found, known)
    return [Score(name, value, len(found), error)]


def _precision_recall(prefix: str = "") -> Callable[..., list[Score]]:
    def compute(name, samples, reference):
        found, known = samples["pool"], reference.features["pool"]
        n = len(found)
        # The radii shrink as points become more: as many real images as samples.
        rows = np.linspace(0, len(known) - 1, min(n, len(known))).astype(int)
        both = metrics.precision_recall(found, known[rows])
        return [Score(prefix + k, v, n) for k, v in both._asdict().items()]

    return compute


METRICS = {
    "fid": Metric("inception", _frechet("pool", fid=True), min_images=2),
    "sfid": Metric("inception", _frechet("spatial", fid=True), min_images=2),
    "inception_score": Metric(
        "inception", _inception_score, lower_is_better=False, min_images=10
    ),
    "kid": Metric("inception", _kid, needs_reference_features=True, min_images=2),
    "precision_recall": Metric(
        "inception", _precision_recall(), True, False, min_images=4
    ),
    "cnn_fd": Metric("classifier", _frechet("pool"), min_images=2),
    "cnn_is": Metric(
        "classifier", _inception_score, lower_is_better=False, min_images=10
    ),
    "cnn_kid": Metric("classifier", _kid, needs_reference_features=True, min_images=2),
    "cnn_precision_recall": Metric(
        "classifier", _precision_recall("cnn_"), True, False, min_images=4
    ),
    # An image of 4096 numbers has a covariance of 4096 x 4096, which takes a minute.
    "pixel_distance": Metric(
        "pixels", _frechet("pool"), max_numbers=4096, min_images=2
    ),
}


def make_loaders(
    classifier: str | os.PathLike | None,
    inception: str | os.PathLike | None = None,
    **download: Any,
) -> dict[str, Callable[[Sequence[int]], FeatureExtractor]]:
    """Returns functions of the images' shape (h, w, c) that load extractors, by name.

    Args:
        classifier: path of the feature classifier.
        inception: path of Inception's weights; default downloaded.
        download: url and sha256, see `features.inception`.
    """
    return {
        "pixels": lambda shape: features.pixels(),
        "inception": lambda shape: features.inception(inception, **download),
        "classifier": functools.partial(load_feature_classifier, classifier),
    }


def open_reference(
    reference: Images | None,
    run: Run | None,
    rows: Mapping[str, Metric],
    *,
    split: str,
    source: str | None,
    batch_size: int,
) -> tuple[ImageSet | None, GivenMoments | None]:
    """Opens what images are compared with: other images, moments, or both.

    Args:
        reference: images, or the path of a .npz of moments, which may have images
            besides, as guided-diffusion's have; default a split of the run's data.
        run: whose data are the default.
        rows: the metrics.
        split: of a data set.
        source: a data set in place of the run's.
        batch_size: number of images in a batch.

    Raises:
        ValueError: if a metric needs more than moments, or the files are wrong.
    """
    if reference is None:
        assert run is not None
        of_data: dict[str, Any] = dict(source=source, batch_size=batch_size)
        return from_split(run, split, **of_data), None
    moments = None
    path = Path(reference) if isinstance(reference, str | os.PathLike) else None
    if path is not None and metrics.holds_moments(path):
        others = [k for k, r in rows.items() if r.extractor_name != "inception"]
        if others:
            raise ValueError(
                "a reference of moments is for Inception's features, and the metrics "
                f"have {others[0]!r}."
            )
        moments = GivenMoments(str(path), metrics.load_moments(path))
        if not any(row.needs_reference_features for row in rows.values()):
            return None, moments
    of_set: dict[str, Any] = dict(split=split, batch_size=batch_size, like=run)
    return as_image_set(reference, field="reference", **of_set), moments


def check_enough(n: int, rows: Mapping[str, Metric]) -> None:
    """Raises ValueError unless n images are enough for one of the metrics at least."""
    if rows and all(n < row.min_images for row in rows.values()):
        name, least = min(
            ((k, row.min_images) for k, row in rows.items()), key=lambda pair: pair[1]
        )
        raise ValueError(f"n must be >= {least} for {name}, got {n}.")


def score_images(
    samples: ImageSet,
    reference: ImageSet | None,
    rows: Mapping[str, Metric],
    loaders: Mapping[str, Callable[[Sequence[int]], FeatureExtractor]],
    *,
    moments: GivenMoments | None = None,
    out: Path | None = None,
    keep_images: bool = False,
    save_moments: str | os.PathLike | None = None,
) -> Result:
    """Computes all scores of samples beside a reference.

    A metric that cannot be computed, such as of too few images, becomes a failure of
    the result; the others are computed.

    Args:
        samples: the images to score.
        reference: the images to compare them with; None if the moments are enough.
        rows: the metrics, by the name that their scores get.
        loaders: functions of the shape (h, w, c) of the samples that return extractors,
            by the name that the rows use.
        moments: of the reference, in place of those of its images.
        out: folder for intermediate files, so that a killed job can continue.
        keep_images: whether to leave the samples there, as samples.npz.
        save_moments: path of a .npz for the moments of Inception's features.

    Raises:
        ValueError: if the images do not fit each other or a metric.
    """
    clock, shape = Clock(), samples.about["image_shape"]
    wanted = {row.extractor_name: row.extractor for row in rows.values()}
    extractors = [
        loaders[e](shape) if isinstance(e, str) else e for e in wanted.values()
    ]
    check_shapes(samples, reference, rows, extractors)
    used = {e.name: e.sha256 for e in extractors}
    found = collect(
        features.map_features(samples, extractors, keep_images=keep_images),
        samples.n,
        path=out and out / "samples.npz",
        keep=SAMPLES if keep_images else (),
        record={**samples.about, "extractors": used},
    )
    clock.end("samples")
    finish, known = [found.finish], {}
    if reference is not None:
        known, end = collect(
            features.map_features(reference, extractors),
            reference.n,
            path=out and out / "reference.npz",
            keep=(),
            record={**reference.about, "extractors": used},
        )
        finish.append(end)
        clock.end("reference")
    about = {"samples": samples.about, "extractors": used}
    if not found.arrays:  # the first host has them
        return Result([], about, clock.seconds, finish)
    compared = {}
    for extractor in extractors:
        arrays = features.of_extractor(known, extractor.name)
        if moments is not None and extractor.name == "inception":
            kinds = moments.moments
        else:
            kinds = moments_of(arrays)
        compared[extractor.name] = Reference(arrays, kinds)
    if save_moments is not None and jax.process_index() == 0:
        metrics.save_moments(Path(save_moments), compared["inception"].moments)
    about["reference"] = {
        **({"moments": moments.path} if moments is not None else {}),
        **(reference.about if reference is not None else {}),
        "sha256": {k: sha256_of_moments(r.moments) for k, r in compared.items()},
    }
    clock.end("moments")
    scores, failures = compute_scores(rows, samples.n, found.arrays, compared, clock)
    return Result(scores, about, clock.seconds, finish, failures)


def compute_scores(
    rows: Mapping[str, Metric],
    n: int,
    arrays: Arrays,
    compared: Mapping[str, Reference],
    clock: Clock,
) -> tuple[list[Score], dict[str, str]]:
    """Computes the scores of all metrics, and says which could not be computed.

    Args:
        rows: the metrics by name.
        n: the number of samples.
        arrays: features of the samples, by `array_name`.
        compared: the reference by extractor.
        clock: is told how long each metric took.

    Returns:
        Scores, and by name of the metric why it could not be computed.
    """
    scores: list[Score] = []
    failures = {}
    for name, row in rows.items():
        some = features.of_extractor(arrays, row.extractor_name)
        try:
            check_enough(n, {name: row})
            scores += row.compute(name, some, compared[row.extractor_name])
        except ValueError as error:
            failures[name] = str(error)
        clock.end(name)
    return scores, failures


def moments_of(features: Mapping[str, np.ndarray]) -> dict[str, Moments]:
    """Returns the moments of all features but logits, which are not compared."""
    return {k: metrics.moments(a) for k, a in features.items() if k != "logits"}


def check_shapes(
    samples: ImageSet,
    reference: ImageSet | None,
    rows: Mapping[str, Metric],
    extractors: Sequence[FeatureExtractor],
) -> None:
    """Raises ValueError unless the images fit the metrics and each other."""
    shape = tuple(samples.about["image_shape"])
    for name, row in rows.items():
        if row.max_numbers is not None and math.prod(shape) > row.max_numbers:
            raise ValueError(
                f"{name} is for images of up to {row.max_numbers} numbers, got {shape}."
            )
    if reference is None or all(extractor.any_size for extractor in extractors):
        return
    other = tuple(reference.about["image_shape"])
    if other != shape:
        raise ValueError(
            "images and reference must be of one shape for features that are not "
            f"Inception's, got {shape} and {other}; resize some, or give a run by "
            "`workdir` and the reference by `data`, which is resized to the run's."
        )


def sha256_of_moments(moments: Mapping[str, Moments]) -> str:
    """Returns the SHA-256 of means and covariances as they are in memory."""
    digest = hashlib.sha256()
    for name in sorted(moments):
        for array in (moments[name].mean, moments[name].cov):
            digest.update(np.ascontiguousarray(array, np.float64).tobytes())
    return digest.hexdigest()
