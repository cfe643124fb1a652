"""Which schedule a denoiser is made with, so that it meets no other one."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jax_diffusion import checks
from jax_diffusion.schedules import NoiseSchedule, num_visited

# Tables that differ by less give the same samples: a table in another precision does.
RTOL, ATOL = 1e-4, 1e-6
NOTE = "_schedule_of_rows"
"""The attribute of a function of rows t that holds their schedule."""


def schedule_of(function: Any) -> NoiseSchedule | None:
    """Returns the schedule that a denoiser was made with; None if that is not known.

    `denoiser` and every wrapper of this package note it in an attribute of `function`;
    so does a scale of guidance that depends on t. What copies attributes keeps the note
    (`jax.jit`, `functools.wraps`), and `functools.partial` is looked into. An attribute
    `schedule` of a denoiser of your own says nothing: it may be that of its training.

    >>> from jax_diffusion import diffusion, schedules
    >>> schedule = schedules.make_schedule(schedules.cosine_betas(10))
    >>> objective = diffusion.Objective()
    >>> denoise_fn = diffusion.denoiser(lambda x, t: x, schedule, objective)
    >>> schedule_of(diffusion.clip_x_0(denoise_fn)) is schedule
    True
    """
    found = getattr(function, NOTE, None)
    if found is None and isinstance(function, functools.partial):
        return schedule_of(function.func)
    return found if isinstance(found, NoiseSchedule) else None


def with_schedule(function: Any, source: Any) -> Any:
    """Notes which schedule the rows t are of that a function takes.

    Args:
        function: a denoiser, or a scale of guidance; it gets an attribute.
        source: the schedule, or the function that is wrapped, which may know none.

    Returns:
        The function.

    Raises:
        ValueError: unless `function` is one.
    """
    checks.function("function", function, "(x_t, t)")
    schedule = source if isinstance(source, NoiseSchedule) else schedule_of(source)
    if schedule is not None:
        function.__dict__[NOTE] = schedule
    return function


def check_raw(model_fn: Any) -> None:
    """Raises ValueError unless `model_fn` is a function, and no denoiser of one."""
    checks.function("model_fn", model_fn, "(x_t, timesteps)")
    if schedule_of(model_fn) is not None:
        raise ValueError("model_fn must be the raw network, got a denoiser of one.")


def check_schedule_of(
    function: Any, schedule: NoiseSchedule | None, name: str = "denoise_fn"
) -> None:
    """Checks that a denoiser is used with the schedule that it was made with.

    The rows that `schedule` visits must be equal in both; either may be padded. Where
    one of them is traced, lengths are compared, as far as they are known.

    Args:
        function: a denoiser, or a scale of guidance.
        schedule: where its rows are taken from.
        name: of the function, in the sentence.

    Raises:
        ValueError: if it is made with another one.
    """
    own = schedule_of(function)
    if own is schedule or own is None or schedule is None:
        return
    rule = f"{name} must be made with the schedule that it is used with, got one of"
    if not all(map(checks.known, jax.tree.leaves((own, schedule)))):
        known = checks.known(own.mask)
        short, long = own.num_steps, num_visited(own) if known else 0
        if num_visited(schedule) > short or long > schedule.num_steps:
            rows = f"{long or short} rows for {schedule.num_steps}"
            raise ValueError(f"{rule} {rows}; within jax.jit, make it there.")
        return
    mine, theirs = jax.tree.map(np.asarray, jax.device_get((own, schedule)))
    num_mine, num_theirs = (int(np.sum(table.visited)) for table in (mine, theirs))
    if num_theirs > num_mine:
        raise ValueError(f"{rule} {num_mine} steps for {num_theirs}.")
    if jax.tree.structure(mine) != jax.tree.structure(theirs):
        raise ValueError(f"{rule} another kind.")  # such as of levels with churn
    for field in dataclasses.fields(NoiseSchedule):
        if field.name == "next":  # no denoiser's, and of the last row not the same
            continue
        columns = (
            jax.tree.leaves(getattr(table, field.name)) for table in (mine, theirs)
        )
        for a, b in zip(*columns, strict=True):
            same = np.isclose(a[:num_theirs], b[:num_theirs], RTOL, ATOL, True)
            if not same.all():
                raise ValueError(
                    f"{rule} {num_mine} steps for {num_theirs}, with other "
                    f"{field.name} in row {np.argmin(same)}."
                )
