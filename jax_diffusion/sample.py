"""Images from a run, and the command line that writes them.

    python -m jax_diffusion.sample --workdir runs/digits --out pictures --steps 50

Image i depends on the seed and on i alone, whatever the batch size.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict
from tqdm import tqdm

from jax_diffusion import (
    checkpoint,
    data,
    diffusion,
    plotting,
    samplers,
    settings,
    sharding,
)
from jax_diffusion.diffusion import Objective
from jax_diffusion.schedules import NoiseSchedule
from jax_diffusion.settings import Config
from jax_diffusion.training import bind, ema_name, num_classes

SAMPLERS = {"ddpm": samplers.ddpm_step, "ddim": samplers.ddim_step}
GIF_FRAMES = 25
GRID_IMAGES = 100


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained network and all that is needed to use it."""

    config: Config
    model: nn.Module
    params: PyTree
    objective: Objective | None  # None of a classifier
    image_shape: tuple[int, ...]
    ema: str  # which average `params` are, or "none"


def load_run(workdir: str | Path, ema: str | None = None) -> Run:
    """Reads the newest checkpoint of a workdir.

    Args:
        ema: which average of the parameters, such as "0.999"; default the first of the
            config's; "none" for the parameters themselves.

    Raises:
        ValueError: if there is no checkpoint, or no such average.
    """
    record = checkpoint.load_record(workdir)
    config: Config = ConfigDict(record["config"])
    schedule = settings.make_schedule(config.schedule)
    objective = settings.make_objective(config.objective, schedule)
    image_shape = tuple(record["image_shape"])
    model = settings.make_model(config.model, objective, image_shape[-1])
    if ema is None:  # a converted checkpoint is one average already
        ema = ema_name(config.ema_decays[0]) if config.ema_decays else "none"
    params = checkpoint.load_params(workdir, ema=None if ema == "none" else ema)
    return Run(config, model, params, objective, image_shape, ema)


def make_sampler(
    model: nn.Module,
    objective: Objective | None,
    image_shape: tuple[int, ...],
    *,
    sampler: str = "ddim",
    clip: bool = True,
    num_frames: int = 1,
) -> Callable[..., samplers.SampleState]:
    """Builds a compiled f(params, schedule, keys, eta, label, low_res) -> frames.

    Schedules padded to one length, and all eta, share one compilation. `low_res` is
    left out but for a network that wants it.

    Raises:
        ValueError: for an unknown sampler, or for a classifier.
    """
    if objective is None:
        raise ValueError("the run must be of a denoiser, got a classifier's.")
    step_fn = settings.choose("sampler", sampler, SAMPLERS)

    @jax.jit
    def draw(params, schedule, keys, eta, label, low_res=None):
        options = {} if low_res is None else {"low_res": low_res}
        model_fn = bind(model, params, label, **options)
        denoise_fn = diffusion.denoiser(model_fn, schedule, objective)
        if clip:
            denoise_fn = diffusion.clip_x_0(denoise_fn)
        step = functools.partial(step_fn, eta=eta) if sampler == "ddim" else step_fn
        x_T = samplers.normal(keys, image_shape)
        return samplers.sample_frames(
            keys,
            denoise_fn,
            step,
            schedule,
            x_T,
            num_frames=num_frames,
            ts=ts(schedule),
        )

    def ts(schedule):  # skipped steps in front make the number divisible
        steps = jnp.arange(schedule.num_steps, dtype=jnp.int32)[::-1]
        return jnp.pad(steps, (-schedule.num_steps % num_frames, 0), constant_values=-1)

    return draw


