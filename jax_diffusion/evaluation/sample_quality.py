"""Scores of images and of networks: what `evaluate` computes, and `train` on the way.

Images are drawn or read in batches that all devices share. What is computed of each
image goes into parts that survive a kill; scores are made of all of it by the first
host.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from tqdm import tqdm

from jax_diffusion import (
    data,
    diffusion,
    likelihood,
    losses,
    metrics,
    pipeline,
    samplers,
    timesteps,
)
from jax_diffusion.evaluation import features as extractors
from jax_diffusion.evaluation.features import FeatureExtractor
from jax_diffusion.metrics import Moments
from jax_diffusion.runtime import files as parts
from jax_diffusion.runtime import sharding
from jax_diffusion.schedules import NoiseSchedule
from jax_diffusion.training import step as training

METRICS = {  # whose features they are made of, and how
    "fid": ("inception", "distance"),
    "sfid": ("inception", "spatial"),
    "inception_score": ("inception", "score"),
    "kid": ("inception", "kernel"),
    "precision_recall": ("inception", "precision_recall"),
    "classifier_distance": ("classifier", "distance"),
    "classifier_score": ("classifier", "score"),
    "classifier_kernel": ("classifier", "kernel"),
    "classifier_precision_recall": ("classifier", "precision_recall"),
    "pixel_distance": ("pixels", "distance"),
}
PAIR = ("arr_0", "arr_1")  # images and labels, as improved-diffusion calls them
MIN_FID_IMAGES = (
    10_000  # samples, from which on a FID is called so without their number
)
NEEDS_REFERENCE_FEATURES = (
    "kernel",
    "precision_recall",
)  # which need the images of the reference

NUM_NOISE_LEVELS = 16  # times that each image is shown to a classifier

Arrays = dict[str, np.ndarray]
ScoreFn = Callable[..., Any]  # (params, ids [b], image, label) -> arrays [b, ...]


class Score(NamedTuple):
    """One number of the table."""

    metric: str
    value: float
    images: int
    error: float | None = None  # see the metric for which


class ImageSet(NamedTuple):
    """Images to be scored."""

    n: int
    batches: Callable[[int], Iterator[Arrays]]  # "image" and "label" from this one on
    about: dict[str, Any]  # what decides them


class Reference(NamedTuple):
    """What samples are compared with, by extractor and kind of feature."""

    features: Mapping[str, Arrays]
    moments: Mapping[str, Mapping[str, Moments]]


def drawn(
    bound: pipeline.BoundSampler,
    *,
    n: int,
    about: Mapping[str, Any],
    batch_size: int,
    **options: Any,
) -> ImageSet:
    """Samples of a bound sampler.

    Args:
        options: of `BoundSampler.batches`.
    """

    def batches(start):
        size = min(batch_size, n)
        made = bound.batches(n - start, first=start, batch_size=size, **options)
        for frames, labels in made:
            yield {"image": frames[-1], "label": labels}

    return ImageSet(n, batches, dict(about))


def stored(
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    n: int,
    batch_size: int,
    about: Mapping[str, Any],
) -> ImageSet:
    """The first n images, of which read(rows) gives some with their labels."""

    def batches(start):
        for first in range(start, n, batch_size):
            rows = np.arange(first, min(first + batch_size, n))
            images, labels = read(rows)
            yield {"image": images, "label": labels}

    return ImageSet(n, batches, dict(about))


def collect(
    compute: Callable[[int], Iterator[Arrays]],
    n: int,
    *,
    path: Path | None = None,
    record: Mapping[str, Any] | None = None,
) -> tuple[Arrays, parts.ResumableNpz | None]:
    """What compute(start) yields of images start, ..., n - 1, joined.

    With a path, batches go into its parts, and those that are there are not computed
    again. On several hosts the first one has them, and the others get nothing. Images
    are not returned.
    """
    if path is None:
        batches = [*compute(0)]
        return jax.tree.map(lambda *a: np.concatenate(a), *batches), None
    leader = jax.process_index() == 0
    writer = parts.ResumableNpz(path, dict(record or {})) if leader else None
    done = min(sharding.broadcast_from_first(writer.done if writer else 0), n)
    quiet = None if leader else True
    with tqdm(total=n, initial=done, unit="image", disable=quiet) as bar:
        for arrays in compute(done) if done < n else ():
            if writer is not None:
                writer.add(arrays)
            bar.update(len(next(iter(arrays.values()))))
    return ({}, None) if writer is None else (writer.read(n, without=PAIR), writer)


def features_of(
    source: ImageSet, chosen: Sequence[FeatureExtractor], *, keep_images: bool = False
) -> Callable[[int], Iterator[Arrays]]:
    """compute(start), for `collect`, of "inception_pool" and so on of a source.

    Args:
        keep_images: and their labels, as `PAIR`.
    """
    apply = {e.name: extractors.compiled(e) for e in chosen}

    def compute(start):
        for batch in source.batches(start):
            arrays: Arrays = {}
            if keep_images:
                arrays = dict(arr_0=batch["image"], arr_1=batch["label"])
            for name, extract in apply.items():
                found = extract(batch["image"])
                arrays |= {f"{name}_{kind}": a for kind, a in found.items()}
            yield arrays

    return compute


def by_extractor(arrays: Mapping[str, np.ndarray]) -> dict[str, Arrays]:
    """{"inception_pool": a, ...} as {"inception": {"pool": a}, ...}."""
    grouped: dict[str, Arrays] = {}
    for name, array in arrays.items():
        extractor, _, kind = name.partition("_")
        grouped.setdefault(extractor, {})[kind] = array
    return grouped


def compare(
    metric: str, samples: Mapping[str, Arrays], reference: Reference
) -> list[Score]:
    """The scores that one of `METRICS` consists of.

    Distances come with what a perfect model would have: that of as many images of the
    reference to its others, or of its two halves if it is too small for that.
    """
    extractor, kind = METRICS[metric]
    found = samples[extractor]
    n = len(found["pool"])
    if kind == "score":
        value, error = metrics.inception_score(found["logits"])
        return [Score(metric, value, n, error)]
    if kind in ("distance", "spatial"):
        feature = "spatial" if kind == "spatial" else "pool"
        moments = reference.moments[extractor][feature]
        value = metrics.frechet_distance(metrics.moments(found[feature]), moments)
        return [
            Score(_named(metric, n), value, n),
            *_of_data(metric, n, reference.features.get(extractor, {}).get(feature)),
        ]
    known = reference.features[extractor]["pool"]
    if kind == "kernel":
        value, error = metrics.kernel_distance(found["pool"], known)
        return [Score(metric, value, n, error)]
    # The radii shrink as points become more: as many of the reference as of samples.
    rows = np.linspace(0, len(known) - 1, min(n, len(known))).astype(int)
    both = metrics.precision_recall(found["pool"], known[rows])
    prefix = metric.removesuffix("precision_recall")
    return [Score(f"{prefix}{k}", v, n) for k, v in both._asdict().items()]


def _named(metric: str, n: int) -> str:
    return (
        metric
        if n >= MIN_FID_IMAGES or not metric.endswith("fid")
        else f"{metric}_n{n}"
    )


def _of_data(metric: str, n: int, features: np.ndarray | None) -> list[Score]:
    """The distance that n of the reference have to all its others."""
    n = 0 if features is None else min(n, len(features) // 2)
    if features is None or n <= features.shape[1]:
        return []
    order = np.random.default_rng(0).permutation(len(features))
    few, others = (metrics.moments(features[o]) for o in (order[:n], order[n:]))
    value = metrics.frechet_distance(few, others)
    return [Score(f"{_named(metric, n)}_of_data", value, n)]


def bound_fn(
    model: nn.Module, objective: Any, schedule: NoiseSchedule, seed: int
) -> ScoreFn:
    """Builds the discrete bound, score(params, ids, image, label) -> BitsPerDim."""

    def bits(keys, denoise_fn, *rest):
        return likelihood.bits_per_dim(keys, diffusion.clip_x_0(denoise_fn), *rest)

    return _bits_fn(bits, model, objective, schedule, seed)


def ode_fn(
    model: nn.Module, objective: Any, schedule: NoiseSchedule, seed: int, probes: int
) -> ScoreFn:
    """Builds the likelihood by the ODE, of the same form; nothing is clipped."""
    bits = functools.partial(likelihood.ode_bits_per_dim, probes=probes)
    return _bits_fn(bits, model, objective, schedule, seed)


def _bits_fn(bits, model, objective, schedule, seed):
    """score(params, ids, image, label) of bits(keys, denoise_fn, schedule, x_0)."""

    @jax.jit
    def score(params, ids, image, label):
        keys = samplers.image_keys(jax.random.key(seed), ids)
        model_fn = training.bind(model, params, label)
        denoise_fn = diffusion.denoiser(model_fn, schedule, objective)
        return bits(keys, denoise_fn, schedule, data.from_uint8(image))

    return score


class Answers(NamedTuple):
    """Of a classifier, to each image noised `NUM_NOISE_LEVELS` times, [b, k]."""

    accuracy: Array  # 1 if it is right
    top_5: Array
    loss: Array  # cross-entropy, in nats
    quartile: Array  # of t, 0 to 3


def accuracy_fn(model: nn.Module, schedule: NoiseSchedule, seed: int) -> ScoreFn:
    """Builds how a classifier does, of the same form, at random levels of noise."""
    draw_t = timesteps.stratified(schedule.num_steps).sample

    @jax.jit
    def score(params, ids, image, label):
        x_0, model_fn = data.from_uint8(image), training.bind(model, params, label)

        def answer(_, i):
            key = jax.random.fold_in(jax.random.key(seed), i)
            key_t, key_eps = jax.random.split(jax.random.fold_in(key, ids[0]))
            t, _ = draw_t(key_t, (), len(x_0))
            terms = losses.classifier_loss(key_eps, model_fn, schedule, x_0, t, label)
            quartile = 4 * t // schedule.num_steps
            return None, Answers(terms.accuracy, terms.top_5, terms.loss, quartile)

        _, answers = jax.lax.scan(answer, None, jnp.arange(NUM_NOISE_LEVELS))
        return jax.tree.map(jnp.transpose, answers)

    return score


def each_image(
    score: ScoreFn, params: PyTree, source: ImageSet
) -> Callable[[int], Iterator[Arrays]]:
    """compute(start), for `collect`, of score(params, ids, image, label).

    All devices share each batch; images are numbered as they come.
    """
    mesh = sharding.make_mesh()
    params = sharding.replicate(mesh, params)

    def compute(start):
        for batch in source.batches(start):
            n = len(batch["label"])
            ids = np.arange(start, start + n, dtype=np.int32)
            found = score(params, **sharding.shard_padded(mesh, {**batch, "ids": ids}))
            scores = sharding.fetch(found)._asdict()
            yield {name: a[:n] for name, a in scores.items()}
            start += n

    return compute


def mean_and_error(values: Any) -> tuple[float, float]:
    """The mean over images and its standard error, in float64."""
    values = np.asarray(values, np.float64)
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


class Clock:
    """Seconds of each stage, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._mark = time.perf_counter()

    def __call__(self, stage: str) -> None:
        """Charges the time since the last call to a stage that has ended."""
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._mark, 1)
        self._mark = now


def needs(names: Sequence[str]) -> list[str]:
    """The extractors that these metrics need, each once, in order."""
    used = (METRICS[name][0] for name in names if name in METRICS)
    return [*dict.fromkeys(used)]
