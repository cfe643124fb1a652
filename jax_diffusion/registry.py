"""Looks names up: rows of a registry, or anybody's own function as "module:attribute".

A registry is a dict that stands beside the functions that it lists, such as `SAMPLERS`
or `BETAS`. Wherever a config or a flag takes a name of one, it also takes
"package.module:attribute", so that a new sampler, network or metric needs no change of
this package.
"""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


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
    if not isinstance(name, str) or ":" not in name:
        raise ValueError(
            f"{what} must be one of {sorted(registry)} or 'package.module:function', "
            f"got {name!r}{hint(name, registry)}"
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
        raise ValueError(f"{rule} function, got {name!r}, which is {found!r}.")
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
        raise ValueError(f"{rule}, got {name!r}{hint(name, known)}")
    return known[name]


def hint(name: Any, known: Iterable[str]) -> str:
    """Ends a sentence about an unknown name: "; did you mean 'ddim'?", or a period."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def call(function: Callable, group: Any, where: str, **fixed: Any) -> Any:
    """Calls function(**group, **fixed).

    Args:
        group: a group of a config, keyword arguments by name.
        where: its name, such as "config.data", for errors.
        fixed: arguments that a config may not give.

    Raises:
        ValueError: for a field that the function does not take, and for a missing one.
    """
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} must name a function, got {function!r}.") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for name in group:
        if name in fixed or (name not in known and not takes_any):
            raise ValueError(f"{where} has no field {name!r}{hint(name, known)}")
    missing = [
        name
        for name, p in known.items()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and name not in group
        and name not in fixed
    ]
    if missing:
        raise ValueError(f"{where} must have the fields {missing}, got none.")
    return function(**group, **fixed)


def call_by_name(registry: Mapping[str, Callable], group: Any, where: str) -> Any:
    """`call` of the function that the group's field `name` names."""
    arguments = dict(group)
    name = arguments.pop("name", None)
    return call(lookup(f"{where}.name", name, registry), arguments, where)
