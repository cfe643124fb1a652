"""Evaluation during training: cheap scores for every EMA; the best one in WORKDIR/best.

`config.eval_every` says how often, `config.evaluation` what: the distance `metric`
between `n` samples and `reference` training images, and the bound on bits/dim of
`bpd_images` test images. On several hosts all of them compute their share of the images
and then the same scores.
"""

import dataclasses
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jax_diffusion import checks, data
from jax_diffusion import config as settings
from jax_diffusion.config import Config
from jax_diffusion.diffusion import Objective
from jax_diffusion.evaluation import features, image_sets, sample_quality
from jax_diffusion.evaluation.arguments import as_metric
from jax_diffusion.evaluation.bits_per_dim import bound_fn
from jax_diffusion.evaluation.feature_classifier import (
    load_feature_classifier,
    train_feature_classifier,
)
from jax_diffusion.evaluation.features import FeatureExtractor
from jax_diffusion.evaluation.image_sets import Arrays, ImageSet
from jax_diffusion.evaluation.per_image import collect, each_image, mean_and_error
from jax_diffusion.evaluation.results import OLD_METRICS
from jax_diffusion.evaluation.sample_quality import METRICS, Metric, Reference
from jax_diffusion.models import Network, check_takes, traits
from jax_diffusion.pipeline import (
    Run,
    SamplingOptions,
    bind_sampler,
    fit_labels,
    make_options,
    open_split,
    with_conditioning,
)
from jax_diffusion.runtime import checkpoint, locks, sharding
from jax_diffusion.training import TrainState
from jax_diffusion.training.averages import only_average

BEST = "best"  # a folder in the workdir, itself one for `sample` and `evaluate`
MAX_SAMPLES = 10_000_000  # of an average: their features are kept in memory
BATCH = 256  # images that all devices together compute at once


class PeriodicScores(NamedTuple):
    """Scores of one state of training, by EMA, such as "0.9999".

    Attributes:
        distance_name: metric and number of samples, "pixel_distance_n1000".
        distances: the distance of each average; the lower, the better.
        bits_name: "bits_per_dim_n64".
        bits: the bound on bits/dim of each average; empty if it is not wanted.
    """

    distance_name: str
    distances: dict[str, float]
    bits_name: str
    bits: dict[str, float]

    def for_log(self) -> dict[str, float]:
        """Returns all scores by name, as "pixel_distance_n1000_0.9999"."""
        named = {f"{self.distance_name}_{ema}": v for ema, v in self.distances.items()}
        return named | {f"{self.bits_name}_{ema}": v for ema, v in self.bits.items()}


