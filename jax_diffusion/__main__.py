"""Lists the programs: `python -m jax_diffusion`."""

import argparse

import jax_diffusion

PROGRAMS = {
    "train": "trains a run from a config",
    "sample": "draws images from a run, or writes its sampler as one file",
    "evaluate": "scores a run or any images: FID, KID, bits/dim, ...",
    "convert": "reads checkpoints of other codes, and writes runs for them",
}


def main() -> None:
    """Prints the programs, a line each."""
    lines = [
        f"    python -m jax_diffusion.{name:9} {what}"
        for name, what in PROGRAMS.items()
    ]
    parser = argparse.ArgumentParser(
        prog="python -m jax_diffusion",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="\n".join(
            ["Denoising diffusion in JAX. The programs, each with --help:", "", *lines]
        ),
    )
    version = f"jax_diffusion {jax_diffusion.__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.parse_args()
    parser.print_help()


if __name__ == "__main__":
    main()
