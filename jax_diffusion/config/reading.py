"""Reads config files, and the changes of a command line."""

import ast
import contextlib
import importlib
import inspect
import os
import runpy
import sys
import textwrap
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jax_diffusion import checks
from jax_diffusion.config.fields import FIELDS, Config, check_config, complete
from jax_diffusion.config.groups import GROUPS, known_fields
from jax_diffusion.registry import check_type, hint, is_outside, short
from jax_diffusion.registry.type_hints import fits, rule

PREFIX = "config."
PACKAGE = Path(__file__).parents[1]
CONFIGS = "configs"  # what the sample configs call their folder in imports
LONGEST = 300  # characters of an error
WORDS = {"true": True, "t": True, "false": False, "f": False, "1": True, "0": False}


def configs_folder() -> Path:
    """Returns the folder of the sample configs.

    That is jax_diffusion/configs where a wheel has put them, and configs/ beside
    jax_diffusion/ in a clone.
    """
    installed = PACKAGE / CONFIGS
    return installed if installed.is_dir() else PACKAGE.parent / CONFIGS


def find_config(config: str | Path) -> Path:
    """Returns the config file that a path, or the name of a sample config, means.

    Raises:
        ValueError: if there is neither.
    """
    found = configs_folder().glob("[!_]*.py")
    known = {path.stem: path for path in sorted(found)}
    wanted = "the path of a config file or a name such as 'digits'"
    checks.path("config", config, wanted)
    path, is_name = Path(config), isinstance(config, str) and config in known
    try:
        is_file, exists = path.is_file(), path.exists()
    except (OSError, ValueError) as error:  # a name too long, or not to be looked at
        reason = getattr(error, "strerror", None) or f"{error}"
        got = f"{short(os.fspath(config))}: {reason.lower()}"
        raise ValueError(f"config must be {wanted}, got {got}.") from error
    if is_file:
        if is_name:
            warnings.warn(
                f"config {config!r} is the file of this name in the current folder, "
                "not the sample config; rename it to use that.",
                stacklevel=3,
            )
        return path
    if is_name:
        return known[str(config)]
    got = short(os.fspath(config))
    got += ", which is no file" if exists else ", where nothing is"
    close = hint(path.stem, known)
    if path.stem in known:  # of digits/, digits.py or Path("digits")
        close = f"; the sample config is just the string {path.stem!r}."
    elif close == ".":  # which are the names, as far as a short sentence can tell
        wanted = "the path of a config file or one of "
        room = LONGEST - len(f"config must be {wanted}, got {got}.")
        wanted += textwrap.shorten(", ".join(known), max(room, 20), placeholder=" ...")
    raise ValueError(f"config must be {wanted}, got {got}{close}")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Runs a config file and applies overrides; returns the complete config.

    The file may import what lies beside it: its folder and the one above are importable
    while it runs. A config of yours may begin with a sample config, as
    `config = load_config("digits")`.

    Args:
        path: a Python file with `get_config() -> ConfigDict`, or the name of a sample
            config, such as "digits". A file of that name in the current folder comes
            first, with a warning.
        overrides: "--config.FIELD=VALUE" or "--config.GROUP.FIELD=VALUE". Any argument
            of the functions that take a group is a field, whether the file gives it or
            not. Another `name` is set before all else; what its function does not take
            is left out, with a warning.

    Raises:
        ValueError: if the file is missing or wrong, or a field unknown or ill-typed.
    """
    path = find_config(path)
    if isinstance(overrides, str):
        raise ValueError(f"overrides must be a list of strings, got {overrides!r}.")
    try:
        with neighbors_importable(path):
            make = runpy.run_path(str(path)).get("get_config")
            config = make() if callable(make) else None
    except (Exception, SystemExit) as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise ValueError(
            f"{short(str(path))} must be a config file that runs, got "
            f"{found.rstrip('.')}."
        ) from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{str(path)!r} must define get_config() -> ConfigDict.")
    changed: dict[str, Any] = complete(config).to_dict()
    changes = parse_overrides(overrides)
    # Names first: they decide which other fields there are.
    for field in sorted(changes, key=lambda field: not field.endswith(".name")):
        set_field(changed, field, changes[field])
    config = ConfigDict(changed)
    check_config(config)
    return config


@contextlib.contextmanager
def neighbors_importable(path: Path) -> Iterator[None]:
    """Makes the folder of a file, and the one above it, importable for a while.

    In configs/mine.py, both `import digits` and `from configs import digits` mean the
    neighbor configs/digits.py, whatever else has these names. Afterwards the modules of
    the folder are forgotten, so that another folder of the same name has its own.

    Args:
        path: a file.
    """
    folder = path.resolve().parent
    added, before = [str(folder), str(folder.parent)], dict(sys.modules)
    if folder.parent == PACKAGE.resolve():  # whose modules are no top-level ones
        added.pop()
    package, theirs = folder.name, dict[str, Any]()
    loaded = before.get(package)
    file = getattr(loaded, "__file__", None)
    is_folder = hasattr(loaded, "__path__") and file is None  # without __init__.py
    is_elsewhere = file and Path(file).resolve().parent != folder
    if is_folder or (package == CONFIGS and is_elsewhere):
        # What a user calls configs is not what the sample configs import. Any other
        # package keeps its name: a config in a folder called jax must find jax.
        names = [n for n in before if n == package or n.startswith(f"{package}.")]
        theirs = {name: sys.modules.pop(name) for name in names}
    if package not in sys.modules and not (folder / "__init__.py").exists():
        # Else a package of this name in site-packages would hide the folder.
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    sys.path[:0] = added
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for entry in added:
            if entry in sys.path:
                sys.path.remove(entry)
        for name in [name for name in sys.modules if name not in before]:
            file = getattr(sys.modules[name], "__file__", None)
            inside = name == package or name.startswith(f"{package}.")
            beside = "." not in name and file and Path(file).parent == folder
            if inside or beside:
                del sys.modules[name]
        for name in theirs:
            sys.modules.pop(name, None)
        sys.modules.update(theirs)


def parse_overrides(overrides: Sequence[str]) -> dict[str, str | None]:
    """Parses arguments of a command line to texts by field, such as "model.channels".

    Args:
        overrides: "--config.FIELD=VALUE", or "--config.FIELD" and "VALUE". A field
            without a value is a switch: None stands for its text.

    Raises:
        ValueError: for any other argument.
    """
    found: dict[str, str | None] = {}
    rest = [*overrides]
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            raise ValueError(f"arguments must begin with --, got {argument!r}.")
        flag, equals, text = argument.lstrip("-").partition("=")
        if not flag.startswith(PREFIX):
            name = argument.partition("=")[0]
            close = hint(name, [f"--{PREFIX}{field}" for field in FIELDS])
            raise ValueError(
                f"there is no flag {name!r}; --help lists flags, and --config.FIELD"
                f"=VALUE changes a field of the config{close}"
            )
        is_last = not rest or rest[0].startswith("--")
        value = text if equals else None if is_last else rest.pop(0)
        found[flag.removeprefix(PREFIX)] = value
    return found


def set_field(config: dict[str, Any], field: str, text: str | None) -> None:
    """Sets a field of a config to what a text says, by the field's type.

    Args:
        config: a complete config, which is changed.
        field: "FIELD" or "GROUP.FIELD".
        text: the value; None for a switch that is set.

    Raises:
        ValueError: for an unknown field or a value of a wrong type.
    """
    where, now = f"{PREFIX}{field}", config.get(field)
    group, dot, name = field.partition(".")
    if group not in FIELDS:
        raise ValueError(f"the config has no field {group!r}{hint(group, FIELDS)}")
    if not dot:
        if field in GROUPS and text != "None":
            raise ValueError(
                f"{where} must be given by its fields, as {where}.FIELD=VALUE, got "
                f"{short(text)}."
            )
        kind = FIELDS[field].hint if FIELDS[field].least is None else int
        config[field] = None if field in GROUPS else parse(where, text, kind, now)
        return
    if group not in GROUPS or not isinstance(config.get(group), dict):
        raise ValueError(
            f"config.{group} must be a group to have the field {name!r}, got "
            f"{short(config.get(group))}."
        )
    fields = config[group]
    if name == "name" and GROUPS[group].registry is not None:
        rename(group, fields, parse(where, text, str, None))
        return
    known, fixed = known_fields(group, fields), GROUPS[group].fixed
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    if name not in known and not takes_any:
        names = [n for n in known if n not in fixed]
        of = f" of {fields['name']!r}" if is_outside(fields.get("name")) else ""
        raise ValueError(f"config.{group}{of} has no field {name!r}{hint(name, names)}")
    kind = known[name].annotation if name in known else Any
    fields[name] = parse(where, text, kind, fields.get(name))


def rename(group: str, fields: dict[str, Any], name: str) -> None:
    """Sets the name of a group; leaves out what its function does not take.

    Args:
        group: the group's name.
        fields: its fields, which are changed.
        name: of the function.

    Raises:
        ValueError: if there is no such function.
    """
    if fields.get("name") == name:
        return
    fields["name"] = name
    known = known_fields(group, fields)
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    lost = [field for field in fields if field not in known]
    for field in lost:
        del fields[field]
    if lost:
        warnings.warn(
            f"config.{group}.name={name} does not take {', '.join(lost)}, which the "
            "config file gives; left out.",
            stacklevel=2,
        )


def parse(where: str, text: str | None, kind: Any, now: Any) -> Any:
    """Returns the value that a text means for a type.

    Args:
        where: the field, for errors.
        text: such as "60", "(1, 2)", "true" or "folder"; None for a switch.
        kind: the field's type hint.
        now: its value so far, whose type counts where there is no hint.

    Raises:
        ValueError: if the text has no meaning of this type.

    >>> parse("config.seed", "3", int, 0), parse("config.x", "1,2", Sequence[int], ())
    (3, (1, 2))
    """
    if kind in (Any, inspect.Parameter.empty):
        kind = type(now) if isinstance(now, bool | int | float | str) else Any
    if text is None:
        if not fits(True, kind) or kind is Any:
            raise ValueError(f"{where} must be given a value, as {where}=VALUE.")
        return True
    for value in readings(text):
        if fits(value, kind):
            check_type(where, value, kind)  # which refuses NaN, too
            kinds = {kind, *typing.get_args(kind)}
            is_float = type(value) is int and float in kinds and int not in kinds
            return float(value) if is_float else value
    allowed = rule(next(readings(text)), kind)
    raise ValueError(f"{where} must be {allowed}, got {short(text)}.")


def readings(text: str) -> Iterator[Any]:
    """Yields what a text can mean, in the order in which meanings are tried."""
    if text.lower() == "none":
        yield None
    errors = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
    for read in (int, float, ast.literal_eval):
        with contextlib.suppress(*errors):
            value = read(text)
            if not isinstance(value, str):  # quotes are a part of a string
                yield value
    if text.lower() in WORDS:
        yield WORDS[text.lower()]
    yield text
