"""Arguments of `evaluate`: which metrics they choose, and what contradicts itself.

All is checked before anything is read, drawn or written. An argument that no chosen
metric uses is refused, rather than ignored.
"""

import inspect
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_diffusion import checks
from jax_diffusion.config import num_steps
from jax_diffusion.data import parse_source
from jax_diffusion.evaluation import (
    bits_per_dim,
    classifier_accuracy,
    results,
    sample_quality,
)
from jax_diffusion.evaluation.image_sets import AS_THEY_ARE, Images, changed_options
from jax_diffusion.evaluation.results import Score
from jax_diffusion.evaluation.sample_quality import METRICS, Metric
from jax_diffusion.interop.inception_weights import SHA256, URL
from jax_diffusion.models import traits
from jax_diffusion.pipeline import Run, SamplingOptions, make_options
from jax_diffusion.registry import is_outside, lookup, outside, short
from jax_diffusion.runtime import checkpoint, files

# Metrics of the network of a run, which need no samples.
NETWORK_METRICS = {
    "bpd": bits_per_dim.bound,
    "nll_ode": bits_per_dim.ode,
    "accuracy": classifier_accuracy.accuracy,
}
# Which of them use an argument; the other arguments are for metrics of images.
NETWORK_ARGUMENTS = {
    "split": ["bpd", "nll_ode", "accuracy"],
    "bpd_images": ["bpd", "nll_ode"],
    "bpd_steps": ["bpd"],
    "ode_steps": ["nll_ode"],
    "ode_probes": ["nll_ode"],
}
# Which extractor of features uses an argument.
EXTRACTOR_ARGUMENTS = {
    "inception": "inception",
    "inception_url": "inception",
    "inception_sha256": "inception",
    "feature_classifier": "classifier",
}
# The arguments of which no other check says more than their type hint does.
OF_ONE_TYPE = ("data", "split", "reference_split", "train_feature_classifier", "out")
OF_ONE_TYPE += (*EXTRACTOR_ARGUMENTS, "options")
# The arguments that not every metric uses, and their defaults but None.
NOT_FOR_ALL = ("n", "reference_split", *NETWORK_ARGUMENTS, *EXTRACTOR_ARGUMENTS)
DEFAULTS = {
    "split": "test",
    "reference_split": "train",
    "ode_steps": 200,
    "ode_probes": 2,
    "inception_url": URL,
    "inception_sha256": SHA256,
}


class Chosen(NamedTuple):
    """What is to be scored, and how.

    Attributes:
        run: the run, if any.
        images: images to score in place of its samples, if any.
        options: how samples are drawn.
        rows: the metrics of images, by name.
        names: the metrics of networks.
    """

    run: Run | None
    images: Images | None
    options: SamplingOptions
    rows: dict[str, Metric]
    names: list[str]


def choose(
    run_or_images: Run | Images,
    images: Images | None,
    reference: Images | None,
    data: str | os.PathLike | None,
    metrics: Any,
    options: SamplingOptions | None,
    sampling: Mapping[str, Any],
    *,
    trains: bool,
    save_moments: Any,
    given: Mapping[str, Any],
) -> Chosen:
    """Finds out what the arguments of `evaluate` ask for.

    Args:
        run_or_images, images, reference, data, metrics: as `evaluate` takes them.
        options: how samples are drawn.
        sampling: fields of the options to change.
        trains: whether the feature classifier is to be trained.
        save_moments: whether moments of Inception's features are wanted.
        given: the arguments of `NOT_FOR_ALL`, by name.

    Raises:
        ValueError: if an argument is wrong, contradicts another, or is of no use.
    """
    run = run_or_images if isinstance(run_or_images, Run) else None
    check_kinds(run_or_images, images, reference)
    if run is None and images is not None:
        raise ValueError("images must be given once, got them as run_or_images, too.")
    source: Any = images if run is not None else run_or_images
    fields = vars(options or SamplingOptions()) | dict(sampling)
    (how,) = make_options(fields, SamplingOptions)
    sampled = {**changed_options(how), **sampling}
    changed = {k: v for k, v in given.items() if v != DEFAULTS.get(k)} | sampled
    arrays = {"images": run and images, "reference": reference}
    changed |= {k: v for k, v in arrays.items() if v is not None}
    check_sources(run, source, data, trains, how, [*sampled], reference is not None)
    rows, names = choose_metrics(metrics, run, source, trains, save_moments)
    check_used(changed, rows, names, run, trains)
    reads_data = trains or source is None or reference is None or names
    if data is not None and not reads_data:
        raise ValueError(
            "data is for samples, a reference or a metric of the network, got "
            f"{data!r} beside images and reference."
        )
    return Chosen(run, source, how, rows, names)


