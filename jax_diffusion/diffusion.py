"""The forward process, the posterior, and a network read as a distribution.

    q(x_t | x_0) = N(signal x_0, noise^2 I)          x_t = signal x_0 + noise eps
    v = signal eps - noise x_0                       score = -eps / noise
    p(x_{t-1} | x_t) = q(x_{t-1} | x_t, x_0 predicted), its variance fixed or learned

Conventions, relied on everywhere in the package:

1. Arguments come as `key`, functions, static objects, `schedule`, arrays (data before
   `t`); options by keyword.
2. `t` is int32 of shape [b], counted from 0. There is no scalar form.
3. Data are float32 [b, h, w, c] in [-1, 1].
4. Per-example results have shape [b]; the caller takes the mean.
5. What draws takes a typed key first (`jax.random.key`) and never returns one.
6. A model_fn(x_t, timesteps, **conditioning) is the raw network and returns [b, ..., c]
   or, if it learns its variance, [b, ..., 2 c]: mean channels first. A
   denoise_fn(x_t, t, **conditioning) is the network read as a `Prediction`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jax_diffusion.schedules import NoiseSchedule, take


class Prediction(NamedTuple):
    """What a denoiser says of x_t. x_0 decides eps, v, score, mean: none is stored."""

    x_0: Array  # [b, ...] estimate of the clean data
    log_var: Array  # [b, ...] or broadcastable; log variance of p(x_{t-1} | x_t)
    grad: Any = None  # [b, ...] what guidance adds to the score of x_t; None, nothing


DenoiseFn = Callable[..., Prediction]  # (x_t, t, **conditioning) -> Prediction

MeanType = Literal["eps", "x_0", "v", "mu"]
VarType = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
LossType = Literal["l2", "l1", "huber", "vlb", "hybrid"]
Weighting = Literal["uniform", "snr", "min_snr", "truncated_snr", "p2"]
Reduction = Literal["mean", "sum"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the network outputs and how that is scored. Static: hashable, no arrays.

    mean_type: the network predicts eps (DDPM), x_0, v (Salimans & Ho 2022), or mu, the
        mean of p(x_{t-1} | x_t).
    var_type: the posterior variance (fixed_small), beta (fixed_large), the log variance
        itself (learned), or where it lies between those two (learned_range).
    loss: l2, l1 or huber of the output; vlb, the variational bound; hybrid, l2 plus the
        bound, whose gradient then reaches the variance only.
    weighting: of the l2, l1 or huber term over noise levels; see `losses.loss_weight`.
    reduction: of the l2, l1 or huber term over an image: mean, or sum (the DDIM
        repository), which is as many times larger as an image has numbers; the learning
        rate hardly feels it under Adam, clipping the gradient and its epsilon do.
    vlb_scale: the bound counts vlb_scale * T times its term at the sampled t, that is
        vlb_scale times L_vlb on average. Default 1e-3 in "hybrid" (Improved DDPM;
        OpenAI's RESCALED_MSE) and 1 in "vlb" (RESCALED_KL); 1 / T gives their MSE
        and KL.
    """

    mean_type: MeanType = "eps"
    var_type: VarType = "fixed_large"
    loss: LossType = "l2"
    weighting: Weighting = "uniform"
    vlb_scale: float | None = None
    min_snr_gamma: float = 5.0  # "min_snr" only
    p2_gamma: float = 1.0  # "p2" only
    p2_k: float = 1.0  # "p2" only
    reduction: Reduction = "mean"

    def __post_init__(self):  # not a pytree, so checking here is safe
        _check_choice("mean_type", self.mean_type, MeanType)
        _check_choice("var_type", self.var_type, VarType)
        _check_choice("loss", self.loss, LossType)
        _check_choice("weighting", self.weighting, Weighting)
        _check_choice("reduction", self.reduction, Reduction)
        if self.loss == "hybrid" and not self.learns_variance:
            raise ValueError(
                f"loss 'hybrid' needs a learned variance, got {self.var_type!r}."
            )

    @property
    def learns_variance(self) -> bool:
        """Whether the network has a second half of channels, for the variance."""
        return self.var_type.startswith("learned")


