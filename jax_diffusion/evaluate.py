"""Scores of a run or of any images, and the command line that prints and saves them.

    python -m jax_diffusion.evaluate --workdir runs/digits
    python -m jax_diffusion.evaluate --workdir runs/cifar10 --metrics fid,kid
    python -m jax_diffusion.evaluate --images mine --reference theirs

Samples are drawn from the run, or read (--images); they are compared with the run's
data, or with images or moments that are read (--reference). The same command goes on
where it was killed.
"""

import argparse
import math
from typing import Any

import jax

from jax_diffusion import cli
from jax_diffusion.evaluation import bits_per_dim as evaluation
from jax_diffusion.evaluation import image_sets as image_scores
from jax_diffusion.evaluation import published as papers
from jax_diffusion.evaluation import sample_quality as scoring
from jax_diffusion.evaluation.sample_quality import Score
from jax_diffusion.interop import inception_weights
from jax_diffusion.models import traits
from jax_diffusion.pipeline import Run, load_run

STAGES = {  # of networks, which need no samples
    "bpd": evaluation.bound,
    "ode": evaluation.ode,
    "accuracy": evaluation.accuracy,
}
METRICS = (*scoring.METRICS, *STAGES)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """The program; returns the record, on the first of several hosts."""
    _check(args)
    run = load_run(args.workdir, args.ema) if args.workdir else None
    names = _metrics_of(args, run)
    job = evaluation.begin(args, run)
    if args.train_classifier:
        image_scores.train_classifier(job)
    if of_images := [name for name in names if name in scoring.METRICS]:
        image_scores.score_images(job, of_images)
    for name, score in STAGES.items():
        if name in names:
            score(job)
    if jax.process_index() > 0 or not names:
        return {}
    record = job.finish()
    print(table(job.scores, record["seconds"]))
    if args.compare is not None and run is not None:
        print(papers.comparison(run.config.reproduces, record["scores"]))
    return record


def _check(args: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is read."""
    counts = ("n", "batch_size", "bits_images", "bits_steps", "ode_steps", "ode_probes")
    for name in counts:
        value = getattr(args, name)
        if value is not None and value < 1:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} must be positive, got {value}.")
    if args.workdir is None and (args.images is None or args.reference is None):
        raise ValueError(
            "--workdir must be given, or both --images and --reference, got "
            f"{args.workdir}, {args.images} and {args.reference}."
        )
    if args.train_classifier and args.workdir is None:
        raise ValueError("--train-classifier needs --workdir, got none.")
    cli.sampling_options(args)
    if args.compare not in (None, "paper"):
        raise ValueError(f"--compare must be paper, got {args.compare!r}.")


def _metrics_of(args: argparse.Namespace, run: Run | None) -> list[str]:
    """The metrics asked for, or those that take no more than there is."""
    if run is not None and traits(run.model).low_res:
        raise ValueError("the run must be of a network without low_res, got one with.")
    if run is None:
        allowed, default = [*scoring.METRICS], ["fid", "kid", "precision_recall"]
    elif run.objective is None:
        allowed = default = ["accuracy"]
    else:
        allowed, default = [*scoring.METRICS, "bpd", "ode"], ["pixel_distance", "bpd"]
        if args.images is not None:
            default = default[:1]
        if math.prod(run.image_shape) > image_scores.MAX_PIXELS:
            default = ["fid" if name == "pixel_distance" else name for name in default]
    if args.metrics is None:
        default = [] if args.train_classifier else default
    names = default if args.metrics is None else args.metrics.split(",")
    for name in names:
        if name not in METRICS:
            raise ValueError(f"--metrics must be of {METRICS}, got {name!r}.")
        if name not in allowed:
            what = "this run" if run else "images without a run"
            raise ValueError(f"--metrics of {what} must be of {allowed}, got {name!r}.")
    if args.save_moments and not {"inception"} & {*scoring.needs(names)}:
        raise ValueError(
            f"--save-moments is for metrics of Inception's features, got {names}."
        )
    if args.compare and (run is None or not run.config.get("reproduces")):
        raise ValueError(
            "--compare needs a run whose config names what it reproduces, got none."
        )
    return names


def table(scores: list[Score], seconds: dict[str, float]) -> str:
    """The scores, aligned, and where the time went."""
    rows = [("metric", "value", "+-", "images")]
    for score in scores:
        error = "" if score.error is None else f"{score.error:.4f}"
        rows.append((score.metric, f"{score.value:.6g}", error, str(score.images)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    spent = ", ".join(f"{stage} {s:.1f}" for stage, s in seconds.items())
    return "\n".join([*lines, f"seconds: {spent}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m jax_diffusion.evaluate",
        description=__doc__,
    )
    add = parser.add_argument
    add("--workdir", help="of a training run")
    add("--metrics", help=f"some of {', '.join(METRICS)}")
    add("--out", help="folder of scores.json and files; default WORKDIR/evaluation")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=256)
    add("--ema", help="such as 0.999; none for the raw parameters")
    add("--data", help="NAME:PATH, a data set other than the run's: folder:DIR, ...")
    add("--compare", metavar="paper", help="print the paper's numbers beside ours")
    add = parser.add_argument_group("samples").add_argument
    add("--images", help="a folder or .npz of images to score, instead of samples")
    add("--n", type=int, help="how many; default as many as the reference has")
    cli.add_sampling_flags(parser)
    _add_features(parser)
    add = parser.add_argument_group("likelihood and accuracy").add_argument
    add("--split", default="test", help="of the run's data")
    add("--bits-images", type=int, help="the first so many; default all")
    add("--bits-steps", type=int, help="of the bound; default all T")
    add("--ode-steps", type=int, default=200)
    add("--ode-probes", type=int, default=2, help="of Hutchinson's estimate")
    cli.add_host_flags(parser)
    return parser


def _add_features(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what they are compared with").add_argument
    add("--reference", help="a folder or .npz of images, or of moments (mu, sigma)")
    add(
        "--reference-split", default="train", help="of the run's data: train, test, all"
    )
    add(
        "--save-moments", metavar="FILE", help="of the reference, as pytorch-fid's .npz"
    )
    add = parser.add_argument_group("features").add_argument
    add("--inception", metavar="FILE", help="pytorch-fid's .pth; default downloaded")
    add(
        "--inception-url",
        default=inception_weights.URL,
        help="where it is downloaded from",
    )
    add(
        "--inception-sha256",
        default=inception_weights.SHA256,
        help="what the file must have",
    )
    add("--feature-classifier", metavar="FILE", help="default OUT/classifier.npz")
    add("--train-classifier", action="store_true", help="on the run's labelled data")


def main() -> None:
    """The command line."""
    args = _parser().parse_args()
    cli.start_hosts(args)
    with cli.fields_as_flags():
        evaluate(args)


if __name__ == "__main__":
    cli.run_program(main, long=True)
