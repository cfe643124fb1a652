"""Draws the pictures of the README from trained runs, the same ones every time.

    python -m tests.benchmarks.gallery --workdir runs/emoji [--only samples,tasks]

Writes colab/images/emoji_samples.png and so on, named after the workdir. `PICTURES`
lists them; those that a run cannot have, such as guidance without labels, are left out
with a line that says so. Seeds are fixed. For emoji, all but `steps` took six minutes
on a core; `steps` takes far longer.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import jax_diffusion as jd
from jax_diffusion import cli, pipeline, plotting
from jax_diffusion import config as configs
from jax_diffusion.models import traits
from jax_diffusion.pipeline import Run, SamplingOptions, TaskOptions
from jax_diffusion.runtime import files
from jax_diffusion.samplers import SAMPLERS

SEED = 0
COLUMNS = 9  # images in a row
SCALES = (1.0, 2.0, 4.0, 8.0)  # of guidance
NUM_STEPS = (5, 10, 20, 40)  # of `steps`
NUM_SCORED = 500  # images of each point of `steps`
MIN_SIZE, GIF_SIZE = 600, 300  # least pixels of the longer side of grids
Picture = Callable[..., None]  # of a run and the path of the file


class NotForThisRun(Exception):
    """A picture that this run cannot have, and why."""


def frames(run: Run, task: TaskOptions, n: int, **options: Any) -> np.ndarray:
    """All frames of a task, uint8 [k, n, h, w, c]."""
    bound = pipeline.bind_sampler(run, SamplingOptions(**options), task)
    batches = bound.batches(ids=np.arange(n), seed=SEED, batch_size=n)
    return np.concatenate([found for found, _ in batches], axis=1)


def guidance_of(run: Run, scale: float) -> dict[str, Any]:
    """The options of a guided sampler; none for a run without labels."""
    return dict(guidance=scale) if run.null_label is not None else {}


def save_rows(path: Path, rows: dict[str, np.ndarray]) -> None:
    """Writes images [n, h, w, c] in a row for each name, the name on its left."""
    figure = Figure(figsize=(9, 1.05 * len(rows)), layout="constrained")
    for axes, (name, images) in zip(
        np.atleast_1d(figure.subplots(len(rows))), rows.items(), strict=True
    ):
        axes.imshow(
            plotting.grid(images, columns=len(images)).squeeze(),
            cmap="gray",
            vmin=0,
            vmax=255,
            aspect="equal",
            interpolation="nearest",
        )
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    save(path, figure)


def save(path: Path, figure: Figure) -> None:
    """Writes a figure as a PNG, without the date, which would differ every time."""
    file = io.BytesIO()
    metadata = {"Software": None}
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight", metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, lambda out: out.write(file.getvalue()), sync=False)


def samples(run: Run, path: Path, scale: float = 1.0, **options: Any) -> None:
    """Samples, a row for each class if there are any."""
    rows = max(run.num_labels, 1) if run.takes_labels else COLUMNS
    told = guidance_of(run, scale) | options
    if run.takes_labels:
        told["label"] = [i for i in range(rows) for _ in range(COLUMNS)]
    images = jd.sample_images(run, n=rows * COLUMNS, seed=SEED, **told)
    sheet = plotting.grid(images, columns=COLUMNS)
    plotting.save_png(path, sheet, min_size=MIN_SIZE)


def guided(run: Run, path: Path) -> None:
    """The same with classifier-free guidance of scale 2."""
    need_labels(run)
    samples(run, path, scale=2.0)


def guidance(run: Run, path: Path) -> None:
    """The same noise and class at several scales of guidance."""
    need_labels(run)
    rows = {
        f"scale {scale:g}": jd.sample_images(
            run, n=COLUMNS, seed=SEED + 1, guidance=scale
        )
        for scale in SCALES
    }
    save_rows(path, rows)


def need_labels(run: Run) -> None:
    if run.null_label is None:
        raise NotForThisRun("it was not trained with config.label_dropout")


def denoising(run: Run, path: Path) -> None:
    """The way from noise to samples, as a GIF."""
    found = frames(run, TaskOptions(frames=16), 3 * COLUMNS, **guidance_of(run, 2.0))
    sheets = [plotting.grid(images, columns=COLUMNS) for images in found]
    plotting.save_gif(path.with_suffix(".gif"), sheets, min_size=GIF_SIZE)


def tasks(run: Run, path: Path) -> None:
    """What editing does to images that were not trained on."""
    n, steps = COLUMNS, min(100, configs.num_steps(run.config.schedule))
    told: dict[str, Any] = dict(sampler="ddpm", steps=steps)
    inpaint = TaskOptions(task="inpaint", mask="left", resamples=5)
    image, known, inpainted = frames(run, inpaint, n, **told)
    rows = {"test image": image, "known half": known, "inpainted": inpainted}
    if run.image_shape[-1] == 3:
        _, gray, colored = frames(run, TaskOptions(task="colorize"), n, **told)
        rows |= {"its gray": gray, "colorized": colored}
    sides = run.image_shape[:2]
    block = next((b for b in (4, 3, 2) if not any(side % b for side in sides)), None)
    if block is not None:
        task = TaskOptions(task="enlarge", block=block)
        _, blocks, large = frames(run, task, n, **told)
        rows |= {f"blocks of {block} x {block}": blocks, "enlarged": large}
    for level in (0.4, 0.7):
        edited = frames(run, TaskOptions(task="edit", level=level), n)[-1]
        rows[f"SDEdit from {level:.0%}"] = edited
    reconstruct = TaskOptions(task="reconstruct", level=1.0)
    _, noise, back = frames(run, reconstruct, n, clip=False, steps=steps)
    rows |= {"inverted to noise": noise, "and back": back}
    save_rows(path, rows)


def interpolation(run: Run, path: Path) -> None:
    """Between two noises (slerp), and between two images, noised by half the steps."""
    noises = TaskOptions("slerp", frames=COLUMNS)
    mixed = TaskOptions("interpolate", frames=COLUMNS - 2, level=0.5)
    rows = {}
    for name, task in (("noises", noises), ("images", mixed)):
        strips = np.moveaxis(frames(run, task, 3), 1, 0)
        rows |= {f"{name} {i} to {i + 1}": strip for i, strip in enumerate(strips)}
    save_rows(path, rows)


def neighbors(run: Run, path: Path) -> None:
    """Ten samples, and below each the three nearest training images by pixels."""
    images = jd.sample_images(run, n=10, seed=SEED + 2, **guidance_of(run, 2.0))
    train = pipeline.open_split(run.config, "train", train=False).images
    rmse = []  # one sample at a time: [n, h, w, c] floats are a lot already
    for image in images.astype(np.float32):
        rmse.append(np.sqrt(np.mean((image - train) ** 2, axis=(1, 2, 3))))
    rmse = np.stack(rmse)
    nearest = np.argsort(rmse, axis=1)[:, :3]
    rows = {"sample": images}
    for rank, name in enumerate(("nearest", "second", "third")):
        rows[name] = train[nearest[:, rank]]
    save_rows(path, rows)
    found = " ".join(f"{value:.0f}" for value in rmse.min(axis=1))
    print(f"RMSE to the nearest training image, of 255: {found}")


def steps(run: Run, path: Path) -> None:
    """Frechet distance against the number of steps, for every sampler."""
    assert run.workdir is not None
    total = configs.num_steps(run.config.schedule)
    counts = [num_steps for num_steps in NUM_STEPS if num_steps <= total]
    if not counts:
        raise NotForThisRun(f"its schedule has {total} steps only")
    has_classifier = (run.workdir / "evaluation" / "classifier.npz").is_file()
    metric = "cnn_fd" if has_classifier else "pixel_distance"
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name in SAMPLERS:
        distances = []
        for num_steps in counts:
            told: dict[str, Any] = dict(sampler=name, steps=num_steps, seed=SEED)
            scores = jd.evaluate(run, n=NUM_SCORED, metrics=[metric], **told)
            distances.append(scores[0].value)
            print(f"{name} {num_steps} steps: {metric} {distances[-1]:.3f}", flush=True)
        axes.loglog(counts, distances, "o-", markersize=3, linewidth=1, label=name)
    axes.set(xlabel="steps", ylabel=metric, title=f"{NUM_SCORED} samples of each")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(path, figure)


PICTURES: dict[str, Picture] = {
    "samples": samples,
    "guided": guided,
    "guidance": guidance,
    "denoising": denoising,
    "tasks": tasks,
    "interpolation": interpolation,
    "neighbors": neighbors,
    "steps": steps,
}


def main() -> None:
    """Draws the pictures, and prints the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("colab/images"))
    parser.add_argument("--only", default=",".join(PICTURES))
    parser.add_argument(
        "--sampler", default="ddim", help="Which sampler draws `samples`."
    )
    parser.add_argument(
        "--steps", type=int, default=50, help="How many steps that sampler takes."
    )
    args = parser.parse_args()
    names = [*dict.fromkeys(args.only.split(","))]
    if unknown := [name for name in names if name not in PICTURES]:
        raise ValueError(f"--only must be some of {list(PICTURES)}, got {unknown}.")
    files.check_output("--out", args.out, "folder")
    run = load(args.workdir)
    options = {"samples": dict(sampler=args.sampler, steps=args.steps)}
    for name in names:
        began = time.perf_counter()
        path = args.out / f"{args.workdir.resolve().name}_{name}.png"
        try:
            PICTURES[name](run, path, **options.get(name, {}))
        except NotForThisRun as reason:
            print(f"{name}: left out, {reason}.")
            continue
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def load(workdir: Path) -> Run:
    """Loads a run that draws without being told more than labels.

    Raises:
        ValueError: unless it is one.
    """
    run = jd.load_run(workdir)
    rule = "--workdir must be a run of a denoiser that takes nothing but labels, got"
    if run.objective is None:
        raise ValueError(f"{rule} a classifier.")
    takes_low_res = traits(run.model).low_res
    if more := [*run.conditioning, *(["low_res"] if takes_low_res else [])]:
        raise ValueError(f"{rule} one that takes {', '.join(more)}.")
    return run


if __name__ == "__main__":
    cli.run_program(main)
