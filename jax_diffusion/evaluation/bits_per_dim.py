"""An evaluation: what it knows, finds and writes down; and its scores of a network.

`evaluate` is the command line. Every stage goes on where it was killed.
"""

import argparse
import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_diffusion import config as settings
from jax_diffusion import data, likelihood, pipeline, plotting
from jax_diffusion.evaluation import sample_quality as scoring
from jax_diffusion.evaluation.sample_quality import Arrays, ImageSet, Score
from jax_diffusion.pipeline import Run
from jax_diffusion.runtime import checkpoint, logs
from jax_diffusion.runtime import files as parts


@dataclasses.dataclass
class Evaluation:
    """What one call of the program knows and finds."""

    args: argparse.Namespace
    run: Run | None
    out: Path | None  # None: nothing is written
    about: dict[str, Any]  # how the scores were made
    scores: list[Score] = dataclasses.field(default_factory=list)
    clock: scoring.Clock = dataclasses.field(default_factory=scoring.Clock)
    # What can be removed or joined when all has been computed.
    written: list[tuple[parts.ResumableNpz, int, tuple[str, ...] | None]] = (
        dataclasses.field(default_factory=list)
    )

    def collect(
        self, stage: str, compute: Any, source: ImageSet, keep: Any = None, **more: Any
    ) -> Arrays:
        """`scoring.collect` into parts of `out`; `keep` are the names to keep."""
        n, path = source.n, None
        if self.out is not None:
            path = self.out / f"{stage}.npz"
        record = {**source.about, **more, "n": n, "jax": jax.__version__}
        arrays, writer = scoring.collect(compute, n, path=path, record=record)
        if writer is not None:
            self.written.append((writer, n, keep))
        self.clock(stage)
        return arrays

    def finish(self) -> dict[str, Any]:
        """The record of this evaluation, added to scores.json."""
        entry = {
            "scores": {s.metric: s.value for s in self.scores},
            "errors": {s.metric: s.error for s in self.scores if s.error is not None},
            "images": {s.metric: s.images for s in self.scores},
            **self.about,
            "seconds": self.clock.seconds,
            **logs.describe(self.run.config.to_dict() if self.run else {}),
        }
        if self.out is None:
            return entry
        path = self.out / "scores.json"
        text = json.dumps({"evaluations": [*_evaluations(path), entry]}, indent=2)
        self.out.mkdir(parents=True, exist_ok=True)
        parts.write_atomic(path, text)
        for writer, n, keep in self.written:
            if keep == ():
                writer.discard()
            else:
                writer.join(n, keep)
        return entry


def begin(args: argparse.Namespace, run: Run | None) -> Evaluation:
    """An evaluation of which nothing is computed yet."""
    out = Path(args.out) if args.out else None
    if out is None and args.workdir:
        out = Path(args.workdir) / "evaluation"
    if out is not None:
        _evaluations(out / "scores.json")  # which must be readable at the end
    job = Evaluation(args, run, out, about={"seed": args.seed})
    if run is not None:
        digests = json.dumps(checkpoint.digests(run.params), sort_keys=True)
        job.about["network"] = {
            "ema": run.ema,
            "step": checkpoint.latest_step(args.workdir),
            "crc32": zlib.crc32(digests.encode()),
        }
    return job


