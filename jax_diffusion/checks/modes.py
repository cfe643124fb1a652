"""Calls a network, and finds dropout that was left on in it."""

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any


def evaluate(name: str, function: Any, *arguments: Any, **named: Any) -> Any:
    """Calls a network, and returns its output; refuses one of Flax NNX that trains.

    What counts is what happens in the call, since there, too, dropout is switched off:
    whether a layer draws a key, or updates the means of its batches. Networks are found
    behind `functools.partial`, a method, and a function that names one.

    Args:
        name: of the function, in the sentence.
        function: the network.
        arguments, named: what it is called with.

    Raises:
        ValueError: if a layer has drawn dropout, or averaged the batch.

    >>> evaluate("model_fn", lambda x_t, timesteps: x_t, 2, 3)
    2
    """
    nnx = sys.modules.get("flax.nnx")  # if it is not there, nobody has a network of it
    watched = [] if nnx is None else variables(nnx, function)
    before = [variable.get_raw_value() for _, variable in watched]
    try:
        output = function(*arguments, **named)
    except Exception as error:  # a layer may not change within a trace
        if type(error).__name__ != "TraceContextError":
            raise
        drew = "RngCount" in str(error)
        training = [layer for layer, _ in watched if drew or trains(layer)]
        if not training:
            raise
        raise _refused(name, training[0]) from error
    for (layer, variable), value in zip(watched, before, strict=True):
        if variable.get_raw_value() is not value:
            raise _refused(name, layer)
    return output


def _refused(name, layer):
    drops = hasattr(layer, "deterministic")  # not so BatchNorm
    rule = "have its dropout off" if drops else "be in evaluation mode"
    return ValueError(
        f"{name} must {rule}, as eval() of a network of Flax NNX does "
        f"it, got {type(layer).__name__} in training mode."
    )


def trains(layer: Any) -> bool:
    """Whether a layer is in training mode by itself, whatever a call says."""
    rate = getattr(layer, "rate", getattr(layer, "dropout_rate", 0))
    drops = getattr(layer, "deterministic", None) is False and rate > 0
    return drops or getattr(layer, "use_running_average", None) is False


def variables(nnx: Any, function: Any) -> list[tuple[Any, Any]]:
    """What layers change in training, and only there: pairs of a layer and a variable.

    That is the count of keys that dropout has drawn, and the mean of batches.
    """
    found = {}
    for network in named_by(function):
        if not isinstance(network, nnx.Module):
            continue
        for _, layer in nnx.iter_modules(network):
            variable = None
            if hasattr(layer, "deterministic"):
                variable = getattr(getattr(layer, "rngs", None), "count", None)
            elif hasattr(layer, "use_running_average"):
                variable = getattr(layer, "mean", None)
            if isinstance(variable, nnx.Variable):
                found[id(layer)] = (layer, variable)
    return list(found.values())


def named_by(function: Any) -> Iterator[Any]:
    """A function, its object, and the values that its code names."""
    while isinstance(function, functools.partial):
        function = function.func
    yield from (function, getattr(function, "__self__", None))
    inner = inspect.unwrap(function)
    code = getattr(inner, "__code__", None)
    for cell in getattr(inner, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # if it is empty as yet
            yield cell.cell_contents
    for word in getattr(code, "co_names", ()):
        yield inner.__globals__.get(word)
