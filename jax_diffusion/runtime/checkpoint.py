"""Checkpoints: what is saved, how damage is found, and the rule of resuming.

WORKDIR/checkpoints/STEP holds the whole train state and a JSON record: the config, the
shape of the images, and the metrics since the last line of the log. Orbax writes it in
the background. A 32-bit digest of every array, which does not depend on how the
array is split over devices, and a checksum of the record are stored with them, because
Orbax restores a flipped byte without an error.

The rule of resuming: the newest checkpoint that is whole is taken, after all digests
have been compared. Later ones, which are damaged, are named in a warning and moved to
WORKDIR/bad_checkpoints. If there are checkpoints and none is whole, that is an error:
nothing starts afresh by itself. Without any checkpoint the state is initialized.

`config.keep` newest checkpoints stay, and those at multiples of `config.keep_every`.
Any number of devices or hosts reads what any other number has saved.
"""

import contextlib
import json
import logging
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jax_diffusion.runtime import locks, sharding
from jax_diffusion.runtime.digests import digests
from jax_diffusion.runtime.files import json_text, leaves_by_name, reason_of_disk
from jax_diffusion.runtime.orbax import alone, is_news, lean_handlers, reader

BAD = "bad_checkpoints"  # folder in the workdir, for damaged ones


def make_manager(
    workdir: str | Path,
    *,
    keep: int | None = 3,
    keep_every: int | None = None,
    handlers: dict[str, Any] | None = None,
) -> ocp.CheckpointManager:
    """Makes Orbax's manager of WORKDIR/checkpoints; the folder is made if need be.

    Args:
        workdir: the folder of the run.
        keep: number of newest checkpoints that stay; None for all.
        keep_every: checkpoints at multiples of this step stay too.
        handlers: Orbax's of "state" and "record", in place of its own choice.
    """
    logging.getLogger("absl").addFilter(is_news)  # the same one is added once
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        keep_period=keep_every,
        create=True,
        cleanup_tmp_directories=True,  # what a killed run has left half-written
    )
    return ocp.CheckpointManager(
        _directory(workdir), options=options, item_handlers=handlers
    )


def latest_step(workdir: str | Path) -> int | None:
    """Returns the step of the newest complete checkpoint, or None; creates nothing."""
    return next(all_steps(workdir), None)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: PyTree,
    record: dict[str, Any],
    *,
    as_item: Callable[[PyTree], Any] = ocp.args.StandardSave,
) -> None:
    """Saves a state in the background; `closing` waits for the disk.

    On several hosts, all of them call it.

    Args:
        manager: of `make_manager`.
        step: number of updates made.
        state: a pytree of arrays.
        record: plain JSON values; numbers that are not finite become words that `float`
            reads, see `files.json_text`.
        as_item: Orbax's argument that the manager takes for the state.

    Raises:
        OSError: if this one or the one before cannot be written, such as to a full
            disk, or if the workdir was lost, see `locks`; those before stay.
    """
    locks.check(Path(manager.directory).parent)
    record = json.loads(json_text(record))  # as it will be read
    sealed = {"record": record, "digests": digests(state)}
    items = ocp.args.Composite(
        state=as_item(state),
        record=ocp.args.JsonSave(sealed | {"checksum": _checksum(sealed)}),
    )
    with _writing(manager):
        manager.save(step, args=items, force=True)


@contextlib.contextmanager
def closing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Closes a manager in the end, also after an error: what it saves gets to the disk.

    Raises:
        OSError: if the last state cannot be written; those before stay.
    """
    try:
        yield
    finally:
        with _writing(manager):
            manager.close()


@contextlib.contextmanager
def _writing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns the errors of many kinds that a full or lost disk causes into OSError."""
    workdir = Path(manager.directory).parent
    try:
        yield
    except Exception as error:
        locks.check(workdir)  # a workdir that was removed causes errors of all kinds
        reason, newest = reason_of_disk(error), latest_step(workdir)
        if not reason:
            raise
        raise OSError(
            f"{manager.directory}: {reason}; a checkpoint is not complete, and the "
            f"newest whole one is {newest or 'none'}"
        ) from error


def save_params(
    workdir: str | Path, params: PyTree, record: dict[str, Any], *, step: int = 0
) -> None:
    """Writes parameters without a train state, for `load_params` and `load_record`.

    Args:
        workdir: a folder without checkpoints, made if need be.
        params: the parameters, NumPy arrays.
        record: plain JSON values: "config", "image_shape", ...
        step: number of updates made.

    Raises:
        ValueError: if the folder holds checkpoints already.
    """
    if latest_step(workdir) is not None:
        raise ValueError(f"workdir must be new, and {str(workdir)!r} holds a run.")
    manager = make_manager(workdir, keep=None, handlers=lean_handlers())
    with closing(manager):
        item = {"params": params, "ema_params": {}}
        save(manager, step, item, record, as_item=ocp.args.PyTreeSave)


