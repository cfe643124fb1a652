"""Accuracy of a run of a noisy classifier, at all noise levels and by quartile of t."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_diffusion import config as settings
from jax_diffusion import data, losses, timesteps
from jax_diffusion.evaluation.image_sets import ImageSet, network_of
from jax_diffusion.evaluation.per_image import ScoreFn, collect, each_image
from jax_diffusion.evaluation.results import Clock, Result, Score
from jax_diffusion.models import Network, bind
from jax_diffusion.pipeline import Run
from jax_diffusion.schedules import NoiseSchedule

NUM_NOISE_LEVELS = 16  # at which every image is shown to the classifier


class Answers(NamedTuple):
    """The classifier's answers to each image at `NUM_NOISE_LEVELS` levels, [b, k].

    Attributes:
        accuracy: 1 if its first answer is right, else 0.
        top_5: 1 if one of its first five answers is right, else 0.
        loss: cross-entropy, in nats.
        quartile: of the timestep, 0 to 3.
    """

    accuracy: Array
    top_5: Array
    loss: Array
    quartile: Array


def accuracy(
    run: Run,
    images: ImageSet,
    *,
    seed: int = 0,
    out: Path | None = None,
) -> Result:
    """Computes how often a classifier of noisy images is right.

    Args:
        run: of a noisy classifier.
        images: labeled images, usually the test split.
        seed: of the noise and of its levels.
        out: folder for intermediate files, so that a killed job can continue.

    Returns:
        accuracy, over all levels of noise; accuracy_q0 to accuracy_q3, by quartile of
        t; top_5; cross_entropy, in nats.
    """
    clock = Clock()
    schedule = settings.make_schedule(run.config.schedule)
    score = accuracy_fn(run.model, schedule, seed)
    answers, finish = collect(
        each_image(score, run.params, images),
        images.n,
        path=out and out / "accuracy.npz",
        keep=(),
        record={**images.about, "seed": seed, "network": network_of(run)},
    )
    clock.end("accuracy")
    about = {"accuracy": images.about}
    if not answers:  # the first host has them
        return Result([], about, clock.seconds, [finish])
    right, quartile = answers["accuracy"], answers["quartile"]
    shares = {"accuracy": right}
    parts = {q: right[quartile == q] for q in range(4)}  # of few steps one has none
    shares |= {f"accuracy_q{q}": part for q, part in parts.items() if part.size}
    shares |= {"top_5": answers["top_5"], "cross_entropy": answers["loss"]}
    scores = [Score(k, float(v.mean()), images.n) for k, v in shares.items()]
    return Result(scores, about, clock.seconds, [finish])


def accuracy_fn(model: Network, schedule: NoiseSchedule, seed: int) -> ScoreFn:
    """Builds score(params, ids, image, label) -> `Answers`, jitted.

    The timesteps of a batch are stratified; the id of its first image decides them.
    """
    draw_t = timesteps.stratified(schedule.num_steps).sample

    @jax.jit
    def score(params, ids, image, label):
        x_0, model_fn = data.from_uint8(image), bind(model, params, label)

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
