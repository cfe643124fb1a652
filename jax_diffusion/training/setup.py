"""From a config to a compiled train step: what `train` runs.

`make_setup` builds data, network, optimizer and train step, and finds what does not
fit; `compile_step` compiles them for the devices that are there.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from jax_diffusion import checks, data, editing, training
from jax_diffusion import config as configs
from jax_diffusion.config import Config
from jax_diffusion.diffusion import Objective
from jax_diffusion.evaluation import published
from jax_diffusion.models import Network
from jax_diffusion.pipeline import (
    Run,
    SamplingOptions,
    TaskOptions,
    bind_sampler,
    match_classes,
    with_conditioning,
    with_effect,
)
from jax_diffusion.registry import choose, outside
from jax_diffusion.runtime import logs, sharding
from jax_diffusion.training import TrainState, consistency
from jax_diffusion.training.averages import average_names

# Fields of a config that are arguments of `make_train_step`.
STEP_FIELDS = (
    *("ema_decays", "ema_warmup", "ema_widths", "microbatches"),
    *("label_dropout", "low_res_size"),
)
PREVIEW_BATCH = 256  # images of a sample grid that are drawn together
MAX_PREVIEW = 65_536  # images of a sample grid


class TrainingSetup(NamedTuple):
    """What a config describes, on the devices that are there; nothing is compiled.

    Attributes:
        batches: the training images.
        mesh: the devices.
        rows: the row numbers of a batch that this host's devices hold, int [b_host].
        train_step: step(key, state, batch) -> (state, metrics).
        init: returns the state before the first update.
        start: returns that state for given parameters.
        key: of all training steps, replicated.
        lr_fn: the learning rate by the number of updates made; None if `train` was
            given an optimizer of its own.
        preview: draws a grid, preview(state) -> uint8 [n, h, w, c]; None for a
            classifier, and if config.sample_every is 0.
        model: the network.
        objective: None for a classifier.
    """

    batches: data.Batches
    mesh: Mesh
    rows: np.ndarray
    train_step: Callable[..., Any]
    init: Callable[[], TrainState]
    start: Callable[[PyTree], TrainState]
    key: jax.Array
    lr_fn: Callable[[int], Any] | None
    preview: Callable[[TrainState], np.ndarray] | None
    model: Network
    objective: Objective | None

    def place(self, local: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts this host's rows of a batch on the devices."""
        return sharding.global_batch(self.mesh, local, self.batches.batch_size)


