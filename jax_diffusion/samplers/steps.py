"""Every sampler's step, and the table of samplers.

To add a sampler: write its step here, as `jax_diffusion.samplers` describes one, and
give it a row in `SAMPLERS`. Programs, `SamplingOptions` and the protocol test read the
table.
"""

import inspect
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import checks, diffusion
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.samplers.loop import (
    STEP_ARGUMENTS,
    State,
    StepFn,
    advance,
    check_step_arguments,
)
from jax_diffusion.samplers.noise import fold_in, normal
from jax_diffusion.schedules import NoiseSchedule, take


def ddpm_step(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: State,
    t: Int[Array, "b"],
) -> State:
    """One step of ancestral sampling, from t to t - 1 (Ho et al. 2020, algorithm 2).

    The mean is that of q(x_{t-1} | x_t, x_0) at the predicted x_0; the variance is the
    predicted one. The last step, t = 0, adds no noise.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`.

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other.
    """
    t = check_step_arguments(keys, denoise_fn, schedule, state, t)
    prediction = denoise_fn(state.x, t)
    diffusion.check_prediction(prediction, state.x)
    mean = diffusion.guided_mean(schedule, prediction, state.x, t)
    level = take(schedule, t, state.x.ndim).now
    std = jnp.where(t.reshape(level.noise.shape) == 0, 0.0, 1.0)
    std = std * jnp.exp(0.5 * prediction.log_var)
    x = mean + std * normal(fold_in(keys, t), state.x.shape[1:])
    return advance(state, x=x, x_0=prediction.x_0, log_snr=level.log_snr)


def ddim_step(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: State,
    t: Int[Array, "b"],
    *,
    eta: float | Float[Array, ""] = 0.0,
) -> State:
    """One step of DDIM, from t to t - 1 (Song et al. 2021, eq. 12 and 16).

    The predicted variance is not used. eps is computed from the predicted x_0 after any
    clipping, as in improved-diffusion.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`.
        eta: how much noise is added, in [0, 1]: none with 0; with 1 as much as by
            ancestral sampling with the posterior variance (`fixed_small`).

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other, or eta is out of range.

    >>> import jax
    >>> from jax_diffusion import samplers, schedules
    >>> schedule = schedules.make_schedule(schedules.cosine_betas(10))
    >>> def denoise_fn(x_t, t):
    ...     return diffusion.Prediction(0.5 * jnp.ones_like(x_t), jnp.zeros(()))
    >>> keys = samplers.image_keys(jax.random.key(0), jnp.arange(2))
    >>> state = samplers.start(samplers.normal(keys, (1,)))
    >>> t = jnp.zeros(2, jnp.int32)
    >>> ddim_step(keys, denoise_fn, schedule, state, t).x.tolist()
    [[0.5], [0.5]]
    """
    t = check_step_arguments(keys, denoise_fn, schedule, state, t)
    checks.number("eta", eta, at_least=0, at_most=1)
    c = take(schedule, t, state.x.ndim)
    x_0 = _x_0(denoise_fn, schedule, state.x, t)
    eps = (state.x - c.now.signal * x_0) / c.now.noise
    ratio = c.prev.noise / c.now.noise
    sigma = eta * ratio * jnp.sqrt(c.betas)  # eq. 16
    # 1 - (sigma / prev.noise)^2, as a sum of positive terms: the difference would
    # cancel. The bound keeps the gradient by eta finite at t = 0, where all is zero.
    kept = (1 - eta**2) + eta**2 * c.posterior_x_t * c.now.signal / c.prev.signal
    direction = c.prev.noise * jnp.sqrt(jnp.maximum(kept, 1e-20))
    drawn = normal(fold_in(keys, t), state.x.shape[1:])
    x = c.prev.signal * x_0 + direction * eps + sigma * drawn
    return advance(state, x=x, x_0=x_0, log_snr=c.now.log_snr)


