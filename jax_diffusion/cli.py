"""Flags that several programs share, and `run_program`, which runs a command line."""

import argparse
import contextlib
import dataclasses
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jax

from jax_diffusion.guidance import GUIDANCE_METHODS
from jax_diffusion.pipeline import SamplingOptions
from jax_diffusion.registry import hint
from jax_diffusion.runtime import cpu, sharding
from jax_diffusion.samplers import SAMPLERS
from jax_diffusion.spacing import SPACINGS

# Fields of options whose flags are called otherwise, and how.
FLAGS = {"clip": "--no-clip", "reclip": "--no-reclip"}


class IncompleteError(Exception):
    """Something that was asked for is missing, and the rest is there: status 1."""


class Parser(argparse.ArgumentParser):
    """Raises ValueError for a wrong command line: `run_program` makes it a sentence.

    The parsed arguments have one more attribute, `given`: the set of names that stood
    on the command line. It tells a flag that was given with its default value from one
    that was not given.
    """

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """Parses arguments, as `argparse` does."""
        absent = object()
        hidden = argparse.SUPPRESS  # such as the default of --help
        names = {a.dest for a in self._actions if hidden not in (a.dest, a.default)}
        space = argparse.Namespace(**dict.fromkeys(names, absent))
        found, rest = super().parse_known_args(args, namespace or space)
        values = vars(found)
        given = {name for name in names if values.get(name) is not absent}
        values |= {name: self.get_default(name) for name in names - given}
        found.given = given
        return found, rest

    def error(self, message: str) -> NoReturn:
        flag = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        if flag:
            close = hint(flag[1], self._option_string_actions)
            raise ValueError(f"there is no flag {flag[1]!r}{close}")
        text = re.sub(r"^argument ([^ :]+): must ", r"\1 must ", message)
        raise ValueError(text.rstrip(".") + ".")


def make_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """Makes the parser of a program, called as "jax-diffusion train", with --version.

    Args:
        description: the text above the flags; lines are kept as they are.
    """
    from jax_diffusion import __version__

    parser = Parser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog=program,
        usage="%(prog)s [flags]",
        description=description,
        allow_abbrev=False,  # --step of one program would be --steps of another
    )
    version = f"jax_diffusion {__version__}"
    parser.add_argument("--version", action="version", version=version)
    return parser


def refuse_misspelled(
    parser: argparse.ArgumentParser, rest: Iterable[str], besides: Iterable[str]
) -> None:
    """Raises ValueError for an argument that is nearly a flag of a parser.

    Args:
        parser: of the program.
        rest: arguments that it does not know.
        besides: names that are fields of the config.
    """
    for argument in rest:
        name = argument.partition("=")[0]
        close = hint(name, parser._option_string_actions)
        is_flag = name.startswith("--") and "." not in name
        if is_flag and close != "." and name[2:] not in besides:
            raise ValueError(f"there is no flag {name!r}{close}")


def positive(text: str) -> int:
    """The type of flags that are integers >= 1."""
    if not text.strip().isdecimal() or len(text) > 99 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text[:99]}")
    if int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be below 2^31, got {text}")
    return int(text)


def refuse_useless(given: Iterable[str], useless: Iterable[str], why: str) -> None:
    """Raises ValueError for a flag that has no effect in this call.

    Args:
        given: names of the flags on the command line, `given` of the parsed arguments.
        useless: names of flags without effect.
        why: what they are for instead and what came: "is for X, got Y".
    """
    for name in useless:
        if name in given:
            raise ValueError(f"{name} {why}.")


Flags = Mapping[str, Mapping[str, Any]]  # arguments of add_argument by flag

