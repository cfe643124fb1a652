"""How training should scale, by its compiled programs alone: predicted, not measured.

    python -m tests.benchmarks.scaling [--compiler tpu] [--devices 1,8] [--meshes data]

Compiles the train step for so many devices, as `train` does, and runs nothing. A row
tells what one device then does in a step, and its images a second beside those of a
device that is alone, were it a TPU v5e or an H100: without any overlap of work and
exchange, and with the fullest. Every device has as many images, however many there are
(weak scaling), so that the batch becomes very large.

With `--compiler tpu` the programs are those of a TPU v5e: the package libtpu (extra
`tpu`) compiles for slices that are not there. With `--compiler cpu` they are those of
as many fake CPU devices, whose fusions move several times the bytes, so that work is
bounded by the operations alone; that is too short, and makes exchanges weigh more.
An H100 gets the same programs; its own were not compiled.

What is not in it: latencies, devices that wait for another, and the input.
"""

import argparse
import functools
import os
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jax_diffusion import config as settings
from jax_diffusion import training
from jax_diffusion.runtime import device_peaks, sharding

from . import roofline

CONFIGS = Path(__file__).parents[2] / "configs"
IMAGES = {"cifar10": (32, 64), "imagenet64": (64, 16)}  # side, and images per device
KINDS = {"v5e": "TPU v5 lite", "H100": "NVIDIA H100 80GB HBM3"}
SLICES = {  # of a TPU v5e, by devices
    **{1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4"},
    **{32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
}
MESHES = {  # devices along fsdp, of so many
    "data": lambda n: 1,
    "fsdp": lambda n: n,
    "node": lambda n: min(n, 8),  # split within a node, copied from node to node
}
HEADS = ("config", "devices", "data x fsdp", "TFLOP", "GB", "MB sent")
# Only what LLVM makes of a program for the CPU gets worse, and nobody looks at that.
QUICK: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}


@functools.cache
def program(name):
    """Of a config: its step on any mesh, and the shapes of its state."""
    config = settings.load_config(str(CONFIGS / f"{name}.py"))
    schedule = settings.make_schedule(config.schedule)
    objective = settings.make_objective(config.objective, schedule)
    model = settings.make_model(config.model, objective, num_channels=3)
    sampler = settings.make_timestep_sampler(config.timesteps, schedule)
    optimizer = dict(config.optimizer, total_steps=config.total_steps)
    tx, _ = training.make_optimizer(**optimizer)
    decays, side = config.ema_decays, IMAGES[name][0]

    def make_step(mesh):
        options = dict(ema_decays=decays, param_sharding=sharding.replicated(mesh))
        return training.make_train_step(
            model, tx, schedule, objective, sampler, **options
        )

    def init(key):
        shape = (side, side, 3)
        return training.init_state(key, model, tx, sampler, shape, decays)

    return make_step, jax.eval_shape(init, jax.random.key(0))


def devices_of(compiler, count):
    """So many devices to compile for."""
    if compiler == "cpu":
        return jax.devices()[:count]
    topology = topologies.get_topology_desc(f"v5e:{SLICES[count]}", platform="tpu")
    return topology.devices


def compile_step(name, compiler, count, fsdp):
    """The step as `count` devices would run it."""
    make_step, state = program(name)
    mesh = sharding.make_mesh(fsdp=fsdp, devices=devices_of(compiler, count))
    side, images = IMAGES[name]
    b = images * count
    batch = {
        "image": jax.ShapeDtypeStruct((b, side, side, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((b,), jnp.int32),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    step, _ = sharding.jit_step(mesh, make_step(mesh), state)
    # The network as accelerators run it: cpu_convs.py saves operations on the CPU.
    with mock.patch("jax.lax.platform_dependent", roofline.elsewhere):
        lowered = step.lower(key, state, batch)
    return lowered.compile(compiler_options=QUICK if compiler == "cpu" else None)


def times(cost, compiler, kind):
    """Seconds of a step without overlap and with it."""
    if compiler == "cpu":
        cost = cost._replace(bytes=0.0)
    peak = device_peaks.PEAKS[kind]
    return [
        roofline.seconds(cost, peak, "float32", overlap=overlap)
        for overlap in (False, True)
    ]


def row(name, compiler, mesh, cost, alone):
    """The cells of a line: of the cost, and the efficiency beside one device."""
    cells = [name, str(mesh[0] * mesh[1]), f"{mesh[0]} x {mesh[1]}"]
    cells += [f"{cost.flops / 1e12:.2f}", f"{cost.bytes / 1e9:.1f}"]
    cells.append(f"{cost.collective_bytes / 1e6:.0f}")
    for kind in KINDS.values():
        ones, many = times(alone, compiler, kind), times(cost, compiler, kind)
        cells += [f"{a / b:.2f}" for a, b in zip(ones, many, strict=True)]
    return cells


def main():
    """Prints a line a case as it is ready, and all of them as a table in the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compiler", choices=("cpu", "tpu"), default="cpu")
    parser.add_argument("--devices", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--configs", default=",".join(IMAGES))
    parser.add_argument("--meshes", default=",".join(MESHES))
    args = parser.parse_args()
    counts = [int(n) for n in args.devices.split(",")]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(counts))
    if args.compiler == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask about
        counts = [n for n in counts if n in SLICES]
    table = []
    for name in args.configs.split(","):
        alone = roofline.cost(compile_step(name, args.compiler, 1, 1))
        for count in counts:
            sizes = {MESHES[mesh](count) for mesh in args.meshes.split(",")}
            for fsdp in sorted(sizes):
                begun = time.perf_counter()
                cost = alone
                if count > 1:
                    cost = roofline.cost(compile_step(name, args.compiler, count, fsdp))
                mesh = (count // fsdp, fsdp)
                table.append(row(name, args.compiler, mesh, cost, alone))
                print(*table[-1], roofline.traffic(cost.collectives), end=" ")
                print(f"({time.perf_counter() - begun:.0f} s)", flush=True)
    heads = [*HEADS, *(f"{kind} {how}" for kind in KINDS for how in ("none", "full"))]
    print(
        "\nImages/s per device beside one device, by roofline; predicted, not measured"
    )
    print("(overlap of work and exchange: none, full).\n")
    for cells in (heads, ["---"] * len(heads), *table):
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