def generate(
    draw: Callable[..., samplers.SampleState],
    params: PyTree,
    schedule: NoiseSchedule,
    *,
    n: int,
    seed: int = 0,
    eta: float = 0.0,
    num_labels: int | None = None,
    low_res: data.Arrays | None = None,
    batch_size: int = 256,
    mesh: Mesh | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches of frames, uint8 [num_frames, b, h, w, c], and their labels [b].

    Images are numbered 0 to n - 1. Labels, if the network wants them, go round. On
    several hosts, all of them call it and get all images.

    Args:
        low_res: uint8 images to enlarge and their labels, which go round too.
        mesh: of the devices that share the work; default all.
    """
    mesh = mesh or sharding.make_mesh()
    batch_size = min(batch_size, n)
    params = sharding.spread(mesh, params)
    small, labels = low_res or (None, np.arange(num_labels or 1, dtype=np.int32))
    for first in range(0, n, batch_size):
        ids = np.arange(first, first + batch_size, dtype=np.int32)  # one shape for all
        label = labels[ids % len(labels)]
        inputs = {"ids": ids, "label": label}
        if small is not None:
            inputs["low_res"] = data.from_uint8(small[ids % len(small)])
        inputs = sharding.in_parts(mesh, inputs)
        keys = _keys(np.uint32(seed % 2**32), inputs.pop("ids"))
        frames = sharding.fetch(draw(params, schedule, keys, eta, **inputs).x)
        keep = min(batch_size, n - first)
        yield data.to_uint8(frames)[:, :keep], label[:keep]


@jax.jit
def _keys(seed, ids):
    return samplers.image_keys(jax.random.key(seed), ids)


def write_images(out: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes uint8 images to one .npz (`arr_0`, `arr_1` labels), or as PNGs and a grid.

    The folder gets 00000.png and so on, and grid.png of the first hundred.
    """
    if out.suffix == ".npz":
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(out, images, labels)
        return
    plotting.save_png(
        out / "grid.png", plotting.grid(images[:GRID_IMAGES]), min_size=512
    )
    for i, image in enumerate(images):
        plotting.save_png(out / f"{i:05d}.png", image)


def read_low_res(path: str | None, run: Run) -> data.Arrays | None:
    """Images to enlarge and their labels, if the run's network does that.

    Raises:
        ValueError: if the file does not fit the network, or only one of them is there.
    """
    enlarges, classes = getattr(run.model, "low_res", False), num_classes(run.model)
    if (path is not None) != enlarges:
        raise ValueError(
            "--low-res must be given for a network with low_res and for no other, got "
            f"{path!r}."
        )
    if path is None:
        return None
    images, labels = data.DATASETS["npz"]("all", path, None)
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


def sample(args: argparse.Namespace) -> None:
    """The program: everything is checked before the first image is drawn."""
    _check(args)
    run = load_run(args.workdir, args.ema)
    steps = args.steps if args.steps or args.sampler == "ddpm" else 50
    schedule = settings.make_schedule(
        run.config.schedule, steps=steps, spacing=args.spacing
    )
    out = Path(args.out)
    as_gif = out.suffix != ".npz"
    draw = make_sampler(
        run.model,
        run.objective,
        run.image_shape,
        sampler=args.sampler,
        clip=not args.no_clip,
        num_frames=min(GIF_FRAMES, schedule.num_steps) if as_gif else 1,
    )
    options: dict[str, Any] = dict(
        n=args.n, seed=args.seed, eta=args.eta, batch_size=args.batch_size
    )
    options["num_labels"] = num_classes(run.model)
    options["low_res"] = read_low_res(args.low_res, run)
    parts, labels, gif = [], [], None
    quiet = True if jax.process_index() > 0 else None
    with tqdm(total=args.n, unit="image", disable=quiet) as bar:
        for frames, label in generate(draw, run.params, schedule, **options):
            gif = frames[:, :GRID_IMAGES] if gif is None else gif
            parts.append(frames[-1])
            labels.append(label)
            bar.update(len(label))
    if jax.process_index() > 0:
        return
    write_images(out, np.concatenate(parts), np.concatenate(labels))
    if as_gif and gif is not None:
        plotting.save_gif(out / "denoising.gif", [plotting.grid(f) for f in gif])
    print(
        f"{args.n} images by {args.sampler} in {schedule.num_steps} steps, "
        f"ema {run.ema}: {out}"
    )


def _check(args: argparse.Namespace) -> None:
    if args.n < 1 or args.batch_size < 1:
        raise ValueError(
            "--n and --batch-size must be positive, got "
            f"{args.n} and {args.batch_size}."
        )
    if not 0 <= args.eta <= 1:
        raise ValueError(f"--eta must be in [0, 1], got {args.eta}.")
    if args.eta and args.sampler != "ddim":
        raise ValueError(f"--eta is for the sampler ddim, got {args.sampler!r}.")
    settings.choose("--sampler", args.sampler, SAMPLERS)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m jax_diffusion.sample",
        description=__doc__,
    )
    parser.add_argument("--workdir", required=True, help="of a training run")
    parser.add_argument("--out", required=True, help="a folder, or a file FILE.npz")
    parser.add_argument("--sampler", default="ddim", help="ddpm or ddim")
    parser.add_argument("--steps", type=int, help="default: ddim 50, ddpm all")
    parser.add_argument(
        "--spacing", default="sections", help=f"of the steps: {sorted(settings.STEPS)}"
    )
    parser.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0 to 1")
    parser.add_argument("--n", type=int, default=64, help="number of images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument(
        "--low-res", help="images to enlarge: a .npz of arr_0 and perhaps labels arr_1"
    )
    parser.add_argument("--ema", help="such as 0.999; none for the raw parameters")
    parser.add_argument(
        "--no-clip", action="store_true", help="do not clip the predicted x_0"
    )
    settings.add_hosts(parser)
    args = parser.parse_args()
    settings.start_hosts(args)
    sample(args)


if __name__ == "__main__":
    settings.run_program(main)
