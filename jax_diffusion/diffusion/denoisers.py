"""A network read as a distribution: `denoiser`, and what clips its predictions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_diffusion import checks
from jax_diffusion.checks import modes, placement, signatures
from jax_diffusion.diffusion.objective import Objective, check_objective, check_signal
from jax_diffusion.diffusion.preconditioning import precondition
from jax_diffusion.diffusion.prediction import (
    AnyDenoiseFn,
    ConditionalDenoiseFn,
    Prediction,
    check_prediction,
)
from jax_diffusion.diffusion.process import (
    q_posterior,
    x_0_from_eps,
    x_0_from_flow,
    x_0_from_mu,
    x_0_from_v,
)
from jax_diffusion.diffusion.same_schedule import check_raw, with_schedule
from jax_diffusion.schedules import NoiseSchedule, check_batch, take


def guided_x_0(
    schedule: NoiseSchedule, prediction: Prediction, t: Int[Array, "b"]
) -> Float[Array, "b *d"]:
    """The predicted x_0 after guidance, for samplers that follow the score.

    Guidance replaces eps by eps - noise grad (Dhariwal & Nichol 2021, algorithm 2),
    which is x_0 + noise^2 / signal grad. The result is not clipped again. Where the
    signal is zero, x_t holds no information on x_0, and x_0 is returned as it is.

    Args:
        schedule: where signal and noise of row t stand.
        prediction: with the gradient of guidance, or None, in `grad`.
        t: int32 [b].

    Returns:
        x_0 [b, ...].

    Raises:
        ValueError: unless schedule, prediction and t fit each other.
    """
    check_prediction(prediction)
    check_batch(schedule, t, x_0=prediction.x_0)
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
    """The mean of p(x_{t-1} | x_t): the posterior's at the predicted x_0, and guidance.

    Guidance shifts it by the variance times the gradient (Dhariwal & Nichol 2021,
    algorithm 1).

    Args:
        schedule: where the coefficients of row t stand.
        prediction: what the denoiser predicts from x_t.
        x_t: noisy data [b, ...].
        t: int32 [b].

    Returns:
        The mean [b, ...].

    Raises:
        ValueError: unless schedule, prediction, x_t and t fit each other.
    """
    check_batch(schedule, t, x_t=x_t)
    check_prediction(prediction, x_t)
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
    """What the network should output: eps, x_0, v, ..., by `objective.mean_type`.

    eps, x_0 and mu are those of Ho et al. 2020, v that of Salimans & Ho 2022, and flow
    that of Liu et al. 2023.

    Args:
        schedule: where the coefficients of row t stand.
        objective: says what the network predicts.
        x_0, x_t: clean and noisy data [b, ...].
        t: int32 [b].
        eps: the noise in x_t, [b, ...].

    Returns:
        [b, ...], for the mean's channels only.

    Raises:
        ValueError: unless schedule, data and t fit each other.
    """
    check_objective(objective)
    check_batch(schedule, t, x_0=x_0, x_t=x_t, eps=eps)
    level = take(schedule, t, x_t.ndim).now
    match objective.mean_type:
        case "eps":
            return eps
        case "x_0":
            return x_0
        case "v":
            return level.signal * eps - level.noise * x_0
        case "flow":
            return eps - x_0
        case "mu":
            return q_posterior(schedule, x_0, x_t, t)[0]


def split_output(
    objective: Objective, output: Float[Array, "b *d"], num_channels: int
) -> tuple[Float[Array, "b *_"], Any]:
    """Splits a network's output into the channels of the mean and of the variance.

    The mean's come first, as in improved-diffusion.

    Args:
        objective: says whether the variance is learned.
        output: of the network, [b, ..., num_channels], or twice as many channels if the
            variance is learned.
        num_channels: of the data.

    Returns:
        Both parts, [b, ..., num_channels]; the second is None if not learned.

    Raises:
        ValueError: if the output is no float array, or its last axis has another size.

    >>> mean, var = split_output(Objective(), jnp.zeros((2, 8, 8, 3)), 3)
    >>> mean.shape, var
    ((2, 8, 8, 3), None)
    """
    check_objective(objective)
    checks.array("model_fn's output", output, "float", ("b", ...))
    checks.integer("num_channels", num_channels, at_least=1)
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

    At t = 0 both fixed variances are the posterior's at t = 1, as in the official code.
    The large one is that for data N(0, 1), which keep their variance at every level.
    A learned range is not clamped: it may lie outside the two variances (Nichol &
    Dhariwal 2021, eq. 15).

    Args:
        schedule: where the coefficients of row t stand.
        objective: says what the network outputs.
        output: of the network, [b, ..., c] or [b, ..., 2 c], see `split_output`.
        x_t: noisy data [b, ..., c].
        t: int32 [b].

    Returns:
        Prediction without guidance.

    Raises:
        ValueError: if output has another shape, or schedule, x_t and t do not fit each
            other.
    """
    check_batch(schedule, t, x_t=x_t)
    check_output(output, x_t)
    value, var_value = split_output(objective, output, x_t.shape[-1])
    match objective.mean_type:
        case "eps":
            x_0 = x_0_from_eps(schedule, x_t, t, value)
        case "x_0":
            x_0 = value
        case "v":
            x_0 = x_0_from_v(schedule, x_t, t, value)
        case "flow":
            x_0 = x_0_from_flow(schedule, x_t, t, value)
        case "mu":
            x_0 = x_0_from_mu(schedule, x_t, t, value)

    c = take(schedule, t, x_t.ndim)
    low, high = c.posterior_log_var, jnp.log(c.betas)
    if c.prev.signal is not None:  # as in levels of `schedule_at`, which have no betas
        high = high + _log_total(c.prev) - _log_total(c.now)
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


