"""Checks a config that comes with a file of somebody else, before it is used.

Such a config could name code to run, or a network that does not fit into the memory.
So it may name rows of our registries only, and its network may be no larger than the
tensors beside it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from jax_diffusion import checks
from jax_diffusion import config as configs
from jax_diffusion.config import Config
from jax_diffusion.config.fields import OF_DENOISERS
from jax_diffusion.config.groups import GROUPS
from jax_diffusion.models import Network, init_params

MAX_SIDE = 2**14  # pixels of an image
MAX_STEPS = 10**6  # of a noise schedule
CODE = re.compile(r"[\w.]+:[\w.]+")  # a name "package.module:function"
NO_NAMES = {"path"}  # fields that hold other strings


def config_of(
    model: dict[str, Any],
    schedule: dict[str, Any],
    objective: dict[str, Any] | None,
    data: dict[str, Any],
) -> dict[str, Any]:
    """Completes what is known of a network to a config, with which it can train on.

    Args:
        model, schedule, objective, data: groups of the config.
    """
    sampling = dict(sampler="ddim", steps=50, spacing="sections", eta=0.0, n=64)
    return dict(
        seed=0,
        data=data,
        schedule=schedule,
        objective=objective,
        timesteps=dict(name="uniform"),
        model=model,
        optimizer=dict(lr=1e-4),
        ema_decays=(),
        ema_warmup=True,
        total_steps=1,
        log_every=100,
        save_every=10_000,
        sample_every=10_000,
        sampling=sampling if objective else None,
    )


def check_record(record: Mapping[str, Any]) -> tuple[Config, tuple[int, int, int]]:
    """Checks the record of a .safetensors file of ours.

    Args:
        record: a JSON object, with "config" and "image_shape".

    Returns:
        The config in today's format, and (h, w, c).

    Raises:
        ValueError: if a field is missing or of a wrong type.
    """
    config, shape = record.get("config"), record.get("image_shape")
    if not isinstance(config, dict):
        raise ValueError(f"config must be a group of fields, got {config!r:.40}.")
    if not isinstance(shape, list) or len(shape) != 3:
        raise ValueError(f"image_shape must be [h, w, c], got {shape!r:.40}.")
    for side in shape:
        checks.integer("image_shape", side, at_least=1, at_most=MAX_SIDE)
    checks.integer("format", record.get("format", 1), at_least=1)
    needed = [name for name in configs.FIELDS if name not in configs.DEFAULTS]
    if missing := [name for name in needed if name not in config]:
        raise ValueError(f"config lacks the fields {missing}.")
    for name in (name for name in needed if name in GROUPS):
        group = config[name]
        no_group = group is None and name in OF_DENOISERS
        if not isinstance(group, dict) and not no_group:
            raise ValueError(f"config.{name} must be a group, got {group!r:.40}.")
    try:
        upgraded = configs.upgrade(record)["config"]
    except (KeyError, TypeError) as error:
        classes = config["model"].get("num_classes")
        raise ValueError(
            "config.model.num_classes must be an integer in a config of format 1 with "
            f"label_dropout, got {classes!r:.40}."
        ) from error
    h, w, c = shape
    return upgraded, (h, w, c)


def check_no_code(config: Config, path: Path) -> None:
    """Checks that a config names nothing that would be imported and run.

    Args:
        config: a config from a file.
        path: the file, for the error.

    Raises:
        ValueError: if it names a "package.module:function".
    """
    flat: dict[str, Any] = flatten_dict(dict(config), sep=".")
    for name, value in flat.items():
        values = value if isinstance(value, list | tuple) else [value]
        for text in values:
            found = isinstance(text, str) and CODE.fullmatch(text)
            if found and name.split(".")[-1] not in NO_NAMES:
                raise ValueError(
                    f"config must be given to read {path}, whose own config would run "
                    f"code of its author's choice, got {name} = {text!r:.80}."
                )


def model_and_shapes(
    config: Config,
    image_shape: tuple[int, ...],
    tensors: Mapping[str, Any],
) -> tuple[Network, PyTree]:
    """Builds the network of a config, and the shapes of its parameters.

    Args:
        config: a config; groups schedule, objective and model are read.
        image_shape: (h, w, c).
        tensors: the tensors that the network shall have, by name: what the config
            describes may not be larger.

    Returns:
        The network, and a tree of `jax.ShapeDtypeStruct`; nothing is computed.

    Raises:
        ValueError: if the network cannot be built.
    """
    check_sizes(config, tensors)
    try:
        model: Any = configs.build(config, image_shape[-1]).model
        shapes = jax.eval_shape(
            lambda: init_params(model, jax.random.key(0), image_shape)
        )
    except ValueError:
        raise
    except Exception as error:  # a config of anybody fails in any way
        reason = str(error).split("\n")[0][:200].rstrip(".")
        raise ValueError(
            f"a config must describe a network that can be built, got {reason}."
        ) from error
    return model, shapes


def check_sizes(config: Config, tensors: Mapping[str, Any]) -> None:
    """Checks that the network of a config is no larger than the file beside it.

    Args:
        config: a config; groups schedule and model are read.
        tensors: the tensors of the file, by name.

    Raises:
        ValueError: if the config describes a larger network, or a very long schedule.
    """
    steps = config["schedule"].get("num_steps")
    if steps is not None:
        checks.integer("config.schedule.num_steps", steps, at_most=MAX_STEPS)
    most = max(sum(tensor.size for tensor in tensors.values()), 512)
    group: dict[str, Any] = flatten_dict(dict(config["model"]), sep=".")
    for name, value in group.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not abs(number) <= most:
                raise ValueError(
                    f"config.model.{name} must be at most {most}, as the tensors "
                    f"beside it have no more numbers, got {number!r:.40}."
                )
    blocks = group.get("depth")
    if isinstance(blocks, int) and blocks > max(len(tensors), 16):
        raise ValueError(
            f"config.model.depth must fit {len(tensors)} tensors, got {blocks}."
        )
    depth, levels = group.get("num_res_blocks"), group.get("multipliers")
    if isinstance(depth, int) and isinstance(levels, list | tuple):
        if depth * len(levels) > max(len(tensors), 16):
            raise ValueError(
                f"config.model.num_res_blocks must fit {len(tensors)} tensors, got "
                f"{depth} at {len(levels)} levels."
            )
