"""Reads config files, and the changes of a command line."""

import os
import re
import runpy
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from jax_diffusion.config.fields import Config, check_config, complete


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Runs a config file and applies overrides; returns the complete config.

    Args:
        path: a Python file with `get_config() -> ConfigDict`.
        overrides: "--config.FIELD=VALUE" or "--config.GROUP.FIELD=VALUE".

    Raises:
        ValueError: if the file is missing or wrong, or a field unknown or ill-typed.
    """
    if not isinstance(path, str | os.PathLike) or not Path(path).is_file():
        raise ValueError(f"config must be the path of a config file, got {path!r}.")
    if isinstance(overrides, str):
        raise ValueError(f"overrides must be a list of strings, got {overrides!r}.")
    try:
        make = runpy.run_path(str(path)).get("get_config")
        config = make() if callable(make) else None
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} must be a config file that runs, got "
            f"{type(error).__name__}: {error}."
        ) from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{str(path)!r} must define get_config() -> ConfigDict.")
    argv = ["", *overrides]
    values = flags.FlagValues()  # our own: nothing global is defined
    try:
        holder = config_flags.DEFINE_config_dict(
            "config", complete(config), flag_values=values, sys_argv=argv
        )
        rest = values(argv)[1:]
    except AttributeError as error:
        words = re.findall(r"\w+", str(error).replace(r"\n", " "))  # name, Did you ...
        advice = f"; did you mean {words[4]!r}?" if len(words) > 4 else "."
        raise ValueError(f"the config has no field {words[0]!r}{advice}") from None
    except flags.Error as error:
        raise ValueError(f"{error}".rstrip(".") + ".") from None
    if rest:
        raise ValueError(f"arguments must begin with --, got {' '.join(rest)!r}.")
    check_config(holder.value)
    return holder.value
