"""The door: a config file and a command line in, schedule, objective and model out.

A config is a Python file with `get_config() -> ConfigDict`, one level of groups deep.
Each group holds the keyword arguments of one function, so that a misspelt field is
found and named; `FIELDS` lists the rest. Behind this door there are no configs.
"""

import argparse
import difflib
import inspect
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from jax_diffusion import schedules, timesteps
from jax_diffusion.diffusion import Objective, check_signal
from jax_diffusion.models import MODELS, traits
from jax_diffusion.runtime import cpu, sharding
from jax_diffusion.schedules import NoiseSchedule

Config = Any  # a ConfigDict or a dict: neither has fields of static types

FIELDS = {
    "seed": "of parameters, data order, noise and dropout",
    "data": "arguments of data.load",
    "schedule": "name in BETAS, its arguments, rescale_timesteps, zero_terminal_snr",
    "objective": "arguments of Objective; None for a classifier",
    "timesteps": "name in timesteps.SAMPLERS, and its arguments",
    "model": "name in MODELS, and its arguments but out_channels",
    "optimizer": "arguments of training.make_optimizer but total_steps",
    "ema_decays": "one average of the parameters for each",
    "ema_warmup": "whether averages forget the random start faster",
    "total_steps": "updates to make, in all",
    "log_every": "updates between two lines of metrics.jsonl",
    "save_every": "updates between two checkpoints",
    "sample_every": "updates between two sample grids",
    "sampling": "of the grids: sampler, steps, spacing, eta, n; None for a classifier",
    "label_dropout": "share of labels hidden from the network, for guidance; it then "
    "has one class more, the last, which means hidden",
    "low_res_size": "side of the small images that a network with low_res enlarges; 0",
    "mesh": "arguments of sharding.make_mesh",
    "microbatches": "parts of a batch whose gradients are averaged, to save memory",
    "keep": "newest checkpoints that stay",
    "keep_every": "checkpoints at multiples of it stay too; 0, none",
    "max_skipped": "updates in a row that were not finite, after which the run stops",
    "log_to": "of logs.WRITERS, beside metrics.jsonl",
    "profile_steps": "updates to trace for TensorBoard or Perfetto, from the 11th on",
    "reproduces": "the setting of a paper, of papers.PAPERS, for evaluate --compare",
    "eval_every": "updates between two scores of every average; 0, none",
    "evaluation": "of these scores: fields of watching.Scores",
}
OPTIONAL = {  # what fields are that a config leaves out
    "label_dropout": 0.0,
    "low_res_size": 0,
    "mesh": {"data": -1, "fsdp": 1},
    "microbatches": 1,
    "keep": 3,
    "keep_every": 0,
    "max_skipped": 20,
    "log_to": (),
    "profile_steps": 0,
    "reproduces": "",
    "eval_every": 0,
    "evaluation": {
        "metric": "pixel_distance",
        "n": 1000,
        "reference": 10_000,
        "sampler": "ddim",
        "steps": 50,
        "spacing": "sections",
        "bits_images": 0,
        "inception": "",
    },
}

