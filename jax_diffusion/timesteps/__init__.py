"""Samplers of training timesteps: which t each image of a batch is noised to.

    sampler = loss_second_moment(1000)
    state = sampler.init()
    t, weight = sampler.sample(key, state, batch_size)
    state = sampler.update(state, t, loss)

Whatever the sampler, the mean of weight * loss(t) is an unbiased estimate of the mean
loss over uniform t. The state is a pytree of arrays, a part of the train state.

In continuous time, `LEVEL_SAMPLERS` draw `Levels` instead of rows, quantiles at even u
of `even_uniform`. `table_of` makes a table of them, on which losses are computed:

    levels, weight = logit_normal_times(schedule).sample(key, (), batch_size)
    table, t = table_of(schedule, levels)

They are for a schedule of `sigma_levels`, `time_levels` or `log_snr_levels`.

    rows    TimestepSampler; samplers of rows of a schedule: uniform, antithetic, ...
    levels  samplers in continuous time: logit_normal_times, log_normal_sigmas, ...
"""

from collections.abc import Callable

from jax_diffusion.timesteps.levels import (
    even_uniform,
    importance_sampled,
    log_normal,
    log_normal_sigmas,
    logit_normal,
    logit_normal_times,
    low_discrepancy_times,
    rows_of,
    table_of,
)
from jax_diffusion.timesteps.rows import (
    LossHistory,
    TimestepSampler,
    antithetic,
    check_results,
    loss_second_moment,
    stratified,
    uniform,
)

TIMESTEP_SAMPLERS: dict[str, Callable[..., TimestepSampler]] = {
    "uniform": uniform,
    "antithetic": antithetic,
    "stratified": stratified,
    "loss_second_moment": loss_second_moment,
}
"""Samplers by name: f(num_steps, **arguments) -> TimestepSampler."""

LEVEL_SAMPLERS: dict[str, Callable[..., TimestepSampler]] = {
    "low_discrepancy": low_discrepancy_times,
    "logit_normal": logit_normal_times,
    "log_normal": log_normal_sigmas,
    "importance": importance_sampled,
}
"""Those in continuous time: f(schedule, **arguments) -> TimestepSampler of `Levels`."""

SAMPLERS = TIMESTEP_SAMPLERS  # its old name

__all__ = [
    "LEVEL_SAMPLERS",
    "SAMPLERS",
    "TIMESTEP_SAMPLERS",
    "LossHistory",
    "TimestepSampler",
    "antithetic",
    "check_results",
    "even_uniform",
    "importance_sampled",
    "log_normal",
    "log_normal_sigmas",
    "logit_normal",
    "logit_normal_times",
    "loss_second_moment",
    "low_discrepancy_times",
    "rows_of",
    "stratified",
    "table_of",
    "uniform",
]
