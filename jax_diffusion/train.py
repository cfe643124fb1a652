"""The training program: one config, one workdir, stop and start again as you like.

    python -m jax_diffusion.train --config configs/digits.py --workdir runs/digits

The same command continues a run that was stopped, bit for bit on the same device count.
It is the same on one device, on several, and on every host of a pod.
"""

import argparse
import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jax_diffusion import cli, metrics, plotting
from jax_diffusion import config as settings
from jax_diffusion.config import Config
from jax_diffusion.evaluation import during_training as watching
from jax_diffusion.runtime import checkpoint, cpu, device_peaks, logs, sharding
from jax_diffusion.runtime.preemption import PreemptionSignal
from jax_diffusion.training.setup import Plan, Program, compile_plan, make_plan
from jax_diffusion.training.step import TrainState

COLOUR_BATCHES = 8  # of data, to compare the colours of samples with
PROFILE_FROM = 10  # updates after the start: what compiles and caches is over by then


def train(config: Config, workdir: str | Path) -> TrainState:
    """Trains until config.total_steps, or until a signal, and returns the state.

    Writes checkpoints, metrics.jsonl, run.json and sample grids to `workdir`. Continues
    from its newest whole checkpoint if there is one. On several hosts, all of them call
    it, with a `workdir` that all of them see.

    Raises:
        ValueError: for bad input, before anything is written.
        FloatingPointError: if too many updates in a row were not finite, after saving.
    """
    config, workdir = settings.complete(config), Path(workdir)
    settings.check_config(config)
    logs.check_writers(config.log_to)
    record = {"config": json.loads(config.to_json()), "window": []}
    record["format"] = settings.FORMAT
    if not sharding.same_on_all_hosts(json.dumps(record["config"], sort_keys=True)):
        raise ValueError("all processes must be given one config, got several.")
    fresh = checkpoint.latest_step(workdir) is None
    if not fresh:
        saved = settings.upgrade(checkpoint.load_record(workdir))["config"]
        _check_same_run(saved, record["config"], workdir)
    plan = make_plan(config)
    record["image_shape"] = list(plan.batches.image_shape)
    watch = watching.make_watch(config, workdir, plan, record)
    # Compiled first: whatever does not fit is found before anything is written.
    program = compile_plan(plan, fresh=fresh)
    cpu.release_memory()
    if jax.process_index() == 0:
        print(program.summary, flush=True)
    manager = checkpoint.make_manager(
        workdir, keep=config.keep, keep_every=config.keep_every or None
    )
    state, saved = checkpoint.restore_or_init(manager, program.init, program.shardings)
    first = step = int(state.step)
    journal, problem = Reporter(config, workdir, plan, program, first), ""
    journal.window = saved["window"] if saved else []
    clock, stream = journal.clock, plan.batches.stream(first, plan.rows)
    with PreemptionSignal().listen() as stop, contextlib.closing(stream), journal:
        while step < config.total_steps and not problem and not stop.name:
            with clock.measure("data"):
                batch = plan.place(next(stream))
            with clock.measure("dispatch"):
                state, numbers = program.step(plan.key, state, batch)
            journal.add(numbers)
            step += 1
            last, extra = step == config.total_steps, {}
            profile(workdir, step - first, last, config, numbers)
            if step == first + 2:  # the heap has found its shape
                cpu.release_memory()
            if plan.preview and (step % config.sample_every == 0 or last):
                with clock.pause():
                    extra = journal.picture(step, plan.preview(state))
            if watch and (step % config.eval_every == 0 or last):
                with clock.pause():
                    extra |= watch(step, state)
            if step % config.log_every == 0 or last:
                problem = journal.line(step, extra)
            elif extra:
                journal.write(step, extra)
            stop.poll(step)
            if step % config.save_every == 0 or last or problem or stop.name:
                with clock.pause():
                    record["window"] = plain(journal.window)
                    checkpoint.save(manager, step, state, record)
    manager.close()  # waits for the last checkpoint
    if problem:
        raise FloatingPointError(problem)
    journal.finish(step, stop.name)
    return state


def profile(
    workdir: Path, made: int, last: bool, config: Config, numbers: Mapping[str, Any]
) -> None:
    """Traces some updates on host 0, after the first few of this start."""
    if not config.profile_steps or jax.process_index() > 0:
        return
    if made == PROFILE_FROM:
        jax.profiler.start_trace(workdir / "profile", create_perfetto_trace=True)
    elif made == PROFILE_FROM + config.profile_steps or (last and made > PROFILE_FROM):
        jax.block_until_ready(numbers)
        jax.profiler.stop_trace()


