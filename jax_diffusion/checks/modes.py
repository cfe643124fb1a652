"""Whether a network that is evaluated still trains: dropout that was left on."""

import contextlib
import functools
import sys
from typing import Any


def evaluating(name: str, value: Any) -> None:
    """Raises ValueError if a function is a Flax NNX network with dropout left on.

    Such networks say so themselves. Networks are found behind `functools.partial`, a
    method, and a function that is defined around one, where it closes over it.

    >>> evaluating("model_fn", lambda x_t, timesteps: x_t)
    """
    nnx = sys.modules.get("flax.nnx")  # if it is not there, nobody has a network of it
    if nnx is None:
        return
    while isinstance(value, functools.partial):
        value = value.func
    cells = getattr(value, "__closure__", None) or ()
    candidates = [value, getattr(value, "__self__", None)]
    for cell in cells:
        with contextlib.suppress(ValueError):  # if it is empty as yet
            candidates.append(cell.cell_contents)
    for candidate in candidates:
        if not isinstance(candidate, nnx.Module):
            continue
        for _, module in nnx.iter_modules(candidate):
            on = getattr(module, "deterministic", None) is False
            if on and getattr(module, "rate", 0) > 0:
                raise ValueError(
                    f"{name} must have its dropout off, as eval() of a network of "
                    f"Flax NNX does it, got {type(module).__name__} in training mode."
                )