def _evaluations(path: Path) -> list[Any]:
    """Those that are in scores.json."""
    if not path.exists():
        return []
    try:
        return [*json.loads(path.read_text())["evaluations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be an object with a list `evaluations`, got {error!r}."
        ) from error


def images_of(job: Evaluation, split: str) -> data.Batches:
    assert job.run is not None
    args = job.args
    return pipeline.open_images(job.run, args.data, split, batch_size=args.batch_size)


def name_of_data(job: Evaluation) -> str:
    """NAME:PATH, or NAME of data that are embedded, as --data or the config has it."""
    assert job.run is not None
    group = job.run.config.data
    path = group.get("path")
    return job.args.data or (f"{group.name}:{path}" if path else group.name)


def split_of(job: Evaluation, split: str, n: int | None = None) -> ImageSet:
    """The first n images of a split of the run's data, unflipped."""
    assert job.run is not None
    batches, size = images_of(job, split), job.args.batch_size
    if n is not None and n > batches.num_examples:
        raise ValueError(
            f"--bits-images must be at most {batches.num_examples}, the images of "
            f"{split!r}, got {n}."
        )
    about = {
        "by": name_of_data(job),
        "split": split,
        "flip": False,
        "batch_size": size,
        "image_shape": [*batches.image_shape],
    }
    n = n or batches.num_examples
    return scoring.stored(batches.examples.read, n, size, {**about, "images": n})


def bound(job: Evaluation) -> None:
    """The discrete bound over a split, with its parts, files and plots."""
    run, args = job.run, job.args
    assert run is not None
    source = split_of(job, args.split, args.bits_images)
    schedule = settings.make_schedule(run.config.schedule, steps=args.bits_steps)
    fixed = {"steps": schedule.num_steps, "network": job.about["network"]}
    job.about["bpd"] = source.about | fixed
    score = scoring.bound_fn(run.model, run.objective, schedule, args.seed)
    compute = scoring.each_image(score, run.params, source)
    found: Any = job.collect("bpd_terms", compute, source, seed=args.seed, **fixed)
    if jax.process_index() > 0:
        return
    n, bits = source.n, likelihood.BitsPerDim(**found)
    rates, distortions = likelihood.progressive_coding(bits)
    rate, distortion = (np.asarray(a).mean(axis=0) for a in (rates, distortions))
    if job.out is not None:
        _write_terms(job.out, bits, rate, distortion)
    for name, values in (
        ("bits_per_dim", bits.total),
        ("prior", bits.prior),
        ("kl", bits.vlb[:, 1:].sum(axis=1)),
        ("decoder", bits.vlb[:, 0]),
        ("rmse", distortions[:, 0]),
    ):
        value, error = scoring.mean_and_error(values)
        job.scores.append(Score(name, value, n, error))


def _write_terms(
    out: Path, bits: likelihood.BitsPerDim, rate: np.ndarray, distortion: np.ndarray
) -> None:
    """Means over images: improved-diffusion's three files, and the plots."""
    terms = {"vb": bits.vlb, "mse": bits.eps_mse, "xstart_mse": bits.x_0_mse}
    for name, values in terms.items():  # there the last timestep comes first
        np.savez(out / f"{name}_terms.npz", np.mean(values, axis=0)[::-1])
    np.savez(out / "rate_distortion.npz", rate=rate, distortion=distortion)
    plotting.save_vlb_curve(out / "bpd_terms.png", {"vlb": np.mean(bits.vlb, axis=0)})
    plotting.save_rate_distortion(out / "rate_distortion.png", rate, distortion)


def ode(job: Evaluation) -> None:
    """The likelihood by the probability-flow ODE, with its errors."""
    run, args = job.run, job.args
    assert run is not None
    source = split_of(job, args.split, args.bits_images)
    most = settings.make_schedule(run.config.schedule).num_steps
    # From row to row: one row more than steps, where there are so many.
    rows = min(args.ode_steps + 1, most)
    schedule = settings.make_schedule(run.config.schedule, steps=rows, spacing="angle")
    fixed = {"steps": schedule.num_steps - 1, "probes": args.ode_probes}
    fixed |= {"network": job.about["network"]}
    job.about["ode"] = source.about | fixed
    score = scoring.ode_fn(
        run.model, run.objective, schedule, args.seed, args.ode_probes
    )
    compute = scoring.each_image(score, run.params, source)
    found = job.collect("ode_terms", compute, source, seed=args.seed, **fixed)
    if jax.process_index() > 0:
        return
    value, error = scoring.mean_and_error(found["total"])
    job.scores.append(Score("ode_bits_per_dim", value, source.n, error))
    for name in ("step_error", "probe_error"):  # unknown of one step, of one probe
        value = float(np.mean(found[name], dtype=np.float64))
        if np.isfinite(value):
            job.scores.append(Score(f"ode_{name}", value, source.n))


def accuracy(job: Evaluation) -> None:
    """How often a classifier is right, over a split and all t, and by quartile of t."""
    run, args = job.run, job.args
    assert run is not None
    source = split_of(job, args.split)
    job.about["accuracy"] = source.about
    schedule = settings.make_schedule(run.config.schedule)
    score = scoring.accuracy_fn(run.model, schedule, args.seed)
    compute = scoring.each_image(score, run.params, source)
    fixed = {"seed": args.seed, "network": job.about["network"]}
    answers = job.collect("accuracy", compute, source, (), **fixed)
    if jax.process_index() > 0:
        return
    right, quartile = answers["accuracy"], answers["quartile"]
    shares = {f"accuracy_q{q}": right[quartile == q] for q in range(4)}
    shares |= {"top_5": answers["top_5"], "cross_entropy": answers["loss"]}
    for name, values in {"accuracy": right, **shares}.items():
        job.scores.append(Score(name, float(values.mean()), source.n))
