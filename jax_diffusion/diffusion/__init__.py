"""The forward process, the posterior, and a network read as a distribution.

    q(x_t | x_0) = N(signal x_0, noise^2 I)          x_t = signal x_0 + noise eps
    v = signal eps - noise x_0, flow = eps - x_0     score = -eps / noise
    p(x_{t-1} | x_t) = q(x_{t-1} | x_t, x_0 predicted), its variance fixed or learned

    process    q_sample, q_posterior; conversions of x_0, eps, v, flow, mu and score
    objective  Objective: what the network predicts, and the loss
    prediction Prediction; DenoiseFn, the type of a denoiser
    denoisers  denoiser (the learned variance, too), clip_x_0, threshold_x_0
    preconditioning  precondition: a network's input and output at unit scale (EDM)
    same_schedule  schedule_of: which schedule a denoiser is made with

Conventions, relied on everywhere in the package:

1. Arguments come as `key`, functions, static objects, `schedule`, arrays (data before
   `t`); options by keyword.
2. `t` is int32 of shape [b] and counts rows of the schedule from 0. There is no scalar
   form.
3. Data are float32 [b, h, w, c] in [-1, 1], or of another shape [b, ...], or another
   float dtype, which a sampler keeps.
4. Per-example results have shape [b]; the caller takes the mean.
5. A function that draws takes a typed key (`jax.random.key`) first and returns none.
6. A model_fn(x_t, timesteps, **conditioning) is the raw network and returns [b, ..., c]
   or, if it learns its variance, [b, ..., 2 c], where the mean's channels come first. A
   denoise_fn(x_t, t, **conditioning) is the network read as a `Prediction`.
7. How many steps, which ones, eta and guidance scales are data: with schedules of one
   length (`schedules.pad`), other values of them do not compile again.
8. Types, shapes and dtypes are checked always, values where they are known, such as t
   outside of `jax.jit`: ValueError.
"""

from jax_diffusion.diffusion.denoisers import (
    check_output,
    clip_x_0,
    denoiser,
    guided_mean,
    guided_x_0,
    predict,
    split_output,
    target,
    threshold_x_0,
)
from jax_diffusion.diffusion.objective import (
    LossType,
    MeanType,
    Objective,
    Reduction,
    VarType,
    Weighting,
    check_objective,
    check_signal,
)
from jax_diffusion.diffusion.preconditioning import precondition
from jax_diffusion.diffusion.prediction import (
    AnyDenoiseFn,
    ConditionalDenoiseFn,
    DenoiseFn,
    Prediction,
    check_denoise_fn,
    check_prediction,
)
from jax_diffusion.diffusion.process import (
    eps_from_x_0,
    flow_from_x_0,
    q_mean_log_var,
    q_posterior,
    q_sample,
    score_from_x_0,
    v_from_x_0,
    x_0_from_eps,
    x_0_from_flow,
    x_0_from_mu,
    x_0_from_v,
)
from jax_diffusion.diffusion.same_schedule import (
    check_raw,
    check_schedule_of,
    schedule_of,
    with_schedule,
)

__all__ = [
    "AnyDenoiseFn",
    "ConditionalDenoiseFn",
    "DenoiseFn",
    "LossType",
    "MeanType",
    "Objective",
    "Prediction",
    "Reduction",
    "VarType",
    "Weighting",
    "check_denoise_fn",
    "check_objective",
    "check_output",
    "check_prediction",
    "check_raw",
    "check_schedule_of",
    "check_signal",
    "clip_x_0",
    "denoiser",
    "eps_from_x_0",
    "flow_from_x_0",
    "guided_mean",
    "guided_x_0",
    "precondition",
    "predict",
    "q_mean_log_var",
    "q_posterior",
    "q_sample",
    "schedule_of",
    "score_from_x_0",
    "split_output",
    "target",
    "threshold_x_0",
    "v_from_x_0",
    "with_schedule",
    "x_0_from_eps",
    "x_0_from_flow",
    "x_0_from_mu",
    "x_0_from_v",
]
