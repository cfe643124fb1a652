"""The fields of a config: their meanings, defaults and ranges."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from ml_collections import ConfigDict

from jax_diffusion import checks
from jax_diffusion.config.groups import GROUPS, check_group
from jax_diffusion.data import DATASETS
from jax_diffusion.models import MODELS, traits
from jax_diffusion.registry import (
    check_is_group,
    check_type,
    hint,
    lookup,
    named,
    short,
)
from jax_diffusion.training.averages import check_averages

Config = Any  # a ConfigDict or a dict: neither has fields of static types

OF_DENOISERS = ("objective", "sampling")  # groups that are None for a classifier

NEEDED = object()  # the default of a field that every config must have


class Field(NamedTuple):
    """A field of a config.

    Attributes:
        meaning: what it decides, for readers.
        default: its value where a config leaves it out; of a group, its own defaults.
        least, most: the smallest and the largest integer that it may be; None for
            other types, and for no bound.
        free: whether it may differ between two starts of one run.
        hint: the type of a value that is no group; int if `least` is given.
    """

    meaning: str
    default: Any = NEEDED
    least: int | None = None
    free: bool = False
    most: int | None = None
    hint: Any = Any


SAMPLE_FIELDS = "fields of pipeline.SamplingOptions, and n, the number of images"

FIELDS = {
    "seed": Field(
        "seed of parameters, data order, noise and dropout", least=0, most=2**32 - 1
    ),
    "data": Field("arguments of data.load"),
    "schedule": Field(
        "name in schedules.BETAS or LEVELS, and its arguments; of BETAS also "
        "rescale_timesteps and zero_terminal_snr"
    ),
    "objective": Field("arguments of Objective; None for a classifier"),
    "timesteps": Field(
        "name in timesteps.TIMESTEP_SAMPLERS, or in LEVEL_SAMPLERS for continuous "
        "time, and its arguments"
    ),
    "model": Field("name in models.MODELS, and its arguments but out_channels"),
    "optimizer": Field("arguments of training.make_optimizer but total_steps"),
    "init_from": Field(
        "whose weights training begins with: WORKDIR, WORKDIR:EMA or a checkpoint "
        "file, see training.fine_tuning; empty for random ones",
        "",
        hint=str,
    ),
    "ema_decays": Field(
        "decay rates; one average of the parameters is kept for each",
        hint=Sequence[float],
    ),
    "ema_warmup": Field(
        "whether averages of ema_decays forget the random start faster", hint=bool
    ),
    "ema_widths": Field(
        "relative widths, such as (0.05, 0.1), of averages by power functions, whose "
        "snapshots give any other width later, see training.post_hoc_ema",
        (),
        hint=Sequence[float],
    ),
    "ema_snapshots": Field(
        "number of snapshots of the averages of ema_widths that stay, of those taken "
        "at multiples of save_every; each has the parameters once for each width",
        32,
        least=1,
        free=True,
    ),
    "total_steps": Field(
        "number of updates, in all", least=1, free=True, most=2**31 - 1
    ),
    "log_every": Field("updates between two lines of the log", least=1, free=True),
    "save_every": Field("updates between two checkpoints", least=1, free=True),
    "sample_every": Field(
        "updates between two sample grids; 0 for no grids", least=0, free=True
    ),
    "sampling": Field(
        f"of the grids: {SAMPLE_FIELDS}; None for a classifier", free=True
    ),
    "label_dropout": Field(
        "probability that a label, cond and tokens are hidden in training, for "
        "classifier-free guidance; the network gets a class more than num_classes",
        0.0,
        hint=float,
    ),
    "low_res_size": Field(
        "height in pixels of the small images that a network with low_res enlarges; "
        "0 for other networks",
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
    "log_to": Field(
        "writers of logs.WRITERS, beside metrics.jsonl",
        (),
        free=True,
        hint=Sequence[str],
    ),
    "profile_steps": Field(
        "updates to trace for TensorBoard or Perfetto, from the 11th on; 0 for none",
        0,
        least=0,
        free=True,
    ),
    "reproduces": Field(
        "setting of a paper, a key of evaluation.published.PAPERS",
        "",
        free=True,
        hint=str,
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
# Free fields of groups that are not.
FREE_IN_GROUPS = ("data.in_memory", "data.on_error")


def complete(config: Config) -> Config:
    """Returns a copy with the defaults of all fields that it leaves out.

    Fields within the groups `mesh` and `evaluation` are filled in, too. Numbers and
    arrays of NumPy become those of Python, paths and dtypes become strings: a config is
    kept as JSON.
    """
    given = plain(config)
    for name, default in DEFAULTS.items():
        if isinstance(default, dict) and name in given:
            check_is_group(f"config.{name}", given[name])
            given[name] = {**default, **given[name]}
    return ConfigDict(DEFAULTS | given)


def plain(value: Any, name: str = "config") -> Any:
    """Returns a value of a config as JSON can keep it, tuples aside.

    Args:
        value: anything that a config file may hold.
        name: of the value, for errors.

    Raises:
        ValueError: for a value that JSON cannot keep.
    """
    if isinstance(value, ConfigDict | Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(
                f"{name} must have names of fields, got {short(wrong[0])}."
            )
        return {key: plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [plain(item, name) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.dtype) or (hasattr(value, "dtype") and callable(value)):
        with contextlib.suppress(TypeError):
            return np.dtype(cast(Any, value)).name  # such as jnp.bfloat16
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return plain(value.tolist(), name)
    if isinstance(value, os.PathLike):
        return plain(os.fspath(value), name)
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{name} must be text without zero bytes, got {short(value)}.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{name} must be a number, a string, None, or a list or group of these, got "
        f"{short(value)}."
    )


def check_config(config: Config) -> None:
    """Checks that a config has exactly the fields of `FIELDS`, of their types.

    The fields of groups are checked against the functions that take them. Ranges that
    these functions know are checked by `build` and those who call the others.

    Raises:
        ValueError: that names the field, the rule and what came.
    """
    for name in config:
        if name not in FIELDS:
            raise ValueError(f"the config has no field {name!r}{hint(name, FIELDS)}")
    missing = [name for name in FIELDS if name not in config]
    if missing:
        raise ValueError(f"the config lacks the fields {missing}.")
    for name, field in FIELDS.items():
        value = plain(config[name], f"config.{name}")
        if field.least is not None:
            check_type(f"config.{name}", value, int)
            checks.integer(
                f"config.{name}", value, at_least=field.least, at_most=field.most
            )
        elif name in GROUPS and not (value is None and name in OF_DENOISERS):
            check_group(name, value)
        elif name not in GROUPS:
            check_type(f"config.{name}", value, field.hint)
    with named("config", ["label_dropout", "ema_decays", "ema_widths"]):
        checks.number("label_dropout", config.label_dropout, at_least=0, below=1)
        check_averages(config.ema_decays, config.ema_widths)
    if not config.ema_decays and not config.ema_widths:
        raise ValueError(
            "config.ema_decays must be at least one number unless ema_widths has one, "
            f"got {config.ema_decays}."
        )
    lookup("config.data.name", config.data.name, DATASETS)
    model = lookup("config.model.name", config.model.get("name"), MODELS)
    classifies = traits(model).num_labels is not None
    for name in OF_DENOISERS:
        if (config[name] is None) != classifies:
            raise ValueError(
                f"config.{name} must be None for a classifier and for no other model, "
                f"got {short(config[name])}."
            )
