"""Looks names up, as rows of a registry or "module:attribute", and checks arguments.

A registry is a dict that stands beside the functions that it lists, such as `SAMPLERS`
or `BETAS`. Wherever a config or a flag takes a name of one, it also takes
"package.module:attribute", so that a new sampler, network or metric needs no change of
this package.

What a config gives to a function is checked here, in one place, against the type hints
of that function, see `type_hints`; the range of an argument is checked by the function
itself.
"""

import contextlib
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jax_diffusion.registry.type_hints import check_type, short


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

    >>> import math
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
