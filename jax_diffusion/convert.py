"""Converts checkpoints of other codes into workdirs, and runs into their files.

A checkpoint comes in with --checkpoint and makes a workdir for `sample` and `evaluate`:

    python -m jax_diffusion.convert --checkpoint cifar10_uncond_50M_500K.pt \\
        --workdir runs/openai

A run goes out with --to:

    python -m jax_diffusion.convert --workdir runs/digits --to diffusers --out digits

From Python, `jax_diffusion.load_checkpoint` loads a checkpoint without a workdir, and
`jax_diffusion.interop.exporting.export_run` writes a run.
"""

import argparse

import jax

from jax_diffusion import cli
from jax_diffusion import config as configs
from jax_diffusion.interop import dit_layout, layouts, lucidrains_layout
from jax_diffusion.interop.exporting import WRITERS, export_run, learns_variance
from jax_diffusion.interop.importing import import_checkpoint
from jax_diffusion.pipeline import load_run


def parse_size(text: str) -> int | tuple[int, int]:
    """The type of --image-size: "32" -> 32, "32x64" -> (32, 64)."""
    sides = [cli.positive(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"must be a side or HxW, got {text}")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


LAYOUTS = sorted([*layouts.LAYOUTS, lucidrains_layout.NAME, dit_layout.NAME])
WORKDIR: cli.Flags = {
    "--workdir": dict(
        required=True,
        help="The workdir to make (with --checkpoint) or to read (with --to).",
    ),
}
READING: cli.Flags = {
    "--checkpoint": dict(
        metavar="PATH",
        help="The file (.pt, .pth, .ckpt, .bin, .safetensors) or Hugging Face folder.",
    ),
    "--name": dict(help="Name of the released checkpoint, if the file was renamed."),
    "--config": dict(
        metavar="FILE",
        help="Config of a network of your own, a file or a name as for training.",
    ),
    "--layout": dict(
        help="With --config, the code whose tensor names the file has: "
        f"{', '.join(LAYOUTS)}. By default it is recognized; only openai_new must be "
        "given.",
    ),
    "--image-size": dict(
        type=parse_size,
        metavar="SIZE",
        help="With --config, the side of the images in pixels, or HxW, if config.data "
        "has no image_size.",
    ),
    "--ignore-objects": dict(
        action="store_true",
        help="Read the tensors of a file that holds other objects too, such as the "
        "flags of its trainer. Nothing of them is run.",
    ),
    "--allow-nonfinite": dict(
        action="store_true", help="Accept weights that are NaN or infinite."
    ),
}
WRITING: cli.Flags = {
    "--to": dict(metavar="FORMAT", help=f"The format: {', '.join(WRITERS)}."),
    "--out": dict(metavar="PATH", help="The file or folder to write; it must be new."),
    **cli.EMA_FLAGS,
    "--drop-variance": dict(
        action="store_true",
        help="Leave out a learned variance: samplers such as diffusers' DDIMPipeline "
        "expect a network that predicts the mean only.",
    ),
}


def main(program: str = "python -m jax_diffusion.convert") -> None:
    """Runs the command line; `program` is what starts it, for --help.

    Raises:
        ValueError: for wrong flags, and if the conversion is impossible.
    """
    parser = cli.make_parser(program, __doc__)
    cli.add_flags(parser, WORKDIR)
    about = (
        "Released files are known by their names. A network of your own needs a config "
        "and a layout:\n--checkpoint mine.pt --config mine.py --layout openai "
        "--workdir runs/mine"
    )
    cli.add_flags(parser, READING, "reading a checkpoint", about)
    about = "Example: --workdir runs/digits --to safetensors --out digits.safetensors"
    cli.add_flags(parser, WRITING, "writing a run", about)
    args = parser.parse_args()
    if (args.checkpoint is None) == (args.to is None):
        given = "neither" if args.to is None else "both"
        raise ValueError(f"one of --checkpoint and --to must be given, got {given}.")
    if args.checkpoint is None:
        useless, why = READING, f"is for --checkpoint, got --to {args.to}"
    else:
        useless, why = WRITING, f"is for --to, got --checkpoint {args.checkpoint}"
    with cli.fields_as_flags(args):
        names = [flag.removeprefix("--").replace("-", "_") for flag in useless]
        cli.refuse_useless(args.given, names, why)
    if args.checkpoint is not None:
        with cli.fields_as_flags(args):
            given = args.config is not None
            config = configs.load_config(args.config) if given else None
            run = import_checkpoint(
                args.checkpoint,
                args.workdir,
                name=args.name,
                config=config,
                layout=args.layout,
                image_size=args.image_size,
                ignore_objects=args.ignore_objects,
                allow_nonfinite=args.allow_nonfinite,
            )
        count = sum(array.size for array in jax.tree.leaves(run.params))
        name = run.config.model.name
        print(f"{args.checkpoint}: {count:,} parameters of a {name} in {args.workdir}")
        return
    if args.out is None:
        raise ValueError("--out must name a new file or folder, got None.")
    with cli.fields_as_flags(args), cli.saying_what_is_read():
        run = load_run(args.workdir, args.ema, ema_width=args.ema_width)
        export_run(run, args.to, args.out, drop_variance=args.drop_variance)
    print(f"{args.workdir} as {args.to}: {args.out}")
    if args.to == "diffusers" and learns_variance(run) and not args.drop_variance:
        print(
            "The network predicts its variance: DDPMPipeline draws with it; others, "
            "such as DDIMPipeline, cannot and need --drop-variance."
        )


if __name__ == "__main__":
    cli.run_program(main)