_STEPS = ", ".join(f"{name} {row.steps or 'all'}" for name, row in SAMPLERS.items())
_SPACING = ", ".join(f"{name} {row.spacing}" for name, row in SAMPLERS.items())
SAMPLER_FLAGS: Flags = {
    "--sampler": dict(
        default="ddim",
        metavar="NAME",
        help=f"The solver: {', '.join(SAMPLERS)}, or your own package.module:function.",
    ),
    "--steps": dict(type=int, help=f"Number of steps. By default: {_STEPS}."),
    "--spacing": dict(
        metavar="NAME",
        help=f"Which of the T steps are taken: {', '.join(SPACINGS)}, explained by "
        f"`python -m pydoc jax_diffusion.spacing`. By default: {_SPACING}.",
    ),
    "--eta": dict(
        type=float,
        default=0.0,
        help="Noise of ddim on any process, from 0 (none; on flows and EDM Euler's "
        "method) to 1 (as much as ddpm and euler_ancestral).",
    ),
    "--churn": dict(
        type=float,
        default=0.0,
        help="S_churn, such as 40: noise that edm_heun adds anew. --steps is odd then.",
    ),
    "--churn-interval": dict(
        metavar="LOW,HIGH",
        help="S_tmin and S_tmax: churn only while noise / signal is between these.",
    ),
    "--churn-noise": dict(
        type=float, default=1.0, help="S_noise: standard deviation of that noise."
    ),
    "--no-clip": dict(action="store_true", help="Do not clip the predicted x_0."),
    "--threshold": dict(
        type=float,
        help="Clip the predicted x_0 to this quantile of |x_0|, such as 0.995, instead "
        "of to 1 (dynamic thresholding).",
    ),
    "--rounding": dict(
        default="floor",
        help="How floats become uint8: floor, as in OpenAI's code, or round, as in "
        "DDIM's.",
    ),
    "--quantize": dict(dest="rounding", help=argparse.SUPPRESS),  # its old name
}
GUIDANCE_FLAGS: Flags = {
    "--label": dict(
        help="The images get these labels in turn: 3, or 0,1,2, or names of classes, "
        "as dog,cat. By default all."
    ),
    "--cond": dict(
        metavar="FILE.npz",
        help="A .npz with cond [k, d], or tokens [k, n, d] and tokens_mask [k, n], for "
        "a network with cond_dim or token_dim. Row i is for image i; rows repeat if "
        "there are fewer. Not needed where images have their own: of --task, and the "
        "data of evaluate. With labels, give --label, too: they are paired in order.",
    ),
    "--guidance": dict(
        type=float,
        help="Scale of classifier-free guidance, 1 for none. The run must have been "
        "trained with config.label_dropout, or --guide-with be given.",
    ),
    "--guide-with": dict(
        metavar="WORKDIR[:EMA]",
        help="Autoguidance: guide away from this weaker run (EMA is such as 0.999 or "
        "width=0.1) instead of away from its own prediction without labels.",
    ),
    "--guidance-method": dict(
        metavar="NAME",
        help="How --guidance combines the two predictions: "
        f"{', '.join(GUIDANCE_METHODS)}. By default classifier_free.",
    ),
    "--guidance-rescale": dict(
        type=float,
        default=0.0,
        help="How far, 0 to 1, guided images are scaled back to the contrast of "
        "unguided ones.",
    ),
    "--guidance-interval": dict(
        metavar="LOW,HIGH",
        help="Guide only while noise / signal is between these. By default always.",
    ),
    "--classifier": dict(
        metavar="WORKDIR", help="Guide by this classifier of noisy images."
    ),
    "--classifier-scale": dict(
        type=float, default=1.0, help="Scale of the classifier's gradient."
    ),
    "--no-reclip": dict(
        action="store_true",
        help="Do not clip x_0 again after a classifier has shifted it; OpenAI's DDIM "
        "does not.",
    ),
}
EMA_FLAGS: Flags = {
    "--ema": dict(
        help="Which average of the parameters, such as 0.999, or none for the "
        "parameters themselves. By default the first of the config.",
    ),
    "--ema-width": dict(
        type=float,
        metavar="WIDTH",
        help="Relative width of an average by a power function, such as 0.1, in place "
        "of --ema. Needs a run with config.ema_widths; other widths are reconstructed "
        "from its snapshots.",
    ),
}
HOST_FLAGS: Flags = {
    "--coordinator": dict(metavar="HOST:PORT", help="Address of process 0."),
    "--num-processes": dict(type=int, help="Number of processes."),
    "--process-id": dict(type=int, help="Number of this process, from 0."),
}


