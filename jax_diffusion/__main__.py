"""Lists and starts the programs: `python -m jax_diffusion` and `jax-diffusion`.

`jax-diffusion train`, which an installation brings, `python -m jax_diffusion train` and
`python -m jax_diffusion.train` start the same program, and so for the others.
"""

import argparse
import functools
import importlib
import sys
from pathlib import Path

import jax_diffusion
from jax_diffusion import registry

SCRIPT = "jax-diffusion"
PROGRAMS = {
    "train": "trains a run from a config",
    "sample": "draws images from a run, or writes its sampler as one file",
    "evaluate": "scores a run or any images: FID, KID, bits/dim, ...",
    "convert": "reads checkpoints of other codes, and writes runs for them",
}


def make_parser(called: str) -> argparse.ArgumentParser:
    """Makes the parser of --help, which lists the programs, and --version.

    Args:
        called: how this was started, such as "jax-diffusion".
    """
    before = f"{called} " if called == SCRIPT else f"{called}."
    lines = [f"    {before}{name:9} {what}" for name, what in PROGRAMS.items()]
    parser = argparse.ArgumentParser(
        prog=called,
        usage="%(prog)s PROGRAM [flags]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="\n".join(
            ["Denoising diffusion in JAX. The programs, each with --help:", "", *lines]
        ),
    )
    version = f"jax_diffusion {jax_diffusion.__version__}"
    parser.add_argument("--version", action="version", version=version)
    return parser


def start(name: str, called: str) -> None:
    """Runs a program with the rest of the command line.

    Args:
        name: a key of `PROGRAMS`.
        called: how this was started, such as "jax-diffusion".
    """
    from jax_diffusion import cli  # loads the libraries of training

    program = importlib.import_module(f"jax_diffusion.{name}")
    del sys.argv[1]
    cli.run_program(functools.partial(program.main, f"{called} {name}"))


def main() -> None:
    """Starts the program that the command line names; without one, lists them."""
    is_script = Path(sys.argv[0]).name != "__main__.py"
    called = SCRIPT if is_script else "python -m jax_diffusion"
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first in ("-h", "--help", "--version"):
        make_parser(called).parse_args([first])
    try:
        registry.choose("the first argument", first, PROGRAMS)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if is_script:
        sys.path.append("")  # a config may import from the current folder
    start(first, called)


if __name__ == "__main__":
    main()