# What may change between two starts of one run. All else must be as it was.
FREE_FIELDS = (
    *("total_steps", "log_every", "save_every", "sample_every", "sampling"),
    *(OPTIONAL.keys() - {"label_dropout", "low_res_size"}),
    "data.in_memory",
)


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Runs the config file and applies overrides such as "--config.total_steps=60".

    Raises:
        ValueError: if the file is missing or wrong, or a field unknown or ill-typed.
    """
    if not Path(path).is_file():
        raise ValueError(f"--config must be the path of a config file, got {path!r}.")
    make = runpy.run_path(path).get("get_config")
    config = make() if make else None
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{path!r} must define get_config() -> ConfigDict.")
    argv = ["", *overrides]
    values = flags.FlagValues()  # our own: nothing global is defined
    try:
        holder = config_flags.DEFINE_config_dict(
            "config", complete(config), flag_values=values, sys_argv=argv
        )
        rest = values(argv)[1:]
    except AttributeError as error:
        words = re.findall(r"\w+", str(error).replace(r"\n", " "))  # name, Did you ...
        hint = f"; did you mean {words[4]!r}?" if len(words) > 4 else "."
        raise ValueError(f"the config has no field {words[0]!r}{hint}") from None
    except flags.Error as error:
        raise ValueError(f"{error}".rstrip(".") + ".") from None
    if rest:
        raise ValueError(f"arguments must begin with --, got {' '.join(rest)!r}.")
    check_config(holder.value)
    return holder.value


def complete(config: Config) -> Config:
    """A copy with the optional fields that it leaves out, in groups too."""
    given: dict[str, Any] = dict(ConfigDict(config).items())
    groups = {
        name: {**group, **given.get(name, {})}
        for name, group in OPTIONAL.items()
        if isinstance(group, dict)
    }
    return ConfigDict(OPTIONAL | given | groups)


def check_config(config: Config) -> None:
    """Raises ValueError unless the config has exactly the fields of `FIELDS`."""
    for name in config:
        if name not in FIELDS:
            raise ValueError(f"the config has no field {name!r}{_hint(name, FIELDS)}")
    missing = [name for name in FIELDS if name not in config]
    if missing:
        raise ValueError(f"the config must have the fields {missing}, got none.")
    counts = ("total_steps", "log_every", "save_every", "sample_every", "microbatches")
    for name in (*counts, "keep", "max_skipped"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(
                f"config.{name} must be a positive integer, got {config[name]!r}."
            )
    for name in ("keep_every", "profile_steps", "low_res_size", "eval_every"):
        if not isinstance(config[name], int) or config[name] < 0:
            raise ValueError(
                f"config.{name} must be an integer from 0, got {config[name]!r}."
            )
    if not config.ema_decays or not all(0 <= d < 1 for d in config.ema_decays):
        raise ValueError(
            f"config.ema_decays must be numbers in [0, 1), got {config.ema_decays}."
        )
    named = MODELS.get(str(dict(config.model).get("name")))
    classifies = traits(named).num_labels is not None
    for name in ("objective", "sampling"):
        if (config[name] is None) != classifies:
            raise ValueError(
                f"config.{name} must be None for a classifier and for no other model, "
                f"got {config[name]}."
            )


def make_schedule(
    config: Config, *, steps: int | None = None, spacing: str = "sections"
) -> NoiseSchedule:
    """The schedule that `config.schedule` describes, or a shorter one for sampling.

    Args:
        steps: how many steps to keep; all if None.
        spacing: a rule of `STEPS`.

    Raises:
        ValueError: for an unknown name, a misspelt argument or too many steps.
    """
    betas, keep = make_betas(config), None
    if steps is not None:
        if not 1 <= steps <= len(betas):
            raise ValueError(f"steps must be in [1, T = {len(betas)}], got {steps}.")
        keep = choose("spacing", spacing, STEPS)(betas, steps)
    return schedules.make_schedule(
        betas, keep=keep, rescale_timesteps=config.get("rescale_timesteps", False)
    )


def make_betas(config: Config) -> np.ndarray:
    """The variances, float64 [T], that `config.schedule` describes."""
    group = dict(config)
    group.pop("rescale_timesteps", None)
    zero_terminal_snr = group.pop("zero_terminal_snr", False)
    betas = call_by_name(schedules.BETAS, group, "config.schedule")
    return schedules.zero_terminal_snr(betas) if zero_terminal_snr else betas


STEPS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "sections": lambda betas, n: schedules.spaced_steps(len(betas), n),
    "uniform": lambda betas, n: schedules.uniform_steps(len(betas), n),
    "quadratic": lambda betas, n: schedules.quadratic_steps(len(betas), n),
    "trailing": lambda betas, n: schedules.trailing_steps(len(betas), n),
    "karras": schedules.karras_steps,
    "log_snr": schedules.log_snr_steps,
    "angle": schedules.angle_steps,
}


def make_objective(config: Config, schedule: NoiseSchedule) -> Objective | None:
    """The objective that `config.objective` describes, checked against the schedule.

    A classifier has none.
    """
    if config is None:
        return None
    objective = call(Objective, config, "config.objective")
    check_signal(schedule, objective)
    return objective


def make_model(
    config: Config, objective: Objective | None, num_channels: int
) -> nn.Module:
    """The network that `config.model` describes, its outputs fit to the objective."""
    group = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(config).items()}
    if objective is not None:
        factor = 2 if objective.learns_variance else 1
        group["out_channels"] = factor * num_channels
    return call_by_name(MODELS, group, "config.model")


def make_timestep_sampler(config: Config, num_steps: int) -> timesteps.TimestepSampler:
    """The timestep sampler that `config.timesteps` describes."""
    group = {"num_steps": num_steps, **dict(config)}
    return call_by_name(timesteps.SAMPLERS, group, "config.timesteps")


def call(function: Callable, group: Config, where: str, **fixed: Any) -> Any:
    """`function(**group, **fixed)`; a field it does not know is a ValueError."""
    known = inspect.signature(function).parameters
    for name in group:
        if name not in known or name in fixed:
            raise ValueError(f"{where} has no field {name!r}{_hint(name, known)}")
    missing = [
        name
        for name, p in known.items()
        if p.default is p.empty and name not in group and name not in fixed
    ]
    if missing:
        raise ValueError(f"{where} must have the fields {missing}, got none.")
    return function(**group, **fixed)


def call_by_name(registry: Mapping[str, Callable], group: Config, where: str) -> Any:
    """`call` of the function that the group's field `name` names."""
    arguments = dict(group)
    name = arguments.pop("name", None)
    return call(choose(f"{where}.name", name, registry), arguments, where)


