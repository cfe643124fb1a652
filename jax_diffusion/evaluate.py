"""Scores a run, or any images: FID, KID, bits/dim and their relatives.

    python -m jax_diffusion.evaluate --workdir runs/digits
    python -m jax_diffusion.evaluate --workdir runs/cifar10 --metrics fid,kid --n 2000
    python -m jax_diffusion.evaluate --images mine --reference theirs --metrics fid

Samples are drawn from the run, or read (--images). They are compared with the run's
training images, or with images or moments that are read (--reference). Scores, files
and the record of how they were made go to WORKDIR/evaluation; a command that was killed
continues when it is given again. Where a metric cannot be computed, such as precision
of 3 images, the others are, and the exit status is 1. What each metric is:
`python -m pydoc jax_diffusion.evaluation`.

From Python: `jax_diffusion.evaluate(run, metrics=["fid", "bpd"])`.
"""

import argparse
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jax_diffusion import cli
from jax_diffusion.evaluation import (
    METRICS,
    NETWORK_METRICS,
    Scores,
    feature_classifier,
    image_sets,
    published,
    results,
)
from jax_diffusion.evaluation import evaluate as compute
from jax_diffusion.interop import inception_weights
from jax_diffusion.pipeline import Run, load_run
from jax_diffusion.runtime import files, locks, sharding

SPLITS = ["train", "test", "all"]
ALL_METRICS = ", ".join((*METRICS, *NETWORK_METRICS))