def add_flags(
    parser: argparse.ArgumentParser, flags: Flags, title: str = "", about: str = ""
) -> None:
    """Adds flags to a parser, in a group of their own if that has a title.

    The help of a flag ends with its default, if that says something.

    Args:
        flags: arguments of `add_argument` by flag.
        title: the group's title.
        about: text below the title, such as an example.
    """
    group = parser.add_argument_group(title, about) if title else parser
    for flag, options in flags.items():
        default, told = options.get("default"), options["help"]
        if default not in (None, argparse.SUPPRESS) and told != argparse.SUPPRESS:
            told += f" (default: {default})"
        group.add_argument(flag, **{**options, "help": told})


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `pipeline.SamplingOptions`; see `sampling_options`."""
    example = "Example: --sampler dpmpp_2m --steps 20 --spacing trailing"
    add_flags(parser, SAMPLER_FLAGS, "sampler", example)
    example = "Example: --label 3,5 --guidance 2"
    add_flags(parser, GUIDANCE_FLAGS, "conditioning and guidance", example)


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """Makes the options that the flags of `add_sampling_flags` describe.

    Raises:
        ValueError: for a value that is out of range.
    """
    values: dict[str, Any] = vars(args) | {
        "clip": not args.no_clip,
        "reclip": not args.no_reclip,
    }
    names = [field.name for field in dataclasses.fields(SamplingOptions)]
    return SamplingOptions(**{name: values[name] for name in names})


@contextlib.contextmanager
def saying_what_is_read() -> Iterator[None]:
    """Prints a line about every data set and run that is read, on the first host."""
    logger = logging.getLogger("jax_diffusion.data")
    handler, before = _Printer(), (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # or absl's handler, which Orbax brings, says it again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class _Printer(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if jax.process_index() == 0:
            print(record.getMessage(), flush=True)


@contextlib.contextmanager
def fields_as_flags(args: argparse.Namespace) -> Iterator[None]:
    """Names flags instead of fields in errors: "eta must be" -> "--eta must be".

    Errors of the library begin with the name of the field that is wrong. Fields that
    they mention besides, as a way out, stand in backticks.

    Args:
        args: as parsed; only these fields have flags.
    """
    flags = {name: f"--{name.replace('_', '-')}" for name in vars(args)} | FLAGS
    try:
        yield
    except ValueError as error:
        told = re.sub(r"`(\w+)`", lambda m: flags.get(m[1], m[0]), str(error))
        name, _, rest = told.partition(" ")
        if name in flags and rest.startswith(("must ", "needs ", "is for ")):
            told = f"{flags[name]} {rest}"
        if told != str(error):
            raise ValueError(told) from error
        raise


def add_host_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a job with several processes, for `start_hosts`."""
    about = (
        "Found by themselves on Cloud TPU, SLURM, Open MPI and Kubernetes. Elsewhere, "
        "start each\nprocess with its number: --coordinator HOST:PORT "
        "--num-processes 2 --process-id 0"
    )
    add_flags(parser, HOST_FLAGS, "several processes", about)


def start_hosts(args: argparse.Namespace) -> None:
    """Joins the other processes, if there are any; else keeps compiled programs."""
    sharding.start(args.coordinator, args.num_processes, args.process_id)
    if jax.process_count() == 1:  # others could wait for one that finds its programs
        cpu.keep_compiled()


def _in_one_line(
    message: Warning | str, category: type[Warning], *place: Any, **options: Any
) -> None:
    """Prints a warning of ours as a sentence; others with the place in the code."""
    if category is UserWarning:
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    else:
        text = warnings.formatwarning(message, category, *place[:2])
        print(text, end="", file=sys.stderr, flush=True)


def run_program(main: Callable[[], Any]) -> None:
    """Runs a command line; bad input becomes one sentence and exit status 2.

    A run that has to stop ends with status 1, also where a disk is full or a file
    cannot be written. Of several processes, one that fails ends at once: the others
    would wait for it.

    Args:
        main: the command line.
    """
    cpu.tune()
    status, show = 0, warnings.showwarning
    try:
        warnings.showwarning = _in_one_line
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except (FloatingPointError, IncompleteError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except OSError as error:
        reason = " ".join(f"{error.strerror or error}".split())
        if error.strerror and error.filename is not None:
            reason = f"{error.filename}: {reason}"
        print(
            f"error: a file could not be read or written: {reason.rstrip('.')}.",
            file=sys.stderr,
        )
        status = 1
    except Exception:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} stops; if "
            "another was lost, see its log. The same command continues the run.",
            file=sys.stderr,
        )
        status = 1
    finally:
        warnings.showwarning = show
    if status and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)
