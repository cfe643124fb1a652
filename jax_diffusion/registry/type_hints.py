"""Checks values against type hints, and says in words what a hint allows."""

import contextlib
import inspect
import math
import os
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def check_type(name: str, value: Any, hint: Any) -> None:
    """Checks a value against a type hint; NaN and infinity never fit.

    Args:
        name: of the value, for errors.
        value: anything.
        hint: a type hint; `inspect.Parameter.empty` and Any allow everything.

    Raises:
        ValueError: if it does not fit.

    >>> check_type("config.seed", 3, int)
    >>> check_type("config.seed", True, int)
    Traceback (most recent call last):
    ValueError: config.seed must be an integer, got True.
    """
    if not fits(value, hint):
        raise ValueError(f"{name} must be {rule(value, hint)}, got {short(value)}.")
    if not _finite(value):
        raise ValueError(f"{name} must be finite, got {short(value)}.")


def fits(value: Any, hint: Any) -> bool:
    """Tells whether a value has the type that a hint names, every item included.

    An int is a float, but a bool is no number. Lists and tuples count as the same (JSON
    has one of them). A string is no list of strings, a path is text.

    Args:
        value: anything.
        hint: a type hint; beartype reads those that are not simple.
    """
    try:
        simple = hint in SIMPLE
    except TypeError:  # no type at all, such as [int]
        return True
    if hint in (Any, object, inspect.Parameter.empty):
        return True
    if isinstance(value, np.generic):
        value = value.item()
    if simple:
        return type(value) in SIMPLE[hint][0] or (
            isinstance(value, SIMPLE[hint][0]) and not isinstance(value, bool)
        )
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, branch) for branch in inner)
    if origin is typing.Literal:
        return any(type(value) is type(row) and value == row for row in inner)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            return False
        if origin is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return not inner or all(fits(item, inner[0]) for item in value)
    if hint is os.PathLike:
        return isinstance(value, hint) and isinstance(os.fspath(value), str)
    if inspect.isclass(hint) and not inner and not hasattr(hint, "_is_protocol"):
        with contextlib.suppress(TypeError):
            return isinstance(value, hint)
    from beartype.door import is_bearable  # a tenth of a second, and seldom needed

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of hints in an old notation
        try:
            return is_bearable(value, hint)
        except Exception:  # a hint that nobody can read
            return True


# Simple hints: the types of their values, and their words for one and for several.
SIMPLE: dict[Any, tuple[tuple[type, ...], str, str]] = {
    int: ((int,), "an integer", "integers"),
    float: ((float, int), "a number", "numbers"),
    bool: ((bool,), "True or False", "True or False"),
    str: ((str,), "a string", "strings"),
    type(None): ((type(None),), "None", "None"),
    None: ((type(None),), "None", "None"),
}


def rule(value: Any, hint: Any) -> str:
    """Says what a type hint allows, and how a single value is written as a list.

    >>> rule(2, Sequence[int]), rule("x", int)
    ('a list of integers, such as (2,)', 'an integer')
    """
    alone = fits((value,), hint) and not isinstance(value, list | tuple)
    return in_words(hint) + (f", such as ({short(value)},)" if alone else "")


def in_words(hint: Any) -> str:
    """Says what a type hint allows.

    >>> in_words(Sequence[int] | None), in_words(int | float | str)
    ('a list of integers or None', 'a number or a string')
    """
    if hint in SIMPLE:
        return SIMPLE[hint][1]
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        wider = {int: float, str: os.PathLike}  # what includes the other, in words
        words = [in_words(h) for h in inner if wider.get(h, h) not in {*inner} - {h}]
        return " or ".join(dict.fromkeys(words))
    if origin is typing.Literal:
        return f"one of {inner}"
    if origin in (list, tuple, Sequence):
        items = [item for item in inner if item is not Ellipsis]
        if not items:
            return "a list"
        if len(items) > 1:
            return f"a list of {len(items)}: {', '.join(map(in_words, items))}"
        several = SIMPLE.get(items[0] if items[0] != int | float else float)
        return f"a list of {several[2] if several else in_words(items[0])}"
    if origin is Callable:
        return "a function"
    if origin is os.PathLike:
        return "a path"
    return getattr(hint, "__name__", None) or str(hint).replace("typing.", "")


def short(value: Any, length: int = 100) -> str:
    """Returns a value's repr in one line of about `length` characters."""
    if getattr(value, "ndim", 0):  # an array
        return f"{value.dtype} [{', '.join(map(str, value.shape))}]"
    text = " ".join(repr(value).split())
    return text if len(text) <= length else f"{text[:length]}..."


def _finite(value: Any) -> bool:
    if isinstance(value, float | np.floating):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    return not isinstance(value, list | tuple) or all(map(_finite, value))