def check_kinds(run_or_images: Any, images: Any, reference: Any) -> None:
    """Raises ValueError for what is neither a run nor images, and for workdirs."""
    array = isinstance(run_or_images, Sequence) or hasattr(run_or_images, "__array__")
    if not array and not isinstance(run_or_images, Run | os.PathLike):
        raise ValueError(
            "run_or_images must be a run, as load_run returns it, or images, which are "
            f"uint8 [n h w c], PATH or NAME:PATH, got {short(run_or_images)}."
        )
    first = "; jd.load_run makes a Run of it, and --workdir takes it"
    for field, value, remedy in (
        ("images", run_or_images, first),
        ("images", images, "; sample draws images from it"),
        ("reference", reference, "; sample draws images from it"),
    ):
        if not isinstance(value, str | os.PathLike):
            continue
        folder = os.path.expanduser(os.fspath(value).removeprefix("folder:"))
        if os.path.isdir(folder) and checkpoint.latest_step(folder) is not None:
            raise ValueError(
                f"{field} must be uint8 [n h w c], PATH or NAME:PATH of images, got "
                f"the workdir of a run, {os.fspath(value)!r}{remedy}."
            )


def check_counts(seed: Any, optional: Mapping[str, Any], **counts: Any) -> None:
    """Raises ValueError unless the seed and all counts are integers in their ranges.

    Args:
        seed: in [0, 2^32).
        optional: counts by name that may be None.
        counts: the others.
    """
    counts |= {name: count for name, count in optional.items() if count is not None}
    for name, count in counts.items():
        checks.integer(name, count, at_least=1)
    checks.integer("seed", seed, at_least=0, at_most=2**32 - 1)


def check_sources(
    run: Run | None,
    images: Images | None,
    data: str | os.PathLike | None,
    trains: bool,
    how: SamplingOptions,
    sampled: Sequence[str],
    has_reference: bool,
) -> None:
    """Raises ValueError unless there is what can be scored, and what to compare with.

    Args:
        run: the run to score, if any.
        images: images to score in place of its samples.
        data: a data set in place of the run's.
        trains: whether the feature classifier is to be trained.
        how: how samples are drawn.
        sampled: the names of its fields that are not as by default.
        has_reference: whether there are images to compare with.
    """
    if images is not None and sampled:
        raise ValueError(f"{sampled[0]} needs samples of a run, got images.")
    if run is None and not has_reference:
        raise ValueError("reference must be given with images, got None.")
    if run is None and data is not None:
        raise ValueError(f"data needs a run, got {data!r} for images.")
    if run is None and trains:
        raise ValueError("train_feature_classifier needs a run, got images.")
    guide = "" if how.classifier is None else os.fspath(how.classifier)
    if guide.endswith(".npz"):
        raise ValueError(
            "classifier must be the workdir of a noisy classifier that guides, got "
            f"{guide!r}; `feature_classifier` takes the file whose features are "
            "compared."
        )
    if run is not None and traits(run.model).low_res:
        raise ValueError("the run must be of a network without low_res, got one with.")


def choose_metrics(
    names: Any,
    run: Run | None,
    images: Images | None,
    trains: bool,
    save_moments: Any,
) -> tuple[dict[str, Metric], list[str]]:
    """Chooses metrics of images, with their rows, and those of networks.

    Args:
        names: of the metrics, separated by commas or in a list; None for the default.
        run: the run to score, if any.
        images: images to score in place of its samples.
        trains: whether the feature classifier is to be trained.
        save_moments: whether moments of Inception's features are wanted.

    Raises:
        ValueError: for a metric that there is not, or not of this run.
    """
    if run is None:
        allowed, default = {*METRICS}, ["fid", "kid", "precision_recall"]
    elif run.objective is None:
        allowed, default = {"accuracy"}, ["accuracy"]
    else:
        allowed, most = {*METRICS, "bpd", "nll_ode"}, METRICS["pixel_distance"]
        large = math.prod(run.image_shape) > (most.max_numbers or math.inf)
        default = ["fid" if large else "pixel_distance"]
        default += ["bpd"] if images is None else []
    if names is None:
        names = [] if trains else default
    elif isinstance(names, str):
        names = names.split(",")
    names = list(names) if isinstance(names, Iterable) else [names]
    if not all(isinstance(name, str) for name in names) or not (names or trains):
        raise ValueError(f"metrics must be one name or more, got {names}.")
    names = [name.strip() for name in names]
    names = [results.OLD_METRICS.get(name, name) for name in names]
    for name in names:
        if name in {*METRICS, *NETWORK_METRICS} - allowed:
            what = "this run" if run else "images without a run"
            raise ValueError(
                f"metrics of {what} must be of {sorted(allowed)}, got {name!r}."
            )
    rows = {
        name: as_metric(name, also=NETWORK_METRICS)
        for name in names
        if name not in NETWORK_METRICS
    }
    if save_moments is not None:
        files.check_output("save_moments", save_moments)
    if save_moments and "inception" not in {r.extractor_name for r in rows.values()}:
        raise ValueError(
            f"save_moments is for metrics of Inception's features, got {names}."
        )
    return rows, [name for name in NETWORK_METRICS if name in names]


