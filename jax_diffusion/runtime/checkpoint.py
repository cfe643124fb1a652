"""Orbax behind a few functions: what is saved, and the one resume rule.

A checkpoint holds the whole train state and a JSON record of the run: its config, and
the metrics since the last line of the log. Beside them lie a digest of every array and
a checksum of the record, because Orbax restores a flipped byte without a word. The
newest checkpoint that passes is resumed; those that do not are named in a warning and
moved aside; without any checkpoint, the state is initialised.
"""

import json
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jax_diffusion.runtime import sharding

BAD = "bad_checkpoints"  # in the workdir: where damaged ones are moved


def make_manager(
    workdir: str | Path, *, keep: int | None = 3, keep_every: int | None = None
) -> ocp.CheckpointManager:
    """A manager of `workdir`/checkpoints.

    Args:
        keep: the newest so many stay; None for all.
        keep_every: steps that are a multiple of it stay too.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        keep_period=keep_every,
        create=True,
        cleanup_tmp_directories=True,  # what a killed run has left half-written
    )
    return ocp.CheckpointManager(_directory(workdir), options=options)


def latest_step(workdir: str | Path) -> int | None:
    """The step of the newest complete checkpoint, or None. Creates nothing."""
    return next(_steps(workdir), None)


def save(
    manager: ocp.CheckpointManager, step: int, state: PyTree, record: dict[str, Any]
) -> None:
    """Saves in the background; `manager.wait_until_finished` waits for the disk.

    On several hosts, all of them call it.
    """
    record = json.loads(json.dumps(record))  # as it will be read
    sealed = {"record": record, "digests": digests(state)}
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        record=ocp.args.JsonSave(sealed | {"checksum": _checksum(sealed)}),
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
    """The JSON record of the newest checkpoint whose record is whole.

    Raises:
        ValueError: if there is none.
    """
    return _newest_good(workdir, lambda path: _read_record(path)["record"])[1]


def restore_or_init(
    manager: ocp.CheckpointManager,
    init_fn: Callable[[], PyTree],
    shardings: PyTree,
) -> tuple[PyTree, dict[str, Any] | None]:
    """The newest state that is whole and its record, else `init_fn()` and None.

    Works on any number of devices and hosts, whatever saved the state. On several
    hosts, all of them call it.

    Args:
        shardings: where each leaf of the state goes.

    Raises:
        ValueError: if there are checkpoints and none is whole.
    """
    workdir = Path(manager.directory).parent
    if latest_step(workdir) is None:
        return init_fn(), None
    target = jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        jax.eval_shape(init_fn),
        shardings,
    )

    def read(path):
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as reader:
            return reader.restore(path / "state", target), _read_record(path)

    def verify(result):
        state, sealed = result
        _compare(sealed["digests"], digests(state))
        return state, sealed["record"]

    step, result = _newest_good(workdir, read, verify)
    _move_later_aside(workdir, step)
    manager.reload()
    return result


def load_params(workdir: str | Path, *, ema: str | None) -> PyTree:
    """Parameters of the newest whole checkpoint, or one average of them, in NumPy.

    Reads no more than them.

    Args:
        ema: the average's name, such as "0.9999"; None for the parameters themselves.

    Raises:
        ValueError: if there is no checkpoint that is whole, or no such average.
    """

    def read(path):
        sealed = _read_record(path)
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.PyTreeCheckpointHandler(), record=ocp.JsonCheckpointHandler()
        )
        with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as reader:
            tree = reader.metadata(path).item_metadata["state"].tree
            if ema is not None and ema not in tree["ema_params"]:
                raise _UnknownAverage(
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
        found = digests(state)
        _compare({name: sealed["digests"].get(name) for name in found}, found)
        return state["params"] if ema is None else state["ema_params"][ema]

    return _newest_good(workdir, read)[1]


def digests(tree: PyTree) -> dict[str, int]:
    """32 bits for each leaf, by its path, that a change of any of its bits changes.

    The same however the leaf is sharded, and whether in NumPy or in JAX: integers mod
    2^32, each word of the leaf mixed with its place, and added up.
    """
    named = {_name(path): a for path, a in jax.tree_util.tree_leaves_with_path(tree)}
    in_memory = jax.default_backend() == "cpu" and jax.process_count() == 1
    if in_memory or not any(isinstance(a, jax.Array) for a in named.values()):
        with np.errstate(over="ignore"):  # wrapping around is meant
            return {name: int(_digest(np.asarray(a), np)) for name, a in named.items()}
    return {name: int(d) for name, d in jax.device_get(_digests(named)).items()}


@jax.jit
def _digests(named):
    return {name: _digest(a, jnp) for name, a in named.items()}


def _digest(a, xp):
    words = a.reshape(-1) if a.ndim == 0 else a
    if words.dtype.itemsize != 4 or words.dtype == bool:
        words = words.astype(xp.float32)  # of two bytes or one: exact
    words = words.view(xp.uint32)
    place = xp.zeros((), xp.uint32)
    for axis, size in enumerate(words.shape):
        shape = [1] * words.ndim
        shape[axis] = size
        place = place * xp.uint32(size) + xp.arange(size, dtype=xp.uint32).reshape(
            shape
        )
    words = words ^ (place * xp.uint32(0x9E3779B1) + xp.uint32(0x7F4A7C15))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # murmur3's finish
        words = (words ^ (words >> xp.uint32(shift))) * xp.uint32(factor)
    return xp.sum(words ^ (words >> xp.uint32(16)), dtype=xp.uint32)


class _UnknownAverage(ValueError):
    """Bad input, not a bad checkpoint."""


def _newest_good(
    workdir: str | Path,
    read: Callable[[Path], Any],
    verify: Callable[[Any], Any] = lambda result: result,
) -> tuple[int, Any]:
    """The newest step that both functions accept, and what they make of it.

    `read` may fail on one of several hosts; `verify` is called if it did on none.
    """
    problems = []
    for step in _steps(workdir):
        result, problem = None, None
        try:
            result = read(_directory(workdir) / str(step))
        except _UnknownAverage:
            raise
        except Exception as error:  # Orbax raises all kinds
            problem = _first_line(error)
        if not _on_every_host(problem is None):
            problems.append(f"step {step}: {problem or 'another host cannot read it'}")
            continue
        try:
            result = verify(result)
        except ValueError as error:
            problems.append(f"step {step}: {error}")
            continue
        if problems:
            warnings.warn(
                f"checkpoints of {str(workdir)!r} are damaged and passed over: "
                f"{'; '.join(problems)}. Step {step} is whole.",
                stacklevel=3,
            )
        return step, result
    if problems:
        raise ValueError(
            f"workdir must hold a whole checkpoint, and those of {str(workdir)!r} are "
            f"damaged: {'; '.join(problems)}."
        )
    raise ValueError(
        f"workdir must hold a checkpoint, and {str(workdir)!r} holds none."
    )


def _alone() -> ocp.options.MultiprocessingOptions:
    """Of several hosts, each reads by itself: one that fails must not leave the others
    waiting for it."""
    index = jax.process_index()
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=index,
        active_processes={index},
        barrier_sync_key_prefix=f"host{index}",
    )


def _read_record(path: Path) -> dict[str, Any]:
    sealed = json.loads((path / "record" / "metadata").read_text())
    if sealed.pop("checksum", None) != _checksum(sealed):
        raise ValueError("its record does not fit its checksum")
    return sealed


def _checksum(sealed: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(sealed, sort_keys=True).encode())


def _compare(saved: dict[str, int | None], found: dict[str, int]) -> None:
    wrong = [name for name in saved if saved[name] != found.get(name)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(saved)} arrays have changed, the first is {wrong[0]}"
        )


def _move_later_aside(workdir: Path, step: int) -> None:
    """Moves checkpoints after `step`, which are damaged, out of the way of new ones."""
    if jax.process_index() == 0:
        for later in [s for s in _steps(workdir) if s > step]:
            target = workdir / BAD / str(later)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            shutil.move(_directory(workdir) / str(later), target)
    sharding.barrier("damaged checkpoints moved")


def _on_every_host(good: bool) -> bool:
    if jax.process_count() == 1:
        return good
    return bool(multihost_utils.process_allgather(np.array(good)).all())


def _first_line(error: BaseException) -> str:
    return f"{error}".strip().split("\n")[0][:200] or type(error).__name__


def _steps(workdir: str | Path) -> Iterator[int]:
    """Steps of the complete checkpoints, the newest first."""
    directory = _directory(workdir)
    if directory.is_dir():
        names = [p.name for p in directory.iterdir() if p.name.isdigit()]
        yield from sorted(map(int, names), reverse=True)


def _directory(workdir: str | Path) -> Path:
    return Path(workdir).absolute() / "checkpoints"


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
