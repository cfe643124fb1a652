"""Exponential moving averages of the parameters: their names and decay rates."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from jax_diffusion import checks


def ema_name(decay: float) -> str:
    """Returns the key of an average in `TrainState.ema_params`.

    Raises:
        ValueError: unless decay is a number.

    >>> ema_name(0.9999)
    '0.9999'
    """
    checks.number("decay", decay)
    return f"{decay:g}"


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


def check_decays(ema_decays: Sequence[float]) -> None:
    """Raises ValueError unless decay rates are in [0, 1), each with its own name."""
    if not isinstance(ema_decays, list | tuple):
        got = checks.shown(ema_decays)
        raise ValueError(f"ema_decays must be a list of numbers, got {got}.")
    for decay in ema_decays:
        checks.number("ema_decays", decay, at_least=0, below=1)
    names = [ema_name(decay) for decay in ema_decays]
    if len({*names}) < len(names):
        raise ValueError(f"ema_decays must differ from each other, got {ema_decays}.")
