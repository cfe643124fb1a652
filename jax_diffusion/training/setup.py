"""From a config to a compiled program: what `train` runs.

`make_plan` builds the data, the network and the train step, and finds what does not
fit; `compile_plan` compiles them for the devices that are there.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jax_diffusion import config as settings
from jax_diffusion import data, editing
from jax_diffusion.config import Config
from jax_diffusion.diffusion import Objective
from jax_diffusion.models import traits
from jax_diffusion.pipeline import Run, SamplingOptions, TaskOptions, bind_sampler
from jax_diffusion.runtime import sharding
from jax_diffusion.training import step as training
from jax_diffusion.training.step import TrainState

STEP_OPTIONS = (
    *("ema_decays", "ema_warmup", "microbatches"),
    *("label_dropout", "low_res_size"),
)
PREVIEW_BATCH = 256


class Plan(NamedTuple):
    """What a config describes, on the devices that are there."""

    batches: data.Batches
    mesh: Mesh
    rows: np.ndarray  # of a batch, that this host's devices hold
    train_step: Callable[..., Any]
    init: Callable[[], TrainState]
    key: jax.Array  # the run's, replicated
    lr_fn: Callable[[int], Any]
    preview: Callable[[TrainState], np.ndarray] | None  # uint8 [n h w c]
    model: nn.Module
    objective: Objective | None  # None of a classifier

    def place(self, local: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This host's rows of a batch, on the devices."""
        return sharding.global_batch(self.mesh, local, self.batches.batch_size)


def make_plan(config: Config) -> Plan:
    """Builds everything, and compiles nothing yet.

    Raises:
        ValueError: for a field that is wrong, or that does not fit the others.
    """
    mesh = settings.call(sharding.make_mesh, config.mesh, "config.mesh")
    batches = settings.call(data.load, config.data, "config.data", seed=config.seed)
    rows = sharding.host_rows(mesh, batches.batch_size)
    image_shape = batches.image_shape
    schedule, objective, model = settings.build(config, image_shape[-1])
    _check_labels(config, model, batches)
    _check_low_res(config, model, image_shape)
    timestep_sampler = settings.make_timestep_sampler(
        config.timesteps, schedule.num_steps
    )
    optimizer = dict(config.optimizer, total_steps=config.total_steps)
    tx, lr_fn = settings.call(training.make_optimizer, optimizer, "config.optimizer")
    options = {name: config[name] for name in STEP_OPTIONS}
    if mesh.shape["fsdp"] > 1:
        options["param_sharding"] = sharding.replicated(mesh)
    train_step = training.make_train_step(
        model, tx, schedule, objective, timestep_sampler, **options
    )
    preview = make_preview(config, model, objective, batches, mesh)
    # Made on all devices at once: an array of one host is none of the others'.
    keys = jax.jit(
        lambda: tuple(jax.random.split(jax.random.key(config.seed))),
        out_shardings=sharding.replicated(mesh),
    )
    key_init, key = keys()

    @jax.jit  # so that its shapes and its program share one trace
    def init():
        return training.init_state(
            key_init, model, tx, timestep_sampler, image_shape, config.ema_decays
        )

    return Plan(
        batches, mesh, rows, train_step, init, key, lr_fn, preview, model, objective
    )


class Program(NamedTuple):
    """What is compiled of a plan."""

    step: jax.stages.Compiled
    init: Callable[[], TrainState]
    shardings: PyTree  # of the state
    summary: str