class Reporter:
    """All that a run writes down but its checkpoints; on host 0, the others keep count.

    `window` holds the metrics since the last line of the log, most of them still on the
    device: only a line of the log waits for it.
    """

    def __init__(
        self, config: Config, workdir: Path, plan: Plan, program: Program, first: int
    ):
        self.window: list[Any] = []
        self._config, self._workdir, self._plan = config, workdir, plan
        self._first = self._since = first
        self._speed = _roofline(config, plan, program)
        self._writer, self._colours = None, None
        self._writes = jax.process_index() == 0
        if self._writes:
            description = logs.describe(json.loads(config.to_json()))
            self._writer = logs.MetricWriter(
                workdir, first, writers=config.log_to, config=description
            )
            logs.write_description(workdir, description)
        self._bar = tqdm(
            total=config.total_steps,
            initial=first,
            unit="step",
            disable=None if self._writes else True,
            smoothing=0.1,
        )
        self.clock = logs.StepClock()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._writer:
            self._writer.close()

    def add(self, metrics_: Mapping[str, Any]) -> None:
        """Takes the metrics of one update, without waiting for them."""
        self.window.append(metrics_)
        self._bar.update()

    def line(self, step: int, extra: Mapping[str, float]) -> str:
        """Writes the means since the last line; waits for the device.

        Args:
            extra: colours and scores, to stand in the same line.

        Returns:
            Why the run should stop, or nothing.
        """
        with self.clock.measure("device"):
            rows = plain(self.window)
        made, self._since = step - self._since, step
        means = summarise(rows)
        means["lr"] = float(self._plan.lr_fn(step - 1))
        means |= self.clock.line(
            steps=made,
            images=made * self._plan.batches.batch_size,
            **self._speed,
        )
        self.write(step, means | dict(extra))
        self._bar.set_postfix(loss=f"{means['loss']:.4f}")
        if step % self._config.log_every == 0:
            self.window = []  # else kept: total_steps may be raised later
        worst = max(row["skipped_in_a_row"] for row in rows)
        if worst < self._config.max_skipped:
            return ""
        return (
            f"{worst} updates in a row up to step {step} had a loss or a gradient that "
            "was not finite, and were skipped: look at config.optimizer.lr and "
            "grad_clip, at the images of these steps, and at the model's dtype. The "
            f"state before them is saved in {str(self._workdir)!r}."
        )

    def picture(self, step: int, images: np.ndarray) -> dict[str, float]:
        """Writes a grid of samples; returns their colours beside those of the data."""
        if not self._writes:
            return {}
        path = self._workdir / "samples" / f"{step:06d}.png"
        plotting.save_png(path, plotting.grid(images), min_size=512)
        if self._colours is None:
            shown = [
                self._plan.batches.batch(i)["image"] for i in range(COLOUR_BATCHES)
            ]
            self._colours = metrics.channel_stats(np.concatenate(shown))
        return metrics.color_metrics(metrics.channel_stats(images), self._colours)

    def finish(self, step: int, stopped_by: str) -> None:
        """Says where the run stands, and draws its losses if it has ended."""
        if not self._writes:
            return
        if stopped_by:
            print(f"{stopped_by}: saved step {step}; the same command continues.")
        elif step > self._first:
            losses = logs.read_metrics(self._workdir)
            plotting.save_loss_curve(self._workdir / "loss.png", losses)
            picture = f"samples/{step:06d}.png" if self._plan.preview else "loss.png"
            print(f"step {step} of {step}: {self._workdir}/{picture}")
        else:
            print(f"{self._workdir} has made its {self._first} steps already.")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """One line of the log."""
        if self._writer:
            self._writer.write(step, numbers)


def _roofline(config: Config, plan: Plan, program: Program) -> dict[str, float]:
    """FLOPs of a step and the devices' peak FLOP/s, of all of them; none if unknown."""
    peak = device_peaks.PEAKS.get(jax.devices()[0].device_kind)
    if peak is None:
        return {}
    rate = device_peaks.flop_rate(peak, config.model.get("dtype", "float32"))
    analysis = program.step.cost_analysis() or {}  # of what one device does
    count = plan.mesh.size
    flops = analysis.get("flops", float("nan"))
    return {"flops_per_step": flops * count, "peak_flops": rate * count}


def plain(window: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Metrics as Python numbers, which JSON keeps exactly. Waits for the device."""
    return jax.tree.map(lambda a: np.asarray(a).tolist(), jax.device_get(list(window)))


def summarise(window: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The means of each metric over the window, and of each term by quartile of t.

    Of updates that were skipped, only their number enters.
    """
    good = [m for m in window if not m["skipped_in_a_row"]]
    names = [n for n in window[0] if n not in ("quartiles", "skipped_in_a_row")]
    nan = float("nan")
    means = {n: float(np.mean([m[n] for m in good])) if good else nan for n in names}
    means["skipped"] = len(window) - len(good)
    sums = {
        name: np.sum([m["quartiles"][name] for m in good], axis=0)
        for name in window[0]["quartiles"]
        if good
    }
    counts = sums.pop("count", ())
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
    cli.add_host_flags(parser)
    args, overrides = parser.parse_known_args()
    cli.start_hosts(args)
    train(settings.load_config(args.config, overrides), args.workdir)


if __name__ == "__main__":
    cli.run_program(main, long=True)
