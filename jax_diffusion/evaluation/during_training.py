"""PeriodicEvaluation during training: small ones, of every average, and the best network kept.

All hosts compute them together, each its share, and each makes the same numbers of the
whole: none waits for another.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jax_diffusion import config as settings
from jax_diffusion import data, metrics, pipeline
from jax_diffusion.config import Config
from jax_diffusion.evaluation import features as extractors
from jax_diffusion.evaluation import sample_quality as scoring
from jax_diffusion.evaluation.features import FeatureExtractor
from jax_diffusion.evaluation.sample_quality import Arrays, ImageSet, Reference
from jax_diffusion.models import traits
from jax_diffusion.pipeline import SamplingOptions
from jax_diffusion.registry import lookup
from jax_diffusion.runtime import checkpoint, sharding
from jax_diffusion.training.setup import Plan
from jax_diffusion.training.step import TrainState

BEST = "best"  # a folder in the workdir, itself one for `sample` and `evaluate`
DISTANCES = ("fid", "classifier_distance", "pixel_distance")
BATCH = 256


@dataclasses.dataclass
class PeriodicEvaluation:
    """scores(state) -> {"pixel_distance_n1000_0.9999": 12.3, ...}, of every average.

    The entries of the distance decide which network is best. The first call reads the
    reference and, for "classifier_distance", trains the classifier if the workdir has
    none.

    Raises:
        ValueError: for a field that is out of range, or a network that cannot draw.
    """

    config: Config
    plan: Plan
    workdir: Path
    metric: str  # of `DISTANCES`, between samples and training images
    n: int  # samples of every average
    reference: int  # training images to compare with, at most, evenly spaced
    sampler: str
    steps: int
    spacing: str
    bits_images: int  # of the test split, for the bound on bits/dim; 0 for none
    inception: str  # path of pytorch-fid's .pth; if empty it is downloaded

    def __post_init__(self):
        config, model, objective = self.config, self.plan.model, self.plan.objective
        if objective is None or traits(model).low_res:
            raise ValueError(
                "config.eval_every must be 0 for a classifier and for a network with "
                f"low_res, got {config.eval_every}."
            )
        lookup("config.evaluation.metric", self.metric, dict.fromkeys(DISTANCES))
        if self.n < 2 or self.reference < 2 or self.bits_images < 0:
            raise ValueError(
                "config.evaluation must have n and reference from 2 and bits_images "
                f"from 0, got {self.n}, {self.reference} and {self.bits_images}."
            )
        shape = self.plan.batches.image_shape
        options = SamplingOptions(
            sampler=self.sampler, steps=self.steps, spacing=self.spacing
        )
        run = pipeline.Run(config, model, None, objective, shape)
        self._bound = pipeline.bind_sampler(run, options, one_program=False)
        full = settings.make_schedule(config.schedule)
        self._bound = scoring.bound_fn(model, objective, full, config.seed)
        self._extractor: FeatureExtractor | None = None
        if self.metric == "fid":
            self._extractor = extractors.inception(self.inception or None)
        self._known: Reference | None = None

    def __call__(self, state: TrainState) -> dict[str, float]:
        """All scores of this state; on several hosts, all of them call it."""
        found, averages = {}, state.ema_params.items()
        for name, params in averages:
            found[f"{self.metric}_n{self.n}_{name}"] = self._distance(params)
        for name, params in averages if self.bits_images else ():
            found[f"bits_per_dim_n{self.bits_images}_{name}"] = self._bits(params)
        return found

    def _distance(self, params: PyTree) -> float:
        if self._known is None:
            self._known = self._read_reference()
        source = scoring.drawn(
            self._bound,
            params=params,
            n=self.n,
            about={},
            batch_size=BATCH,
            seed=self.config.seed,
            mesh=self.plan.mesh,
        )
        features = self._features(source)
        return scoring.compare(self.metric, features, self._known)[0].value

    def _bits(self, params: PyTree) -> float:
        batches = self._test
        n = min(self.bits_images, batches.num_examples)
        source = scoring.stored(batches.examples.read, n, BATCH, {})
        terms, _ = scoring.collect(scoring.each_image(self._bound, params, source), n)
        return scoring.mean_and_error(terms["total"])[0]

    def _features(self, source: ImageSet) -> dict[str, Arrays]:
        assert self._extractor is not None
        compute = scoring.features_of(source, [self._extractor])
        return scoring.by_extractor(scoring.collect(compute, source.n)[0])

    @functools.cached_property
    def _test(self) -> data.Batches:
        return pipeline.open_split(self.config, "test")

    def _read_reference(self) -> Reference:
        """Moments of training images; sets the extractor if need be."""
        batches = self.plan.batches
        if self.metric == "pixel_distance":
            self._extractor = extractors.pixels()
        elif self.metric == "classifier_distance":
            path = self.workdir / "evaluation" / "classifier.npz"
            if not path.exists():
                extractors.train_classifier(path, batches, seed=self.config.seed)
            self._extractor = extractors.load_classifier(path, batches.image_shape)
        n = min(self.reference, batches.num_examples)
        rows = np.linspace(0, batches.num_examples - 1, n).astype(int)
        source = scoring.stored(
            lambda some: batches.examples.read(rows[some]), n, BATCH, {}
        )
        features = self._features(source)
        moments = {
            name: {"pool": metrics.moments(kinds["pool"])}
            for name, kinds in features.items()
        }
        return Reference({}, moments)


def make_watch(
    config: Config, workdir: Path, plan: Plan, record: dict[str, Any]
) -> Callable[[int, TrainState], dict[str, float]] | None:
    """Builds watch(step, state) -> scores, which also keeps the best network.

    None if the config wants none.

    Raises:
        ValueError: for a field of config.evaluation that is wrong.
    """
    if not config.eval_every:
        return None
    where = dict(config=config, plan=plan, workdir=workdir)
    scores = settings.call(
        PeriodicEvaluation, config.evaluation, "config.evaluation", **where
    )
    best = BestCheckpoint(workdir, record)

    def watch(step, state):
        found = scores(state)
        best.offer(step, state, found)
        return found

    return watch


class BestCheckpoint:
    """The average with the lowest score so far, in `workdir`/best."""

    def __init__(self, workdir: Path, record: dict[str, Any]):
        self._folder, self._record = workdir / BEST, record
        self._best: dict[str, Any] = {}
        self._old = checkpoint.latest_step(self._folder) is not None
        if self._old:
            kept = checkpoint.load_record(self._folder)
            if kept["config"]["evaluation"] == record["config"]["evaluation"]:
                self._best, self._old = kept["best"], False

    def offer(self, step: int, state: TrainState, scores: dict[str, float]) -> None:
        """Keeps the best average of this state if it beats what is kept.

        On several hosts, all of them call it, and the first one decides.
        """
        emas = [*state.ema_params]  # whose distances come first
        values = [*scores.values()][: len(emas)]
        i = int(np.argmin(np.nan_to_num(values, nan=np.inf)))
        better = np.isfinite(values[i]) and self._best.get("step") != step
        better = better and values[i] < self._best.get("value", np.inf)
        i = sharding.broadcast_from_first(i if better else -1)
        if i < 0:
            return
        if self._old and jax.process_index() == 0:
            shutil.rmtree(self._folder)  # by other scores, perhaps of a later step
        sharding.barrier("old best network removed")
        self._old = False
        ema, metric = emas[i], [*scores][i].rpartition("_")[0]
        self._best = dict(metric=metric, value=values[i], step=step, ema=ema)
        config = dict(self._record["config"], ema_decays=[float(ema)])
        record = {**self._record, "config": config, "window": [], "best": self._best}
        tree = {"params": {}, "ema_params": {ema: state.ema_params[ema]}}
        with checkpoint.make_manager(self._folder, keep=1) as manager:
            checkpoint.save(manager, step, tree, record)
