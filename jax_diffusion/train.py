"""The training program: one config, one workdir, stop and start again as you like.

    python -m jax_diffusion.train --config configs/digits.py --workdir runs/digits

The same command continues a run that was stopped, bit for bit on the same device count.
"""

import argparse
import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from tqdm import tqdm

from jax_diffusion import (
    checkpoint,
    cpu,
    data,
    logs,
    plotting,
    sample,
    settings,
    training,
)
from jax_diffusion.diffusion import Objective
from jax_diffusion.settings import Config
from jax_diffusion.training import TrainState


class StopRequest:
    """Set by the first SIGTERM or Ctrl-C, while `listen` is in force."""

    name = ""  # of the signal, once it came

    @contextlib.contextmanager
    def listen(self) -> Iterator["StopRequest"]:
        """Catches the signals; a second one acts as usual."""

        def catch(number, frame):
            self.name = signal.Signals(number).name
            restore()

        def restore():
            for number, handler in previous.items():
                signal.signal(number, handler)

        previous = {}
        with contextlib.suppress(ValueError):  # not the main thread: nothing to catch
            for number in (signal.SIGTERM, signal.SIGINT):
                previous[number] = signal.signal(number, catch)
        try:
            yield self
        finally:
            restore()


def train(config: Config, workdir: str | Path) -> TrainState:
    """Trains until config.total_steps, or until a signal, and returns the state.

    Writes checkpoints, metrics.jsonl, TensorBoard files and sample grids to `workdir`.
    Continues from its newest checkpoint if there is one.

    Raises:
        ValueError: for bad input, before anything is written.
    """
    settings.check_config(config)
    record = {"config": json.loads(config.to_json()), "window": []}
    if checkpoint.latest_step(workdir) is not None:
        saved = checkpoint.load_record(workdir)
        record["window"] = saved["window"]
        _check_same_run(saved["config"], record["config"], workdir)

    batches = settings.call(data.load, config.data, "config.data", seed=config.seed)
    record["image_shape"] = list(batches.image_shape)
    schedule = settings.make_schedule(config.schedule)
    objective = settings.make_objective(config.objective, schedule)
    model = settings.make_model(config.model, objective, batches.image_shape[-1])
    _check_labels(model, batches)
    timestep_sampler = settings.make_timestep_sampler(
        config.timesteps, schedule.num_steps
    )
    optimizer = dict(config.optimizer, total_steps=config.total_steps)
    tx, lr_fn = settings.call(training.make_optimizer, optimizer, "config.optimizer")
    train_step = training.make_train_step(
        model,
        tx,
        schedule,
        objective,
        timestep_sampler,
        ema_decays=config.ema_decays,
        ema_warmup=config.ema_warmup,
    )
    preview = None
    if objective is not None:  # a classifier has nothing to draw
        preview = settings.call(
            make_preview,
            config.sampling,
            "config.sampling",
            schedule=config.schedule,
            model=model,
            objective=objective,
            image_shape=batches.image_shape,
            ema=training.ema_name(config.ema_decays[0]),
            seed=config.seed,
        )
    key_init, key = jax.random.split(jax.random.key(config.seed))

    def init():
        return training.init_state(
            key_init,
            model,
            tx,
            timestep_sampler,
            batches.image_shape,
            config.ema_decays,
        )

    # Drawing hundreds of small arrays runs once and compiles slowly: on the CPU,
    # optimising it costs more than the rest of the start.
    quick = {"xla_backend_optimization_level": "0"}
    on_cpu = jax.default_backend() == "cpu"
    init = jax.jit(init, compiler_options=quick if on_cpu else None)
    # Compiled first: whatever does not fit is found before anything is written.
    step_fn, summary = compile_step(
        train_step, key, jax.eval_shape(init), batches.batch(0)
    )
    cpu.release_memory()
    print(summary, flush=True)
    manager = checkpoint.make_manager(workdir)
    state = checkpoint.restore_or_init(manager, init)
    first = int(state.step)

    writer = logs.MetricWriter(workdir, first)
    bar = tqdm(
        total=config.total_steps,
        initial=first,
        unit="step",
        disable=None,
        smoothing=0.1,
    )
    window, clock = list(record["window"]), time.perf_counter()
    images_seen, step = 0, first
    with StopRequest().listen() as stop:
        while step < config.total_steps and not stop.name:
            state, metrics = step_fn(key, state, batches.batch(step))
            window.append(metrics)
            step += 1
            if step == first + 2:  # the heap has found its shape
                cpu.release_memory()
            images_seen += batches.batch_size
            bar.update()
            last = step == config.total_steps
            if step % config.log_every == 0 or last:
                means = summarise(plain(window))
                now = time.perf_counter()
                means["lr"] = float(lr_fn(step - 1))
                means["images_per_second"] = images_seen / (now - clock)
                writer.write(step, means)
                bar.set_postfix(loss=f"{means['loss']:.4f}")
                clock, images_seen = now, 0
                if step % config.log_every == 0:
                    window = []  # else kept: total_steps may be raised later
            if preview and (step % config.sample_every == 0 or last):
                preview(state, Path(workdir) / "samples" / f"{step:06d}.png")
            if step % config.save_every == 0 or last or stop.name:
                record["window"] = plain(window)
                checkpoint.save(manager, step, state, record)
    bar.close()
    writer.close()
    if step == config.total_steps:
        plotting.save_loss_curve(Path(workdir) / "loss.png", logs.read_metrics(workdir))
    manager.close()  # waits for the last checkpoint
    if stop.name:
        print(f"{stop.name}: saved step {step}; the same command continues.")
    elif step > first:
        picture = f"samples/{step:06d}.png" if preview else "loss.png"
        print(f"step {step} of {step}: {workdir}/{picture}")
    else:
        print(f"{workdir} has made its {first} steps already.")
    return state


