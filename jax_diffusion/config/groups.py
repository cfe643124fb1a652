"""The groups of a config: which functions take their fields, and which fields are set.

Names, types and ranges of a field are those of the function that takes it. Nothing is
listed here twice: a new argument of a function is a new field.
"""

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jax_diffusion import data, schedules, timesteps, training
from jax_diffusion.diffusion import Objective
from jax_diffusion.models import MODELS
from jax_diffusion.registry import (
    Parameters,
    check_arguments,
    check_is_group,
    lookup,
    parameters,
)
from jax_diffusion.runtime import sharding
from jax_diffusion.training.optimizer import OPTIMIZERS

GIVEN = "given to train()"  # what a config says of what was an argument of `train`
GIVEN_OPTIMIZER = {"name": GIVEN}


class Group(NamedTuple):
    """What takes the fields of a group.

    Attributes:
        functions: take the fields; or (module, name) of those that stand above this
            package. What one of them takes as **arguments is for the next.
        registry: rows by name, if the group's field `name` names one more function.
        fixed: arguments that are set for the functions, not by a config.
        more: type hints of fields that are no arguments of the functions.
        optional: fields that may be left out though the functions need them.
        name: the name, where a group leaves it out.
        without: names whose functions go without the fields of `more`.
    """

    functions: Sequence[Callable | tuple[str, str]] = ()
    registry: Mapping[str, Callable] | None = None
    fixed: Sequence[str] = ()
    more: Mapping[str, Any] = {}
    optional: Sequence[str] = ()
    name: str | None = None
    without: Collection[str] = ()


SAMPLING = ("jax_diffusion.pipeline", "SamplingOptions")
EVALUATION = ("jax_diffusion.evaluation.during_training", "PeriodicEvaluation")
OF_SCHEDULES = {"rescale_timesteps": bool, "zero_terminal_snr": bool}
OLD_NAMES = {"bits_images": int}  # of bpd_images

GROUPS = {
    "data": Group([data.load], fixed=["seed", "train", "start_step"]),
    "schedule": Group(
        registry=schedules.BETAS | schedules.LEVELS,
        more=OF_SCHEDULES,
        optional=[*OF_SCHEDULES],
        without=schedules.LEVELS,
    ),
    "objective": Group([Objective]),
    "timesteps": Group(
        registry=timesteps.TIMESTEP_SAMPLERS | timesteps.LEVEL_SAMPLERS,
        fixed=["schedule"],
        optional=["num_steps"],
    ),
    "model": Group(registry=MODELS, fixed=["out_channels", "parent"]),
    "optimizer": Group(
        [training.make_optimizer],
        registry=OPTIMIZERS,
        fixed=["total_steps"],
        name="adamw",
    ),
    "mesh": Group([sharding.make_mesh], fixed=["devices"]),
    "sampling": Group([SAMPLING], more={"n": int}),
    "evaluation": Group(
        [EVALUATION, SAMPLING],
        fixed=["run", "train", "mesh", "workdir"],
        more=OLD_NAMES,
        optional=[*OLD_NAMES],
    ),
}


def known_fields(name: str, group: Mapping[str, Any]) -> Parameters:
    """Returns the parameters of all functions that take fields of a group.

    Args:
        name: of the group.
        group: its fields; its field `name` decides.

    Raises:
        ValueError: if the group names no function.
    """
    described, where = GROUPS[name], f"config.{name}"
    functions: list[Any] = [
        getattr(importlib.import_module(f[0]), f[1]) if isinstance(f, tuple) else f
        for f in described.functions
    ]
    found: dict[str, inspect.Parameter] = {}
    if described.registry is not None:
        chosen = group.get("name", described.name)
        functions.append(lookup(f"{where}.name", chosen, described.registry))
        found["name"] = _field("name", str, described.name)
    for function in functions:
        last = function is functions[-1]
        for p in parameters(function, f"{where}.name").values():
            if p.kind is not p.VAR_KEYWORD or last:
                found.setdefault(p.name, p)
    for field, hint in described.more.items():
        if group.get("name") not in described.without:
            found[field] = _field(field, hint)
    for field in {*described.optional} & {*found}:
        found[field] = found[field].replace(default=None)
    return found


def _field(name: str, hint: Any, default: Any = None) -> inspect.Parameter:
    """A parameter; it must be given unless it has a default."""
    default = inspect.Parameter.empty if default is None else default
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=hint)


def check_group(name: str, group: Any) -> None:
    """Checks that a group has fields that its functions take, of their types.

    Args:
        name: of the group.
        group: its fields.

    Raises:
        ValueError: that names the field, the rule and what came.
    """
    check_is_group(f"config.{name}", group)
    if group == GIVEN_OPTIMIZER:
        return
    known, fixed = known_fields(name, group), GROUPS[name].fixed
    check_arguments(known, group, f"config.{name}", fixed)