def make_setup(
    config: Config,
    optimizer: optax.GradientTransformation | None = None,
    *,
    saved: Mapping[str, Any] | None = None,
) -> TrainingSetup:
    """Builds all that training needs from a config; compiles nothing yet.

    Args:
        config: a whole config, see `config.complete`.
        optimizer: used instead of the one that `config.optimizer` describes.
        saved: the record of the checkpoint that is continued; None if the run begins
            now: then fields that have no effect are refused.

    Raises:
        ValueError: for a field that is wrong, or that does not fit the others.
    """
    # What takes no time is built first: data may have to be decoded for minutes.
    mesh = configs.call(sharding.make_mesh, config.mesh, "config.mesh")
    schedule, objective, _ = configs.build(config, num_channels=1)
    check_choices(config, objective, fresh=saved is None)
    timestep_sampler = configs.make_timestep_sampler(
        config.timesteps, schedule, objective
    )
    tx, lr_fn = choose_optimizer(config, optimizer)
    batches = configs.call(
        data.load,
        config.data if saved is None else with_effect(config.data),
        "config.data",
        **dict(seed=config.seed, train=True, start_step=0),
    )
    with configs.named("config.data", config.data):
        rows = sharding.host_rows(mesh, batches.batch_size)
    image_shape = batches.image_shape
    model = configs.make_network(config, objective, image_shape[-1])
    run = Run(config, model, None, objective, image_shape)
    batches = dataclasses.replace(batches, conditioning_names=run.conditioning)
    consistency.tell_unused(batches, config.model.get("num_classes"))
    if saved is None:
        consistency.check_fit(config, model, batches)
        consistency.check_attention(config, model, image_shape)
    else:
        old = "class_names" not in saved
        consistency.check_fit(config, model, batches, fresh=False, old=old)
        if run.takes_labels:
            batches = match_classes(batches, saved)
    options = {name: config[name] for name in STEP_FIELDS}
    if mesh.shape["fsdp"] > 1:
        options["param_sharding"] = sharding.replicated(mesh)
    with configs.named("config", STEP_FIELDS):
        train_step = training.make_train_step(
            model, tx, schedule, objective, timestep_sampler, **options
        )
    preview = None
    if objective is not None and config.sample_every:
        preview = make_preview(run, batches, mesh)
    # On all devices at once: an array made on one host cannot be used by others.
    make_keys = jax.jit(
        lambda: tuple(jax.random.split(jax.random.key(config.seed))),
        out_shardings=sharding.replicated(mesh),
    )
    key_init, key = make_keys()

    of_state = image_shape, config.ema_decays, config.ema_widths

    @jax.jit  # so that its shapes and its program share one trace
    @naming_network(config, model)
    def init():
        return training.init_state(key_init, model, tx, timestep_sampler, *of_state)

    def start(params):
        return training.start_state(params, tx, timestep_sampler, *of_state[1:])

    return TrainingSetup(
        *(batches, mesh, rows, naming_network(config, model)(train_step), init, start),
        *(key, lr_fn, preview, model, objective),
    )


@contextlib.contextmanager
def naming_network(config: Config, model: Network) -> Iterator[None]:
    """Names config.model in what a network raises, which it does while it is traced."""
    name, rule = config.model.get("name"), "a network that can be trained"
    with (
        outside("config.model.name", name, rule),
        configs.named("config.model", vars(model)),
    ):
        yield


def choose_optimizer(
    config: Config, optimizer: optax.GradientTransformation | None
) -> tuple[optax.GradientTransformation, optax.Schedule | None]:
    """Returns an optimizer and, if the config describes it, its learning rate by step.

    Args:
        config: its group optimizer is read, unless there is an optimizer already.
        optimizer: that of `train`'s caller.

    Raises:
        ValueError: for a field that is wrong.
    """
    if optimizer is not None:
        return optimizer, None
    return configs.call(
        training.make_optimizer,
        config.optimizer,
        "config.optimizer",
        total_steps=config.total_steps,
    )


class CompiledStep(NamedTuple):
    """The compiled programs of a setup.

    Attributes:
        step: step(key, state, batch) -> (state, metrics); `state` is donated.
        init: returns the state before the first update, on its devices.
        shardings: where each leaf of the state goes.
        summary: a line about devices, parameters, memory and compile time.
    """

    step: jax.stages.Compiled
    init: Callable[[], TrainState]
    shardings: PyTree
    summary: str


