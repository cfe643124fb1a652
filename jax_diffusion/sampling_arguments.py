"""What the command line of `sample` asks for, checked and made ready to be drawn."""

import argparse
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from jax_diffusion import config as settings
from jax_diffusion import data, schedules, tasks
from jax_diffusion import pipeline as runs
from jax_diffusion.models import num_classes, traits
from jax_diffusion.pipeline import Run
from jax_diffusion.schedules import NoiseSchedule

GIF_FRAMES = 25
LONG = 100  # steps, from which on they have a progress bar
DEFAULTS = {  # number and spacing of steps, None being all
    "ddpm": (None, "sections"),
    "ddim": (50, "sections"),
    "dpmpp_2m": (20, "trailing"),
    "heun": (10, "trailing"),
}
HALVES: dict[str, Callable[[int, int], Any]] = {  # that --mask says are known
    "left": lambda h, w: np.s_[:, : w // 2],
    "right": lambda h, w: np.s_[:, w // 2 :],
    "top": lambda h, w: np.s_[: h // 2, :],
    "bottom": lambda h, w: np.s_[h // 2 :, :],
}


class BoundSampler(NamedTuple):
    """What `runs.generate` needs of a run."""

    arguments: tuple[Any, ...]  # draw, params, schedule, arrays
    numbers: dict[str, float]
    num_steps: int
    choices: dict[str, Any]  # what defaults and files have come to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags, in groups."""
    add = parser.add_argument
    add("--workdir", required=True, help="of a training run")
    add("--out", help="a folder, or a file FILE.npz")
    add("--export", metavar="FILE", help="write the sampler itself, see export.py")
    add("--weights-beside", action="store_true", help="of the export, in FILE.npz")
    add("--task", default="generate", help=f"of {', '.join(tasks.TASKS)}")
    add("--n", type=int, default=64, help="number of images")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=256)
    add("--ema", help="such as 0.999; none for the raw parameters")
    add("--quantize", default="floor", help="to uint8: floor, or round")
    add = parser.add_argument_group("sampler").add_argument
    add("--sampler", default="ddim", help=f"of {', '.join(runs.SAMPLERS)}")
    add("--steps", type=int, help="default: ddpm all, ddim 50, dpmpp_2m 20, heun 10")
    add(
        "--spacing",
        help=f"of {', '.join(settings.STEPS)}; default sections, for the "
        "last two trailing",
    )
    add("--eta", type=float, default=0.0, help="noise of ddim, 0 to 1")
    add("--no-clip", action="store_true", help="do not clip the predicted x_0")
    add("--threshold", type=float, help="clip it to this quantile of |x_0| instead")
    add = parser.add_argument_group("labels and guidance").add_argument
    add("--label", help="such as 3 or 0,1,2, which go round; default all")
    add("--guidance", type=float, help="scale of classifier-free guidance, 1 for none")
    add("--guidance-rescale", type=float, default=0.0, help="0 to 1")
    add("--guidance-interval", help="LOW,HIGH of noise / signal; default everywhere")
    add("--classifier", help="workdir of a classifier of noisy images")
    add("--classifier-scale", type=float, default=1.0)
    add("--no-reclip", action="store_true", help="after a classifier, as OpenAI's DDIM")
    _add_tasks(parser)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tasks").add_argument
    add("--images", help="NAME:PATH, as folder:DIR or npz:FILE; default the run's data")
    add("--split", default="test", help="of the images")
    add("--level", type=float, default=0.5, help="of noise, as a share of the steps")
    add("--frames", type=int, default=10, help="of sequence, progress, interpolations")
    add("--group", type=int, default=8, help="of complete: images that share noise")
    add("--mask", default="top", help=f"known: {', '.join(HALVES)}, or white in a FILE")
    add("--block", type=int, default=2, help="of enlarge: side of what becomes a pixel")
    add("--resamples", type=int, default=1, help="of what is unknown: RePaint's")
    add("--jump", type=int, default=10, help="steps that are resampled together")
    add = parser.add_argument_group("super-resolution").add_argument
    add("--low-res", help="images to enlarge: a .npz of arr_0 and perhaps labels arr_1")
    add("--upsample", help="workdir of a network with low_res that enlarges the images")


def check(args: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is read.

    Raises:
        ValueError: for an argument that is out of range or fits no other.
    """
    _check_ranges(args)
    if (args.out is None) == (args.export is None):
        raise ValueError(
            "one of --out and --export must be given, got "
            f"{args.out!r} and {args.export!r}."
        )
    if args.export is not None:
        for name in ("label", "low_res", "upsample"):
            if getattr(args, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"--export takes no labels or images, got {flag}.")
        if args.task != "generate":
            raise ValueError(f"--export is of the task generate, got {args.task!r}.")
        return
    if args.task in tasks.STRIPS and Path(args.out).suffix == ".npz":
        raise ValueError(f"--out of {args.task} must be a folder, got {args.out!r}.")
    if args.task == "complete" and args.sampler != "ddpm" and not args.eta:
        raise ValueError(
            f"complete needs noise, --sampler ddpm or --eta, got {args.sampler!r}."
        )
    if args.task != "generate" and args.upsample is not None:
        raise ValueError(f"--upsample is for the task generate, got {args.task!r}.")


def _check_ranges(args: argparse.Namespace) -> None:
    counts = ("n", "batch_size", "frames", "group", "block", "resamples", "jump")
    settings.check_positive(args, counts)
    for name in ("eta", "guidance_rescale", "level"):
        if not 0 <= getattr(args, name) <= 1:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} must be in [0, 1], got {getattr(args, name)}.")
    settings.choose("--sampler", args.sampler, runs.SAMPLERS)
    settings.choose("--task", args.task, tasks.TASKS)
    settings.choose("--quantize", args.quantize, dict.fromkeys(data.ROUNDINGS))
    if args.eta and args.sampler != "ddim":
        raise ValueError(f"--eta is for the sampler ddim, got {args.sampler!r}.")
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise ValueError(f"--threshold must be in (0, 1], got {args.threshold}.")
    if args.threshold is not None and args.no_clip:
        raise ValueError("--threshold clips, got it with --no-clip.")
    for scale in (args.guidance, args.classifier_scale):
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"scales of guidance must be finite, got {scale}.")
    if args.guidance_rescale and args.guidance is None:
        raise ValueError("--guidance-rescale needs --guidance, got none.")


def prepare(args: argparse.Namespace, run: Run) -> BoundSampler:
    """What is to be drawn from a run.

    Raises:
        ValueError: if an argument does not fit the run.
    """
    params: dict[str, PyTree] = {"model": run.params}
    classifier = None
    if args.classifier is not None:
        classifier, params["classifier"] = load_classifier(args.classifier, run)
    arrays = _arrays(args, run, classifier)
    return _drawing(args, run, arrays, params, classifier, args.task)


def prepare_upsampler(args: argparse.Namespace, run: Run) -> BoundSampler:
    """The second stage: the run that enlarges what another draws.

    Raises:
        ValueError: if it does not enlarge, or not such images.
    """
    second = runs.load_run(args.upsample)
    if not traits(second.model).low_res:
        raise ValueError(
            f"--upsample must be a run of a network with low_res, got {args.upsample}."
        )
    if second.image_shape[-1] != run.image_shape[-1]:
        raise ValueError(
            f"--upsample must have {run.image_shape[-1]} channels, as the images, got "
            f"{second.image_shape[-1]}."
        )
    known, given = num_classes(second.model), run.num_labels
    if known is not None and known < given:
        raise ValueError(f"--upsample must know {given} labels, got {known}.")
    return _drawing(args, second, {}, {"model": second.params}, None, "generate")


def make_schedule(args: argparse.Namespace, run: Run) -> tuple[NoiseSchedule, str]:
    """The steps of --sampler, --steps and --spacing, and which spacing that is."""
    total = len(settings.make_betas(run.config.schedule))
    steps, spacing = DEFAULTS[args.sampler]
    spacing = args.spacing or spacing
    steps = min(steps or total, total) if args.steps is None else args.steps
    schedule = settings.make_schedule(run.config.schedule, steps=steps, spacing=spacing)
    return schedule, spacing


def _drawing(args, run, arrays, params, classifier, task) -> BoundSampler:
    schedule, spacing = make_schedule(args, run)
    num_steps = schedule.num_steps
    options = _options(args, run, num_steps, task)
    # Then one program serves every number of steps; an export is of one.
    if options.num_frames == 1 and args.export is None:
        total = len(settings.make_betas(run.config.schedule))
        schedule = schedules.pad(schedule, total)
    watched = num_steps > LONG and args.export is None
    draw = runs.make_sampler(
        run.model,
        run.objective,
        run.image_shape,
        sampler=args.sampler,
        clip=not (args.no_clip or task == "reconstruct"),
        threshold=args.threshold,
        null_label=run.null_label,
        classifier=classifier,
        reclip=not args.no_reclip,
        task=task,
        options=options,
        on_step=_step_bar(num_steps) if watched else None,
    )
    mask = None if options.mask is None else zlib.crc32(options.mask.tobytes())
    choices = {"steps": num_steps, "spacing": spacing, "ema": run.ema, "mask": mask}
    arguments = (draw, params, schedule, arrays)
    return BoundSampler(arguments, _numbers(args, run), num_steps, choices)


def load_classifier(workdir: str, run: Run) -> tuple[nn.Module, PyTree]:
    """A classifier of noisy images that fits a run, and its parameters.

    Raises:
        ValueError: unless it is one, of such images, noised by such a schedule.
    """
    other = runs.load_run(workdir)
    if other.objective is not None:
        raise ValueError(f"--classifier must be a classifier's run, got {workdir}.")
    if other.image_shape != run.image_shape:
        raise ValueError(
            f"--classifier must be of images {run.image_shape}, as the run's, got "
            f"{other.image_shape}."
        )
    if dict(other.config.schedule) != dict(run.config.schedule):
        raise ValueError(
            f"--classifier must have the run's schedule, {dict(run.config.schedule)}, "
            f"got {dict(other.config.schedule)}."
        )
    return other.model, other.params


def _numbers(args: argparse.Namespace, run: Run) -> dict[str, float]:
    """The numbers that can change without another compilation."""
    numbers = {"eta": args.eta}
    if args.guidance is not None:
        if run.null_label is None:
            raise ValueError(
                "--guidance needs a run that was trained with label_dropout, got one "
                "without; --classifier guides any."
            )
        numbers |= {"scale": args.guidance, "rescale": args.guidance_rescale}
    if args.classifier is not None:
        numbers["classifier_scale"] = args.classifier_scale
    if args.guidance_interval is not None:
        low, high = _floats("--guidance-interval", args.guidance_interval, 2)
        if not 0 <= low <= high or len(numbers) == 1:
            raise ValueError(
                "--guidance-interval must be LOW,HIGH with --guidance or --classifier, "
                f"got {args.guidance_interval!r}."
            )
        numbers |= {"low": low, "high": high}
    return numbers


def _arrays(args, run: Run, classifier: nn.Module | None) -> dict[str, np.ndarray]:
    """Labels, and images to start from or to enlarge, by row."""
    low_res = _read_low_res(args.low_res, run)
    arrays: dict[str, np.ndarray] = {}
    labels = None
    if low_res is not None:
        arrays["low_res"], labels = low_res
    if args.task in tasks.FROM_IMAGES:
        batches = runs.load_images(run, args.images, args.split, batch_size=1)
        arrays["image"], labels = batches.images, batches.labels
        if args.task == "interpolate":
            arrays["other"] = np.roll(arrays["image"], -1, axis=0)
    elif args.images is not None:
        raise ValueError(f"--images are for {tasks.FROM_IMAGES}, got {args.task!r}.")
    known = run.num_labels if num_classes(run.model) is not None else None
    if classifier is not None:
        told_apart = traits(classifier).num_labels
        known = min(n for n in (known, told_apart) if n is not None)
    if args.label is not None:
        labels = _labels(args.label, known)
    elif labels is None or known is None:
        labels = np.arange(known or 1)
    elif labels.max() >= known:
        raise ValueError(
            f"labels of the images must be below {known}, got {labels.max()}."
        )
    return {**arrays, "label": labels.astype(np.int32)}


def _labels(text: str, known: int | None) -> np.ndarray:
    if known is None:
        raise ValueError("--label needs a network that knows labels, got one without.")
    numbers = _floats("--label", text)
    if not all(number.is_integer() and 0 <= number < known for number in numbers):
        raise ValueError(f"--label must be of 0 to {known - 1}, got {text!r}.")
    return np.array(numbers).astype(int)


def _floats(flag: str, text: str, count: int | None = None) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or len(numbers) != (count or len(numbers)):
        raise ValueError(f"{flag} must be {count or 'some'} numbers, got {text!r}.")
    return numbers


def _read_low_res(path: str | None, run: Run) -> data.Arrays | None:
    """Images to enlarge and their labels, if the run's network does that."""
    enlarges, classes = traits(run.model).low_res, num_classes(run.model)
    if (path is not None) != enlarges:
        raise ValueError(
            "--low-res must be given for a network with low_res and for no other, got "
            f"{path!r}."
        )
    if path is None:
        return None
    images, labels = data.load_npz("all", path, None)
    if images.shape[-1] != run.image_shape[-1]:
        raise ValueError(
            f"images of --low-res must have {run.image_shape[-1]} channels, got "
            f"{images.shape[-1]}."
        )
    if classes is not None and labels.max() >= classes:
        raise ValueError(
            f"labels of --low-res must be below {classes}, got {labels.max()}."
        )
    return images, labels


def _options(args, run: Run, num_steps: int, task: str) -> tasks.Options:
    frames = args.frames if task in tasks.STRIPS else 1
    in_folder = args.out is not None and Path(args.out).suffix != ".npz"
    if task == "generate" and in_folder and not args.upsample:
        frames = GIF_FRAMES
    if task in ("generate", "sequence", "progress"):
        frames = min(frames, num_steps)
    if task == "colourise" and run.image_shape[-1] != 3:
        raise ValueError(
            f"colourise needs images of 3 channels, got {run.image_shape[-1]}."
        )
    mask = _read_mask(args.mask, run.image_shape) if task == "inpaint" else None
    return tasks.Options(
        num_frames=frames,
        level=max(round(args.level * num_steps) - 1, 0),
        group=args.group,
        mask=mask,
        block=args.block,
        jump=args.jump,
        resamples=args.resamples,
    )


def _read_mask(name: str, image_shape: tuple[int, ...]) -> np.ndarray:
    """1 where an image is known, [h w 1]: of a half, or of what is white in a file."""
    h, w, _ = image_shape
    mask = np.zeros((h, w, 1), np.float32)
    if name in HALVES:
        mask[HALVES[name](h, w)] = 1
        return mask
    if not Path(name).is_file():
        raise ValueError(f"--mask must be of {sorted(HALVES)} or a file, got {name!r}.")
    from PIL import Image

    try:
        with Image.open(name) as stored:
            white = np.asarray(stored.convert("L")) > 127
    except Exception as error:
        raise ValueError(f"--mask must be a whole image, got {error!r}.") from error
    if white.shape != (h, w):
        raise ValueError(f"--mask must be {h} x {w}, as the images, got {white.shape}.")
    mask[white] = 1
    return mask


def _step_bar(num_steps: int) -> Callable[[Any], None] | None:
    """Shows the steps of the present batch, on a terminal."""
    if jax.process_index() > 0:
        return None
    bar = tqdm(total=num_steps, unit="step", leave=False, disable=None)

    def on_step(t):
        if not bar.disable:
            bar.update(num_steps - int(t) - bar.n)

    return on_step