def euler_ancestral_step(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: State,
    t: Int[Array, "b"],
) -> State:
    """One step of Euler ancestral sampling, from t to t - 1 (k-diffusion).

    A draw from q(x_{t-1} | x_t, x_0) at the predicted x_0, on any process: DDIM with
    eta = 1. The predicted variance is not used.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`.

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other.
    """
    t = check_step_arguments(keys, denoise_fn, schedule, state, t)
    c = take(schedule, t, state.x.ndim)
    x_0 = _x_0(denoise_fn, schedule, state.x, t)
    x = _posterior_draw(fold_in(keys, t), c, state.x, x_0)
    return advance(state, x=x, x_0=x_0, log_snr=c.now.log_snr)


def ddim_inversion_step(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: State,
    t: Int[Array, "b"],
) -> State:
    """One step of DDIM inversion, from t up to t + 1, with eta = 0.

    No row of `SAMPLERS`, as it goes from data to noise; `invert` runs it.

    Args:
        keys: not used.
        denoise_fn: not clipped: what clipping removes cannot be recovered.
        schedule, state, t: see `jax_diffusion.samplers`.

    Returns:
        The state at the level of t + 1.

    Raises:
        ValueError: unless these fit each other.
    """
    t = check_step_arguments(keys, denoise_fn, schedule, state, t)
    del keys
    c = take(schedule, t, state.x.ndim)
    x_0 = _x_0(denoise_fn, schedule, state.x, t)
    x = _carry(state.x, x_0, c.now, c.next)
    return advance(state, x=x, x_0=x_0, log_snr=c.now.log_snr)


def dpmpp_2m_step(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: State,
    t: Int[Array, "b"],
) -> State:
    """One step of DPM-Solver++(2M), from t to t - 1 (Lu et al. 2022, algorithm 2).

    This is a step of DDIM with eta = 0 for which x_0 is extrapolated: a line in log-SNR
    through the last prediction and this one is read off at the middle of the step.
    Deterministic, of second order. Two steps are of first order, as DDIM's: the first,
    which has no last prediction, and the last, which is infinitely long in log-SNR.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`.

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other.
    """
    t = check_step_arguments(keys, denoise_fn, schedule, state, t)
    del keys
    c = take(schedule, t, state.x.ndim)
    x_0 = _x_0(denoise_fn, schedule, state.x, t)
    x = _carry(state.x, _ahead(state, c, x_0), c.now, c.prev)
    return advance(state, x=x, x_0=x_0, log_snr=c.now.log_snr)


def dpmpp_2m_sde_step(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: State,
    t: Int[Array, "b"],
) -> State:
    """One step of SDE-DPM-Solver++(2M), from t to t - 1 (Lu et al. 2022, app. D).

    A draw from q(x_{t-1} | x_t, x_0), at the x_0 that `dpmpp_2m_step` extrapolates.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`.

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other.
    """
    t = check_step_arguments(keys, denoise_fn, schedule, state, t)
    c = take(schedule, t, state.x.ndim)
    x_0 = _x_0(denoise_fn, schedule, state.x, t)
    x = _posterior_draw(fold_in(keys, t), c, state.x, _ahead(state, c, x_0))
    return advance(state, x=x, x_0=x_0, log_snr=c.now.log_snr)


def heun_step(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: State,
    t: Int[Array, "b"],
) -> State:
    """One step of Heun's method, from t to t - 1, with two calls of the denoiser.

    A step of DDIM with eta = 0 is made, and then made again with the mean of the x_0
    predicted at its two ends: DPM-Solver++(2S) with r = 1 (Lu et al. 2022).
    Deterministic, of second order. The last step, infinitely long in log-SNR, is one of
    DDIM. Averaging eps instead of x_0 (Karras et al. 2022) is inaccurate on a long step
    that starts with hardly any signal.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`.

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other.
    """
    t = check_step_arguments(keys, denoise_fn, schedule, state, t)
    del keys
    c = take(schedule, t, state.x.ndim)
    x_0 = _x_0(denoise_fn, schedule, state.x, t)
    x = _carry(state.x, x_0, c.now, c.prev).astype(jnp.result_type(state.x))
    end_x_0 = _x_0(denoise_fn, schedule, x, jnp.maximum(t - 1, 0))
    mean = jnp.where(c.prev.noise > 0, (x_0 + end_x_0) / 2, x_0)
    x = _carry(state.x, mean, c.now, c.prev)
    return advance(state, x=x, x_0=x_0, log_snr=c.now.log_snr)