class PeriodicEvaluation:
    """Evaluates every average of a state of training.

    The first call reads the reference and, for a metric of the feature classifier,
    trains that if the workdir has none.
    """

    def __init__(
        self,
        run: Run,
        train: data.Batches,
        mesh: Mesh,
        workdir: Path,
        *,
        metric: str,
        n: int,
        reference: int,
        bpd_images: int,
        inception: str,
        **sampling: Any,
    ):
        """Checks the fields of config.evaluation; nothing is computed yet.

        Args:
            run: config, network, objective and shape of the images; its parameters
                do not matter.
            train: the training images.
            mesh: the devices of the training.
            workdir: of the training.
            metric: a distance, a key of `METRICS` or "package.module:attribute".
            n: number of samples of every average, >= 2.
            reference: number of training images to compare with, evenly spaced; all if
                there are fewer.
            bpd_images: number of test images for the bound on bits/dim; 0 for none.
            inception: path of Inception's weights; "" to download them once.
            sampling: options of sampling, such as sampler and steps.

        Raises:
            ValueError: for a field that is out of range, or a network that cannot draw.
        """
        (options,) = make_options(sampling, SamplingOptions)
        self._row = check_fields(metric, n, reference, bpd_images, inception)
        if run.objective is None or traits(run.model).low_res:
            raise ValueError(
                "config.eval_every must be 0 for a classifier and for a network with "
                f"low_res, got {run.config.eval_every}."
            )
        self._test = None
        if bpd_images:  # found now if its labels are wrong
            test, field = open_split(run.config, "test"), "the test split"
            if test.image_shape != run.image_shape:
                raise ValueError(
                    f"{field} must have images {run.image_shape}, as those of training,"
                    f" got {test.image_shape}."
                )
            if run.takes_labels:
                some = fit_labels(test.examples, run, field, own=True)
                test = dataclasses.replace(test, examples=some)
            test = dataclasses.replace(test, conditioning_names=run.conditioning)
            check_takes(run.model, test.conditioning, f" of {field}")
            self._test = test
        self._metric = metric
        self._run, self._train, self._mesh, self._workdir = run, train, mesh, workdir
        self._n, self._reference_n, self._bpd_images = n, reference, bpd_images
        config, model, objective = run.config, run.model, run.objective
        if train.conditioning and options.cond is None:
            rows = np.linspace(0, train.num_examples - 1, n).astype(int)
            options = with_conditioning(run, options, train.beside(rows))
        self._sampler = bind_sampler(run, options, one_program=False)
        full = settings.make_schedule(config.schedule)
        self._bound = bound_fn(model, objective, full, config.seed)
        self._extractor: FeatureExtractor | None = None
        if self._row.extractor == "inception":  # a missing file is found now
            self._extractor = features.inception(inception or None)
        self._reference: Reference | None = None

    def __call__(self, ema_params: Mapping[str, PyTree]) -> PeriodicScores:
        """Computes all scores; on several hosts, all of them call it."""
        if self._reference is None:
            self._reference = self._read_reference()
        seed: int = self._run.config.seed
        options: dict[str, Any] = dict(batch_size=BATCH)
        distances, bits = {}, {}
        for ema, params in ema_params.items():
            where: Any = dict(mesh=self._mesh, params=params, **options)
            samples = image_sets.drawn(self._sampler, self._n, seed=seed, **where)
            found = self._features(samples)
            try:
                first, *_ = self._row.compute(self._metric, found, self._reference)
                distances[ema] = first.value
            except ValueError as error:  # images that are not finite; training goes on
                warnings.warn(f"{self._metric} of {ema}: {error}", stacklevel=2)
                distances[ema] = math.nan
        test = self._test
        for ema, params in ema_params.items() if test else ():
            assert test is not None
            n = min(self._bpd_images, test.num_examples)
            images = image_sets.from_reader(test.read, n, **options)
            terms = collect(each_image(self._bound, params, images), n).arrays
            bits[ema], _ = mean_and_error(terms["total"])
        names = f"{self._metric}_n{self._n}", f"bits_per_dim_n{self._bpd_images}"
        return PeriodicScores(names[0], distances, names[1], bits)

    def _features(self, images: ImageSet) -> Arrays:
        assert self._extractor is not None
        compute = features.map_features(images, [self._extractor])
        arrays = collect(compute, images.n).arrays
        return features.of_extractor(arrays, self._extractor.name)

    def _read_reference(self) -> Reference:
        """Reads training images; makes the extractor unless it is there."""
        train, extractor = self._train, self._row.extractor
        if extractor == "classifier":
            path = self._workdir / "evaluation" / "classifier.npz"
            if not path.exists():
                train_feature_classifier(path, train, seed=self._run.config.seed)
            self._extractor = load_feature_classifier(path, train.image_shape)
        elif extractor == "pixels":
            self._extractor = features.pixels()
        elif isinstance(extractor, FeatureExtractor):
            self._extractor = extractor
        n = min(self._reference_n, train.num_examples)
        rows = np.linspace(0, train.num_examples - 1, n).astype(int)
        images = image_sets.from_reader(
            lambda some: train.examples.read(rows[some]), n, batch_size=BATCH
        )
        found = self._features(images)
        moments = sample_quality.moments_of(found)
        # Without features, no time is spent on the distance of real images.
        return Reference(found if self._row.needs_reference_features else {}, moments)


def check_fields(
    metric: str,
    n: int,
    reference: int,
    bpd_images: int,
    inception: str,
    **sampling: Any,
) -> Metric:
    """Checks the fields of config.evaluation, as `PeriodicEvaluation` describes them.

    Returns:
        The row of the metric.

    Raises:
        ValueError: for a field that is out of range.
    """
    del sampling  # checked as `SamplingOptions`
    row = as_metric(metric, "metric")
    if not row.lower_is_better:
        names = [name for name, row in METRICS.items() if row.lower_is_better]
        raise ValueError(f"metric must be a distance, of {names}, got {metric!r}.")
    checks.integer("n", n, at_least=2, at_most=MAX_SAMPLES)
    checks.integer("reference", reference, at_least=2)
    checks.integer("bpd_images", bpd_images, at_least=0)
    if inception and not Path(inception).expanduser().is_file():
        raise ValueError(
            f"inception must be a file of weights, or '' for none, got {inception!r}."
        )
    return row