def compile_step(setup: TrainingSetup, *, fresh: bool) -> CompiledStep:
    """Compiles the train step and, for a fresh run, the initialization of its state.

    Args:
        setup: of `make_setup`.
        fresh: whether there is no checkpoint to go on from.
    """
    begun, mesh = time.perf_counter(), setup.mesh
    shapes = jax.eval_shape(setup.init)
    step, shardings = sharding.jit_step(mesh, setup.train_step, shapes)
    # Drawing hundreds of small arrays runs once and compiles slowly: on the CPU,
    # optimizing it costs more than the rest of the start.
    quick = {"xla_backend_optimization_level": "0"}
    on_cpu = jax.default_backend() == "cpu"
    init = jax.jit(
        setup.init, out_shardings=shardings, compiler_options=quick if on_cpu else None
    )
    # On the CPU, the step's compilation leaves a core idle. Several hosts must compile
    # in one order: they may exchange what they have found out.
    beside = fresh and on_cpu and jax.process_count() == 1
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: init.lower().compile()) if beside else None
        first_batch = setup.place(setup.batches.batch(0, setup.rows))
        compiled = step.lower(setup.key, shapes, first_batch).compile()
        first_state = other.result() if other else init
    count = sum(a.size for a in jax.tree.leaves(shapes.params))
    line = f"{mesh.size} x {jax.devices()[0].device_kind}"
    if mesh.shape["fsdp"] > 1 or jax.process_count() > 1:
        sizes = " x ".join(f"{name} {n}" for name, n in mesh.shape.items())
        line += f" ({sizes}, {jax.process_count()} hosts)"
    line += f" | {count:,} parameters"
    if (memory := compiled.memory_analysis()) is not None:
        need = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        need += memory.output_size_in_bytes - memory.alias_size_in_bytes
        has = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        of = f" of {has / 2**20:,.0f}" if has else ""
        line += f" | step needs {need / 2**20:,.0f}{of} MiB a device"
    line += f" | compiled in {time.perf_counter() - begun:.1f} s"
    return CompiledStep(compiled, first_state, shardings, line)


def make_preview(
    run: Run, batches: data.Batches, mesh: Mesh
) -> Callable[[TrainState], np.ndarray]:
    """Builds preview(state) -> uint8 [n, h, w, c], drawn with the first average.

    Labels 0, 1, 2, ... are drawn in turn. A network with conditioning is told that of
    the first images in the stored order, and their labels; one with low_res enlarges
    images of the first batch, and is told theirs.

    Args:
        run: a run without parameters, whose config.sampling says how to draw.
        batches: the training images.
        mesh: the devices that share the work.

    Raises:
        ValueError: for a field of config.sampling that is wrong.
    """
    run = dataclasses.replace(run, class_names=batches.class_names)
    config, task = run.config, TaskOptions()
    fields = dict(config.sampling)
    n = fields.pop("n")
    options = configs.call(SamplingOptions, fields, "config.sampling")
    if config.low_res_size:
        first = batches.batch(0)
        options = with_conditioning(run, options, first)
        large = jnp.asarray(data.from_uint8(first["image"]))
        small = editing.shrink(large, size=large.shape[1] // config.low_res_size)
        task = TaskOptions(low_res=np.asarray(small))
    elif batches.conditioning and options.cond is None:
        rows = np.arange(min(n, batches.num_examples))
        options = with_conditioning(run, options, batches.beside(rows))
    with configs.named("config.sampling", vars(options)):
        bound = bind_sampler(run, options, task, one_program=False)
    ema = average_names(config.ema_decays, config.ema_widths)[0]

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


def check_choices(config: Config, objective: Objective | None, *, fresh: bool) -> None:
    """Checks fields that are needed only later, such as how to draw.

    Args:
        config: a whole config.
        objective: which it describes.
        fresh: whether the run begins now; see `consistency.check_dtype`.

    Raises:
        ValueError: that names the field.
    """
    if fresh:
        consistency.check_dtype(config)
    if objective and objective.learns_variance:
        losses = ("hybrid", "vlb")  # others tell the variance nothing
        if objective.loss not in losses:
            raise ValueError(
                f"config.objective.loss must be one of {losses} for a learned "
                f"variance, got {objective.loss!r}."
            )
    with configs.named("config", ["log_to"]):
        logs.check_writers(config.log_to)
    if config.reproduces:
        choose("config.reproduces", config.reproduces, published.PAPERS)
    for group in ("sampling", "evaluation"):
        if config[group] is None:
            continue
        known = {field.name for field in dataclasses.fields(SamplingOptions)}
        fields = {name: value for name, value in config[group].items() if name in known}
        configs.call(SamplingOptions, fields, f"config.{group}")
    if config.sampling is not None:
        n = config.sampling.n
        checks.integer("config.sampling.n", n, at_least=1, at_most=MAX_PREVIEW)