def compile_plan(plan: Plan, *, fresh: bool) -> Program:
    """Compiles the step, its state donated, and for a fresh run the initialisation."""
    begun = time.perf_counter()
    shapes = jax.eval_shape(plan.init)
    step, shardings = sharding.jit_step(plan.mesh, plan.train_step, shapes)
    # BoundSampler hundreds of small arrays runs once and compiles slowly: on the CPU,
    # optimising it costs more than the rest of the start.
    quick = {"xla_backend_optimization_level": "0"}
    on_cpu = jax.default_backend() == "cpu"
    init = jax.jit(
        plan.init, out_shardings=shardings, compiler_options=quick if on_cpu else None
    )
    # On the CPU, the step's compilation leaves a core idle. Several hosts must compile
    # in one order: they may exchange what they have found out.
    beside = fresh and on_cpu and jax.process_count() == 1
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: init.lower().compile()) if beside else None
        lowered = step.lower(
            plan.key, shapes, plan.place(plan.batches.batch(0, plan.rows))
        )
        compiled = lowered.compile()
        first_state = other.result() if other else init
    count = sum(a.size for a in jax.tree.leaves(shapes.params))
    line = f"{plan.mesh.size} x {jax.devices()[0].device_kind}"
    if plan.mesh.shape["fsdp"] > 1 or jax.process_count() > 1:
        sizes = " x ".join(f"{name} {n}" for name, n in plan.mesh.shape.items())
        line += f" ({sizes}, {jax.process_count()} hosts)"
    line += f" | {count:,} parameters"
    line += _memory_line(compiled)
    line += f" | compiled in {time.perf_counter() - begun:.1f} s"
    return Program(compiled, first_state, shardings, line)


def _memory_line(compiled: Any) -> str:
    """What the step needs on a device, and what that has, where they tell."""
    memory = compiled.memory_analysis()
    if memory is None:
        return ""
    need = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    need += memory.output_size_in_bytes - memory.alias_size_in_bytes
    stats = jax.local_devices()[0].memory_stats() or {}
    of = f" of {stats['bytes_limit'] / 2**20:,.0f}" if "bytes_limit" in stats else ""
    return f" | step needs {need / 2**20:,.0f}{of} MiB a device"


def make_preview(
    config: Config,
    model: nn.Module,
    objective: Objective | None,
    batches: data.Batches,
    mesh: Mesh,
) -> Callable[[TrainState], np.ndarray] | None:
    """Builds preview(state) -> uint8 images [n h w c], drawn with the first average.

    None for a classifier, which has nothing to draw.
    """
    if objective is None:
        return None
    group, task = dict(config.sampling), TaskOptions()
    if "n" not in group:
        raise ValueError("config.sampling must have the fields ['n'], got none.")
    n = group.pop("n")
    if config.low_res_size:  # small images of the first batch, and their labels
        first = batches.batch(0)
        large = jnp.asarray(data.from_uint8(first["image"]))
        small = editing.shrink(large, size=large.shape[1] // config.low_res_size)
        task = TaskOptions(low_res=np.asarray(small))
        if traits(model).num_classes is not None:
            group.setdefault("label", first["label"])
    options = settings.call(SamplingOptions, group, "config.sampling")
    run = Run(config, model, None, objective, batches.image_shape)
    bound = bind_sampler(run, options, task, one_program=False)
    ema = training.ema_name(config.ema_decays[0])

    def preview(state):
        drawn = bound.batches(
            n,
            seed=config.seed,
            batch_size=min(n, PREVIEW_BATCH),
            mesh=mesh,
            params=state.ema_params[ema],
        )
        return np.concatenate([frames[-1] for frames, _ in drawn])

    return preview


def _check_low_res(config: Config, model: nn.Module, image_shape) -> None:
    size = config.low_res_size
    if bool(size) != traits(model).low_res:
        raise ValueError(
            "config.low_res_size must be given for a model with low_res and for no "
            f"other, got {size}."
        )
    if size and (size < 0 or any(n % size for n in image_shape[:2])):
        raise ValueError(
            f"config.low_res_size must divide images {image_shape}, got {size}."
        )


def _check_labels(config: Config, model: nn.Module, batches: data.Batches) -> None:
    share = config.label_dropout
    if not 0 <= share < 1 or (share and training.num_classes(model) is None):
        raise ValueError(
            "config.label_dropout must be in [0, 1), and 0 for a network that knows no "
            f"labels, got {share}."
        )
    for name in ("num_classes", "num_labels"):  # a classifier answers with the latter
        known = traits(model)._asdict()[name]
        if known is None:
            continue
        hidden = ", the last being for hidden labels" if share else ""
        if batches.num_classes > known - bool(share):
            raise ValueError(
                f"labels must be below config.model.{name} = {known}{hidden}, got "
                f"{batches.num_classes - 1}."
            )
