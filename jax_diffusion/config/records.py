"""Configs in the records of checkpoints: of any format, and compared with others."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jax_diffusion.config.fields import DEFAULTS, FIELDS, FREE_IN_GROUPS, Config

FORMAT = 2  # of the records that are saved with parameters, see `upgrade`


def of_record(record: Mapping[str, Any]) -> Config:
    """Returns the config of a checkpoint's record of any format."""
    return ConfigDict(upgrade(record)["config"])


def upgrade(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of a checkpoint of any format in the present one.

    Before format 2, num_classes of a run with label_dropout counted the class of hidden
    labels, which `build` adds now.

    Args:
        record: with "config", of plain JSON values, and "format" if that is not 1.
    """
    config = dict(record["config"])
    if record.get("format", 1) < 2 and config.get("label_dropout"):
        model = dict(config["model"])
        model["num_classes"] -= 1
        config["model"] = model
    return {**record, "config": config, "format": FORMAT}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lists what differs between two configs, as "data.seed: 0 -> 1".

    Free fields are left out; an optional field that a config lacks has its default.
    """
    old, new = (_flat({**DEFAULTS, **config}) for config in (saved, now))
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, "(none)"), new.get(name, "(none)")
        field = FIELDS.get(name.split(".")[0])
        free = name in FREE_IN_GROUPS or (field is not None and field.free)
        if before != after and not free:
            lines.append(f"{name}: {before} -> {after}")
    return lines


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