def _log_total(level):
    """log(signal^2 + noise^2); 0 where that is 1, but for the table's rounding."""
    total = level.signal**2 + level.noise**2
    return jnp.log(jnp.where(jnp.abs(total - 1) < 1e-6, 1.0, total))


def denoiser(
    model_fn: Callable[..., Array], schedule: NoiseSchedule, objective: Objective
) -> ConditionalDenoiseFn:
    """Reads a raw network as a `DenoiseFn` on the rows of `schedule`.

    It does what `p_mean_variance` of improved-diffusion does before it clips x_0.

    Args:
        model_fn: model_fn(x_t, timesteps, **conditioning) -> output, from any library,
            in evaluation mode. timesteps, float32 [b], are `schedule.timesteps` of rows
            t: numbers of the full diffusion, whichever rows a shorter schedule has
            kept. Dropout is noticed in networks of Flax NNX, but not one whose key your
            function closes over.
        schedule: the steps to take.
        objective: says what the network outputs.

    Returns:
        denoise_fn(x_t, t, **conditioning) -> Prediction. Arrays of conditioning have a
        leading axis [b]; numbers are for all images. Beside another schedule it is
        refused where both are known, see `schedule_of`; within `jax.jit`, make it
        there, of the same argument.

    Raises:
        ValueError: if the network predicts eps and the schedule ends in zero signal,
            or v and signal^2 + noise^2 is not 1; if model_fn is a denoiser; in a call,
            if x_t, t, conditioning and the network's output do not fit each other.

    >>> from jax_diffusion.schedules import cosine_betas, make_schedule
    >>> objective = Objective(mean_type="x_0")
    >>> denoise_fn = denoiser(lambda x, t: x, make_schedule(cosine_betas(9)), objective)
    >>> denoise_fn(jnp.ones((2, 3)), jnp.array([0, 8])).x_0.shape
    (2, 3)
    """
    check_raw(model_fn)
    check_signal(schedule, objective)
    output_fn: Any = functools.partial(modes.evaluate, "model_fn", model_fn)
    if objective.precondition:
        output_fn = precondition(output_fn, schedule, objective.sigma_data)

    def denoise(x_t, t, *unnamed, **conditioning):
        if unnamed:
            rule = "conditioning must be given by name, such as label="
            raise ValueError(f"{rule}, got {checks.shown(unnamed[0])}.")
        check_batch(schedule, t, x_t=x_t)
        check_conditioning(conditioning, t)
        t = placement.beside(t, x_t)
        timesteps = placement.rows(schedule.timesteps, t)
        signatures.takes("model_fn", model_fn, "x_t", "timesteps", **conditioning)
        output = output_fn(x_t, timesteps, **conditioning)
        return predict(schedule, objective, output, x_t, t)

    return with_schedule(denoise, schedule)


