"""Draws images from a run: PNGs and a grid, one .npz, or the sampler itself as a file.

    python -m jax_diffusion.sample --workdir runs/digits --out pictures --steps 50
    python -m jax_diffusion.sample --workdir runs/digits --out samples.npz --n 50000
    python -m jax_diffusion.sample --workdir runs/digits --export digits.jaxexport

From Python: `jax_diffusion.sample_images(run, n=64, steps=50)`.

A folder gets a PNG for each image, record.json with the options of the job, and sheets/
with a grid and, of the task generate, denoising.gif; what reads the folder as images
leaves sheets/ out. A folder that holds something else is refused; --overwrite replaces
samples in it.
FILE.npz has the images as arr_0, uint8 [n, h, w, c], and their labels as arr_1, as in
improved-diffusion; where all classes are called by numbers, those are the labels.

Image i depends on the seed and on i alone; another batch size may change a pixel by one
gray level. A job that ends in FILE.npz continues where it was killed when the same
command is given again, and the file has the same bytes as if nothing had happened.
"""

import argparse
import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jax_diffusion import checks, cli, data, plotting
from jax_diffusion.data.find import SHEETS, SUFFIXES
from jax_diffusion.pipeline import (
    BoundSampler,
    SamplingOptions,
    TaskOptions,
    bind_sampler,
    export_sampler,
    load_other,
    load_run,
    make_options,
    sample_folder,
)
from jax_diffusion.pipeline.masks import HALVES
from jax_diffusion.pipeline.tasks import TASKS
from jax_diffusion.runtime import checkpoint, files, locks, sharding
from jax_diffusion.runtime.resumable_npz import ResumableNpz

Batches = Iterable[tuple[np.ndarray, np.ndarray]]  # frames [k b h w c], labels [b]

GIF_FRAMES = 25
GRID_IMAGES = 100
STRIP_IMAGES = 10  # whose frames are shown one below the other


def sample(args: argparse.Namespace) -> None:
    """Runs the program; everything is checked before the first image is drawn."""
    options, task = check(args)
    if args.export is not None:
        run = load_run(args.workdir, args.ema, ema_width=args.ema_width)
        about = {"workdir": args.workdir, "seed": args.seed} | _plain(options, task)
        beside = dict(weights_beside=args.weights_beside)
        bound = export_sampler(args.export, run, options, about=about, **beside)
        _say_drawn(args.sampler, bound, args.export)
        return
    kind = "file" if Path(args.out).suffix == ".npz" else "folder"
    with locks.hold("out", args.out, kind):
        draw_images(args, options, task)


def draw_images(
    args: argparse.Namespace, options: SamplingOptions, task: TaskOptions
) -> None:
    """Draws what the flags ask for and writes it to --out, whose lock is held."""
    run = load_run(args.workdir, args.ema, ema_width=args.ema_width)
    upsample = None if args.upsample is None else load_other("upsample", args.upsample)
    bound = bind_sampler(run, options, task, upsample=upsample, show_steps=True)
    # All that decides the bytes of the images.
    networks = [checkpoint.digests(bound.params)]
    if bound.second is not None:
        networks.append(checkpoint.digests(bound.second.params))
    record = _plain(options, task) | {
        **bound.choices,
        "workdir": args.workdir,
        "seed": args.seed,
        "upsampled": bound.second and dict(bound.second.choices),
        "jax": jax.__version__,
        "network": zlib.crc32(json.dumps(networks, sort_keys=True).encode()),
        "rows": [zlib.crc32(np.ascontiguousarray(a).data) for a in bound.rows.values()],
    }

    n = args.n or bound.default_n

    def draw(start: int) -> Batches:
        return bound.batches(
            n - start,
            first=start,
            seed=args.seed,
            batch_size=min(args.batch_size, n),
            on_compiled=_say_seconds,
        )

    out = Path(args.out)
    if out.suffix == ".npz":
        called = data.numbers_called(bound.class_names)
        _write_npz(out, n, draw, record, called)
    else:
        channels = run.image_shape[-1]
        if channels not in (1, 3) and not task.row.is_strip:
            raise ValueError(
                f"out must be FILE.npz for images of {channels} channels, as PNGs have "
                f"1 or 3, got {args.out!r}."
            )
        record["n"] = n
        sample_folder.check_folder(out, record, overwrite=args.overwrite)
        _write_folder(out, n, draw, task, upsample is None, record)
    _say_drawn(f"{n} images by {args.sampler}", bound, out)


