"""Checks of numbers: one rule, one sentence, for every argument of every function.

Errors begin with the name of the argument, so that a config or a command line can say
its own name for it. NaN and infinity are never numbers that somebody meant.
"""

import math
import numbers
from typing import Any

import jax
import numpy as np


def number(
    name: str,
    value: Any,
    *,
    at_least: int | float | None = None,
    above: int | float | None = None,
    at_most: int | float | None = None,
    below: int | float | None = None,
) -> None:
    """Checks that an argument is one finite number in a range.

    Args:
        name: of the argument.
        value: a number of Python or NumPy, or an array without dimensions. Of a traced
            one, only shape and dtype can be checked.
        at_least, above: lower bound, included or not.
        at_most, below: upper bound, included or not.

    Raises:
        ValueError: if it is not; bool is no number.

    >>> number("eta", 0.5, at_least=0, at_most=1)
    >>> number("eta", 2, at_least=0, at_most=1)
    Traceback (most recent call last):
    ValueError: eta must be a number in [0, 1], got 2.
    """
    rule = f"a number{_range(at_least, above, at_most, below)}"
    if isinstance(value, jax.core.Tracer):
        if value.shape != () or not np.issubdtype(value.dtype, np.number):
            found = f"{value.dtype} {value.shape}"
            raise ValueError(f"{name} must be {rule}, got {found}.")
        return
    found = value
    if isinstance(value, np.ndarray | jax.Array) and value.shape == ():
        found = np.asarray(value).item()
    is_number = isinstance(found, numbers.Real) and not isinstance(found, bool)
    if (
        not is_number
        or not math.isfinite(found)
        or (at_least is not None and found < at_least)
        or (above is not None and found <= above)
        or (at_most is not None and found > at_most)
        or (below is not None and found >= below)
    ):
        raise ValueError(f"{name} must be {rule}, got {found!r}.")


def integer(
    name: str,
    value: Any,
    *,
    at_least: int | None = None,
    at_most: int | None = None,
) -> None:
    """Checks that an argument is one integer in a range, known on the host.

    Args:
        name: of the argument.
        value: an integer of Python or NumPy.
        at_least, at_most: bounds, included.

    Raises:
        ValueError: if it is not; bool is no integer, nor is 2.0.

    >>> integer("steps", 2.5, at_least=1)
    Traceback (most recent call last):
    ValueError: steps must be an integer >= 1, got 2.5.
    """
    rule = f"an integer{_range(at_least, None, at_most, None)}"
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if (
        not is_integer
        or (at_least is not None and value < at_least)
        or (at_most is not None and value > at_most)
    ):
        raise ValueError(f"{name} must be {rule}, got {value!r}.")


def _range(at_least: Any, above: Any, at_most: Any, below: Any) -> str:
    """Words for a range: " >= 1", " in [0, 1)", or nothing."""
    low, high = (
        at_least if above is None else above,
        at_most if below is None else below,
    )
    if low is not None and high is not None:
        ends = "[" if above is None else "(", "]" if below is None else ")"
        return f" in {ends[0]}{low}, {high}{ends[1]}"
    if low is not None:
        return f" {'>=' if above is None else '>'} {low}"
    if high is not None:
        return f" {'<=' if below is None else '<'} {high}"
    return ""
