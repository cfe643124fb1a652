"""Loads and checks configs; builds schedule, objective and network from them.

A config is a Python file with `get_config() -> ConfigDict`, one level of groups deep.
`FIELDS` lists its fields. Each group holds the keyword arguments of one function, so
that a misspelled field is found and named. Where a group has a `name`, that is a row of
a registry or anybody's own "package.module:function" (see `registry.lookup`).

Nothing behind this module sees a ConfigDict.
"""

import os
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from jax_diffusion import schedules, timesteps
from jax_diffusion.diffusion import Objective, check_signal
from jax_diffusion.models import MODELS, traits
from jax_diffusion.registry import call, call_by_name, hint, lookup
from jax_diffusion.schedules import NoiseSchedule
from jax_diffusion.spacing import SPACINGS

Config = Any  # a ConfigDict or a dict: neither has fields of static types

FORMAT = 2  # of the records that are saved with parameters, see `upgrade`

NEEDED = object()  # the default of a field that every config must have


class Field(NamedTuple):
    """A field of a config.

    Attributes:
        meaning: what it decides, for readers.
        default: its value where a config leaves it out; of a group, its own defaults.
        least: the smallest integer that it may be; None for other types.
        free: whether it may differ between two starts of one run.
    """

    meaning: str
    default: Any = NEEDED
    least: int | None = None
    free: bool = False


SAMPLE_FIELDS = "fields of pipeline.SamplingOptions, and n, the number of images"

