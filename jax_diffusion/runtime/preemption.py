"""SIGTERM and Ctrl-C as a request to save and stop, on one process or many."""

import contextlib
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class PreemptionSignal:
    """Remembers that the run was asked to stop, for the training loop to look at.

    A single process catches the first SIGTERM or Ctrl-C while `listen` is in force. In
    a job of several processes JAX catches SIGTERM; a process that gets one tells the
    others through JAX's coordination service, and all stop after the same step.

    Attributes:
        name: the signal's name, such as "SIGTERM", once it came; "" before.
    """

    name = ""

    @contextlib.contextmanager
    def listen(self) -> Iterator["PreemptionSignal"]:
        """Catches the first signal while in force; a second one acts as usual."""

        def catch(number, frame):
            self.name = signal.Signals(number).name
            restore()

        def restore():
            for number, handler in previous.items():
                signal.signal(number, handler)

        previous = {}
        if jax.process_count() == 1:
            with contextlib.suppress(ValueError):  # not the main thread: cannot catch
                for number in (signal.SIGTERM, signal.SIGINT):
                    previous[number] = signal.signal(number, catch)
        try:
            yield self
        finally:
            restore()

    def poll(self, step: int) -> None:
        """Asks the other processes, if any, whether one of them got a signal.

        Args:
            step: the number of updates made. All processes call this after every step,
                and all learn of a signal after the same one.
        """
        if jax.process_count() > 1:
            if multihost_utils.reached_preemption_sync_point(step):
                self.name = "SIGTERM"
