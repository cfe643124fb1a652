"""Orbax behind a few functions: what is saved, and the one resume rule.

A checkpoint holds the whole train state and a JSON record of the run: its config, and
the metrics since the last line of the log. The newest checkpoint is resumed; without
one, the state is initialised.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree


def make_manager(workdir: str | Path, *, keep: int | None = 3) -> ocp.CheckpointManager:
    """A manager of `workdir`/checkpoints that keeps the newest `keep` of them."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(_directory(workdir), options=options)


def latest_step(workdir: str | Path) -> int | None:
    """The step of the newest complete checkpoint, or None. Creates nothing."""
    directory = _directory(workdir)
    if not directory.is_dir():
        return None
    steps = [int(p.name) for p in directory.iterdir() if p.name.isdigit()]
    return max(steps, default=None)


def save(
    manager: ocp.CheckpointManager, step: int, state: PyTree, record: dict[str, Any]
) -> None:
    """Saves in the background; `manager.wait_until_finished` waits for the disk."""
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
    )
    manager.save(step, args=items, force=True)


def save_params(
    workdir: str | Path, params: PyTree, record: dict[str, Any], *, step: int = 0
) -> None:
    """Makes `workdir` one from which `load_params` and `load_record` read.

    Raises:
        ValueError: if it holds checkpoints already.
    """
    if latest_step(workdir) is not None:
        raise ValueError(f"workdir must be new, and {str(workdir)!r} holds a run.")
    with make_manager(workdir) as manager:
        save(manager, step, {"params": params, "ema_params": {}}, record)


def load_record(workdir: str | Path) -> dict[str, Any]:
    """The JSON record of the newest checkpoint.

    Raises:
        ValueError: if there is no checkpoint.
    """
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        return reader.restore(_newest(workdir), args=args)["record"]


def restore_or_init(
    manager: ocp.CheckpointManager, init_fn: Callable[[], PyTree]
) -> PyTree:
    """The newest saved state if there is one, else `init_fn()`."""
    step = manager.latest_step()
    if step is None:
        return init_fn()
    target = jax.eval_shape(init_fn)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), target
    )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    return manager.restore(step, args=args)["state"]


def load_params(workdir: str | Path, *, ema: str | None) -> PyTree:
    """Parameters of the newest checkpoint, or one average of them, as NumPy arrays.

    Args:
        ema: the average's name, such as "0.9999"; None for the parameters themselves.

    Raises:
        ValueError: if there is no checkpoint or no such average.
    """
    path = _newest(workdir)
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(), record=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(handler) as reader:
        tree = reader.metadata(path).item_metadata["state"].tree
        if ema is not None and ema not in tree["ema_params"]:
            raise ValueError(
                f"ema must be one of {sorted(tree['ema_params'])}, got {ema!r}."
            )
        wanted = (
            {"params": tree["params"]}
            if ema is None
            else {"ema_params": {ema: tree["ema_params"][ema]}}
        )
        item = jax.tree.map(lambda a: np.empty((), a.dtype), wanted)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(item, as_numpy, partial_restore=True)
        state = reader.restore(path, args=ocp.args.Composite(state=args))["state"]
    return state["params"] if ema is None else state["ema_params"][ema]


def _directory(workdir: str | Path) -> Path:
    return Path(workdir).absolute() / "checkpoints"


def _newest(workdir: str | Path) -> Path:
    step = latest_step(workdir)
    if step is None:
        raise ValueError(
            f"workdir must hold a checkpoint, and {str(workdir)!r} holds none."
        )
    return _directory(workdir) / str(step)
