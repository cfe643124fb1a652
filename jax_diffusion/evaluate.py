"""Scores of a run, and the command line that prints and saves them.

    python -m jax_diffusion.evaluate --workdir runs/digits --metrics frechet,bpd

frechet: Frechet distance between samples and data, on raw pixels in [-1, 1], beside
that of two random halves of the data. bpd: the variational bound in bits/dim on a
split, with all of its terms. accuracy: of a classifier, on images of a split at every
level of noise.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from jax_diffusion import (
    data,
    diffusion,
    likelihood,
    losses,
    metrics,
    plotting,
    runs,
    samplers,
    settings,
    sharding,
    timesteps,
    training,
)
from jax_diffusion.runs import Run

METRICS = ("frechet", "bpd", "accuracy")
NOISINGS = 16  # times that each image is shown to a classifier
FRECHET_LINE = (
    "Frechet distance in raw pixels, {n} samples by {sampler} in {steps} steps: "
    "{frechet:.4f}; two halves of the data: {frechet_halves:.4f}; ratio {ratio:.2f}"
)
ACCURACY_LINE = (
    "accuracy on {images} images of {split!r} at random noise: {accuracy:.3f}, by "
    "quartile of t {accuracy_by_quartile}; cross-entropy {cross_entropy:.3f} nats"
)
BPD_LINE = (
    "bits/dim of {images} images of {split!r}: {bits_per_dim:.4f} +- "
    "{standard_error:.4f} = prior {prior:.2e} + KL {kl:.4f} + decoder {decoder:.4f}"
)


def scores_of(score: Callable[..., PyTree], params: PyTree, batches: Any) -> PyTree:
    """score(params, ids=[b], image=[b, ...], label=[b]) of all images, in NumPy.

    All devices share each batch; images are numbered as they come.
    """
    mesh, parts, first = sharding.make_mesh(), [], 0
    params = sharding.spread(mesh, params)
    for batch in batches:
        n = len(batch["label"])
        batch["ids"] = np.arange(first, first + n, dtype=np.int32)
        shared = sharding.in_parts(mesh, batch)
        scores = sharding.fetch(score(params, **shared))
        parts.append(jax.tree.map(lambda a, n=n: a[:n], scores))
        first += n
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def frechet(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Distance of as many samples as there are images to those images."""
    images = _images(run, args, args.frechet_split).images
    n = args.n or len(images)
    schedule = settings.make_schedule(
        run.config.schedule, steps=args.steps, spacing=args.spacing
    )
    draw = runs.make_sampler(
        run.model, run.objective, run.image_shape, sampler=args.sampler
    )
    batches = runs.generate(
        draw,
        {"model": run.params},
        schedule,
        {"label": np.arange(run.num_labels, dtype=np.int32)},
        n=n,
        seed=args.seed,
        batch_size=min(args.batch_size, n),
    )
    drawn = [
        b[-1] for b, _ in tqdm(batches, total=-(-n // args.batch_size), disable=None)
    ]
    samples = _pixels(np.concatenate(drawn))
    pixels = _pixels(images)
    order = np.random.default_rng(args.seed).permutation(len(pixels))
    halves = [metrics.moments(pixels[h]) for h in np.array_split(order, 2)]
    distance = metrics.frechet_distance(
        metrics.moments(samples), metrics.moments(pixels)
    )
    distance_of_halves = metrics.frechet_distance(*halves)
    return {
        "frechet": distance,
        "frechet_halves": distance_of_halves,
        "ratio": distance / distance_of_halves,
        "frechet_split": args.frechet_split,
        "n": n,
        "steps": schedule.num_steps,
        "sampler": args.sampler,
    }


def bits_per_dim(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """The bound over a split; writes its terms (.npz) and their curve (.png)."""
    batches = _images(run, args, args.split)
    schedule = settings.make_schedule(run.config.schedule)
    objective: Any = run.objective

    @jax.jit
    def bpd(params, ids, image, label):
        keys = samplers.image_keys(jax.random.key(args.seed), ids)
        x_0 = data.from_uint8(image)
        model_fn = training.bind(run.model, params, label)
        denoise_fn = diffusion.denoiser(model_fn, schedule, objective)
        denoise_fn = diffusion.clip_x_0(denoise_fn)
        return likelihood.bits_per_dim(keys, denoise_fn, schedule, x_0)

    count = -(-batches.num_examples // args.batch_size)
    bits = scores_of(bpd, run.params, tqdm(batches, total=count, disable=None))
    rate, distortion = likelihood.progressive_coding(bits)
    terms = {**bits._asdict(), "rate": rate, "distortion": distortion}
    means = {name: np.mean(value, axis=0) for name, value in bits._asdict().items()}
    if jax.process_index() == 0:
        args.out.mkdir(exist_ok=True)
        np.savez(args.out / "bpd_terms.npz", **terms)
        plotting.save_vlb_curve(args.out / "bpd_terms.png", {"vlb": means["vlb"]})
    return {
        "bits_per_dim": float(means["total"]),
        "standard_error": float(bits.total.std(ddof=1) / len(bits.total) ** 0.5),
        "prior": float(means["prior"]),
        "decoder": float(means["vlb"][0]),
        "kl": float(means["vlb"][1:].sum()),
        "split": args.split,
        "images": len(bits.total),
    }


def accuracy(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """How often a classifier is right, over a split and all t, and by quartile of t."""
    batches = _images(run, args, args.split)
    schedule = settings.make_schedule(run.config.schedule)
    draw_t = timesteps.stratified(schedule.num_steps).sample

    @jax.jit
    def score(params, ids, image, label, i):
        key = jax.random.fold_in(jax.random.key(args.seed), i)
        key_t, key_eps = jax.random.split(jax.random.fold_in(key, ids[0]))
        x_0 = data.from_uint8(image)
        t, _ = draw_t(key_t, (), len(x_0))
        logits_fn = training.bind(run.model, params, label)
        terms = losses.classifier_loss(key_eps, logits_fn, schedule, x_0, t, label)
        return terms, 4 * t // schedule.num_steps

    rows = [
        scores_of(functools.partial(score, i=i), run.params, batches)
        for i in tqdm(range(NOISINGS), disable=None)
    ]
    terms, quartile = jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)
    right = [round(float(terms.accuracy[quartile == q].mean()), 4) for q in range(4)]
    return {
        "accuracy": float(terms.accuracy.mean()),
        "top_5": float(terms.top_5.mean()),
        "accuracy_by_quartile": right,
        "cross_entropy": float(terms.loss.mean()),
        "split": args.split,
        "images": batches.num_examples,
    }


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """The program: prints one line a metric and writes evaluation/scores.json."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be positive, got {args.batch_size}.")
    run = runs.load_run(args.workdir, args.ema)
    names = _metrics_of(run, args.metrics)
    args.out = Path(args.workdir) / "evaluation"
    scores: dict[str, Any] = {"ema": run.ema}
    for name, score, line in (
        ("frechet", frechet, FRECHET_LINE),
        ("bpd", bits_per_dim, BPD_LINE),
        ("accuracy", accuracy, ACCURACY_LINE),
    ):
        if name in names:
            scores |= score(run, args)
            if jax.process_index() == 0:
                print(line.format(**scores))
    if jax.process_index() == 0:
        args.out.mkdir(exist_ok=True)
        (args.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def _metrics_of(run: Run, asked: str | None) -> list[str]:
    """The metrics asked for, or all that the run's network can have."""
    if getattr(run.model, "low_res", False):
        raise ValueError("the run must be of a network without low_res, got one with.")
    allowed = ["accuracy"] if run.objective is None else ["frechet", "bpd"]
    names = allowed if asked is None else asked.split(",")
    for name in names:
        if name not in METRICS:
            raise ValueError(f"--metrics must be of {METRICS}, got {name!r}.")
        if name not in allowed:
            raise ValueError(
                f"--metrics of this run must be of {allowed}, got {name!r}."
            )
    return names


def _images(run: Run, args: argparse.Namespace, split: str) -> data.Batches:
    return runs.load_images(run, args.data, split, batch_size=args.batch_size)


def _pixels(images: np.ndarray) -> np.ndarray:
    return data.from_uint8(images).reshape(len(images), -1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m jax_diffusion.evaluate",
        description=__doc__,
    )
    parser.add_argument("--workdir", required=True, help="of a training run")
    parser.add_argument(
        "--metrics", help="of frechet, bpd; of a classifier accuracy; default all"
    )
    parser.add_argument(
        "--data",
        help="NAME:PATH, a data set other than the run's: folder:DIR, npz:FILE",
    )
    parser.add_argument("--split", default="test", help="for bpd and accuracy")
    parser.add_argument(
        "--frechet-split", default="all", help="to compare samples with"
    )
    parser.add_argument("--n", type=int, help="samples; default as many as images")
    parser.add_argument(
        "--sampler", default="ddim", help=f"of {', '.join(runs.SAMPLERS)}"
    )
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--spacing", default="sections", help="of the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--ema", help="such as 0.999; none for the raw parameters")
    settings.add_hosts(parser)
    args = parser.parse_args()
    settings.start_hosts(args)
    evaluate(args)


if __name__ == "__main__":
    settings.run_program(main, long=True)
