r"""Several devices and several hosts: one mesh, and who holds which part of an array.

The mesh has two axes, `data` and `fsdp`. A batch is split over both. Parameters, their
averages and the state of the optimizer are split over `fsdp`, each array along its
largest axis that divides, and copied along `data`. With fsdp = 1, the default, that is
plain data parallelism. Programs are written for one device; XLA inserts the exchanges
(`jax.jit` with shardings, not `pmap`). Samples, losses and scores do not depend on the
number of devices but for rounding.

`train` uses all devices of all hosts with the same command:

    --config.mesh.fsdp=8         split the state over 8 devices, where memory is short
    --config.microbatches=4      compute a batch in four parts, one after the other
    config.model.remat=...       compute activations twice instead of keeping them

`config.data.batch_size` is that of the whole job and must divide by the number of
devices. Parameters are float32 whatever `config.model.dtype`. `sample` and `evaluate`
use every device too. All hosts must see the workdir, on a shared disk or bucket.

One machine, several GPUs:

    pip install '.[cuda]'
    python -m jax_diffusion.train --config configs/cifar10.py --workdir runs/cifar10

A slice of TPU VMs, from outside:

    gcloud compute tpus tpu-vm ssh SLICE --zone=ZONE --worker=all --command="
        cd jax_diffusion && .venv/bin/python -m jax_diffusion.train \
        --config configs/imagenet64.py --workdir /shared/imagenet64"

A SLURM job of four nodes with eight GPUs each, one process for each GPU:

    #!/bin/bash
    #SBATCH --nodes=4 --ntasks-per-node=8 --gpus-per-node=8
    #SBATCH --requeue --signal=TERM@120
    srun --kill-on-bad-exit=1 .venv/bin/python -m jax_diffusion.train \
        --config configs/imagenet64.py --workdir /shared/imagenet64 \
        --config.mesh.fsdp=8

Cloud TPU, SLURM, Open MPI and indexed Kubernetes jobs (GKE) tell each process where the
others are. Elsewhere flags do; here those of the first of two hosts:

    --coordinator host0:1234 --num-processes 2 --process-id 0

Host 0 alone prints, logs and draws. Its first line tells devices, parameters, the
memory that a device needs and has, and the seconds of compilation. A SIGTERM to any
host makes all save the same step and exit with status 0. If a host is lost, the others
end within a minute (JAX prints "another task died", or a computation fails). Either way
the same command goes on from the last checkpoint, on as many devices and hosts as there
are then: bit for bit the same on the same number, up to rounding on another.

This is tested on fake CPU devices and with several processes on one machine; no pod has
run it yet.
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

from jax_diffusion import checks

AXES = ("data", "fsdp")
# Arrays of fewer numbers are copied: exchanging them costs more than they take.
MIN_SPLIT = 2**12
TIMEOUT = 30  # seconds until a silent host is given up; JAX would wait for 100 and 300


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the other processes of this job; call it before JAX looks for devices.

    Without arguments, JAX finds the others by the environment variables of Cloud TPU,
    SLURM, Open MPI or an indexed Kubernetes job; without those, this process is alone.

    Args:
        coordinator: "HOST:PORT", where process 0 listens.
        num_processes: number of processes of the job.
        process_id: number of this process, in [0, num_processes).

    Raises:
        ValueError: if some arguments but not all are given, or one is out of range.
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
    """Tells whether jax.distributed can find the other processes by itself."""
    has_tpu = Path("/dev/vfio").exists() or any(Path("/dev").glob("accel*"))
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return (
        any(int(os.environ.get(name, 1)) > 1 for name in counts)
        or "JOB_COMPLETION_INDEX" in os.environ
        or (importlib.util.find_spec("libtpu") is not None and has_tpu)
    )


def make_mesh(
    *, data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Makes a mesh of all devices of all hosts, or of some, with the axes of `AXES`.

    Args:
        data: number of devices along this axis; -1 for all that `fsdp` leaves.
        fsdp: number of devices along this axis; -1 for all that `data` leaves.
        devices: by default `jax.devices()`.

    Raises:
        ValueError: unless data * fsdp is the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    for name, size in (("data", data), ("fsdp", fsdp)):
        checks.integer(name, size, at_least=-1)
    sizes = (
        count // fsdp if data == -1 and fsdp > 0 else data,
        count // data if fsdp == -1 and data > 0 else fsdp,
    )
    if min(sizes) < 1 or sizes[0] * sizes[1] != count:
        raise ValueError(
            f"data * fsdp must be the number of devices, {count}, got data = {data} "
            f"and fsdp = {fsdp}."
        )
    # With explicit axes, the default, every convolution must be given a sharding.
    auto = (AxisType.Auto,) * 2
    return jax.make_mesh(sizes, AXES, axis_types=auto, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds as a whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_sharding(mesh: Mesh, shapes: PyTree) -> PyTree:
    """Returns the sharding of each leaf: split over `fsdp` along one axis, or copied.

    A leaf is split along its largest axis whose size divides by the number of devices
    along `fsdp`. Leaves without such an axis, and small ones, are copied. Most axes are
    numbers of channels: choose fsdp such that it divides them, or little is saved.

    Args:
        mesh: of `make_mesh`.
        shapes: arrays, or their shapes and dtypes.
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
    """Puts a train step under `jax.jit` with shardings; donates the state to it.

    Args:
        mesh: of `make_mesh`.
        train_step: train_step(key, state, batch) -> (state, metrics); key and metrics
            are on every device.
        state: the state, or shapes and dtypes of its leaves.

    Returns:
        The step, not compiled yet, and the sharding of each leaf of the state.
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
    """Returns the rows of a batch that this host's devices hold, ascending int [k].

    Args:
        mesh: of `make_mesh`.
        batch_size: number of rows of the whole job's batch.

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
    """Makes arrays of `batch_size` rows from those that every host has.

    Args:
        mesh: of `make_mesh`.
        local: this host's rows, see `host_rows`, by name.
        batch_size: number of rows of the whole job's batch.

    Returns:
        Arrays [batch_size, ...] whose rows are split over all devices.
    """
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
    """Copies arrays to all devices of a mesh, unless they are there already."""
    devices = set(mesh.devices.flat)

    def put(a):
        there = isinstance(a, jax.Array) and a.sharding.device_set == devices
        return a if there else jax.device_put(a, replicated(mesh))

    return jax.tree.map(put, tree)


