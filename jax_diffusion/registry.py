"""Looks names up, as rows of a registry or "module:attribute", and checks arguments.

A registry is a dict that stands beside the functions that it lists, such as `SAMPLERS`
or `BETAS`. Wherever a config or a flag takes a name of one, it also takes
"package.module:attribute", so that a new sampler, network or metric needs no change of
this package.

What a config gives to a function is checked here, in one place, against the type hints
of that function; the range of an argument is checked by the function itself.
"""

import contextlib
import difflib
import importlib
import inspect
import math
import os
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np


def lookup(what: str, name: Any, registry: Mapping[str, Any]) -> Any:
    """Returns the row of a registry, or the object that "module:attribute" names.

    Args:
        what: what is looked up, for errors: "config.model.name", "sampler".
        name: a key of the registry, or "package.module:attribute".
        registry: rows by name.

    Raises:
        ValueError: if the name is no key, the module cannot be imported, or what it
            has there is no function.

    >>> lookup("sampler", "math:sqrt", {})(4.0)
    2.0
    """
    if isinstance(name, str) and name in registry:
        return registry[name]
    if not is_outside(name):
        raise ValueError(
            f"{what} must be one of {sorted(registry)} or 'package.module:function', "
            f"got {short(name)}{hint(name, registry)}"
        )
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look there
    module, _, attribute = name.partition(":")
    rule = f"{what} must be one of {sorted(registry)} or an importable"
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # the module may do anything
        raise ValueError(
            f"{rule} 'package.module:function', got {name!r}: "
            f"{type(error).__name__}: {error}."
        ) from error
    if not callable(found) and not isinstance(found, tuple):  # rows are NamedTuples
        raise ValueError(f"{rule} function, got {name!r}, which is {short(found)}.")
    return found


def choose(what: str, name: Any, known: Mapping[str, Any]) -> Any:
    """Returns the row of a dict that takes no names from outside.

    Args:
        what: what is chosen, for errors.
        name: a key.
        known: rows by name.

    Raises:
        ValueError: if the name is no key.
    """
    if not isinstance(name, str) or name not in known:
        rule = f"{what} must be one of {sorted(known)}"
        raise ValueError(f"{rule}, got {short(name)}{hint(name, known)}")
    return known[name]