def make_watch(
    config: Config,
    workdir: Path,
    record: dict[str, Any],
    model: Network,
    objective: Objective | None,
    batches: data.Batches,
    mesh: Mesh,
) -> Callable[[int, TrainState], dict[str, float]] | None:
    """Builds watch(step, state) -> scores by name, which also keeps the best average.

    Args:
        config: of the training.
        workdir: of the training.
        record: what is saved with parameters, see `checkpoint.save`.
        model, objective: what the config describes.
        batches: the training images.
        mesh: the devices of the training.

    Returns:
        The function, or None if config.eval_every is 0.

    Raises:
        ValueError: for a field of config.evaluation that is wrong.
    """
    fields = current_fields(config.evaluation)
    if not config.eval_every:  # a wrong field is told now, not when it is wanted
        settings.call(check_fields, fields, "config.evaluation")
        return None
    of_data: Any = dict(
        image_shape=batches.image_shape, class_names=batches.class_names
    )
    run = Run(config, model, None, objective, **of_data)
    evaluation = settings.call(
        PeriodicEvaluation,
        fields,
        "config.evaluation",
        **dict(run=run, train=batches, mesh=mesh, workdir=workdir),
    )
    best = BestCheckpoint(workdir, record)

    def watch(step, state):
        found = evaluation(state.ema_params)
        best.offer(step, state, found)
        return found.for_log()

    return watch


def current_fields(group: Config) -> dict[str, Any]:
    """Returns config.evaluation with today's names, which version 0.1 did not have.

    Raises:
        ValueError: if it is no group, or has both names of a field.
    """
    try:
        fields = dict(group)
    except (TypeError, ValueError):
        raise ValueError(
            f"config.evaluation must be a group of fields, got {group!r}."
        ) from None
    if "bits_images" in fields:
        old, new = fields.pop("bits_images"), fields.get("bpd_images", 0)
        if new:  # 0 is what a config is completed with
            raise ValueError(
                "config.evaluation must have bpd_images without bits_images, its old "
                f"name, got {new} and {old}."
            )
        fields["bpd_images"] = old
    fields["metric"] = OLD_METRICS.get(fields["metric"], fields["metric"])
    return fields


class BestCheckpoint:
    """Keeps the average with the lowest distance so far in `workdir`/best."""

    def __init__(self, workdir: Path, record: dict[str, Any]):
        """Reads what is kept already, of this config.evaluation.

        Args:
            workdir: of the training.
            record: what is saved with parameters.
        """
        self._folder, self._record = workdir / BEST, record
        self._removed = workdir / f"{BEST}.removed"
        self._best: dict[str, Any] = {}
        if jax.process_index() == 0:  # what a kill has left
            shutil.rmtree(self._removed, ignore_errors=True)
        self._old = checkpoint.latest_step(self._folder) is not None
        if self._old:
            try:
                kept = checkpoint.load_record(self._folder)
            except ValueError as error:
                warnings.warn(f"{self._folder} begins anew: {error}", stacklevel=2)
                return
            # A kill between saving and removing leaves two.
            checkpoint.keep_only(self._folder, [kept["best"]["step"]])
            before, now = (r["config"]["evaluation"] for r in (kept, record))
            if current_fields(before) == current_fields(now):
                self._best, self._old = kept["best"], False

    def offer(self, step: int, state: TrainState, scores: PeriodicScores) -> None:
        """Keeps the best average of this state if it beats the one that is kept.

        On several hosts, all of them call it, and the first one decides.
        """
        emas = [*scores.distances]
        values = [*scores.distances.values()]
        i = int(np.argmin(np.nan_to_num(values, nan=np.inf)))
        better = np.isfinite(values[i]) and self._best.get("step") != step
        better = better and values[i] < self._best.get("value", np.inf)
        i = sharding.broadcast_from_first(i if better else -1)
        if i < 0:
            return
        locks.check(self._folder.parent)
        if self._old and jax.process_index() == 0:
            # By other scores, perhaps of a later step. A kill leaves no half.
            self._folder.rename(self._removed)
            shutil.rmtree(self._removed)
        sharding.barrier("old best network removed")
        self._old = False
        ema, metric = emas[i], scores.distance_name
        self._best = dict(metric=metric, value=values[i], step=step, ema=ema)
        config = dict(self._record["config"], **only_average(ema))
        record = {**self._record, "config": config, "window": [], "best": self._best}
        tree = {"params": {}, "ema_params": {ema: state.ema_params[ema]}}
        manager = checkpoint.make_manager(self._folder, keep=1)
        with checkpoint.closing(manager):
            checkpoint.save(manager, step, tree, record)
