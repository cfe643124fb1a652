"""Where the wall-clock time of training steps goes, measured without waiting."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator


class StepClock:
    """Splits the wall-clock time of training steps without waiting for the device.

    Each moment counts for the innermost `measure` around it, so that the parts neither
    overlap nor leave a gap. Outside of every `measure` it counts as "other"; within a
    `pause` it does not count at all.

        with clock.measure("data"):      # the next batch
        with clock.measure("dispatch"):  # the call of the step, which returns early
        with clock.measure("device"):    # jax.device_get of the metrics, once a line

    A large share of "device" means that the device always has work waiting, a large
    share of "data" that it may be waiting for the host. Where calls do not return early
    (on the CPU after `cpu.tune`, or once the queue is full), the device's time is part
    of "dispatch".

    Args:
        now: returns the time in seconds.
    """

    PARTS = ("data", "dispatch", "device", "other")

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._mark = now()
        self._part = "other"
        self._seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Counts the time inside as "data", "dispatch", "device" or "other".

        Raises:
            ValueError: for another name.
        """
        if part not in self.PARTS:
            raise ValueError(f"part must be one of {self.PARTS}, got {part!r}.")
        with self._within(part):
            yield

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """Leaves out the time inside, such as that of previews and checkpoints."""
        return self._within("paused")

    def line(
        self,
        *,
        steps: int,
        images: int,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
    ) -> dict[str, float]:
        """Summarizes the time since the last call, for a line of the log.

        Args:
            steps: number of steps made since then, >= 1.
            images: number of images trained on since then, on all devices.
            flops_per_step: floating-point operations of a step, on all devices.
            peak_flops: peak FLOP/s of all devices together.

        Returns:
            `seconds_per_step`, `images_per_second`; `data_share`, `dispatch_share`,
            `device_share` and `other_share`, which sum to 1; and, if both FLOPs and
            peak are given, `roofline_share`, the share of the peak that was reached.

        Raises:
            ValueError: unless steps >= 1.
        """
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}.")
        self._charge(self._part)
        total = sum(self._seconds[part] for part in self.PARTS)
        numbers = {
            "seconds_per_step": total / steps,
            "images_per_second": images / total,
        }
        numbers |= {f"{part}_share": self._seconds[part] / total for part in self.PARTS}
        if flops_per_step is not None and peak_flops is not None:
            numbers["roofline_share"] = flops_per_step * steps / total / peak_flops
        self._seconds.clear()
        return numbers

    @contextlib.contextmanager
    def _within(self, part: str) -> Iterator[None]:
        around = self._part
        self._charge(then=around if around == "paused" else part)
        try:
            yield
        finally:
            self._charge(then=around)

    def _charge(self, then: str) -> None:
        now = self._now()
        self._seconds[self._part] += now - self._mark
        self._mark, self._part = now, then
