"""Translates the schedulers of diffusers that are of a flow or of EDM.

Their processes are rows of `schedules.LEVELS`. `ROWS` says which fields and which
output of a network are the same on both sides; anything else is refused.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax_diffusion import checks
from jax_diffusion.diffusion import Objective
from jax_diffusion.registry import parameters
from jax_diffusion.schedules import LEVELS

NUM_STEPS = 1000  # rows of our table; of a flow also what their networks are told


class Row(NamedTuple):
    """A scheduler of diffusers.

    Attributes:
        name: of the process in `schedules.LEVELS`.
        fields: arguments of that process that are fields of the scheduler.
        objective: fields of `Objective`, by which an output is read as they do.
        fixed: fields of the scheduler with the value that makes it the same process.
        pipeline: that draws with it; None if diffusers has none of a network alone.
    """

    name: str
    fields: tuple[str, ...]
    objective: Mapping[str, Any]
    fixed: Mapping[str, Any]
    pipeline: str | None = None


FLOW = dict(mean_type="flow", precondition=False)
EDM = dict(mean_type="x_0", precondition=True)
EDM_FIELDS = ("sigma_min", "sigma_max", "rho")
SIGMAS = {
    "prediction_type": "epsilon",
    "sigma_schedule": "karras",
    "final_sigmas_type": "zero",
}
ROWS = {  # the first one of a process is written
    "FlowMatchEulerDiscreteScheduler": Row(
        *("flow", ("shift",), FLOW),
        {
            "num_train_timesteps": NUM_STEPS,
            "shift_terminal": None,
            "use_dynamic_shifting": False,
            "invert_sigmas": False,
            "stochastic_sampling": False,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
        },
        "DDPMPipeline",
    ),
    "EDMEulerScheduler": Row("edm", EDM_FIELDS, EDM, SIGMAS),
    "EDMDPMSolverMultistepScheduler": Row("edm", EDM_FIELDS, EDM, SIGMAS),
}


def process_of_levels(
    kind: str, config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the groups `schedule` and `objective` of a config for a scheduler.

    Args:
        kind: a key of `ROWS`.
        config: content of the scheduler_config.json.

    Raises:
        ValueError: for a field with which the process is another one.
    """
    row = ROWS[kind]
    for field, value in row.fixed.items():
        if (got := config.get(field, value)) != value:
            raise ValueError(f"{field} of {kind} must be {value!r}, got {got!r:.80}.")
    fields = {name: config[name] for name in row.fields if name in config}
    objective = dict(row.objective, var_type="fixed_small", loss="l2")
    if row.objective["precondition"]:
        sigma_data = config.get("sigma_data", 0.5)
        objective |= dict(sigma_data=sigma_data, weighting="edm")
        checks.number("sigma_data", sigma_data, above=0)
    for name, value in fields.items():
        checks.number(name, value, above=0)
    return dict(name=row.name, num_steps=NUM_STEPS, **fields), objective


def scheduler_of_levels(
    config: Mapping[str, Any], objective: Objective
) -> tuple[dict[str, Any], str | None]:
    """Returns the scheduler_config.json for a process of levels, and its pipeline.

    Args:
        config: the group `schedule` of a config.
        objective: how the network's output is read.

    Raises:
        ValueError: if diffusers has no scheduler that computes the same.
    """
    for kind, row in ROWS.items():
        same = all(getattr(objective, k) == v for k, v in row.objective.items())
        if row.name == config["name"] and same and not objective.learns_variance:
            known = parameters(LEVELS[row.name], "schedule")
            fields = {k: config.get(k, known[k].default) for k in row.fields}
            if row.objective["precondition"]:
                fields["sigma_data"] = objective.sigma_data
            return {"_class_name": kind, **row.fixed, **fields}, row.pipeline
    raise ValueError(
        "diffusers must have a scheduler of the process, as of 'flow' with mean_type "
        "'flow' and of 'edm' with precondition, no variance learned, got "
        f"{config['name']!r} with mean_type {objective.mean_type!r}, precondition "
        f"{objective.precondition} and var_type {objective.var_type!r}."
    )