def check_conditioning(conditioning: dict[str, Any], t: Array) -> None:
    """Raises ValueError unless all arrays in `conditioning` have the axis [b] of t.

    Numbers of no axis are for all images, and what `jax.vmap` shows is of one image.
    """
    for name, tree in conditioning.items():
        for leaf in jax.tree.leaves(tree):
            if np.ndim(t) and np.ndim(leaf):
                checks.array(name, leaf, "any", (*t.shape, ...))


def check_output(output: Any, x_t: Array) -> None:
    """Raises ValueError unless a network's `output` fits its input `x_t`.

    It must be a float array [b, ..., channels] where x_t is [b, ..., c].
    """
    shape = (*x_t.shape[:-1], "channels") if x_t.ndim else ()
    checks.array("model_fn's output", output, "float", shape)


Bound = float | Array | np.ndarray


def clip_x_0(
    denoise_fn: AnyDenoiseFn, low: Bound = -1.0, high: Bound = 1.0
) -> AnyDenoiseFn:
    """Wraps a denoiser: clips the predicted x_0, as original samplers do by default.

    That is `clip_denoised` of Ho et al. 2020 and improved-diffusion.

    Args:
        denoise_fn: the denoiser to wrap.
        low, high: bounds of x_0, those of the data; low < high; numbers, or arrays that
            broadcast against [b, ..., c], such as [c].

    Returns:
        A denoiser.

    Raises:
        ValueError: if low is not below high; in a call, if denoise_fn is no denoiser.

    >>> def denoise_fn(x_t, t):
    ...     return Prediction(2 * x_t, jnp.zeros(()))
    >>> clip_x_0(denoise_fn)(jnp.array([[0.3, 0.9]]), jnp.array([5])).x_0
    Array([[0.6, 1. ]], dtype=float32)
    """
    checks.function("denoise_fn", denoise_fn, "(x_t, t)")
    for name, bound in (("low", low), ("high", high)):
        if np.ndim(bound) == 0:  # it may be one for each channel
            checks.number(name, bound, infinite=True)
        else:
            checks.array(name, bound, "float")
    if checks.known(low) and checks.known(high) and not np.all(np.less(low, high)):
        raise ValueError(f"low must be below high = {high}, got {low}.")

    def clipped(x_t, t, **conditioning):
        prediction = denoise_fn(x_t, t, **conditioning)
        check_prediction(prediction, x_t)
        x_0 = prediction.x_0
        of_numpy = np.ndarray | np.generic
        bounds = (  # a float64 of NumPy would make data float64
            np.asarray(bound, x_0.dtype) if isinstance(bound, of_numpy) else bound
            for bound in (low, high)
        )
        return prediction._replace(x_0=jnp.clip(x_0, *bounds))

    return with_schedule(clipped, denoise_fn)


def threshold_x_0(denoise_fn: AnyDenoiseFn, quantile: float = 0.995) -> AnyDenoiseFn:
    """Wraps a denoiser: dynamic thresholding of x_0 (Saharia et al. 2022, sec. 2.3).

    Where the quantile of an image's |x_0| exceeds 1, clips x_0 to plus and minus that
    quantile and divides by it.

    Args:
        denoise_fn: the denoiser to wrap.
        quantile: in [0, 1].

    Returns:
        A denoiser.

    Raises:
        ValueError: if quantile is out of range; in a call, if denoise_fn is no
            denoiser.
    """
    checks.function("denoise_fn", denoise_fn, "(x_t, t)")
    checks.number("quantile", quantile, at_least=0, at_most=1)

    def thresholded(x_t, t, **conditioning):
        prediction = denoise_fn(x_t, t, **conditioning)
        check_prediction(prediction, x_t)
        x_0 = prediction.x_0
        flat = placement.reshape(jnp.abs(x_0), (x_0.shape[0], -1))
        bound = jnp.maximum(jnp.quantile(flat, quantile, axis=-1), 1.0)
        bound = bound.reshape((-1,) + (1,) * (x_0.ndim - 1))
        return prediction._replace(x_0=jnp.clip(x_0, -bound, bound) / bound)

    return with_schedule(thresholded, denoise_fn)
