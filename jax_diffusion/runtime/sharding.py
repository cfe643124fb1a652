"""One mesh for every program: which device holds what, and how hosts find each other.

The mesh has two axes, `data` and `fsdp`. A batch is split over both. Parameters,
averages and optimiser state are split over `fsdp`, each along the largest of its axes
that can be; they are copied along `data`. With fsdp = 1, plain data parallelism.

Nothing here changes what is computed: programs are written for one device, and XLA
inserts the exchanges (`jax.jit` with shardings; `pmap` is history).
"""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

AXES = ("data", "fsdp")
# Leaves of fewer numbers are copied: to exchange them costs more than they take.
MIN_SPLIT = 2**12
TIMEOUT = 30  # seconds until a silent host is given up; JAX would wait for 100 and 300


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the other processes of this job, before JAX has looked for its devices.

    Without arguments they are found through what Cloud TPU, SLURM, Open MPI or an
    indexed Kubernetes job have set; where none has, this process is alone.

    Args:
        coordinator: "HOST:PORT" of process 0, which listens there.
        num_processes: of the job.
        process_id: of this one, from 0.

    Raises:
        ValueError: if some but not all are given, or they are out of range.
    """
    given = (coordinator, num_processes, process_id)
    if all(value is None for value in given):
        if not _on_cluster():
            return
        try:
            jax.distributed.initialize(
                heartbeat_timeout_seconds=TIMEOUT, shutdown_timeout_seconds=TIMEOUT
            )
        except ValueError as error:
            raise ValueError(
                "this job's other processes must be known to jax.distributed or be "
                f"told by --coordinator, --num-processes and --process-id, got: {error}"
            ) from error
        return
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(
            "coordinator, num_processes and process_id must be given together, got "
            f"{given}."
        )
    if not 0 <= process_id < num_processes or ":" not in coordinator:
        raise ValueError(
            "coordinator must be HOST:PORT and process_id in [0, num_processes), got "
            f"{given}."
        )
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=TIMEOUT,
        shutdown_timeout_seconds=TIMEOUT,
    )


def _on_cluster() -> bool:
    """Whether jax.distributed can find the other processes by itself."""
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return (
        any(int(os.environ.get(name, 1)) > 1 for name in counts)
        or "JOB_COMPLETION_INDEX" in os.environ
        or (importlib.util.find_spec("libtpu") is not None and _has_tpu())
    )


def _has_tpu() -> bool:
    return Path("/dev/vfio").exists() or any(Path("/dev").glob("accel*"))


def make_mesh(
    *, data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """The mesh of all devices of all hosts, or of some.

    Args:
        data, fsdp: devices along each axis; -1 for all that the other leaves.
        devices: default `jax.devices()`.

    Raises:
        ValueError: unless data * fsdp is the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    sizes = (
        count // fsdp if data == -1 and fsdp > 0 else data,
        count // data if fsdp == -1 and data > 0 else fsdp,
    )
    if min(sizes) < 1 or sizes[0] * sizes[1] != count:
        raise ValueError(
            f"data * fsdp must be the number of devices, {count}, got data = {data} "
            f"and fsdp = {fsdp}."
        )
    # Explicit axes, the default, would ask for the sharding of every convolution.
    auto = (AxisType.Auto,) * 2
    return jax.make_mesh(sizes, AXES, axis_types=auto, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_sharding(mesh: Mesh, shapes: PyTree) -> PyTree:
    """Where each leaf goes: split over `fsdp` along the largest axis that it divides.

    Small leaves, and those that no axis of which can be split, are copied: more devices
    than channels have common divisors save little.
    """

    def of_leaf(leaf):
        size, axes = mesh.shape["fsdp"], dict[int, str]()
        fitting = [n for n in leaf.shape if n % size == 0]
        if size > 1 and fitting and np.prod(leaf.shape) >= MIN_SPLIT:
            axes[leaf.shape.index(max(fitting))] = "fsdp"
        names = [axes.get(axis) for axis in range(len(leaf.shape))]
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree.map(of_leaf, shapes)


def jit_step(
    mesh: Mesh, train_step: Callable[..., Any], state: PyTree
) -> tuple[Any, PyTree]:
    """A train step (key, state, batch) -> (state, metrics) under `jax.jit` on a mesh.

    The state it is given is donated; key and metrics are on every device.

    Args:
        state: shapes of the leaves.

    Returns:
        The step, not yet compiled, and where each leaf of the state goes.
    """
    whole, states = replicated(mesh), state_sharding(mesh, state)
    step = jax.jit(
        train_step,
        in_shardings=(whole, states, batch_sharding(mesh)),
        out_shardings=(states, whole),
        donate_argnums=1,
    )
    return step, states


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this host's devices hold, in increasing order.

    Raises:
        ValueError: unless the batch divides by the number of devices.
    """
    if batch_size % mesh.size:
        raise ValueError(
            f"batch_size must be divisible by the number of devices, {mesh.size}, got "
            f"{batch_size}."
        )
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[index] for index in parts.values()]))


def global_batch(
    mesh: Mesh, local: Mapping[str, np.ndarray], batch_size: int
) -> dict[str, jax.Array]:
    """Global arrays of `batch_size` rows, of which `local` has those of this host."""
    if jax.process_count() == 1:
        return jax.device_put(dict(local), batch_sharding(mesh))
    rows = host_rows(mesh, batch_size)

    def place(array):
        def part(index):
            first, last, _ = index[0].indices(batch_size)
            return array[np.searchsorted(rows, first) :][: last - first]

        shape = (batch_size, *array.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh), part)

    return {name: place(array) for name, array in local.items()}


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
    """Copies on all devices of arrays that are not on them yet."""
    devices = set(mesh.devices.flat)

    def put(a):
        there = isinstance(a, jax.Array) and a.sharding.device_set == devices
        return a if there else jax.device_put(a, replicated(mesh))

    return jax.tree.map(put, tree)


def shard_padded(mesh: Mesh, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays of rows [n, ...] that every host has; the last is repeated until
    their number divides by that of the devices."""
    n = len(next(iter(arrays.values())))
    batch_size = -(-n // mesh.size) * mesh.size
    rows = np.minimum(host_rows(mesh, batch_size), n - 1)
    local = {name: a[rows] for name, a in arrays.items()}
    return global_batch(mesh, local, batch_size)


def same_on_all_hosts(text: str) -> bool:
    """Whether all processes have the same text."""
    if jax.process_count() == 1:
        return True
    mine = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return bool((multihost_utils.process_allgather(mine) == mine).all())


def broadcast_from_first(number: int) -> int:
    """The number that process 0 has, on all."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def barrier(name: str) -> None:
    """Waits until all processes have come to this line, such as for a file of one.

    Args:
        name: of the line, the same in all processes, for JAX to check.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: PyTree) -> PyTree:
    """NumPy copies, on every host, of arrays that may lie on several."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
