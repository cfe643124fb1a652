"""Images from a run, and the command line that writes them.

    python -m jax_diffusion.sample --workdir runs/digits --out pictures --steps 50

Image i depends on the seed and on i alone, whatever the batch size. A job that ends in
FILE.npz goes on where it was killed when the same command is given again.
"""

import argparse
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jax_diffusion import config as settings
from jax_diffusion import export, plotting, tasks
from jax_diffusion import pipeline as runs
from jax_diffusion import sampling_arguments as asked
from jax_diffusion.models import num_classes
from jax_diffusion.pipeline import Run
from jax_diffusion.runtime import checkpoint, sharding
from jax_diffusion.runtime import files as parts
from jax_diffusion.sampling_arguments import BoundSampler

Batches = Iterable[tuple[np.ndarray, np.ndarray]]  # frames [k b h w c], labels [b]

GRID_IMAGES = 100
STRIP_IMAGES = 10  # whose frames are shown one below the other
# Arguments that decide no byte of an image. (--batch-size moves some by one grey level
# if anything, and who changes it halfway accepts that.)
FREE = ("out", "n", "batch_size", "coordinator", "num_processes", "process_id")


def sample(args: argparse.Namespace) -> None:
    """The program: everything is checked before the first image is drawn."""
    asked.check(args)
    run = runs.load_run(args.workdir, args.ema)
    first = asked.prepare(args, run)
    if args.export is not None:
        _export(args, run, first)
        return
    second = None
    if args.upsample is not None:
        second = asked.prepare_upsampler(args, run)
    out = Path(args.out)
    if out.suffix == ".npz":
        _write_npz(args, out, first, second)
    else:
        _write_folder(args, out, first, second)
    if jax.process_index() == 0:
        print(
            f"{args.n} images by {args.sampler} in {first.num_steps} steps, "
            f"ema {run.ema}: {out}"
        )


def _export(args: argparse.Namespace, run: Run, drawing: BoundSampler) -> None:
    """Writes the sampler as a file of its own."""
    draw, params, schedule, arrays = drawing.arguments

    def draw_images(params, seed, ids, label):
        rows = {"ids": ids, "label": label}
        return draw(params, schedule, seed, rows, drawing.numbers)[-1]

    if jax.process_index() == 0:
        labels = num_classes(run.model) is not None or args.classifier is not None
        about = {k: v for k, v in vars(args).items() if k not in (*FREE, "export")}
        export.write(
            args.export,
            draw_images,
            params,
            beside=args.weights_beside,
            num_labels=int(arrays["label"].max()) + 1 if labels else None,
            about=about | drawing.choices,
        )
        print(
            f"{args.sampler} in {drawing.num_steps} steps, ema {run.ema}: {args.export}"
        )


def draw_all(
    args: argparse.Namespace,
    first: BoundSampler,
    second: BoundSampler | None,
    start: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images start to n - 1, enlarged by the second run if there is one."""
    common: dict[str, Any] = dict(seed=args.seed, rounding=args.quantize)
    batch_size = min(args.batch_size, args.n)
    batches = runs.generate(
        *first.arguments,
        n=args.n - start,
        first=start,
        numbers=first.numbers,
        batch_size=batch_size,
        on_compiled=_say_seconds,
        **common,
    )
    if second is not None:
        draw, params, schedule, _ = second.arguments
        params = sharding.replicate(sharding.make_mesh(), params)  # once, not each time
    for frames, labels in batches:
        if second is not None:
            small = {"low_res": frames[-1], "label": labels}
            # Image i takes row i % n of them.
            small = {k: np.roll(a, start % len(a), axis=0) for k, a in small.items()}
            enlarged = runs.generate(
                *(draw, params, schedule, small),
                n=len(labels),
                first=start,
                numbers=second.numbers,
                batch_size=batch_size,
                **common,
            )
            frames, labels = next(iter(enlarged))
        yield frames, labels
        start += len(labels)


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
    args: argparse.Namespace,
    out: Path,
    first: BoundSampler,
    second: BoundSampler | None,
) -> None:
    """One .npz (`arr_0`, and `arr_1` labels) as improved-diffusion's, in parts."""
    leader = jax.process_index() == 0
    writer = parts.ResumableNpz(out, _record(args, first, second)) if leader else None
    done = min(sharding.broadcast_from_first(writer.done if writer else 0), args.n)
    batches = draw_all(args, first, second, done) if done < args.n else ()
    for frames, labels in _with_bar(batches, total=args.n, initial=done):
        if writer is not None:
            writer.add({"arr_0": frames[-1], "arr_1": labels})
    if writer is not None:
        writer.join(args.n)


def _record(
    args: argparse.Namespace, first: BoundSampler, second: BoundSampler | None
) -> dict[str, Any]:
    """All that decides the bytes of the images."""
    networks, rows, free = [], [], (*FREE, *first.choices)
    for _, params, _, arrays in (d.arguments for d in (first, second) if d is not None):
        networks.append(checkpoint.digests(params))
        rows += [zlib.crc32(np.ascontiguousarray(a).data) for a in arrays.values()]
    return {
        **{k: v for k, v in sorted(vars(args).items()) if k not in free},
        **first.choices,
        "upsampled": second and second.choices,
        "jax": jax.__version__,
        "network": zlib.crc32(json.dumps(networks, sort_keys=True).encode()),
        "rows": rows,  # labels, and images to start from
    }


def _write_folder(
    args: argparse.Namespace,
    out: Path,
    first: BoundSampler,
    second: BoundSampler | None,
) -> None:
    """PNGs and a grid of the first; of a task with frames, those beside each other."""
    shown, images = [], []
    batches = draw_all(args, first, second)
    for frames, _ in _with_bar(batches, total=args.n):
        room = GRID_IMAGES - sum(part.shape[1] for part in shown)
        shown.append(frames[:, : max(room, 0)])
        images.append(frames[-1])
    if jax.process_index() > 0:
        return
    frames, drawn = np.concatenate(shown, axis=1), np.concatenate(images)
    if args.task not in tasks.STRIPS:
        for i, image in enumerate(drawn):
            plotting.save_png(out / f"{i:05d}.png", image)
    sheet, columns = drawn[:GRID_IMAGES], None
    if args.task == "complete":
        columns = args.group
    elif args.task != "generate":
        columns = len(frames)
        sheet = frames[:, :STRIP_IMAGES].swapaxes(0, 1).reshape(-1, *drawn.shape[1:])
    elif second is None:
        plotting.save_gif(out / "denoising.gif", [plotting.grid(f) for f in frames])
    plotting.save_png(out / "grid.png", plotting.grid(sheet, columns), min_size=512)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m jax_diffusion.sample",
        description=__doc__,
    )
    asked.add_arguments(parser)
    settings.add_hosts(parser)
    args = parser.parse_args()
    settings.start_hosts(args)
    sample(args)


if __name__ == "__main__":
    settings.run_program(main)