FIELDS = {
    "seed": Field("seed of parameters, data order, noise and dropout"),
    "data": Field("arguments of data.load"),
    "schedule": Field(
        "name in schedules.BETAS, its arguments, rescale_timesteps, zero_terminal_snr"
    ),
    "objective": Field("arguments of Objective; None for a classifier"),
    "timesteps": Field("name in timesteps.TIMESTEP_SAMPLERS, and its arguments"),
    "model": Field("name in models.MODELS, and its arguments but out_channels"),
    "optimizer": Field("arguments of training.make_optimizer but total_steps"),
    "ema_decays": Field("decay rates; one average of the parameters is kept for each"),
    "ema_warmup": Field("whether averages forget the random start faster"),
    "total_steps": Field("number of updates, in all", least=1, free=True),
    "log_every": Field("updates between two lines of the log", least=1, free=True),
    "save_every": Field("updates between two checkpoints", least=1, free=True),
    "sample_every": Field("updates between two sample grids", least=1, free=True),
    "sampling": Field(
        f"of the grids: {SAMPLE_FIELDS}; None for a classifier", free=True
    ),
    "label_dropout": Field(
        "probability that a label is hidden in training, for classifier-free "
        "guidance; the network then gets one class more than num_classes",
        0.0,
    ),
    "low_res_size": Field(
        "side in pixels of the small images that a network with low_res enlarges; 0 "
        "for other networks",
        0,
        least=0,
    ),
    "mesh": Field(
        "arguments of sharding.make_mesh", {"data": -1, "fsdp": 1}, free=True
    ),
    "microbatches": Field(
        "parts of a batch whose gradients are averaged, to save memory",
        1,
        least=1,
        free=True,
    ),
    "keep": Field("number of newest checkpoints that stay", 3, least=1, free=True),
    "keep_every": Field(
        "checkpoints at multiples of it stay too; 0 for none", 0, least=0, free=True
    ),
    "max_skipped": Field(
        "non-finite updates in a row after which the run stops", 20, least=1, free=True
    ),
    "log_to": Field("writers of logs.WRITERS, beside metrics.jsonl", (), free=True),
    "profile_steps": Field(
        "updates to trace for TensorBoard or Perfetto, from the 11th on; 0 for none",
        0,
        least=0,
        free=True,
    ),
    "reproduces": Field(
        "setting of a paper, a key of evaluation.published.PAPERS", "", free=True
    ),
    "eval_every": Field(
        "updates between two evaluations of every average; 0 for none",
        0,
        least=0,
        free=True,
    ),
    "evaluation": Field(
        f"of these: metric, reference, bpd_images, inception, and {SAMPLE_FIELDS}",
        dict(metric="pixel_distance", n=1000, reference=10_000)
        | dict(sampler="ddim", steps=50, spacing="sections", bpd_images=0)
        | dict(inception=""),
        free=True,
    ),
}
DEFAULTS = {k: f.default for k, f in FIELDS.items() if f.default is not NEEDED}
FREE_IN_GROUPS = ("data.in_memory",)  # free fields of groups that are not


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Runs a config file and applies overrides; returns the complete config.

    Args:
        path: a Python file with `get_config() -> ConfigDict`.
        overrides: "--config.FIELD=VALUE" or "--config.GROUP.FIELD=VALUE".

    Raises:
        ValueError: if the file is missing or wrong, or a field unknown or ill-typed.
    """
    if not isinstance(path, str | os.PathLike) or not Path(path).is_file():
        raise ValueError(f"config must be the path of a config file, got {path!r}.")
    if isinstance(overrides, str):
        raise ValueError(f"overrides must be a list of strings, got {overrides!r}.")
    try:
        make = runpy.run_path(str(path)).get("get_config")
        config = make() if callable(make) else None
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} must be a config file that runs, got "
            f"{type(error).__name__}: {error}."
        ) from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{str(path)!r} must define get_config() -> ConfigDict.")
    argv = ["", *overrides]
    values = flags.FlagValues()  # our own: nothing global is defined
    try:
        holder = config_flags.DEFINE_config_dict(
            "config", complete(config), flag_values=values, sys_argv=argv
        )
        rest = values(argv)[1:]
    except AttributeError as error:
        words = re.findall(r"\w+", str(error).replace(r"\n", " "))  # name, Did you ...
        advice = f"; did you mean {words[4]!r}?" if len(words) > 4 else "."
        raise ValueError(f"the config has no field {words[0]!r}{advice}") from None
    except flags.Error as error:
        raise ValueError(f"{error}".rstrip(".") + ".") from None
    if rest:
        raise ValueError(f"arguments must begin with --, got {' '.join(rest)!r}.")
    check_config(holder.value)
    return holder.value


def complete(config: Config) -> Config:
    """Returns a copy with the defaults of all fields that it leaves out.

    Fields within the groups `mesh` and `evaluation` are filled in, too.
    """
    given: dict[str, Any] = dict(ConfigDict(config).items())
    for name, default in DEFAULTS.items():
        if isinstance(default, dict) and not hasattr(given.get(name, {}), "items"):
            raise ValueError(f"config.{name} must be a group, got {given[name]!r}.")
    groups = {
        name: {**default, **given.get(name, {})}
        for name, default in DEFAULTS.items()
        if isinstance(default, dict)
    }
    return ConfigDict(DEFAULTS | given | groups)


def check_config(config: Config) -> None:
    """Checks that a config has exactly the fields of `FIELDS`, and their ranges.

    Raises:
        ValueError: that names the field, the rule and what came.
    """
    for name in config:
        if name not in FIELDS:
            raise ValueError(f"the config has no field {name!r}{hint(name, FIELDS)}")
    missing = [name for name in FIELDS if name not in config]
    if missing:
        raise ValueError(f"the config must have the fields {missing}, got none.")
    for name, field in FIELDS.items():
        value = config[name]
        if field.least is None:
            continue
        if not isinstance(value, int) or value < field.least:
            kind = "a positive integer" if field.least == 1 else "an integer >= 0"
            raise ValueError(f"config.{name} must be {kind}, got {value!r}.")
    if not config.ema_decays or not all(0 <= d < 1 for d in config.ema_decays):
        raise ValueError(
            f"config.ema_decays must be numbers in [0, 1), got {config.ema_decays}."
        )
    model = lookup("config.model.name", config.model.get("name"), MODELS)
    classifies = traits(model).num_labels is not None
    for name in ("objective", "sampling"):
        if (config[name] is None) != classifies:
            raise ValueError(
                f"config.{name} must be None for a classifier and for no other model, "
                f"got {config[name]}."
            )


class Built(NamedTuple):
    """What a config describes.

    Attributes:
        schedule: all T steps.
        objective: None for a classifier.
        model: the network, without parameters.
    """

    schedule: NoiseSchedule
    objective: Objective | None
    model: nn.Module


def build(config: Config, num_channels: int) -> Built:
    """Builds schedule, objective and network, fit to each other.

    With `config.label_dropout`, the network gets one class more than the config's
    num_classes: the last, which it is told instead of a hidden label.

    Args:
        config: its groups schedule, objective, model and label_dropout are read.
        num_channels: channels of the images.

    Raises:
        ValueError: for an unknown name, a misspelled argument, or parts that do not
            fit each other.
    """
    schedule = make_schedule(config["schedule"])
    objective = make_objective(config["objective"], schedule)
    group = dict(config["model"])
    if config.get("label_dropout"):
        network = lookup("config.model.name", group.get("name"), MODELS)
        known = group.get("num_classes", traits(network).num_classes)
        if isinstance(known, int):
            group["num_classes"] = known + 1
    return Built(schedule, objective, make_model(group, objective, num_channels))


def make_schedule(
    config: Config, *, steps: int | None = None, spacing: str = "sections"
) -> NoiseSchedule:
    """Builds the schedule that `config.schedule` describes, or a shorter one.

    Args:
        config: the group `schedule` of a config.
        steps: number of steps to keep; all if None.
        spacing: which ones, a rule of `spacing.SPACINGS`.

    Raises:
        ValueError: for an unknown name, a misspelled argument or too many steps.
    """
    betas, keep = make_betas(config), None
    if steps is not None:
        if not 1 <= steps <= len(betas):
            raise ValueError(f"steps must be in [1, T = {len(betas)}], got {steps}.")
        keep = lookup("spacing", spacing, SPACINGS)(betas, steps)
        if keep is None:
            raise ValueError(f"spacing {spacing!r} must return steps, got None.")
    return schedules.make_schedule(
        betas, keep=keep, rescale_timesteps=config.get("rescale_timesteps", False)
    )


def make_betas(config: Config) -> np.ndarray:
    """Builds the variances that `config.schedule` describes, float64 [T]."""
    group = dict(config)
    group.pop("rescale_timesteps", None)
    zero_terminal_snr = group.pop("zero_terminal_snr", False)
    betas = call_by_name(schedules.BETAS, group, "config.schedule")
    return schedules.zero_terminal_snr(betas) if zero_terminal_snr else betas


def make_objective(config: Config, schedule: NoiseSchedule) -> Objective | None:
    """Builds the objective that `config.objective` describes; None for a classifier.

    Raises:
        ValueError: if a field is wrong, or if it does not fit the schedule.
    """
    if config is None:
        return None
    objective = call(Objective, config, "config.objective")
    check_signal(schedule, objective)
    return objective


def make_model(
    config: Config, objective: Objective | None, num_channels: int
) -> nn.Module:
    """Builds the network that `config.model` describes, as it stands there.

    A denoiser is told `out_channels`: num_channels, twice of it for a learned variance.
    """
    group = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(config).items()}
    if objective is not None:
        factor = 2 if objective.learns_variance else 1
        group["out_channels"] = factor * num_channels
    return call_by_name(MODELS, group, "config.model")


def make_timestep_sampler(config: Config, num_steps: int) -> timesteps.TimestepSampler:
    """Builds the sampler of training timesteps that `config.timesteps` describes."""
    group = {"num_steps": num_steps, **dict(config)}
    return call_by_name(timesteps.TIMESTEP_SAMPLERS, group, "config.timesteps")


def of_record(record: Mapping[str, Any]) -> Config:
    """Returns the config of a checkpoint's record of any format."""
    return ConfigDict(upgrade(record)["config"])


def upgrade(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of a checkpoint of any format in the present one.

    Before format 2, num_classes of a run with label_dropout counted the class of hidden
    labels, which `build` adds now.

    Args:
        record: with "config", of plain JSON values, and "format" if that is not 1.
    """
    config = dict(record["config"])
    if record.get("format", 1) < 2 and config.get("label_dropout"):
        model = dict(config["model"])
        model["num_classes"] -= 1
        config["model"] = model
    return {**record, "config": config, "format": FORMAT}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lists what differs between two configs, as "data.seed: 0 -> 1".

    Free fields are left out; an optional field that a config lacks has its default.
    """
    old, new = (_flat({**DEFAULTS, **config}) for config in (saved, now))
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, "(none)"), new.get(name, "(none)")
        field = FIELDS.get(name.split(".")[0])
        free = name in FREE_IN_GROUPS or (field is not None and field.free)
        if before != after and not free:
            lines.append(f"{name}: {before} -> {after}")
    return lines


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