def load_record(workdir: str | Path) -> dict[str, Any]:
    """Reads the JSON record of the newest checkpoint whose record is whole.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    return _newest_good(workdir, lambda path: _read_record(path)["record"])[1]


def load_shapes(workdir: str | Path) -> dict[str, tuple[int, ...]]:
    """Reads the shapes of the arrays of the newest whole state, by name.

    Names are those of `files.leaves_by_name`; no array is read.

    Raises:
        ValueError: if there is no such checkpoint.
    """

    def read(path):
        _read_record(path)
        with reader() as opened:
            tree = opened.metadata(path).item_metadata["state"].tree
        return {name: tuple(a.shape) for name, a in leaves_by_name(tree).items()}

    return _newest_good(workdir, read)[1]


def restore_or_init(
    manager: ocp.CheckpointManager,
    init_fn: Callable[[], PyTree],
    shardings: PyTree,
    *,
    keep: int | None = None,
    keep_every: int | None = None,
) -> tuple[PyTree, dict[str, Any] | None]:
    """Restores the newest whole state, or initializes one if there is no checkpoint.

    On several hosts, all of them call it.

    Args:
        manager: of `make_manager`.
        init_fn: returns the state before the first update.
        shardings: the sharding of each leaf of the state, whatever it was when saved.
        keep, keep_every: as for `make_manager`. A run that was killed between a save
            and the removal of older checkpoints has too many, which are removed now.

    Returns:
        The state and its record; the record is None if the state was initialized.

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
        with ocp.StandardCheckpointer(multiprocessing_options=alone()) as opened:
            return opened.restore(path / "state", target), _read_record(path)

    def verify(result):
        state, sealed = result
        _compare(sealed["digests"], digests(state))
        return state, sealed["record"]

    step, result = _newest_good(workdir, read, verify)
    if jax.process_index() == 0:
        for later in [s for s in all_steps(workdir) if s > step]:  # damaged
            aside = workdir / BAD / str(later)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            shutil.move(_directory(workdir) / str(later), aside)
    sharding.barrier("damaged checkpoints moved")
    steps = [*all_steps(workdir)]
    periodic = [s for s in steps if keep_every and s % keep_every == 0]
    keep_only(workdir, [*steps[:keep], *periodic])
    manager.reload()
    return result


def keep_only(workdir: str | Path, steps: Sequence[int]) -> None:
    """Removes all checkpoints but some; on several hosts, all of them call it.

    Args:
        workdir: the folder of a run, which no manager is writing to.
        steps: those that stay.
    """
    if jax.process_index() == 0:
        for step in [s for s in all_steps(workdir) if s not in steps]:
            shutil.rmtree(_directory(workdir) / str(step))
    sharding.barrier("superfluous checkpoints removed")


def load_params(workdir: str | Path, *, ema: str | None) -> PyTree:
    """Reads the parameters of the newest whole checkpoint; see `load_step_params`."""
    return load_step_params(workdir, ema=ema)[1]


def load_step_params(workdir: str | Path, *, ema: str | None) -> tuple[int, PyTree]:
    """Reads the parameters of the newest whole checkpoint, or one average of them.

    Nothing else is read.

    Args:
        workdir: the folder of a run.
        ema: name of the average, such as "0.9999"; None for the parameters themselves.

    Returns:
        The checkpoint's step, and a tree of NumPy arrays.

    Raises:
        ValueError: if no checkpoint is whole, or there is no such average.
    """

    return _newest_good(workdir, lambda path: _read_params(path, ema))


def load_params_at(workdir: str | Path, step: int, *, ema: str | None) -> PyTree:
    """Reads parameters as `load_step_params` does, of the checkpoint of one step.

    Raises:
        ValueError: if it is damaged or not there.
    """
    path = _directory(workdir) / str(step)
    try:
        return _read_params(path, ema)
    except Exception as error:  # Orbax raises all kinds
        raise ValueError(f"{path} must be a whole checkpoint: {error}") from error


class _UnknownAverage(ValueError):
    """The input is wrong, not the checkpoint."""


def _newest_good(
    workdir: str | Path,
    read: Callable[[Path], Any],
    verify: Callable[[Any], Any] = lambda result: result,
) -> tuple[int, Any]:
    """Returns the newest step that both functions accept, and their result.

    `read` may fail on one of several hosts; then `verify` is called on none.
    """
    problems = []
    for step in all_steps(workdir):
        result, problem = None, None
        try:
            result = read(_directory(workdir) / str(step))
        except _UnknownAverage as error:
            raise ValueError(str(error)) from None
        except Exception as error:  # Orbax raises all kinds
            problem = f"{error}".strip().split("\n")[0][:200] or type(error).__name__
        if not sharding.true_on_all_hosts(problem is None):
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


def _read_params(path: Path, ema: str | None) -> PyTree:
    sealed = _read_record(path)
    with reader() as opened:
        tree = opened.metadata(path).item_metadata["state"].tree
        averages = tree.get("ema_params") or {}
        if ema is not None and ema not in averages:
            known = [*sorted(averages), "none"]
            raise _UnknownAverage(f"ema must be one of {known}, got {ema!r}.")
        wanted = (
            {"params": tree["params"]}
            if ema is None
            else {"ema_params": {ema: tree["ema_params"][ema]}}
        )
        item = jax.tree.map(lambda a: np.empty((), a.dtype), wanted)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(item, as_numpy, partial_restore=True)
        state = opened.restore(path, args=ocp.args.Composite(state=args))["state"]
    found = digests(state)
    _compare({name: sealed["digests"].get(name) for name in found}, found)
    return state["params"] if ema is None else state["ema_params"][ema]


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


def all_steps(workdir: str | Path) -> Iterator[int]:
    """Yields the steps of the complete checkpoints, the newest first."""
    directory = _directory(workdir)
    if directory.is_dir():
        names = [p.name for p in directory.iterdir() if p.name.isdigit()]
        yield from sorted(map(int, names), reverse=True)


def _directory(workdir: str | Path) -> Path:
    return Path(workdir).absolute() / "checkpoints"