def compile_step(train_step, key, state, batch):
    """Compiles the train step, its state donated, and says in a line what that took."""
    begun = time.perf_counter()
    lowered = jax.jit(train_step, donate_argnums=1).lower(key, state, batch)
    compiled = lowered.compile()
    seconds = time.perf_counter() - begun
    devices = jax.devices()
    line = f"{len(devices)} x {devices[0].device_kind}"
    count = sum(a.size for a in jax.tree.leaves(state.params))
    line += f" | {count:,} parameters"
    memory = compiled.memory_analysis()
    if memory is not None:  # not every backend tells
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        line += f" | step needs {total / 2**20:,.0f} MiB"
    return compiled, f"{line} | compiled in {seconds:.1f} s"


def make_preview(
    schedule: Config,
    model: nn.Module,
    objective: Objective,
    image_shape: tuple[int, ...],
    ema: str,
    seed: int,
    *,
    sampler: str,
    steps: int,
    spacing: str,
    eta: float,
    n: int,
) -> Callable[[TrainState, Path], None]:
    """Builds preview(state, path), which draws a grid with one average."""
    short = settings.make_schedule(schedule, steps=steps, spacing=spacing)
    draw = sample.make_sampler(model, objective, image_shape, sampler=sampler)

    def preview(state, path):
        batches = sample.generate(
            draw,
            state.ema_params[ema],
            short,
            n=n,
            eta=eta,
            seed=seed,
            num_labels=training.num_classes(model),
        )
        images = np.concatenate([frames[-1] for frames, _ in batches])
        plotting.save_png(path, plotting.grid(images), min_size=512)

    return preview


def plain(window: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Metrics as Python numbers, which JSON keeps exactly. Waits for the device."""
    return jax.tree.map(lambda a: np.asarray(a).tolist(), jax.device_get(list(window)))


def summarise(window: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The means of each metric over the window, and of each term by quartile of t."""
    names = [name for name in window[0] if name != "quartiles"]
    means = {name: float(np.mean([m[name] for m in window])) for name in names}
    sums = {
        name: np.sum([m["quartiles"][name] for m in window], axis=0)
        for name in window[0]["quartiles"]
    }
    counts = sums.pop("count")
    for name, by_quartile in sums.items():
        for q in range(4):
            if counts[q]:
                means[f"{name}_q{q}"] = float(by_quartile[q] / counts[q])
    return means


def _check_same_run(saved, now, workdir):
    lines = settings.differences(saved, now)
    if lines:
        raise ValueError(
            f"workdir {str(workdir)!r} holds a run with another config, which must not "
            f"change: {'; '.join(lines)}."
        )


def _check_labels(model: nn.Module, batches: data.Batches) -> None:
    for name in ("num_classes", "num_labels"):  # a classifier answers with the latter
        known = getattr(model, name, None)
        if known is not None and batches.num_classes > known:
            raise ValueError(
                f"labels must be below config.model.{name} = {known}, got "
                f"{batches.num_classes - 1}."
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m jax_diffusion.train",
        description=__doc__,
        epilog="Any field of the config: --config.total_steps=60, "
        "--config.model.channels=64",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="such as configs/digits.py")
    parser.add_argument("--workdir", required=True, help="where the run lives")
    args, overrides = parser.parse_known_args()
    train(settings.load_config(args.config, overrides), args.workdir)


if __name__ == "__main__":
    settings.run_program(main)