def widths(text: str) -> list[float]:
    """The type of flags that are widths of averages, with commas between them."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        rule = "must be numbers with commas between, such as 0.05,0.1"
        raise argparse.ArgumentTypeError(f"{rule}, got {text[:99]!r}") from None
    if len({f"{width:g}" for width in found}) < len(found):
        raise argparse.ArgumentTypeError(f"must be different widths, got {text[:99]}")
    return found


FLAGS: cli.Flags = {
    "--workdir": dict(help="Workdir of a run to evaluate."),
    "--metrics": dict(
        metavar="NAME,...",
        help=f"What to compute: {ALL_METRICS}, or your own package.module:function. By "
        "default pixel_distance (fid for large images) and bpd of a denoiser, accuracy "
        "of a classifier, and fid, kid and precision_recall of images without a run.",
    ),
    "--out": dict(
        metavar="DIR",
        help="Folder for scores.json and other files. By default WORKDIR/evaluation; "
        "without a run, nothing is written.",
    ),
    "--seed": dict(type=int, default=0, help="Seed of samples and of noise."),
    "--batch-size": dict(
        type=cli.positive,
        default=256,
        help="Number of images that all devices together compute at once.",
    ),
    **cli.EMA_FLAGS,
    "--ema-width": dict(
        type=widths,
        metavar="WIDTH,...",
        help="Scores the average of each width, such as 0.05,0.1,0.15. Needs a run "
        "with config.ema_widths; other widths are reconstructed from its snapshots. "
        "Of several, each has a folder such as WORKDIR/evaluation/width=0.1.",
    ),
    "--data": dict(
        metavar="[NAME:]PATH",
        help="A data set in place of the run's, such as folder:DIR or FILE.npz.",
    ),
    "--compare": dict(
        choices=["paper"],
        help="Print the paper's numbers beside ours, for a config that reproduces one.",
    ),
}
IMAGE_FLAGS: cli.Flags = {
    "--images": dict(
        metavar="[NAME:]PATH",
        help="Images to score in place of samples: a folder, a .npz such as sample "
        "writes, or a data set.",
    ),
    "--n": dict(
        type=cli.positive,
        help="Number of images to score. By default all of --images, and as many "
        "samples as the reference has images.",
    ),
    "--reference": dict(
        metavar="[NAME:]PATH",
        help="Images to compare with, or a .npz of moments (mu, sigma) as pytorch-fid "
        "and guided-diffusion write it. By default the run's data.",
    ),
    "--reference-split": dict(
        default="train",
        choices=SPLITS,
        help="Which split of a data set is the reference.",
    ),
    "--save-moments": dict(
        metavar="FILE",
        help="Write the moments of the reference's Inception features to this .npz.",
    ),
}
_TRAIN: dict[str, Any] = dict(dest="train_feature_classifier", action="store_true")
FEATURE_FLAGS: cli.Flags = {
    "--inception": dict(
        metavar="FILE",
        help="Inception's weights, pytorch-fid's .pth. By default they are downloaded "
        "once.",
    ),
    "--inception-url": dict(
        metavar="URL",
        default=inception_weights.URL,
        help="Where Inception's weights are downloaded from.",
    ),
    "--inception-sha256": dict(
        metavar="HASH",
        default=inception_weights.SHA256,
        help="SHA-256 that the file of weights must have.",
    ),
    "--feature-classifier": dict(
        metavar="FILE",
        help="The small network whose features the metrics cnn_* compare. By default "
        "classifier.npz in the folder of --out.",
    ),
    "--train-feature-classifier": dict(
        help="Train that network first, on the run's labeled data.", **_TRAIN
    ),
    "--train-classifier": dict(help=argparse.SUPPRESS, **_TRAIN),  # the old name
}
_COUNT: dict[str, Any] = dict(type=cli.positive, metavar="N")
NETWORK_FLAGS: cli.Flags = {
    "--split": dict(
        default="test",
        choices=SPLITS,
        help="Which split of the data bpd, nll_ode and accuracy are of.",
    ),
    "--bpd-images": dict(
        help="Compute bpd and nll_ode on the first so many images only. By "
        "default on all.",
        **_COUNT,
    ),
    "--bpd-steps": dict(
        help="Number of terms of the bound. By default all T of them; with fewer the "
        "bound is looser, of EDM and flows by far.",
        **_COUNT,
    ),
    # The old names.
    "--bits-images": dict(help=argparse.SUPPRESS, dest="bpd_images", **_COUNT),
    "--bits-steps": dict(help=argparse.SUPPRESS, dest="bpd_steps", **_COUNT),
    "--ode-steps": dict(
        default=200, help="Number of steps of the ODE, at most T - 1.", **_COUNT
    ),
    "--ode-probes": dict(
        default=2, help="Number of probes of Hutchinson's estimate.", **_COUNT
    ),
}


def main(
    program: str = "python -m jax_diffusion.evaluate",
) -> Scores | list[Scores]:
    """Runs the command line; returns the scores, on the first of several hosts.

    Args:
        program: what starts it, for --help.
    """
    args = make_parser(program).parse_args()
    cli.start_hosts(args)
    with cli.fields_as_flags(args), cli.saying_what_is_read():
        if args.workdir is None and (args.images is None or args.reference is None):
            raise ValueError(
                "--workdir must be given, or both --images and --reference, got "
                f"{args.workdir}, {args.images} and {args.reference}."
            )
        keywords = inspect.signature(compute).parameters
        fields = {k: v for k, v in vars(args).items() if k in keywords}
        fields["options"] = cli.sampling_options(args)
        given, reproduces = args.ema_width or [None], ""
        if args.workdir is None:
            needs = "needs a run, got images"
            cli.refuse_useless(args.given, ["ema", "ema_width"], needs)
            runs = [fields.pop("images")]
        else:
            if len(given) > 1 and args.train_feature_classifier:
                rule = "train_feature_classifier must be left out with several widths"
                raise ValueError(f"{rule}, got {len(given)}.")
            # All of them at first: what is wrong is told before the first is scored.
            runs = [load_run(args.workdir, args.ema, ema_width=each) for each in given]
            reproduces = runs[0].config.get("reproduces")
            if args.out is None:
                fields["out"] = Path(args.workdir) / "evaluation"
        if args.compare and not reproduces:
            raise ValueError(
                "--compare needs a run whose config names what it reproduces, got none."
            )
        if len(runs) == 1:
            found = [compute(runs[0], **fields)]
        else:
            found = evaluate_averages(runs, fields.pop("out"), fields)
    if jax.process_index() == 0:
        show(found, given, reproduces if args.compare else None)
    return found[0] if len(found) == 1 else found


@locks.holding("out")
def evaluate_averages(
    runs: Sequence[Run], out: str | Path, fields: Mapping[str, Any]
) -> list[Scores]:
    """Evaluates averages of one run, each into a folder of its own within `out`.

    Until all are there, `out`/averages.json says which are: a command that was killed
    does not compute them again.

    Args:
        runs: the averages, whose names are those of the folders.
        out: the folder.
        fields: further arguments of `evaluation.evaluate`.
    """
    path, leads = Path(out) / "averages.json", jax.process_index() == 0
    values, done = {**fields, "options": vars(fields["options"])}, list[str]()
    job: dict[str, Any] = {name: repr(value) for name, value in values.items()}
    job["networks"] = [image_sets.network_of(run) for run in runs]
    if leads and path.exists():
        there = json.loads(path.read_text())
        done = there["done"] if there["job"] == job else []
    if "cnn_" in (fields["metrics"] or "") and fields["feature_classifier"] is None:
        default = feature_classifier.default_file(Path(out), None)
        fields = {**fields, "feature_classifier": default}
    found, count = [], sharding.broadcast_from_first(len(done))
    for i, run in enumerate(runs):
        folder = Path(out) / run.ema
        if i < count:
            last = results.read_records(folder / "scores.json")[-1:] if leads else []
            found.append(Scores.of_record(last[0]) if last else Scores())
            continue
        found.append(compute(run, **{**fields, "out": folder}))
        done = [*done, run.ema]
        if leads:
            text = files.json_text({"job": job, "done": done}, indent=2)
            files.write_atomic(path, text)
    if leads:
        path.unlink()
    return found


def show(
    found: Sequence[Scores], ema_widths: Sequence[float | None], compare: str | None
) -> None:
    """Prints scores.

    Args:
        found: of every run.
        ema_widths: which averages these are of.
        compare: the setting of a paper, whose numbers are printed beside.

    Raises:
        cli.IncompleteError: if metrics are missing.
    """
    trained = found[0].record.get("feature_classifier")
    if trained:
        print(
            f"feature classifier: {trained['accuracy']:.3f} of "
            f"{trained['test_images']} test images right, {trained['seconds']:.0f} s: "
            f"{trained['file']}"
        )
    several = len(found) > 1
    of = [f" of ema_width {width:g}" if several else "" for width in ema_widths]
    if several:
        by_width = dict(zip([f"{w:g}" for w in ema_widths], found, strict=True))
        print(results.side_by_side("ema_width", by_width))
    elif found[0]:
        print(found[0])
    for scores, which in zip(found, of, strict=True) if compare else ():
        assert compare is not None
        print(which.removeprefix(" of ") + ":\n" if which else "", end="")
        print(published.comparison(compare, scores.record["scores"]))
    told = (
        f"{k}{which} is missing: {why}"
        for scores, which in zip(found, of, strict=True)
        for k, why in scores.failures.items()
    )
    if missing := " ".join(told):
        raise cli.IncompleteError(missing)


def make_parser(program: str) -> argparse.ArgumentParser:
    """Makes the parser of the command line; see `main`."""
    parser = cli.make_parser(program, __doc__)
    cli.add_flags(parser, FLAGS)
    about = "Example: --images samples.npz --reference cifar10:DATA --n 10000"
    cli.add_flags(parser, IMAGE_FLAGS, "images", about)
    cli.add_sampling_flags(parser)
    about = "Example: --train-feature-classifier --metrics cnn_fd,cnn_kid"
    cli.add_flags(parser, FEATURE_FLAGS, "features", about)
    about = "Example: --metrics bpd,nll_ode --bpd-images 1000 --bpd-steps 100"
    cli.add_flags(parser, NETWORK_FLAGS, "likelihood and accuracy", about)
    cli.add_host_flags(parser)
    return parser


if __name__ == "__main__":
    cli.run_program(main)