def check(args: argparse.Namespace) -> tuple[SamplingOptions, TaskOptions]:
    """Makes the options that the flags describe; reads nothing yet.

    Raises:
        ValueError: for a flag that is out of range or fits no other.
    """
    options = cli.sampling_options(args)
    names = [field.name for field in dataclasses.fields(TaskOptions)]
    fields = {name: getattr(args, name) for name in names}
    checks.integer("seed", args.seed, at_least=0, at_most=2**32 - 1)
    suffix = Path(args.out or "").suffix
    in_folder = args.out is not None and suffix != ".npz"
    if args.task == "generate" and in_folder and args.upsample is None:
        fields["frames"] = args.frames or GIF_FRAMES
    (task,) = make_options(fields, TaskOptions)
    if (args.out is None) == (args.export is None):
        raise ValueError(
            "one of --out and --export must be given, got "
            f"{'neither' if args.out is None else 'both'}."
        )
    options.check_useful(args.given)
    if args.task == "generate" and not (in_folder and args.upsample is None):
        why = "is for strips, and for a folder with denoising.gif"
        cli.refuse_useless(args.given, ["frames"], f"{why}, got --out {args.out}")
    task.check_read(name for name in names if name in args.given)
    if in_folder and suffix.lower() in (*SUFFIXES, ".npy", ".npz"):
        raise ValueError(f"out must be a folder or FILE.npz, got {args.out!r}.")
    if args.overwrite and not in_folder:
        raise ValueError(f"overwrite is for a folder, got --out {args.out!r}.")
    if args.export is not None:
        files.check_output("export", args.export)
        files.check_output("export", f"{args.export}.json")
        if args.weights_beside:
            files.check_output("export", f"{args.export}.npz")
        useless = ("n", "batch_size")
        cli.refuse_useless(args.given, useless, "is for --out, got --export")
        for name in ("label", "cond", "low_res", "upsample"):
            if getattr(args, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                rule = "--export takes no labels, cond or images"
                raise ValueError(f"{rule}, got {flag}.")
        if args.task != "generate":
            raise ValueError(f"--export is of the task generate, got {args.task!r}.")
    else:
        files.check_output("out", args.out, "folder" if in_folder else "file")
        if args.out is not None and not in_folder:
            files.check_output("out", Path(args.out).with_suffix(".parts"), "folder")
        why = "needs --export, got --out"
        cli.refuse_useless(args.given, ["weights_beside"], why)
        if task.row.is_strip and not in_folder:
            raise ValueError(
                f"--out of {args.task} must be a folder, got {args.out!r}."
            )
    return options, task


def _plain(options: SamplingOptions, task: TaskOptions) -> dict[str, Any]:
    """The fields of options as JSON values."""
    fields = dataclasses.asdict(options) | dataclasses.asdict(task)
    if task.split_of_images == dataclasses.replace(task, split=None).split_of_images:
        fields["split"] = None  # as where it is not said
    if not options.churn:  # as in records of versions without it
        fields |= dict(churn=None, churn_noise=None)
    return {k: os.fspath(v) if isinstance(v, Path) else v for k, v in fields.items()}


def _say_drawn(what: str, bound: BoundSampler, out: str | Path) -> None:
    if jax.process_index() == 0:
        steps, ema = bound.choices["steps"], bound.choices["ema"]
        print(f"{what} in {steps} steps, ema {ema}: {out}")


def upgrade_record(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of parts of any version under today's names of options.

    Until version 0.1 it had the values of flags.
    """
    if "no_clip" not in record:
        return record
    flags = dict(record)
    if record["images"] is None and record["split"] == "test":
        flags["split"] = None  # which it is by default
    flags["clip"], flags["reclip"] = not record["no_clip"], not record["no_reclip"]
    flags["rounding"], flags["frames"] = record["quantize"], None
    gone = ("no_clip", "no_reclip", "quantize", "export", "weights_beside", "upsample")
    return {name: value for name, value in flags.items() if name not in gone}


def _say_seconds(seconds: float) -> None:
    if jax.process_index() == 0:
        print(f"compiled in {seconds:.1f} s", flush=True)


def _with_bar(batches: Batches, *, total: int, initial: int = 0) -> Batches:
    quiet = True if jax.process_index() > 0 else None
    with tqdm(total=total, initial=initial, unit="image", disable=quiet) as bar:
        for frames, labels in batches:
            yield frames, labels
            bar.update(len(labels))


def _write_npz(
    out: Path,
    n: int,
    draw: Callable[[int], Batches],
    record: dict[str, Any],
    called: list[int] | None,
) -> None:
    """Writes one .npz (`arr_0`, labels `arr_1`) as improved-diffusion's, in parts.

    Where classes are called by numbers, `called`, those are the labels.
    """
    leader = jax.process_index() == 0
    writer = ResumableNpz(out, record, upgrade_record) if leader else None
    done = min(sharding.broadcast_from_first(writer.done if writer else 0), n)
    batches = draw(done) if done < n else ()
    for frames, labels in _with_bar(batches, total=n, initial=done):
        if writer is not None:
            named = labels if called is None else np.array(called, np.int32)[labels]
            writer.add({"arr_0": frames[-1], "arr_1": named})
    if writer is not None:
        writer.join(n)


def _write_folder(
    out: Path,
    n: int,
    draw: Callable[[int], Batches],
    task: TaskOptions,
    gif: bool,
    record: dict[str, Any],
) -> None:
    """Writes PNGs, and a grid of the first; frames of tasks stand side by side."""
    shown, images = [], []
    for frames, _ in _with_bar(draw(0), total=n):
        room = GRID_IMAGES - sum(part.shape[1] for part in shown)
        shown.append(frames[:, : max(room, 0)])
        images.append(frames[-1])
    if jax.process_index() > 0:
        return
    frames, drawn = np.concatenate(shown, axis=1), np.concatenate(images)
    sample_folder.begin(out, record)
    if not task.row.is_strip:
        for i, image in enumerate(drawn):
            plotting.save_png(out / f"{i:05d}.png", image)
    sheet, columns = drawn[:GRID_IMAGES], None
    if task.row.in_groups:
        columns = task.group
    elif task.task != "generate":
        columns = len(frames)
        sheet = frames[:, :STRIP_IMAGES].swapaxes(0, 1).reshape(-1, *drawn.shape[1:])
    elif gif:
        gif_file = out / SHEETS / "denoising.gif"
        plotting.save_gif(gif_file, [plotting.grid(f) for f in frames])
    file = out / SHEETS / "grid.png"
    plotting.save_png(file, plotting.grid(sheet, columns), min_size=512)


FLAGS: cli.Flags = {
    "--workdir": dict(required=True, help="Workdir of the training run."),
    "--out": dict(help="Where images go: a folder, or FILE.npz."),
    "--overwrite": dict(
        action="store_true",
        help="Replace the samples of another job in the folder --out.",
    ),
    "--export": dict(
        metavar="FILE",
        help="Write the sampler as one file that runs without this package; see "
        "jax_diffusion/export.py.",
    ),
    "--weights-beside": dict(
        action="store_true",
        help="Put the weights of --export into FILE.npz, not into FILE.",
    ),
    "--n": dict(
        type=cli.positive,
        help="Number of images. By default 64, or as many as --cond has rows.",
    ),
    "--seed": dict(type=int, default=0, help="Seed of all images."),
    "--batch-size": dict(
        type=cli.positive, default=256, help="Number of images drawn together."
    ),
    **cli.EMA_FLAGS,
}
TASK_FLAGS: cli.Flags = {
    "--task": dict(
        default="generate",
        metavar="NAME",
        help=f"What to draw: {', '.join(TASKS)}.",
    ),
    "--images": dict(
        metavar="[NAME:]PATH",
        help="Images to start from: a folder, an image, a .npz, or NAME:PATH of a data "
        "set. By default the run's data.",
    ),
    "--split": dict(
        help="Split of the images: train, test or all. By default all of --images, and "
        "the test split of the run's data."
    ),
    "--level": dict(
        type=float,
        default=0.5,
        help="Noise level of edit, reconstruct, interpolate and complete, as a share "
        "of the steps, 0 to 1.",
    ),
    "--frames": dict(
        type=cli.positive,
        help="Number of frames of sequence, progress, interpolate and slerp (by "
        f"default 10), and of denoising.gif (by default {GIF_FRAMES}).",
    ),
    "--group": dict(
        type=cli.positive,
        default=8,
        help="Number of images of complete that share their first steps.",
    ),
    "--mask": dict(
        default="top",
        help=f"Known pixels of inpaint: {', '.join(HALVES)}, or a picture whose white "
        "pixels are known; half of white and darker is not.",
    ),
    "--block": dict(type=cli.positive, default=2, help="Upscaling factor of enlarge."),
    "--resamples": dict(
        type=cli.positive,
        default=1,
        help="How often each stretch of --jump steps is repeated (RePaint); 1 for "
        "plain inpainting.",
    ),
    "--jump": dict(
        type=cli.positive,
        default=10,
        help="Number of steps that are resampled together.",
    ),
}
CASCADE_FLAGS: cli.Flags = {
    "--low-res": dict(
        metavar="[NAME:]PATH",
        help="Images to enlarge by a network with low_res: a folder, an image, a .npz "
        "or a data set.",
    ),
    "--upsample": dict(
        metavar="WORKDIR",
        help="Enlarge the drawn images by this super-resolution run.",
    ),
}


def main(program: str = "python -m jax_diffusion.sample") -> None:
    """Runs the command line; `program` is what starts it, for --help."""
    parser = cli.make_parser(program, __doc__)
    cli.add_flags(parser, FLAGS)
    cli.add_sampling_flags(parser)
    example = "Example: --task inpaint --mask left --resamples 10 --images mine"
    cli.add_flags(parser, TASK_FLAGS, "tasks", example)
    example = "Example: --upsample runs/upsample"
    cli.add_flags(parser, CASCADE_FLAGS, "super-resolution", example)
    cli.add_host_flags(parser)
    args = parser.parse_args()
    cli.start_hosts(args)
    with cli.fields_as_flags(args), cli.saying_what_is_read():
        sample(args)


if __name__ == "__main__":
    cli.run_program(main)
