"""Guidance by the difference of two denoisers: a good one, and a weaker one.

The weaker one is another network, an earlier average of the same one, or the same one
without its label: `functools.partial(denoise_fn, label=null_labels)`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_diffusion import checks, diffusion
from jax_diffusion.checks import placement
from jax_diffusion.diffusion import ConditionalDenoiseFn, Prediction
from jax_diffusion.guidance.scales import Scale, check_scale, column, rescaled
from jax_diffusion.schedules import NoiseSchedule, check_schedule, take


def autoguidance(
    denoise_fn: Callable[..., Prediction],
    weak_fn: Callable[..., Prediction],
    scale: Scale,
    *,
    rescale: float | Float[Array, ""] = 0.0,
) -> ConditionalDenoiseFn:
    """Guides a denoiser away from a weaker one: x_0(weak) + scale (x_0 - x_0(weak)).

    Autoguidance (Karras et al. 2024), which combines x_0; combining eps, v or flow is
    the same. With a weak_fn without labels it is classifier-free guidance. Variance and
    gradient are those of denoise_fn.

    Args:
        denoise_fn: the better denoiser.
        weak_fn: the weaker one; both get the same conditioning.
        scale: one number, one for each image [b], or a function of t, see `within`; 1
            is denoise_fn, 0 is weak_fn.
        rescale: in [0, 1]: how far x_0 is rescaled to the standard deviation, image by
            image, of what denoise_fn predicts (Lin et al. 2023).

    Returns:
        A denoiser.

    Raises:
        ValueError: if an argument has another type or is out of range, or the two are
            made with different schedules; in a call, if one of them returns something
            else.

    >>> def denoise_fn(x_t, t):
    ...     return Prediction(2 * x_t, jnp.zeros(()))
    >>> def weak_fn(x_t, t):
    ...     return Prediction(x_t, jnp.zeros(()))
    >>> guided = autoguidance(denoise_fn, weak_fn, scale=3.0)
    >>> guided(jnp.array([[1.0]]), jnp.array([5])).x_0.tolist()
    [[4.0]]
    """

    def combine(strong, weak, scale, x_t, t):
        return rescaled(weak + scale * (strong - weak), strong, rescale)

    return _guided(denoise_fn, weak_fn, scale, rescale, combine)


def adaptive_projected(
    denoise_fn: Callable[..., Prediction],
    weak_fn: Callable[..., Prediction],
    scale: Scale,
    *,
    eta: float | Float[Array, ""] = 0.0,
    norm: float | Float[Array, ""] | None = None,
    rescale: float | Float[Array, ""] = 0.0,
) -> ConditionalDenoiseFn:
    """Adaptive projected guidance: x_0 + (scale - 1) of a weakened difference.

    APG (Sadat et al. 2025, algorithm 1) is defined on x_0, which saturates where the
    difference to weak_fn points along x_0 itself: that part counts eta times. Its
    momentum is left out: it needs a history, which a denoiser has not.

    Args:
        denoise_fn, weak_fn: see `autoguidance`.
        scale: one number, one for each image [b], or a function of t, see `within`.
        rescale: see `autoguidance`.
        eta: share of the part along x_0; 1, without a norm, is `autoguidance`.
        norm: > 0: longer differences, over all values of an image, are shortened to it.

    Returns:
        A denoiser.

    Raises:
        ValueError: as `autoguidance` does.
    """
    checks.number("eta", eta)
    if norm is not None:
        checks.number("norm", norm, above=0)

    def combine(strong, weak, scale, x_t, t):
        off = strong - weak
        if norm is not None:
            off = off * norm / jnp.sqrt(jnp.maximum(_dot(off, off), norm**2))
        tiny = jnp.finfo(strong.dtype).tiny
        along = _dot(off, strong) / jnp.maximum(_dot(strong, strong), tiny) * strong
        guided = strong + (scale - 1) * (off - (1 - eta) * along)
        return rescaled(guided, strong, rescale)

    return _guided(denoise_fn, weak_fn, scale, rescale, combine)


def zero_star(
    denoise_fn: Callable[..., Prediction],
    weak_fn: Callable[..., Prediction],
    scale: Scale,
    *,
    schedule: NoiseSchedule | None = None,
    zero_steps: int = 1,
    rescale: float | Float[Array, ""] = 0.0,
) -> ConditionalDenoiseFn:
    """CFG-Zero*: s flow(weak) + scale (flow - s flow(weak)), and no flow at first.

    Fan et al. 2025. s is the multiple of flow(weak) that comes closest to flow. The
    method is defined on flow = eps - x_0, to which predictions are converted: on any
    process it is what it is on the rectified flow with the same ratios of noise.

    Args:
        denoise_fn, weak_fn: see `autoguidance`.
        scale: one number, one for each image [b], or a function of t, see `within`.
        rescale: see `autoguidance`.
        schedule: the steps to take; by default those that denoise_fn is made with.
        zero_steps: >= 0: at the first so many rows that sampling visits, flow is 0.

    Returns:
        A denoiser.

    Raises:
        ValueError: as `autoguidance` does, or if no schedule is known.
    """
    table: Any = diffusion.schedule_of(denoise_fn) if schedule is None else schedule
    check_schedule(table)
    diffusion.check_schedule_of(denoise_fn, table)
    checks.integer("zero_steps", zero_steps, at_least=0)

    def combine(strong, weak, scale, x_t, t):
        level = take(table, t, x_t.ndim).now
        both = level.signal + level.noise
        flow, weak_flow = ((x_t - both * x_0) / level.noise for x_0 in (strong, weak))
        closest = _dot(flow, weak_flow) / (_dot(weak_flow, weak_flow) + 1e-8)
        weak_flow = closest * weak_flow
        flow = weak_flow + scale * (flow - weak_flow)
        x_0 = rescaled((x_t - level.noise * flow) / both, strong, rescale)
        still = t >= jnp.sum(table.visited) - zero_steps
        return jnp.where(still.reshape(level.noise.shape), x_t / both, x_0)

    return _guided(denoise_fn, weak_fn, scale, rescale, combine, table)


GUIDANCE_METHODS: dict[str, Callable[..., ConditionalDenoiseFn]] = {
    "classifier_free": autoguidance,  # if weak_fn is denoise_fn without its label
    "apg": adaptive_projected,
    "zero_star": zero_star,
}
"""Methods by name: functions (denoise_fn, weak_fn, scale, *, rescale) -> denoiser."""


def _dot(a: Array, b: Array) -> Array:
    """The inner product of each image, [b, 1, ...]."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)


