"""What `train` writes and prints: metrics, grids of samples, loss curve, traces."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jax_diffusion import data, metrics, plotting
from jax_diffusion.config import Config
from jax_diffusion.runtime import device_peaks, locks, logs
from jax_diffusion.runtime.clock import StepClock

COLOR_BATCHES = 8  # of data, to compare the colors of samples with
PROFILE_FROM = 10  # updates after the start: compiling and caching is over by then


class Reporter:
    """Writes all that a run leaves in its workdir but its checkpoints.

    That is metrics.jsonl and what else config.log_to asks for, run.json, grids of
    samples and the loss curve; see `runtime.logs` for the fields. Only host 0 writes
    and prints; the others keep count. Use it as a context manager.

    Args:
        config: of the run.
        workdir: of the run.
        first: number of updates made before this start.
        batches: the training images.
        lr_fn: the learning rate by the number of updates made; None if unknown.
        flops: of `flops_and_peak`.
        about: what run.json shall say besides of this start, plain JSON values.

    Attributes:
        window: metrics of the updates since the last line of the log, most of them
            still on the device: only a line of the log waits for it.
        clock: where the time of the updates went.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        first: int,
        *,
        batches: data.Batches,
        lr_fn: Callable[[int], Any] | None,
        flops: Mapping[str, float],
        about: Mapping[str, Any],
    ):
        self.window: list[Any] = []
        self._config, self._workdir = config, workdir
        self._batches, self._lr_fn, self._flops = batches, lr_fn, flops
        self._first = self._last_line = first
        self._writer, self._data_colors = None, None
        self._writes = jax.process_index() == 0
        if self._writes:
            description = logs.describe(json.loads(config.to_json()))
            description |= {"step": first, **about}
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
        self.clock = StepClock()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._writer:
            self._writer.close()

    def add(self, step_metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of one update, without waiting for them."""
        self.window.append(step_metrics)
        self._bar.update()

    def log_line(self, step: int, extra: Mapping[str, float]) -> str:
        """Writes the means since the last line; waits for the device.

        Args:
            step: number of updates made.
            extra: colors and scores, to stand in the same line.

        Returns:
            Why the run should stop, or "".
        """
        with self.clock.measure("device"):
            rows = plain(self.window)
        made, self._last_line = step - self._last_line, step
        means = summarize(rows)
        if self._lr_fn is not None:
            means["lr"] = float(self._lr_fn(step - 1))
        images = made * self._batches.batch_size
        means |= self.clock.line(steps=made, images=images, **self._flops)
        if damaged := self._batches.examples.damaged:
            means["damaged_images"] = len(damaged)
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

    def save_grid(self, step: int, images: np.ndarray) -> dict[str, float]:
        """Writes a grid of samples, uint8 [n, h, w, c], to samples/STEP.png.

        Returns:
            Mean and standard deviation of each channel, of samples and of data.
        """
        if not self._writes:
            return {}
        locks.check(self._workdir)
        path = self._workdir / "samples" / f"{step:06d}.png"
        plotting.save_png(path, plotting.grid(images), min_size=512)
        if self._data_colors is None:
            shown = [self._batches.batch(i)["image"] for i in range(COLOR_BATCHES)]
            self._data_colors = metrics.channel_stats(np.concatenate(shown))
        return metrics.color_metrics(metrics.channel_stats(images), self._data_colors)

    def finish(self, step: int, stopped_by: str) -> None:
        """Prints where the run stands, and draws its loss curve if it has ended.

        Args:
            step: number of updates made.
            stopped_by: name of the signal that has stopped the run; "" if none has.
        """
        if not self._writes:
            return
        locks.check(self._workdir)
        if damaged := [*self._batches.examples.damaged.values()]:
            file, _, why = damaged[0].partition(" must be a whole image, got ")
            example = f"{file}: {why}" if why else file
            print(f"damaged images skipped: {len(damaged)}, such as {example}")
        if stopped_by:
            print(f"{stopped_by}: saved step {step}; the same command continues.")
        elif step > self._first:
            losses = logs.read_metrics(self._workdir)
            plotting.save_loss_curve(self._workdir / "loss.png", losses)
            grid = self._workdir / "samples" / f"{step:06d}.png"  # of a denoiser
            picture = grid if grid.exists() else self._workdir / "loss.png"
            print(f"step {step} of {step}: {picture}")
        else:
            print(f"{self._workdir} has made its {self._first} steps already.")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes one line of the log as it is."""
        if self._writer:
            locks.check(self._workdir)
            self._writer.write(step, numbers)


def flops_and_peak(step: Any, num_devices: int, dtype: Any) -> dict[str, float]:
    """Returns FLOPs of a step and peak FLOP/s of all devices, or {} if unknown.

    XLA counts the FLOPs; of a loop over microbatches it counts one part only.

    Args:
        step: the compiled train step.
        num_devices: number of devices that it runs on.
        dtype: in which matrices are multiplied.

    Returns:
        "flops_per_step" and "peak_flops", for `StepClock.line`.
    """
    peak = device_peaks.PEAKS.get(jax.devices()[0].device_kind)
    if peak is None:
        return {}
    analysis = step.cost_analysis() or {}  # of what one device does
    if "flops" not in analysis:
        return {}
    return {
        "flops_per_step": analysis["flops"] * num_devices,
        "peak_flops": device_peaks.flop_rate(peak, dtype) * num_devices,
    }


def plain(window: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Converts metrics to Python numbers, which JSON keeps exactly; waits for them."""
    return jax.tree.map(lambda a: np.asarray(a).tolist(), jax.device_get(list(window)))


def from_plain(window: Any) -> Any:
    """Converts what `plain` has returned back, once it was JSON: "nan" is a number."""
    return jax.tree.map(lambda a: float(a) if isinstance(a, str) else a, window)


def summarize(window: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Averages metrics of a train step over several updates.

    Args:
        window: plain metrics of each update; those that were skipped are counted only.

    Returns:
        The mean of each metric; as "loss_q0" to "loss_q3" the mean of each term over
        the examples of a quartile of t, if there were any; "skipped", the number of
        updates that were skipped.
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


def trace_steps(
    workdir: Path, made: int, num_steps: int, last: bool, wait_for: Any
) -> None:
    """Starts or stops the profiler, which traces a few updates to WORKDIR/profile.

    Host 0 traces, and begins at the 11th update of this start. TensorBoard and Perfetto
    show traces.

    Args:
        workdir: of the run.
        made: number of updates made since this start.
        num_steps: number of updates to trace; 0 for none.
        last: whether the last update is made.
        wait_for: arrays that are ready once the last update is.
    """
    if not num_steps or jax.process_index() > 0:
        return
    end = PROFILE_FROM + num_steps
    if made == PROFILE_FROM:
        jax.profiler.start_trace(workdir / "profile", create_perfetto_trace=True)
    elif made == end or (last and PROFILE_FROM < made < end):
        jax.block_until_ready(wait_for)
        jax.profiler.stop_trace()
