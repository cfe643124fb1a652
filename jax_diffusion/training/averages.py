"""Exponential moving averages of the parameters: their names, rates and updates.

There are two kinds, kept beside each other. A constant decay ("0.9999") remembers a
number of updates. A power function ("width=0.1") remembers a share of the training: it
weighs the parameters after update t in proportion to t^gamma, and `post_hoc_ema` makes
averages of any other width from snapshots of two.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jax_diffusion import checks

MAX_WIDTH = 0.28  # that of equal weights is 1 / sqrt(12)
WIDTH_PREFIX = "width="  # how names of power-function averages begin


def ema_name(decay: float) -> str:
    """Returns the key of an average in `TrainState.ema_params`.

    Raises:
        ValueError: unless decay is a number.

    >>> ema_name(0.9999)
    '0.9999'
    """
    checks.number("decay", decay)
    return f"{decay:g}"


def width_name(width: float) -> str:
    """Returns the key of a power-function average in `TrainState.ema_params`.

    >>> width_name(0.1)
    'width=0.1'
    """
    return f"{WIDTH_PREFIX}{width:g}"


def average_names(
    ema_decays: Sequence[float], ema_widths: Sequence[float]
) -> list[str]:
    """Returns the keys of all averages; the first is used where none is asked for."""
    return [*map(ema_name, ema_decays), *map(width_name, ema_widths)]


def only_average(name: str) -> dict[str, list[float]]:
    """Returns the fields ema_decays and ema_widths of a run with one average.

    >>> only_average("width=0.1")
    {'ema_decays': [], 'ema_widths': [0.1]}
    """
    width = width_of(name)
    if width is None:
        return {"ema_decays": [float(name)], "ema_widths": []}
    return {"ema_decays": [], "ema_widths": [width]}


def width_of(name: str) -> float | None:
    """Returns the width that the name of an average tells; None for other names.

    Raises:
        ValueError: if the name begins as `width_name` does and no number follows.
    """
    if not name.startswith(WIDTH_PREFIX):
        return None
    try:
        return float(name.removeprefix(WIDTH_PREFIX))
    except ValueError:
        rule = "ema must name a width as width=0.1 does"
        raise ValueError(f"{rule}, got {name!r}.") from None


def ema_decay_at(decay: float, step: Array, warmup: bool = True) -> Array | float:
    """Returns the decay rate of an average at an update.

    While the average warms up that is min(decay, (1 + n) / (10 + n)); without warm-up
    it would remember the random start for about 1 / (1 - decay) updates.

    Args:
        decay: the final decay rate, in [0, 1).
        step: n, the number of updates made.
        warmup: whether it warms up.

    Raises:
        ValueError: if an argument is out of range.

    >>> [round(float(ema_decay_at(0.9999, jnp.asarray(n))), 3) for n in (0, 90, 10**6)]
    [0.1, 0.91, 1.0]
    """
    checks.number("decay", decay, at_least=0, below=1)
    checks.boolean("warmup", warmup)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step)) if warmup else decay


def gamma_from_width(width: float) -> float:
    """Returns the exponent of a power function whose relative width is given.

    The width is the standard deviation of t / T under a density in proportion to
    t^gamma, which is sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))) (Karras et al.
    2024, eq. 8). Two values of gamma have it; the larger one is meant.

    Args:
        width: sigma_rel, in (0, 0.28].

    Raises:
        ValueError: if it is out of range.

    >>> round(gamma_from_width(0.1), 2)
    6.94
    """
    checks.number("width", width, above=0, at_most=MAX_WIDTH)
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def power_function_share(t: Array, width: float) -> Array:
    """Returns 1 - beta = 1 - (1 - 1 / t)^(gamma + 1), the share of the newest values.

    The first update copies the parameters, so that these averages need no warm-up. In
    float32, beta itself would have lost most digits of it after a million updates.

    Args:
        t: number of updates, this one included, >= 1.
        width: as for `gamma_from_width`.
    """
    t = jnp.asarray(t, float)
    return -jnp.expm1((gamma_from_width(width) + 1) * jnp.log1p(-1 / t))


def update(
    averages: Mapping[str, PyTree],
    params: PyTree,
    step: Array,
    ema_decays: Sequence[float],
    ema_warmup: bool,
    ema_widths: Sequence[float],
) -> dict[str, PyTree]:
    """Updates all averages of the parameters.

    Args:
        averages: those before, by name.
        params: the new parameters.
        step: number of updates made before this one.
        ema_decays, ema_warmup, ema_widths: of `make_train_step`.
    """
    updated = {}
    for decay in ema_decays:
        name = ema_name(decay)
        share = 1 - ema_decay_at(decay, step, ema_warmup)
        updated[name] = optax.incremental_update(params, averages[name], share)
    for width in ema_widths:
        name, share = width_name(width), power_function_share(step + 1, width)
        # As a difference: 1 - share would be rounded, and the weights not sum to 1.
        updated[name] = jax.tree.map(
            lambda new, old, share=share: old + share.astype(old.dtype) * (new - old),
            params,
            averages[name],
        )
    return updated


def check_averages(ema_decays: Any, ema_widths: Any) -> None:
    """Raises ValueError unless rates are in range, each with its own name."""
    ranges: dict[str, Any] = {
        "ema_decays": (ema_decays, dict(at_least=0, below=1), ema_name),
        "ema_widths": (ema_widths, dict(above=0, at_most=MAX_WIDTH), width_name),
    }
    for field, (values, bounds, name_of) in ranges.items():
        if not isinstance(values, list | tuple):
            got = checks.shown(values)
            raise ValueError(f"{field} must be a list of numbers, got {got}.")
        for value in values:
            checks.number(field, value, **bounds)
        if len({*map(name_of, values)}) < len(values):
            raise ValueError(f"{field} must differ from each other, got {values}.")
