"""How strongly guidance acts: one number, one for each image, or a function of t."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_diffusion import checks, diffusion
from jax_diffusion.checks import placement
from jax_diffusion.schedules import NoiseSchedule, check_schedule, take

Scale = float | Array | Callable[[Array], Array]
"""A guidance scale: one for all images, one for each image [b], or a function of t [b]
that returns scales [b], such as `within` makes.
"""


def within(
    schedule: NoiseSchedule,
    scale: float | Array,
    *,
    low: float | Float[Array, ""] = 0.0,
    high: float | Float[Array, ""] = jnp.inf,
    outside: float | Float[Array, ""] = 1.0,
) -> Callable[[Array], Array]:
    """Makes a scale for an interval of noise levels only (Kynkäänniemi et al. 2024).

    Args:
        schedule: the steps to take.
        scale: inside the interval; a number, or one for each image [b].
        low, high: the interval, in units of noise / signal, the paper's sigma; both
            ends are inside. It is empty if low is above high.
        outside: the scale elsewhere. 1 is the prediction with the label for
            `classifier_free`; give 0 for `classifier` and `posterior`.

    Returns:
        scale_fn(t) -> scales [b].

    Raises:
        ValueError: if an argument is out of range.

    >>> from jax_diffusion.schedules import cosine_betas, make_schedule
    >>> scale_fn = within(make_schedule(cosine_betas(10)), 3.0, low=0.3, high=2.0)
    >>> scale_fn(jnp.array([0, 5, 9])).tolist()
    [1.0, 3.0, 1.0]
    """
    check_schedule(schedule)
    check_scale(scale)
    checks.number("low", low, at_least=0, infinite=True)
    checks.number("high", high, at_least=0, infinite=True)
    check_scale(outside, "outside")

    def scale_fn(t):
        level = take(schedule, t, 1).now
        ratio = level.noise / jnp.maximum(level.signal, 1e-30)  # signal may be zero
        inside = (ratio >= low) & (ratio <= high)
        inner, outer = (
            placement.beside(a, t) if np.ndim(a) else a for a in (scale, outside)
        )
        return jnp.where(inside, inner, outer)

    return diffusion.with_schedule(scale_fn, schedule)


def check_scale(scale: Any, name: str = "scale", schedule: Any = None) -> None:
    """Raises ValueError unless `scale` is one number, numbers [b], or a function.

    In the sentence it is called `name`. A function that is made with another `schedule`
    is refused, too.
    """
    if callable(scale):
        diffusion.check_schedule_of(scale, schedule, name)
        return
    if np.ndim(scale) == 0:
        checks.number(name, scale)
    elif not isinstance(scale, jax.Array | np.ndarray) or scale.ndim != 1:
        rule = f"{name} must be one number, or one for each image, [b]"
        raise ValueError(f"{rule}, got {checks.shown(scale)}.")
    elif checks.known(scale):
        checks.vector(name, scale)


def column(scale: Any, t: Array, ndim: int) -> Array:
    """A `scale` at t, reshaped to [b or 1, 1, ...], to multiply rank-`ndim` data.

    Raises:
        ValueError: if a function returns something else.
    """
    value = jnp.asarray(scale(t) if callable(scale) else scale, jnp.float32)
    if value.shape not in ((), (1,), t.shape):
        rule = f"scale must be one number, or one for each image, {list(t.shape)}"
        raise ValueError(f"{rule}, got {checks.shown(value)}.")
    return value.reshape((-1,) + (1,) * (ndim - 1))
