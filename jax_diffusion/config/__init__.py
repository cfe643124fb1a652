"""Loads and checks configs; builds schedule, objective and network from them.

A config is a Python file with `get_config() -> ConfigDict`, one level of groups deep.
`FIELDS` lists its fields. Each group holds the keyword arguments of one function, so
that a misspelled field is found and named. Where a group has a `name`, that is a row of
a registry or anybody's own "package.module:function" (see `registry.lookup`).

| file | what it does |
| --- | --- |
| `fields` | `FIELDS`: what a config may say; `complete`, `check_config` |
| `groups` | `GROUPS`: which functions take the fields of a group |
| `reading` | `load_config`: files or sample configs, and a command line's changes |
| `records` | configs of checkpoints: of older formats, and compared |

This module builds what a config describes. Nothing behind it sees a ConfigDict.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_diffusion import checks, schedules, timesteps
from jax_diffusion.config.fields import (
    DEFAULTS,
    FIELDS,
    Config,
    Field,
    check_config,
    complete,
)
from jax_diffusion.config.groups import GIVEN, GIVEN_OPTIMIZER, OF_SCHEDULES
from jax_diffusion.config.reading import load_config
from jax_diffusion.config.records import FORMAT, differences, of_record, upgrade
from jax_diffusion.diffusion import Objective, check_signal
from jax_diffusion.diffusion.preconditioning import check_end
from jax_diffusion.models import MODELS, Network, traits
from jax_diffusion.registry import (
    call,
    call_by_name,
    check_type,
    is_outside,
    lookup,
    named,
    outside,
    parameters,
    short,
)
from jax_diffusion.schedules import Levels, NoiseSchedule
from jax_diffusion.schedules.churn import levels_by_ratio
from jax_diffusion.schedules.levels import betas_of_levels
from jax_diffusion.spacing import SPACINGS

__all__ = [
    "DEFAULTS",
    "FIELDS",
    "FORMAT",
    "GIVEN",
    "GIVEN_OPTIMIZER",
    "Built",
    "Config",
    "Field",
    "build",
    "call",
    "check_config",
    "check_signature",
    "complete",
    "differences",
    "fields",
    "groups",
    "load_config",
    "make_betas",
    "make_churned",
    "make_model",
    "make_network",
    "make_objective",
    "make_process",
    "make_schedule",
    "make_timestep_sampler",
    "named",
    "num_steps",
    "of_record",
    "reading",
    "records",
    "upgrade",
]


class Built(NamedTuple):
    """What a config describes.

    Attributes:
        schedule: all T steps.
        objective: None for a classifier.
        model: the network, without parameters.
    """

    schedule: NoiseSchedule
    objective: Objective | None
    model: Network


def check_signature(
    function: Callable, given: Mapping[str, Any], names: Iterable[str]
) -> None:
    """Checks arguments of a call from Python against the function's type hints.

    Args:
        function: what was called.
        given: its arguments by name, such as its `locals()`.
        names: of the arguments to check.

    Raises:
        ValueError: for the first one that does not fit.
    """
    known = parameters(function, "function")
    for name in names:
        check_type(name, given[name], known[name].annotation)


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
    if objective is not None and isinstance(make_process(config["schedule"]), Levels):
        with named("config", ["schedule"]):
            check_end(schedule, objective.sigma_data)
    return Built(schedule, objective, make_network(config, objective, num_channels))


def make_network(
    config: Config, objective: Objective | None, num_channels: int
) -> Network:
    """Builds the network of a whole config: see `build`."""
    group = dict(config["model"])
    if config.get("label_dropout"):
        network = lookup("config.model.name", group.get("name"), MODELS)
        known = group.get("num_classes", traits(network).num_classes)
        if isinstance(known, int):
            group["num_classes"] = known + 1
    return make_model(group, objective, num_channels)


def make_schedule(
    config: Config, *, steps: int | None = None, spacing: str = "sections"
) -> NoiseSchedule:
    """Builds the schedule that `config.schedule` describes, or a shorter one.

    Args:
        config: the group `schedule` of a config.
        steps: number of steps to keep; all if None.
        spacing: which ones, a rule of `spacing.SPACINGS`. Of levels it sees the betas
            of the chain with the same ratios of noise to signal.

    Raises:
        ValueError: for an unknown name, a misspelled argument or too many steps.
    """
    process, keep = make_process(config), None
    is_chain = not isinstance(process, Levels)
    if steps is not None:
        keep = _steps_to_keep(process, steps, spacing)
    with _describing_a_schedule():
        if not is_chain:
            rows = slice(None) if keep is None else keep
            return schedules.from_levels(*(column[rows] for column in process))
        rescale = config.get("rescale_timesteps", False)
        return schedules.make_schedule(process, keep=keep, rescale_timesteps=rescale)


def _steps_to_keep(
    process: np.ndarray | Levels, steps: int, spacing: str
) -> np.ndarray:
    total = _length(process)
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be in [1, T = {total}], got {steps}.")
    function, betas = lookup("spacing", spacing, SPACINGS), process
    if isinstance(process, Levels):
        betas = betas_of_levels(process)
    with outside("spacing", spacing, "a function (betas, n) -> steps"):
        return schedules.steps_to_keep(function(betas, steps), total)


def make_churned(
    config: Config, steps: int, spacing: str, **churn: float
) -> NoiseSchedule:
    """Builds the schedule of EDM's stochastic sampler on levels of `config.schedule`.

    Levels that noise raises to are those of the process in continuous time, where
    it has one, and else the nearest ones of its T.

    Args:
        config: the group `schedule` of a config.
        steps: number of calls of the network, odd: two for each level but the last one.
        spacing: chooses these levels, as in `make_schedule`.
        churn: `churn`, `s_min` and `s_max` of `schedules.churned`.

    Raises:
        ValueError: as `make_schedule` does.
    """
    process = make_process(config)
    if isinstance(process, Levels):
        table = schedules.from_levels.__wrapped__(*process)
    else:
        rescale = config.get("rescale_timesteps", False)
        table = schedules.tabulate(process, rescale_timesteps=rescale)
    most = 2 * table.num_steps - 1
    if not 1 <= steps <= most:
        rule = f"steps must be in [1, 2 T - 1 = {most}] with churn"
        raise ValueError(f"{rule}, got {steps}.")
    keep = _steps_to_keep(process, (steps + 1) // 2, spacing)
    sigma, levels_fn = levels_by_ratio(table)
    return schedules.churned(sigma[keep], levels_fn, **churn)


def num_steps(config: Config) -> int:
    """Returns T, the number of steps of the process of a group `schedule`."""
    return _length(make_process(config))


def _length(process: np.ndarray | Levels) -> int:
    return len(process.signal if isinstance(process, Levels) else process)


@contextlib.contextmanager
def _describing_a_schedule() -> Iterator[None]:
    """Names the group in errors about betas, which follow from several fields."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("config."):
            raise
        raise ValueError(
            f"config.schedule must describe a noise schedule, got one where {error}"
        ) from error