def shard_padded(mesh: Mesh, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Splits rows over all devices, after filling up with copies of the last one.

    Args:
        mesh: of `make_mesh`.
        arrays: arrays [n, ...] by name, the same on every host.

    Returns:
        Arrays [m, ...], where m is the next multiple of the number of devices.
    """
    n = len(next(iter(arrays.values())))
    batch_size = -(-n // mesh.size) * mesh.size
    rows = np.minimum(host_rows(mesh, batch_size), n - 1)
    local = {name: a[rows] for name, a in arrays.items()}
    return global_batch(mesh, local, batch_size)


def same_on_all_hosts(text: str) -> bool:
    """Tells whether all processes call this with the same text."""
    if jax.process_count() == 1:
        return True
    mine = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return bool((multihost_utils.process_allgather(mine) == mine).all())


def true_on_all_hosts(flag: bool) -> bool:
    """Tells whether all processes call this with True; all of them get the answer.

    Args:
        flag: what this process has to say, such as whether it could read a file.
    """
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).all())


def broadcast_from_first(number: int) -> int:
    """Returns, on all processes, the number that process 0 has; it must fit int32."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def barrier(name: str) -> None:
    """Waits until all processes have come here, such as until one has written a file.

    Args:
        name: the same in all processes; JAX checks it.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: PyTree) -> PyTree:
    """Copies arrays, which may lie on several hosts, to NumPy arrays on every host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
