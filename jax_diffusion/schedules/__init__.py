"""Noise schedules: from variances or levels to a `NoiseSchedule`, a float32 table.

    betas = cosine_betas(1000)                  float64 [T], on the host
    keep = spaced_steps(1000, 50)               which steps to take, if not all
    schedule = make_schedule(betas, keep=keep)  what the rest of the package reads

    schedule = from_levels(*flow_levels(50))    the same of a flow, EDM or any levels

    betas           variances by name: linear, cosine, ...; BETAS lists them
    levels          levels by name: edm, flow, vdm, ...; LEVELS lists them; from_levels
    churn           churned, EDM's levels with churn
    noise_schedule  Level, NoiseSchedule; make_schedule, pad, take

`spacing.SPACINGS` lists the functions that choose steps.

Timesteps count from 0: t = 0 is one step of noise, "t = 1" in the DDPM paper.
alpha_bar, the product of (1 - beta) up to a step, occurs in this folder only; elsewhere
a noise level is a `Level`.
"""

from jax_diffusion.schedules.betas import (
    BETAS,
    betas_from_alpha_bar,
    check_betas,
    constant_betas,
    cosine_betas,
    given_betas,
    jsd_betas,
    linear_betas,
    quadratic_betas,
    sigmoid_alpha_bar_betas,
    sigmoid_betas,
    warmup_betas,
    zero_terminal_snr,
)
from jax_diffusion.schedules.churn import churned
from jax_diffusion.schedules.levels import (
    LEVELS,
    Levels,
    cosine_levels,
    edm_levels,
    flow_levels,
    from_levels,
    laplace_levels,
    log_snr_levels,
    logit_normal_levels,
    schedule_at,
    sigma_levels,
    time_levels,
    vdm_levels,
)
from jax_diffusion.schedules.noise_schedule import (
    Level,
    NoiseSchedule,
    Table,
    check_batch,
    check_chain,
    check_rows,
    check_schedule,
    check_step,
    make_schedule,
    num_visited,
    pad,
    steps_to_keep,
    tabulate,
    take,
)
from jax_diffusion.spacing import (
    angle_steps,
    karras_steps,
    log_snr_steps,
    quadratic_steps,
    spaced_steps,
    trailing_steps,
    uniform_steps,
)

__all__ = [
    "BETAS",
    "LEVELS",
    "Level",
    "Levels",
    "NoiseSchedule",
    "Table",
    "angle_steps",
    "betas_from_alpha_bar",
    "check_batch",
    "check_betas",
    "check_chain",
    "check_rows",
    "check_schedule",
    "check_step",
    "churned",
    "constant_betas",
    "cosine_betas",
    "cosine_levels",
    "edm_levels",
    "flow_levels",
    "from_levels",
    "given_betas",
    "jsd_betas",
    "karras_steps",
    "laplace_levels",
    "linear_betas",
    "log_snr_levels",
    "log_snr_steps",
    "logit_normal_levels",
    "make_schedule",
    "num_visited",
    "pad",
    "quadratic_betas",
    "quadratic_steps",
    "schedule_at",
    "sigma_levels",
    "sigmoid_alpha_bar_betas",
    "sigmoid_betas",
    "spaced_steps",
    "steps_to_keep",
    "tabulate",
    "take",
    "time_levels",
    "trailing_steps",
    "uniform_steps",
    "vdm_levels",
    "warmup_betas",
    "zero_terminal_snr",
]
