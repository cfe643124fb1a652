"""Whether a function takes what it is called with, before it is called."""

import functools
import inspect
import sys
from typing import Any

from jax_diffusion import checks


def takes(name: str, function: Any, *arguments: Any, **named: Any) -> None:
    """Checks that a function can be called with arguments.

    Args:
        name: of the function, in the sentence.
        function: what is called; what has no signature passes.
        arguments: words for those by position.
        named: those by name.

    Raises:
        ValueError: if it takes others, or is a Flax module without its parameters.

    >>> takes("model_fn", lambda x: x, "x_t", label=3)
    Traceback (most recent call last):
    ValueError: model_fn must be a function of (x_t, label=), got one of (x).
    """
    while isinstance(function, functools.partial):  # whose signature may be none
        arguments = (*map(checks.shown, function.args), *arguments)
        named, function = function.keywords | named, function.func
    linen = sys.modules.get("flax.linen")
    if linen and isinstance(function, linen.Module) and function.scope is None:
        raise ValueError(
            f"{name} must be a network with its parameters, as models.bind makes it, "
            f"got {checks.shown(function)} without."
        )
    if not fit(function, *arguments, **named):
        wanted = ", ".join([*arguments, *(f"{word}=" for word in named)])
        parameters = inspect.signature(function).parameters
        got = f"got one of ({', '.join(parameters)})"
        raise ValueError(f"{name} must be a function of ({wanted}), {got}.")


def fit(function: Any, *arguments: Any, **named: Any) -> bool:
    """Whether a function can be called with arguments; True if it has no signature.

    >>> fit(lambda x: x, "x_t"), fit(lambda x: x, "x_t", label=3)
    (True, False)
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some builtins
        return True
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        return False
    return True
