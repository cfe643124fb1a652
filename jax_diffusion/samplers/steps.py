"""Every sampler's step, and the table of samplers.

To add a sampler: write its step here, as `jax_diffusion.samplers` describes one, from
`_begin` to `advance`, and give it a row in `SAMPLERS`. Programs, `SamplingOptions` and
the protocol test read the table.
"""

import inspect
import itertools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import checks, diffusion
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.samplers.loop import StepFn, check_step_arguments, check_step_fn
from jax_diffusion.samplers.noise import fold_in, normal
from jax_diffusion.samplers.state import (
    Past,
    State,
    advance,
    check_fields,
    marked,
    traits_of,
)
from jax_diffusion.schedules import NoiseSchedule, take

Keys = Key[Array, "b"]
Rows = Int[Array, "b"]


def ddpm_step(
    keys: Keys, denoise_fn: DenoiseFn, schedule: NoiseSchedule, state: State, t: Rows
) -> State:
    """One step of ancestral sampling, from t to t - 1 (Ho et al. 2020, algorithm 2).

    The mean is that of q(x_{t-1} | x_t, x_0) at the predicted x_0; the variance is the
    predicted one. The last step, t = 0, adds no noise.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`: keys [b],
            x of the state [b, ...], and t int32 [b].

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other.
    """
    t = check_step_arguments(keys, denoise_fn, schedule, state, t)
    prediction = denoise_fn(state.x, t)
    mean = diffusion.guided_mean(schedule, prediction, state.x, t)
    level = take(schedule, t, state.x.ndim).now
    std = jnp.where(t.reshape(level.noise.shape) == 0, 0.0, 1.0)
    std = std * jnp.exp(0.5 * prediction.log_var)
    x = mean + std * normal(fold_in(keys, t), state.x.shape[1:])
    return advance(state, x=x, x_0=prediction.x_0, log_snr=level.log_snr)