def make_process(config: Config) -> np.ndarray | Levels:
    """Builds the variances, float64 [T], or `Levels` that `config.schedule` describes.

    Raises:
        ValueError: for an unknown name, a misspelled argument, or fields of variances
            beside the name of levels.
    """
    group = dict(config)
    flags = {name: group.pop(name) for name in OF_SCHEDULES if name in group}
    for name, value in flags.items():
        check_type(f"config.schedule.{name}", value, bool)
    rule = "a function (num_steps, ...) -> betas or Levels"
    known = schedules.BETAS | schedules.LEVELS
    with _describing_a_schedule():
        made = call_by_name(known, group, "config.schedule", rule, _check_process)
        if isinstance(made, Levels):
            if flags:
                name, value = next(iter(flags.items()))
                raise ValueError(
                    f"config.schedule.{name} is for a schedule of variances, got "
                    f"{value} with {short(config['name'])}, which is one of levels."
                )
            return made
        zero_snr = flags.get("zero_terminal_snr", False)
        return schedules.zero_terminal_snr(made) if zero_snr else made


def _check_process(made: Any) -> np.ndarray | Levels:
    if not isinstance(made, Levels):
        return schedules.check_betas(made)
    schedules.from_levels.__wrapped__(*made)  # which checks them
    return Levels(*(np.asarray(column, np.float64) for column in made))