def hint(name: Any, known: Iterable[str]) -> str:
    """Ends a sentence about an unknown name: "; did you mean 'ddim'?", or a period."""
    text = name[:100] if isinstance(name, str) else ""
    close = difflib.get_close_matches(text, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def check_is_group(where: str, group: Any) -> None:
    """Raises ValueError unless a group of a config, called `where`, is one."""
    if not hasattr(group, "items"):
        raise ValueError(f"{where} must be a group of fields, got {short(group)}.")


Parameters = Mapping[str, inspect.Parameter]


def parameters(function: Callable, where: str) -> Parameters:
    """Returns the parameters of a function by name, with resolved type hints.

    A hint that cannot be resolved counts as none.

    Args:
        function: any function, or a class.
        where: the field that names it, for errors.

    Raises:
        ValueError: if it cannot be told which arguments it takes.
    """
    with contextlib.suppress(Exception):  # strings among the hints may name anything
        return inspect.signature(function, eval_str=True).parameters
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        rule = f"{where} must be a function that tells which arguments it takes"
        raise ValueError(f"{rule}, got {function!r}.") from error


def check_arguments(
    known: Parameters,
    group: Any,
    where: str,
    fixed: Iterable[str] = (),
) -> None:
    """Checks names and types of the arguments that a group of a config gives.

    Args:
        known: parameters by name, see `parameters`.
        group: arguments by name.
        where: the group's name, such as "config.data".
        fixed: arguments that a group may not give, as they are set for it.

    Raises:
        ValueError: for an argument that is unknown, missing or of a wrong type; it
            names the argument, the rule and what came.
    """
    kinds = {p.kind for p in known.values()}
    for name in group:
        if name in fixed:
            raise ValueError(
                f"{where}.{name} must be left out, as the program sets it, got "
                f"{short(group[name])}."
            )
        if name not in known and inspect.Parameter.VAR_KEYWORD not in kinds:
            names = [n for n in known if n not in fixed]
            of = f" of {group['name']!r}" if is_outside(group.get("name")) else ""
            raise ValueError(f"{where}{of} has no field {name!r}{hint(name, names)}")
        kind = known[name].annotation if name in known else Any
        check_type(f"{where}.{name}", group[name], kind)
    missing = [
        name
        for name, p in known.items()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and name not in group
        and name not in fixed
    ]
    if missing:
        raise ValueError(f"{where} lacks the fields {missing}.")


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
    if origin in (Callable, os.PathLike):
        return "a function" if origin is Callable else "a path"
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


@contextlib.contextmanager
def named(where: str, names: Iterable[str]) -> Iterator[None]:
    """Puts the name of a group before errors that begin with one of its arguments.

    Functions say "lr must be > 0", as they know no config: "config.optimizer.lr must
    be > 0".

    Args:
        where: the group's name, such as "config.optimizer".
        names: of its arguments.
    """
    try:
        yield
    except ValueError as error:
        if str(error).partition(" ")[0] in {*names}:
            raise ValueError(f"{where}.{error}") from error
        raise


def call(function: Callable, group: Any, where: str, **fixed: Any) -> Any:
    """Calls function(**group, **fixed), after a check of names and types.

    Args:
        group: a group of a config, keyword arguments by name.
        where: its name, such as "config.data", for errors.
        fixed: arguments that a config may not give.

    Raises:
        ValueError: for a field that the function does not take, for a missing one, and
            for one of a wrong type; or as the function does, which then names the field
            as `where` does.
    """
    check_is_group(where, group)
    given = {
        name: value.to_dict() if hasattr(value, "to_dict") else value
        for name, value in group.items()
    }
    known = parameters(function, f"{where}.name")
    check_arguments(known, given, where, fixed)
    with named(where, {*known, *given} - {*fixed}):
        return function(**given, **fixed)


def call_by_name(
    registry: Mapping[str, Callable],
    group: Any,
    where: str,
    rule: str,
    check: Callable[[Any], Any],
    **fixed: Any,
) -> Any:
    """`call` of the function that the group's field `name` names.

    Args:
        registry: rows by name.
        group, where, fixed: as for `call`.
        rule: what the function must be, see `outside`.
        check: returns what a function from outside has made, or raises ValueError.
    """
    arguments = dict(group)
    name = arguments.pop("name", None)
    function = lookup(f"{where}.name", name, registry)
    with outside(f"{where}.name", name, rule):
        made = call(function, arguments, where, **fixed)
        return check(made) if is_outside(name) else made


@contextlib.contextmanager
def outside(
    what: str, name: Any, rule: str, of_rows: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Makes a sentence of what somebody's own function raises; the error is its cause.

    Errors that name a field of a config are such a sentence already.

    Args:
        what: the field that names the function, such as "config.model.name".
        name: the function; what rows of our registries raise is left as it is.
        rule: what the function must be: "a function (a, b) -> c".
        of_rows: errors that are told of rows as well.

    >>> with outside("config.data.name", "math:sqrt", "a reader"):
    ...     math.sqrt("x")
    Traceback (most recent call last):
    ValueError: config.data.name must be a reader, got 'math:sqrt': TypeError: must ...
    """
    try:
        yield
    except Exception as error:
        told = isinstance(error, ValueError) and str(error).startswith("config.")
        if told or not (is_outside(name) or isinstance(error, of_rows)):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        text = " ".join(str(error).split())[:300].rstrip(".")
        raise ValueError(
            f"{what} must be {rule}, got {name!r}: {kind}{text}."
        ) from error


def is_outside(name: Any) -> bool:
    """Tells whether a name is "package.module:attribute"."""
    return isinstance(name, str) and ":" in name