def check_used(
    given: Mapping[str, Any],
    rows: Mapping[str, Metric],
    names: Sequence[str],
    run: Run | None,
    trains: bool,
) -> None:
    """Raises ValueError for an argument that no metric uses, or that one cannot use.

    Args:
        given: the arguments that are not as by default, by name.
        rows: the metrics of images.
        names: the metrics of networks.
        run: the run to score, if any.
        trains: whether the feature classifier is to be trained.
    """
    chosen = [*rows, *names]
    extractors = {row.extractor_name for row in rows.values()}
    extractors |= {"classifier"} if trains else set()
    for name in given:
        extractor = EXTRACTOR_ARGUMENTS.get(name)
        if extractor is not None:
            if extractor not in extractors:
                raise ValueError(
                    f"{name} is for metrics of the features of {extractor}, got "
                    f"{chosen}."
                )
            continue
        users = NETWORK_ARGUMENTS.get(name)
        if users is None and not rows:
            others = "; bpd_images is for the others" if name == "n" else ""
            rule = f"{name} is for metrics of images"
            raise ValueError(f"{rule}, got metrics {chosen}{others}.")
        if users is not None and not {*users} & {*names}:
            raise ValueError(f"{name} is for the metrics {users}, got {chosen}.")
    if "n" in given and not names:
        sample_quality.check_enough(given["n"], rows)
    if "bpd_steps" in given and run is not None:
        total, steps = num_steps(run.config.schedule), given["bpd_steps"]
        if steps > total:
            raise ValueError(f"bpd_steps must be in [1, T = {total}], got {steps}.")
    split, reference = given.get("reference_split"), given.get("reference")
    if split is None or reference is None:
        return
    is_path = isinstance(reference, str | os.PathLike)
    if not is_path or parse_source(reference, "reference")[0] in AS_THEY_ARE:
        raise ValueError(
            f"reference_split needs a data set with splits, got {split!r} for images."
        )


def as_metric(name: str, what: str = "metrics", *, also: Iterable[str] = ()) -> Metric:
    """Returns the row of `METRICS` of this name, or the user's own.

    Args:
        name: a key of `METRICS`, or an old name of one; or "package.module:attribute",
            a `Metric`, or a function (samples [n, d], reference [m, d]) -> float of
            the pixels of images, scaled to [-1, 1] and flattened.
        what: where the name stands, for errors.
        also: names that are allowed there besides, for errors.

    Raises:
        ValueError: if there is no such metric.
    """
    known = {**METRICS, **dict.fromkeys(also)}
    found = lookup(what, results.OLD_METRICS.get(name, name), known)
    rule = "a Metric or a function (samples, reference) -> float"
    told = outside(what, name, rule)
    if isinstance(found, Metric):

        @told
        def scores(*args):
            made = found.compute(*args)
            if not isinstance(made, list) or {*map(type, made)} != {Score}:
                raise ValueError(f"it computes {short(made)} instead of scores.")
            return made

        return found._replace(compute=scores) if is_outside(name) else found
    if not callable(found):
        raise ValueError(f"{what} must name a Metric or a function, got {found!r}.")
    function: Any = found
    try:
        inspect.signature(function).bind("samples", "reference")
    except TypeError:
        raise ValueError(
            f"{what} must name a function of two arguments, samples and reference, got "
            f"{name!r}."
        ) from None
    except ValueError:  # compiled functions need not tell what they take
        pass

    @told
    def compute(name, samples, reference):
        value = function(samples["pool"], reference.features["pool"])
        if np.ndim(value) or not hasattr(value, "__float__"):
            raise ValueError(f"it returns {short(value)}.")
        return [Score(name, float(value), len(samples["pool"]))]

    return Metric("pixels", compute, needs_reference_features=True)
