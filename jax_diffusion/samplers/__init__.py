"""Samplers: one function for a step, and the one scan that runs it.

A sampler is a function, `step`, of this form:

    step(keys, denoise_fn, schedule, state, t) -> state

    keys        typed keys [b], one for each image, the same at every step
    denoise_fn  denoise_fn(x_t, t) -> Prediction, see `diffusion.denoiser`
    schedule    NoiseSchedule; t are numbers of its rows
    state       SampleState, whose x is at the noise level of t, or one of your own; of
                a step that reads earlier predictions, what start(x_T, step) makes
    t           int32 [b], all equal when `sample` calls the step
    -> state    the state: x at the level of t - 1, which is clean data for t = 0; x_0
                as predicted at t; the log-SNR of t; dtypes as they were

It raises ValueError unless these fit each other.

A step draws `normal(fold_in(keys, t), shape)`, and for a second purpose folds in one
more number. So the noise of an image depends on its key and on the row t alone: not on
the batch around it, nor on who calls the step, nor on where a chain was cut. It never
indexes a table with t - 1 but reads `prev` of `schedules.take`. `loop` calls it in a
`lax.scan` and skips negative t; a scan of your own does as well, with t [b].

    noise     keys for images, and the noise drawn with them: fold_in, normal
    state     SampleState, and start, which makes it
    loop      the scan: sample_frames, sample
    steps     every sampler's step, and SAMPLERS, the table of them
    wrappers  functions of a step that return a step: inpaint, share_noise, on_step
    paths     pure_noise, invert, slerp, interpolate

What changes a step wraps the step; what changes a prediction wraps the denoiser
(`diffusion.clip_x_0`, `guidance`). Nothing here is jitted: call it inside your own
`jax.jit`, with parameters, schedule, keys and eta as arguments.
"""

from jax_diffusion.samplers.loop import StepFn, sample, sample_frames
from jax_diffusion.samplers.noise import fold_in, image_keys, normal
from jax_diffusion.samplers.paths import interpolate, invert, pure_noise, slerp
from jax_diffusion.samplers.state import MultistepState, Past, SampleState, start
from jax_diffusion.samplers.steps import (
    SAMPLERS,
    Sampler,
    as_sampler,
    ddim_inversion_step,
    ddim_step,
    ddpm_step,
    dpmpp_2m_sde_step,
    dpmpp_2m_step,
    dpmpp_2s_step,
    dpmpp_3m_sde_step,
    dpmpp_sde_step,
    edm_heun_step,
    euler_ancestral_step,
    heun_step,
    unipc_step,
)
from jax_diffusion.samplers.wrappers import inpaint, on_step, share_noise, watch

__all__ = [
    "SAMPLERS",
    "MultistepState",
    "Past",
    "SampleState",
    "Sampler",
    "StepFn",
    "as_sampler",
    "ddim_inversion_step",
    "ddim_step",
    "ddpm_step",
    "dpmpp_2m_sde_step",
    "dpmpp_2m_step",
    "dpmpp_2s_step",
    "dpmpp_3m_sde_step",
    "dpmpp_sde_step",
    "edm_heun_step",
    "euler_ancestral_step",
    "fold_in",
    "heun_step",
    "image_keys",
    "inpaint",
    "interpolate",
    "invert",
    "normal",
    "on_step",
    "pure_noise",
    "sample",
    "sample_frames",
    "share_noise",
    "slerp",
    "start",
    "unipc_step",
    "watch",
]