def _guided(
    denoise_fn: Any,
    weak_fn: Any,
    scale: Scale,
    rescale: Any,
    combine: Callable[..., Array],
    schedule: NoiseSchedule | None = None,
) -> ConditionalDenoiseFn:
    """A denoiser whose x_0 is combine(x_0, x_0 of weak_fn, scale, x_t, t)."""
    checks.function("denoise_fn", denoise_fn, "(x_t, t)")
    checks.function("weak_fn", weak_fn, "(x_t, t)")
    of_both = map(diffusion.schedule_of, (denoise_fn, weak_fn))
    schedule = schedule or next(filter(None, of_both), None)
    diffusion.check_schedule_of(weak_fn, schedule, "weak_fn")
    check_scale(scale, schedule=schedule)
    checks.number("rescale", rescale, at_least=0, at_most=1)

    def guided(x_t, t, **conditioning):
        checks.data("x_t", x_t, ("b", ...))
        checks.array("t", t, "int", x_t.shape[:1])
        t = placement.beside(t, x_t)
        strong, weak = (f(x_t, t, **conditioning) for f in (denoise_fn, weak_fn))
        diffusion.check_prediction(strong, x_t)
        diffusion.check_prediction(weak, x_t, "weak_fn")
        by = column(scale, t, x_t.ndim)
        return strong._replace(x_0=combine(strong.x_0, weak.x_0, by, x_t, t))

    return diffusion.with_schedule(guided, schedule)