def choose(what: str, name: Any, registry: Mapping[str, Any]) -> Any:
    """The entry of a registry, or a ValueError that lists them."""
    if name not in registry:
        raise ValueError(f"{what} must be one of {sorted(registry)}, got {name!r}.")
    return registry[name]


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two configs, as "data.seed: 0 -> 1", free fields aside.

    Optional fields that one of them leaves out are what `OPTIONAL` says.
    """
    old, new = (_flat({**OPTIONAL, **config}) for config in (saved, now))
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, "(none)"), new.get(name, "(none)")
        free = name in FREE_FIELDS or name.split(".")[0] in FREE_FIELDS
        if before != after and not free:
            lines.append(f"{name}: {before} -> {after}")
    return lines


def check_positive(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises ValueError, naming the flag, unless these are positive or None."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} must be positive, got {value}.")


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """The flags of a job with several processes, for `start_hosts`."""
    group = parser.add_argument_group(
        "several processes", "found from Cloud TPU, SLURM, Open MPI, Kubernetes; else:"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--num-processes", type=int)
    group.add_argument("--process-id", type=int, help="of this process, from 0")


def start_hosts(args: argparse.Namespace) -> None:
    """Joins the other processes, if there are any; else compiles nothing twice."""
    sharding.start(args.coordinator, args.num_processes, args.process_id)
    if jax.process_count() == 1:  # others could wait for one that finds its programs
        cpu.keep_compiled()


def run_program(main: Callable[[], Any], *, long: bool = False) -> None:
    """Runs a command line; bad input becomes one sentence and exit status 2.

    So does a run that has to stop, with status 1. Of several processes, one that fails
    ends at once: the others would wait for it.

    Args:
        long: whether the program is worth compiling anew for a little more speed.
    """
    cpu.tune(onednn=long)
    status = 0
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
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
    if status and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def _hint(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f", only {sorted(known)}."