def _x_0(denoise_fn, schedule, x, t):
    """The predicted x_0 with guidance, for steps that follow the score."""
    prediction = denoise_fn(x, t)
    diffusion.check_prediction(prediction, x)
    return diffusion.guided_x_0(schedule, prediction, t)


def _ahead(state, c, x_0):
    """x_0 in the middle of a step: on a line in log-SNR through the last two of them.

    The last one itself, where the step or the one before is infinitely long.
    """
    step = c.prev.log_snr - c.now.log_snr
    last_step = c.now.log_snr - state.log_snr  # infinite before there is a last x_0
    finite = jnp.isfinite(step) & jnp.isfinite(last_step) & (last_step > 0)
    weight = jnp.where(finite, step, 0.0) / jnp.where(finite, 2 * last_step, 1.0)
    return x_0 + weight * (x_0 - state.x_0)


def _posterior_draw(keys, c, x, x_0):
    """Draws from q(x_{t-1} | x_t, x_0), with the keys of the row t of `c`."""
    mean = c.posterior_x_0 * x_0 + c.posterior_x_t * x
    std = jnp.where(c.prev.noise > 0, jnp.exp(0.5 * c.posterior_log_var), 0.0)
    return mean + std * normal(keys, x.shape[1:])


def _carry(x, x_0, now, to):
    """Moves x from level `now` to level `to`, keeping the eps that x_0 implies."""
    return to.signal * x_0 + to.noise * (x - now.signal * x_0) / now.noise


class Sampler(NamedTuple):
    """A sampler, and what programs have to know of it: a row of `SAMPLERS`.

    Attributes:
        step: the step function.
        takes_eta: whether the step takes `eta`, the DDIM noise level, by keyword.
        steps: how many steps to take unless told otherwise; None, all of them.
        spacing: which steps to take unless told otherwise, a key of `spacing.SPACINGS`.
        adds_noise: whether the step draws noise even when eta is 0.
        uses_mean: whether the step samples from p(x_{t-1} | x_t), whose mean guidance
            by a classifier has already shifted. Then x_0 is not shifted as well.
    """

    step: StepFn
    takes_eta: bool = False
    steps: int | None = None
    spacing: str = "sections"
    adds_noise: bool = False
    uses_mean: bool = False


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm_step, adds_noise=True, uses_mean=True),
    "ddim": Sampler(ddim_step, takes_eta=True, steps=50),
    "dpmpp_2m": Sampler(dpmpp_2m_step, steps=20, spacing="trailing"),
    "heun": Sampler(heun_step, steps=10, spacing="trailing"),
    "euler_ancestral": Sampler(euler_ancestral_step, steps=50, adds_noise=True),
    "dpmpp_2m_sde": Sampler(
        dpmpp_2m_sde_step, steps=25, spacing="trailing", adds_noise=True
    ),
}


def as_sampler(sampler: Sampler | StepFn) -> Sampler:
    """Makes a row of `SAMPLERS` from a bare step function, such as a user's own.

    Args:
        sampler: a step function, or a row, which is returned as it is.

    Returns:
        A row with all steps by default. It takes eta if the function has a parameter of
        that name which is not bound yet, and counts as noisy, since that is unknown.

    Raises:
        ValueError: if the function does not take the arguments of a step.

    >>> as_sampler(ddim_step).takes_eta
    True
    """
    if isinstance(sampler, Sampler):
        return sampler
    checks.function("sampler", sampler, STEP_ARGUMENTS)
    bound = getattr(sampler, "keywords", {})  # of functools.partial
    try:
        signature = inspect.signature(sampler)
        signature.bind(*("keys", "denoise_fn", "schedule", "state", "t"))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"sampler must be a function of {STEP_ARGUMENTS}, got "
            f"{getattr(sampler, '__name__', checks.shown(sampler))}: {error}."
        ) from error
    takes_eta = "eta" in signature.parameters and "eta" not in bound
    return Sampler(sampler, takes_eta=takes_eta, adds_noise=True)