def ddim_step(
    keys: Keys,
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: State,
    t: Rows,
    *,
    eta: float | Float[Array, ""] = 0.0,
) -> State:
    """One step of DDIM, from t to t - 1 (Song et al. 2021, eq. 12 and 16).

    The predicted variance is not used. eps is computed from the predicted x_0 after any
    clipping, as in improved-diffusion.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`: keys [b],
            x of the state [b, ...], and t int32 [b].
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
    checks.number("eta", eta, at_least=0, at_most=1)
    t, c, x_0 = _begin(keys, denoise_fn, schedule, state, t)
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
    keys: Keys, denoise_fn: DenoiseFn, schedule: NoiseSchedule, state: State, t: Rows
) -> State:
    """One step of Euler ancestral sampling, from t to t - 1 (k-diffusion).

    A draw from q(x_{t-1} | x_t, x_0) at the predicted x_0, on any process: DDIM with
    eta = 1. The predicted variance is not used.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`: keys [b],
            x of the state [b, ...], and t int32 [b].

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other.
    """
    t, c, x_0 = _begin(keys, denoise_fn, schedule, state, t)
    x = _posterior_draw(fold_in(keys, t), c, state.x, x_0)
    return advance(state, x=x, x_0=x_0, log_snr=c.now.log_snr)


@marked(way=1)
def ddim_inversion_step(
    keys: Keys, denoise_fn: DenoiseFn, schedule: NoiseSchedule, state: State, t: Rows
) -> State:
    """One step of DDIM inversion, from t up to t + 1, with eta = 0.

    The ODE of Song et al. 2021, eq. 14, upwards (`ddim_reverse_sample` of
    improved-diffusion). No row of `SAMPLERS`, as it goes from data to noise; `invert`
    runs it. What a clipped denoise_fn removes cannot be recovered.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`: keys [b],
            x of the state [b, ...], and t int32 [b].

    Returns:
        The state at the level of t + 1.

    Raises:
        ValueError: unless these fit each other.
    """
    t, c, x_0 = _begin(keys, denoise_fn, schedule, state, t)
    x = _carry(state.x, x_0, c.now, c.next)
    return advance(state, x=x, x_0=x_0, log_snr=c.now.log_snr)


def dpmpp_2m_step(
    keys: Keys, denoise_fn: DenoiseFn, schedule: NoiseSchedule, state: State, t: Rows
) -> State:
    """One step of DPM-Solver++(2M), from t to t - 1 (Lu et al. 2022, algorithm 2).

    This is a step of DDIM with eta = 0 for which x_0 is extrapolated: a line in log-SNR
    through the last prediction and this one is read off at the middle of the step.
    Deterministic, of second order. Two steps are of first order, as DDIM's: the first,
    which has no last prediction, and the last, which is infinitely long in log-SNR.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`: keys [b],
            x of the state [b, ...], and t int32 [b].

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other.
    """
    t, c, x_0 = _begin(keys, denoise_fn, schedule, state, t)
    x = _carry(state.x, _ahead(state, c, x_0), c.now, c.prev)
    return advance(state, x=x, x_0=x_0, log_snr=c.now.log_snr)


def dpmpp_2m_sde_step(
    keys: Keys, denoise_fn: DenoiseFn, schedule: NoiseSchedule, state: State, t: Rows
) -> State:
    """One step of SDE-DPM-Solver++(2M), from t to t - 1 (Lu et al. 2022, app. D).

    A draw from q(x_{t-1} | x_t, x_0), at the x_0 that `dpmpp_2m_step` extrapolates.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`: keys [b],
            x of the state [b, ...], and t int32 [b].

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other.
    """
    t, c, x_0 = _begin(keys, denoise_fn, schedule, state, t)
    x = _posterior_draw(fold_in(keys, t), c, state.x, _ahead(state, c, x_0))
    return advance(state, x=x, x_0=x_0, log_snr=c.now.log_snr)


def heun_step(
    keys: Keys, denoise_fn: DenoiseFn, schedule: NoiseSchedule, state: State, t: Rows
) -> State:
    """One step of Heun's method, from t to t - 1, with two calls of the denoiser.

    A step of DDIM with eta = 0 is made, and then made again with the mean of the x_0
    predicted at its two ends: DPM-Solver++(2S) with r = 1 (Lu et al. 2022).
    Deterministic, of second order. The last step, infinitely long in log-SNR, is one of
    DDIM. Averaging eps instead of x_0 (Karras et al. 2022) is inaccurate on a long step
    that starts with hardly any signal.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`: keys [b],
            x of the state [b, ...], and t int32 [b].

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other.
    """
    t, c, x_0 = _begin(keys, denoise_fn, schedule, state, t)
    x = _carry(state.x, x_0, c.now, c.prev).astype(jnp.result_type(state.x))
    end_x_0 = _x_0(denoise_fn, schedule, x, jnp.maximum(t - 1, 0))
    mean = jnp.where(c.prev.noise > 0, (x_0 + end_x_0) / 2, x_0)
    x = _carry(state.x, mean, c.now, c.prev)
    return advance(state, x=x, x_0=x_0, log_snr=c.now.log_snr)


def dpmpp_2s_step(
    keys: Keys, denoise_fn: DenoiseFn, schedule: NoiseSchedule, state: State, t: Rows
) -> State:
    """One call of DPM-Solver++(2S): half a step (Lu et al. 2022, algorithm 1).

    Rows are taken in pairs, so that a network is asked at rows only: from an even row t
    to the odd one below it, and from there, again from the start, to the level of
    t - 2. The r of the paper is where the odd row lies between the two in log-SNR.
    Deterministic, of second order. Single steps, of first order, are the last one,
    which is infinitely long in log-SNR, both of a pair that starts without any signal,
    and that of an odd row that a chain starts from.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`: keys [b],
            x of the state [b, ...], and t int32 [b].

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other.
    """
    t, c, x_0 = _begin(keys, denoise_fn, schedule, state, t)
    first, length, change = _second_stage(state, c, t, x_0)
    x = _carry(state.x, first, c.now, c.prev)
    x = x - c.prev.signal * jnp.expm1(-length / 2) * change
    return advance(state, x=x, x_0=x_0, log_snr=c.now.log_snr)


def dpmpp_sde_step(
    keys: Keys, denoise_fn: DenoiseFn, schedule: NoiseSchedule, state: State, t: Rows
) -> State:
    """One call of SDE-DPM-Solver++(2S): half a step ("DPM++ SDE" of k-diffusion).

    Rows are taken in pairs, or alone, as by `dpmpp_2s_step`. Noise is that of one path:
    what is drawn at the even row is a part of what leads from the start to the level of
    t - 2.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`: keys [b],
            x of the state [b, ...], and t int32 [b].

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other.
    """
    t, c, x_0 = _begin(keys, denoise_fn, schedule, state, t)
    first, length, change = _second_stage(state, c, t, x_0)
    x = _posterior_draw(fold_in(keys, t), c, state.x, first)
    x = x - c.prev.signal * jnp.expm1(-length) * change  # noise: forgets twice as fast
    return advance(state, x=x, x_0=x_0, log_snr=c.now.log_snr)


@marked(num_earlier=1)
def dpmpp_3m_sde_step(
    keys: Keys, denoise_fn: DenoiseFn, schedule: NoiseSchedule, state: State, t: Rows
) -> State:
    """One step of SDE-DPM-Solver++(3M), from t to t - 1 (k-diffusion).

    A draw from q(x_{t-1} | x_t, x_0), at an x_0 that a parabola in log-SNR through the
    last three predictions gives; of its second derivative it takes half of what an
    integral would, as k-diffusion does. The first two steps use the one or two
    predictions that exist. Where steps are long in log-SNR, as with fewer than about
    20, it spreads samples too far: `dpmpp_2m_sde_step` does not.

    Args:
        keys, denoise_fn, schedule, t: see `jax_diffusion.samplers`: keys [b], t int32
            [b].
        state: a `MultistepState`, such as `start` makes for this step, x [b, ...].

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other, or the state holds no earlier
            predictions.
    """
    earlier = _earlier(state)
    t, c, x_0 = _begin(keys, denoise_fn, schedule, state, t)
    step, taus, usable = _places(c.now.log_snr, c.prev.log_snr, earlier[:2])
    first, second, _ = _moments(2 * step)  # noise makes x forget twice as fast
    values = [x_0, *(past.x_0 for past in earlier[:2])]
    moments = 1.0, first, second / 2
    mean = _mean_of_polynomial(moments, (0.0, *taus), values, sum(usable))
    x = _posterior_draw(fold_in(keys, t), c, state.x, mean)
    now = Past(x_0, c.now.log_snr)
    return advance(state, x=x, **now._asdict(), earlier=earlier[:-1])


@marked(num_earlier=2)
def unipc_step(
    keys: Keys, denoise_fn: DenoiseFn, schedule: NoiseSchedule, state: State, t: Rows
) -> State:
    """One step of UniPC, from t to t - 1 (Zhao et al. 2023; B(h) = bh2).

    What is predicted at t first corrects the step that led there, UniC, and then leads
    on, UniP: both are exact for an x_0 that is the polynomial in log-SNR through the
    last predictions. Deterministic; of order 3 with the state that `start` makes, and
    of order 2 if that holds one earlier prediction instead of two. First steps are of
    the order that there are predictions for, the last ones of order 2 and 1.

    Args:
        keys, denoise_fn, schedule, t: see `jax_diffusion.samplers`: keys [b], t int32
            [b].
        state: a `MultistepState`, such as `start` makes for this step, x [b, ...].

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other, or the state holds no earlier
            predictions.
    """
    earlier = _earlier(state)
    t, c, x_0 = _begin(keys, denoise_fn, schedule, state, t)
    now, order, row = Past(x_0, c.now.log_snr), len(earlier), t.reshape(c.betas.shape)

    last = earlier[0]
    step, taus, usable = _places(last.log_snr, now.log_snr, earlier[1:])
    has_last = jnp.isfinite(last.log_snr) & (last.log_snr < now.log_snr)
    terms = jnp.minimum(sum(usable, 0), row + 1)  # of the predictor of that step
    means = []
    for places, values in ((taus, earlier[1:]), ((1.0, *taus), (now, *earlier[1:]))):
        values = [past.x_0 for past in (last, *values)]
        used = terms + len(values) - order
        means.append(_unipc_mean(step, (0.0, *places), values, used))
    x = state.x - c.now.signal * jnp.expm1(-step) * (means[1] - means[0])
    x = jnp.where(has_last, x, state.x)

    step, taus, usable = _places(now.log_snr, c.prev.log_snr, earlier[: order - 1])
    values = [past.x_0 for past in (now, *earlier[: order - 1])]
    terms = jnp.minimum(sum(usable, 0), row)
    mean = _unipc_mean(step, (0.0, *taus), values, terms)
    x = _carry(x, mean, c.now, c.prev)
    return advance(state, x=x, **now._asdict(), earlier=earlier[:-1])


def edm_heun_step(
    keys: Keys,
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: State,
    t: Rows,
    *,
    s_noise: float | Float[Array, ""] = 1.0,
) -> State:
    """One call of EDM's Heun method with churn (Karras et al. 2022, algorithm 2).

    Rows are taken in pairs, or alone, as by `dpmpp_2s_step`: of `schedules.churned`,
    from a raised level to the next one, and there, once the step has been corrected,
    noise is added up to the raised level below. Elsewhere no level is raised, and this
    is the method of appendix D.2 whose alpha is where the odd row lies between the two
    in noise / signal: deterministic, of second order. On a long step that starts with
    hardly any signal it is inaccurate.

    Args:
        keys, denoise_fn, schedule, state, t: see `jax_diffusion.samplers`: keys [b],
            x of the state [b, ...], and t int32 [b].
        s_noise: the standard deviation of the noise that is added, >= 0.

    Returns:
        The state at the level of t - 1.

    Raises:
        ValueError: unless these fit each other, or s_noise is out of range.
    """
    checks.number("s_noise", s_noise, at_least=0)
    t, c, x_0 = _begin(keys, denoise_fn, schedule, state, t, may_rise=True)
    corrects, first, part = _pair(state, c, t, x_0)
    # sigma where the pair starts and where it ends, in units of that of this row.
    start = jnp.exp(part / 2)
    end = jnp.exp(jnp.minimum(c.now.log_snr - c.prev.log_snr, 0.0) / 2)
    above = jnp.where(corrects, start - 1, 1.0)  # so that no gradient is NaN
    weight = jnp.where(corrects, (start - end) ** 2 / (2 * above), 0.0)
    rises = c.prev.log_snr <= c.now.log_snr  # after the step, by noise
    reached = c.prev.signal * c.now.noise / jnp.where(rises, c.now.signal, 1.0)
    to = c.prev._replace(noise=jnp.where(rises, reached, c.prev.noise))
    x = _carry(state.x, first, c.now, to) + to.signal * weight * (x_0 - first)
    added = jnp.where(rises, jnp.sqrt(c.betas), 0.0)
    x = x + s_noise * added * normal(fold_in(keys, t), state.x.shape[1:])
    return advance(state, x=x, x_0=x_0, log_snr=c.now.log_snr)


def _begin(keys, denoise_fn, schedule, state, t, **options):
    """t [b], its row of the table, and the x_0 predicted there, if all fit together."""
    t = check_step_arguments(keys, denoise_fn, schedule, state, t, **options)
    c = take(schedule, t, state.x.ndim)
    return t, c, _x_0(denoise_fn, schedule, state.x, t)


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


def _pair(state, c, t, x_0):
    """Whether a row is the second of a pair; x_0 of the first; log-SNR between them.

    Elsewhere the latter two are the row's own x_0, and 1.
    """
    odd = (t % 2 == 1).reshape(c.now.log_snr.shape)
    last, now = state.log_snr, c.now.log_snr
    second = odd & jnp.isfinite(last) & (last < now)
    return second, jnp.where(second, state.x_0, x_0), jnp.where(second, now - last, 1.0)


def _second_stage(state, c, t, x_0):
    """The x_0 of a pair's start, the pair's length in log-SNR, and what it adds to x_0.

    In a pair, x at the odd row tells x at the start, and at the end x for the x_0 of
    the start: what is left to add is that the mean of x_0 over the pair is another.
    """
    second, first, part = _pair(state, c, t, x_0)
    whole = jnp.where(second, c.prev.log_snr - state.log_snr, 1.0)
    return first, whole, (x_0 - first) * whole / (2 * part)  # 1 / (2 r)


def _earlier(state):
    """The last predictions of a state, two at least, the newest first."""
    check_fields(state)
    earlier = getattr(state, "earlier", ())
    if not earlier:
        rule = "state must hold earlier predictions, as samplers.start(x_T, step_fn)"
        raise ValueError(f"{rule} does, got {checks.shown(state)}.")
    return (Past(state.x_0, state.log_snr), *earlier)


def _places(start, end, earlier):
    """Half the log-SNR of a step; where earlier predictions lie; which can be used.

    Places count from 0 at the start of the step to 1 at its end. A prediction is used
    where it and all newer ones are of levels that follow each other, and the step is
    not infinitely long; the others get some other places.
    """
    length = end - start
    usable = jnp.isfinite(length) & (length > 0)
    length = jnp.where(usable, length, 1.0)
    taus, uses, newer, tau = [], [], start, 0.0
    for past in earlier:
        usable &= jnp.isfinite(past.log_snr) & (past.log_snr < newer)
        place = jnp.where(usable, past.log_snr - start, 0.0) / length
        tau = jnp.where(usable, place, tau - 1.0)
        taus.append(tau)
        uses.append(usable.astype(jnp.int32))
        newer = past.log_snr
    return length / 2, tuple(taus), uses


def _moments(h):
    """Means of tau, tau^2 and tau^3 over [0, 1], weighed by exp(h tau), for h > 0.

    How an exact step of h in half log-SNR weighs what is predicted on its way.
    """
    total, small = -jnp.expm1(-h), jnp.minimum(h, 1.0)
    series = 1.0
    for n in range(17, 4, -1):
        series = 1 - small / n * series
    third = small / 4 * series  # of the integral; up and down by parts
    second = (1 - third) * small / 3
    low = (1 - second) * small / 2, second, third
    first = 1 - total / h
    second = 1 - 2 * first / h
    high = first, second, 1 - 3 * second / h
    return [jnp.where(h < 1, a, b) / total for a, b in zip(low, high, strict=True)]


def _unipc_mean(h, taus, values, terms):
    """That of `_mean_of_polynomial` for a step of h in half log-SNR, as UniPC takes it:
    the weight of one term after the first alone is 1/2.
    """
    first, second, third = _moments(h)
    moments = 1.0, jnp.where(terms == 1, 0.5, first), second, third
    return _mean_of_polynomial(moments, taus, values, terms)


def _mean_of_polynomial(moments, taus, values, terms):
    """The mean of x_0 over a step, of the polynomial through its predictions.

    Args:
        moments: means over the step of 1, tau, tau^2, ...
        taus, values: places, see `_places`, and the predictions there; Newton's form.
        terms: how many after the first are used.
    """
    basis = [1.0]
    mean, column = values[0], values
    for k in range(1, len(values)):
        spans = [b - a for a, b in zip(taus, taus[k:], strict=False)]
        pairs = zip(itertools.pairwise(column), spans, strict=True)
        column = [(b - a) / span for (a, b), span in pairs]
        shifted = zip([0.0, *basis], [*basis, 0.0], strict=True)
        basis = [a - taus[k - 1] * b for a, b in shifted]
        weight = sum(a * m for a, m in zip(basis, moments, strict=False))
        mean = mean + jnp.where(terms >= k, weight * column[0], 0.0)
    return mean


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
        takes_churn: whether the step is one for `schedules.churned`, and takes
            `s_noise` by keyword.
    """

    step: StepFn
    takes_eta: bool = False
    steps: int | None = None
    spacing: str = "sections"
    adds_noise: bool = False
    uses_mean: bool = False
    takes_churn: bool = False


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm_step, adds_noise=True, uses_mean=True),
    "ddim": Sampler(ddim_step, takes_eta=True, steps=50),
    "dpmpp_2m": Sampler(dpmpp_2m_step, steps=20, spacing="trailing"),
    "heun": Sampler(heun_step, steps=10, spacing="trailing"),
    "dpmpp_2s": Sampler(dpmpp_2s_step, steps=21, spacing="log_snr"),
    "unipc": Sampler(unipc_step, steps=20, spacing="log_snr"),
    "edm_heun": Sampler(edm_heun_step, steps=35, spacing="log_snr", takes_churn=True),
    "euler_ancestral": Sampler(euler_ancestral_step, steps=50, adds_noise=True),
    "dpmpp_sde": Sampler(dpmpp_sde_step, steps=25, spacing="trailing", adds_noise=True),
    "dpmpp_2m_sde": Sampler(
        dpmpp_2m_sde_step, steps=25, spacing="trailing", adds_noise=True
    ),
    "dpmpp_3m_sde": Sampler(
        dpmpp_3m_sde_step, steps=25, spacing="log_snr", adds_noise=True
    ),
}
for _row in SAMPLERS.values():
    marked(**traits_of(_row.step) | {"way": -1})(_row.step)
del _row


def as_sampler(sampler: Sampler | StepFn) -> Sampler:
    """Makes a row of `SAMPLERS` from a bare step function, such as a user's own.

    Args:
        sampler: a step function, or a row, which is returned as it is.

    Returns:
        A row with all steps by default. It takes eta, or churn, if the function has a
        parameter `eta`, or `s_noise`, which is not bound yet, and counts as noisy,
        since that is unknown.

    Raises:
        ValueError: if the function does not take the arguments of a step.

    >>> as_sampler(ddim_step).takes_eta
    True
    """
    if isinstance(sampler, Sampler):
        return sampler
    check_step_fn("sampler", sampler)
    bound = getattr(sampler, "keywords", {})  # of functools.partial
    free = inspect.signature(sampler).parameters.keys() - bound
    takes_eta, takes_churn = "eta" in free, "s_noise" in free
    return Sampler(sampler, takes_eta, adds_noise=True, takes_churn=takes_churn)
