"""Saves a run while it trains: checkpoints, and snapshots of averages beside them."""

import contextlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from jax_diffusion.runtime import checkpoint
from jax_diffusion.runtime.snapshots import SnapshotWriter
from jax_diffusion.training.step import TrainState


class Saver:
    """Writes checkpoints and snapshots; on several hosts, all of them call it.

    Args:
        manager: of the checkpoints.
        snapshots: writer of those of averages by power functions.
    """

    def __init__(self, manager: ocp.CheckpointManager, snapshots: SnapshotWriter):
        self._manager, self._snapshots = manager, snapshots

    def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
        """Saves a state and, if it is time, a snapshot in the background.

        Raises:
            OSError: as `checkpoint.save`.
        """
        checkpoint.save(self._manager, step, state, record)
        self._snapshots.take(step, state.ema_params)  # `begin` takes one that is lost

    def save_at_error(
        self, step: int, state: TrainState, record: dict[str, Any]
    ) -> str:
        """Saves the updates made before something went wrong, such as a damaged image.

        Of several hosts, one alone cannot save; and after an error of the devices there
        is no state any more.

        Args:
            step, state, record: what is to be saved.

        Returns:
            What is saved: the newest "step 3", or "no step".
        """
        saved = self._manager.latest_step()
        lost = any(a.is_deleted() for a in jax.tree.leaves(state))
        if jax.process_count() == 1 and step > (saved or 0) and not lost:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self.save(step, state, record)
                self._manager.wait_until_finished()
                saved = step
        return "no step" if saved is None else f"step {saved}"

    def close(self) -> None:
        """Waits for the disk.

        Raises:
            OSError: if the last state or snapshot cannot be written.
        """
        with checkpoint.closing(self._manager):
            self._snapshots.close()