def make_betas(config: Config) -> np.ndarray:
    """Builds the variances that `config.schedule` describes, float64 [T].

    Raises:
        ValueError: as `make_process` does, and for a schedule of levels.
    """
    betas = make_process(config)
    if isinstance(betas, Levels):
        name = short(config["name"])
        raise ValueError(f"config.schedule must have variances, got levels of {name}.")
    return betas


def make_objective(config: Config, schedule: NoiseSchedule) -> Objective | None:
    """Builds the objective that `config.objective` describes; None for a classifier.

    Raises:
        ValueError: if a field is wrong, or if it does not fit the schedule.
    """
    if config is None:
        return None
    objective = call(Objective, config, "config.objective")
    with named("config.objective", ["mean_type"]):
        check_signal(schedule, objective)
    return objective


def make_model(
    config: Config, objective: Objective | None, num_channels: int
) -> Network:
    """Builds the network that `config.model` describes, as it stands there.

    A denoiser is told `out_channels`: num_channels, twice of it for a learned variance.
    """
    group = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(config).items()}
    group.pop("out_channels", None)  # old checkpoints may have it, to no effect
    fixed = {}
    if objective is not None:
        factor = 2 if objective.learns_variance else 1
        fixed["out_channels"] = factor * num_channels
    rule = "a function that makes a network"
    return call_by_name(MODELS, group, "config.model", rule, _check_network, **fixed)


def _check_network(made: Any) -> Network:
    if not all(callable(getattr(made, name, None)) for name in ("init", "apply")):
        raise ValueError(f"it makes {short(made)}, without init and apply.")
    return made


def make_timestep_sampler(
    config: Config, schedule: NoiseSchedule, objective: Objective | None = None
) -> timesteps.TimestepSampler:
    """Builds the sampler of training timesteps that `config.timesteps` describes.

    Args:
        config: the group `timesteps` of a config.
        schedule: of all T steps.
        objective: what is trained, which must not need a chain in continuous time.

    Raises:
        ValueError: for a field that is wrong or does not fit schedule and objective.
    """
    group, fixed = dict(config), dict[str, Any]()
    name, T = group.get("name"), schedule.num_steps
    known = timesteps.TIMESTEP_SAMPLERS | timesteps.LEVEL_SAMPLERS
    rule = "a function (num_steps, ...) or (schedule, ...) -> TimestepSampler"
    where = "config.timesteps.name"
    if "schedule" in parameters(lookup(where, name, known), where):
        fixed["schedule"] = schedule
    else:
        fixed["num_steps"] = group.pop("num_steps", T)
        checks.integer(
            "config.timesteps.num_steps", fixed["num_steps"], at_least=1, at_most=T
        )
    told = outside(where, name, rule)

    def check(made):
        return timesteps.TimestepSampler(*map(told, timesteps.check_results(made)))

    try:
        sampler = call_by_name(known, group, "config.timesteps", rule, check, **fixed)
    except ValueError as error:
        if is_outside(name) or not str(error).startswith("schedule "):
            raise
        raise ValueError(
            f"{where} must fit config.schedule, got {name!r}, where {error}"
        ) from error
    if "schedule" not in fixed or objective is None or not objective.needs_chain:
        return sampler
    draw = functools.partial(sampler.sample, state=sampler.init(), batch_size=4)
    if isinstance(jax.eval_shape(draw, jax.random.key(0))[0], Levels):
        raise ValueError(
            f"{where} must be one of {sorted(timesteps.TIMESTEP_SAMPLERS)} for an "
            "objective with mu, a learned variance or the bound, which need the steps "
            f"of a chain, got {name!r}."
        )
    return sampler