def q_sample(
    schedule: NoiseSchedule,
    x_0: Float[Array, "b *d"],
    t: Int[Array, "b"],
    eps: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """x_t ~ q(x_t | x_0) = N(signal x_0, noise^2 I), given its noise (DDPM eq. 4)."""
    level = take(schedule, t, x_0.ndim).now
    return level.signal * x_0 + level.noise * eps


def q_mean_log_var(
    schedule: NoiseSchedule, x_0: Float[Array, "b *d"], t: Int[Array, "b"]
) -> tuple[Float[Array, "b *d"], Float[Array, "b *_"]]:
    """Mean and log variance of q(x_t | x_0), the latter [b, 1, ...] (DDPM eq. 4)."""
    level = take(schedule, t, x_0.ndim).now
    return level.signal * x_0, 2 * jnp.log(level.noise)


def q_posterior(
    schedule: NoiseSchedule,
    x_0: Float[Array, "b *d"],
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
) -> tuple[Float[Array, "b *d"], Float[Array, "b *_"]]:
    """Mean and log variance of q(x_{t-1} | x_t, x_0), the latter [b, 1, ...].

    At t = 0 the mean is x_0 and the true variance 0; the log variance given is that of
    t = 1, as in the official code (DDPM eq. 6 and 7).
    """
    c = take(schedule, t, x_t.ndim)
    return c.posterior_x_0 * x_0 + c.posterior_x_t * x_t, c.posterior_log_var


def x_0_from_eps(
    schedule: NoiseSchedule,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    eps: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """(x_t - noise eps) / signal. Undefined where the signal is zero."""
    level = take(schedule, t, x_t.ndim).now
    return (x_t - level.noise * eps) / level.signal


def x_0_from_v(
    schedule: NoiseSchedule,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    v: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """signal x_t - noise v (Salimans & Ho 2022, app. D)."""
    level = take(schedule, t, x_t.ndim).now
    return level.signal * x_t - level.noise * v


def x_0_from_mu(
    schedule: NoiseSchedule,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    mu: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """The x_0 whose posterior q(x_{t-1} | x_t, x_0) has mean mu (DDPM eq. 7)."""
    c = take(schedule, t, x_t.ndim)
    return (mu - c.posterior_x_t * x_t) / c.posterior_x_0


def eps_from_x_0(
    schedule: NoiseSchedule,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    x_0: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """(x_t - signal x_0) / noise."""
    level = take(schedule, t, x_t.ndim).now
    return (x_t - level.signal * x_0) / level.noise


def v_from_x_0(
    schedule: NoiseSchedule,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    x_0: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """signal eps - noise x_0 (Salimans & Ho 2022, app. D), of this x_t and x_0."""
    level = take(schedule, t, x_t.ndim).now
    return (level.signal * x_t - x_0) / level.noise


def score_from_x_0(
    schedule: NoiseSchedule,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    x_0: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """grad_x log q(x_t | x_0) = -eps / noise."""
    level = take(schedule, t, x_t.ndim).now
    return -eps_from_x_0(schedule, x_t, t, x_0) / level.noise


def guided_x_0(
    schedule: NoiseSchedule, prediction: Prediction, t: Int[Array, "b"]
) -> Float[Array, "b *d"]:
    """The predicted x_0 after guidance, for samplers that follow the score.

    eps - noise grad instead of eps (Dhariwal & Nichol 2021, algorithm 2) is x_0 +
    noise^2 / signal grad. It is not clipped again. Where there is no signal, x_t knows
    nothing of x_0 and x_0 stays.
    """
    if prediction.grad is None:
        return prediction.x_0
    level = take(schedule, t, prediction.x_0.ndim).now
    has_signal = level.signal > 0
    shift = level.noise**2 / jnp.where(has_signal, level.signal, 1.0)
    return prediction.x_0 + jnp.where(has_signal, shift, 0.0) * prediction.grad


def guided_mean(
    schedule: NoiseSchedule,
    prediction: Prediction,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
) -> Float[Array, "b *d"]:
    """The mean of p(x_{t-1} | x_t): that of q at the predicted x_0, plus guidance.

    Guidance shifts it by the variance times its gradient (Dhariwal & Nichol 2021,
    algorithm 1).
    """
    mean, _ = q_posterior(schedule, prediction.x_0, x_t, t)
    if prediction.grad is None:
        return mean
    return mean + jnp.exp(prediction.log_var) * prediction.grad


def target(
    schedule: NoiseSchedule,
    objective: Objective,
    x_0: Float[Array, "b *d"],
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    eps: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """What the mean channels of the network should output for this x_0 and eps."""
    level = take(schedule, t, x_t.ndim).now
    match objective.mean_type:
        case "eps":
            return eps
        case "x_0":
            return x_0
        case "v":
            return level.signal * eps - level.noise * x_0
        case "mu":
            return q_posterior(schedule, x_0, x_t, t)[0]


def split_output(
    objective: Objective, output: Float[Array, "b *d"], num_channels: int
) -> tuple[Float[Array, "b *_"], Any]:
    """The mean channels and the variance channels, the latter None if not learned.

    Raises:
        ValueError: unless the last axis has num_channels, or twice as many if learned.
    """
    expected = num_channels * (2 if objective.learns_variance else 1)
    if output.shape[-1] != expected:
        raise ValueError(
            f"the network must output {expected} channels for {num_channels} of data "
            f"and var_type {objective.var_type!r}, got {output.shape[-1]}."
        )
    if not objective.learns_variance:
        return output, None
    return output[..., :num_channels], output[..., num_channels:]


def predict(
    schedule: NoiseSchedule,
    objective: Objective,
    output: Float[Array, "b *_"],
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
) -> Prediction:
    """Reads the network's output at x_t as x_0 and the variance of p(x_{t-1} | x_t).

    At t = 0 both fixed variances take the posterior's at t = 1, as in the official
    code. A learned range is not clamped: it may lie outside the two variances
    (Nichol & Dhariwal 2021, eq. 15).
    """
    value, var_value = split_output(objective, output, x_t.shape[-1])
    match objective.mean_type:
        case "eps":
            x_0 = x_0_from_eps(schedule, x_t, t, value)
        case "x_0":
            x_0 = value
        case "v":
            x_0 = x_0_from_v(schedule, x_t, t, value)
        case "mu":
            x_0 = x_0_from_mu(schedule, x_t, t, value)

    c = take(schedule, t, x_t.ndim)
    low, high = c.posterior_log_var, jnp.log(c.betas)
    log_var: Any
    match objective.var_type:
        case "fixed_small":
            log_var = low
        case "fixed_large":
            log_var = jnp.where(t.reshape(low.shape) == 0, low, high)
        case "learned":
            log_var = var_value
        case "learned_range":
            fraction = (var_value + 1) / 2
            log_var = fraction * high + (1 - fraction) * low
    return Prediction(x_0, log_var)


def denoiser(
    model_fn: Callable[..., Array], schedule: NoiseSchedule, objective: Objective
) -> DenoiseFn:
    """Reads the raw network as a `DenoiseFn` on the rows of `schedule`.

    `model_fn(x_t, timesteps, **conditioning)` may come from any library; it is told the
    schedule's own timesteps, whatever rows a shorter schedule has kept.

    Raises:
        ValueError: if the network predicts eps and the schedule ends in zero signal.
    """
    check_signal(schedule, objective)

    def denoise(x_t, t, **conditioning):
        output = model_fn(x_t, schedule.timesteps[t], **conditioning)
        return predict(schedule, objective, output, x_t, t)

    return denoise


def check_signal(schedule: NoiseSchedule, objective: Objective) -> None:
    """Raises ValueError if eps is to give x_0 at a step without any signal.

    A traced schedule has no values to look at, and passes.
    """
    signal = schedule.now.signal
    if objective.mean_type != "eps" or isinstance(signal, Tracer):
        return
    if not np.asarray(signal)[-1] > 0:  # NumPy: jnp would be traced within a jit
        raise ValueError(
            "a schedule that ends in zero signal needs mean_type 'v', 'x_0' or 'mu', "
            "got 'eps', from which x_0 cannot be told there."
        )


def clip_x_0(denoise_fn: DenoiseFn, low: float = -1.0, high: float = 1.0) -> DenoiseFn:
    """Clips the predicted x_0, as all original samplers do by default."""

    def clipped(x_t, t, **conditioning):
        prediction = denoise_fn(x_t, t, **conditioning)
        return prediction._replace(x_0=jnp.clip(prediction.x_0, low, high))

    return clipped


def threshold_x_0(denoise_fn: DenoiseFn, quantile: float = 0.995) -> DenoiseFn:
    """Dynamic thresholding of x_0 (Saharia et al. 2022, sec. 2.3), image by image.

    Clips to the given quantile of |x_0| where that exceeds 1, and divides by it.
    """

    def thresholded(x_t, t, **conditioning):
        prediction = denoise_fn(x_t, t, **conditioning)
        x_0 = prediction.x_0
        flat = jnp.abs(x_0).reshape(x_0.shape[0], -1)
        bound = jnp.maximum(jnp.quantile(flat, quantile, axis=-1), 1.0)
        bound = bound.reshape((-1,) + (1,) * (x_0.ndim - 1))
        return prediction._replace(x_0=jnp.clip(x_0, -bound, bound) / bound)

    return thresholded


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}.")
