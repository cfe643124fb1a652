"""Snapshots of averages of the parameters, WORKDIR/ema_snapshots, in Orbax's format.

One is taken at every multiple of `config.save_every`, beside the checkpoint and in the
background like it. `config.ema_snapshots` of them stay, spread evenly over the run:
each one more removes the one whose neighbors are closest together. Each takes as much
disk as the parameters in float32 times the number of averages; nothing is computed for
it, and the copy to the host is all that training waits for.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jax_diffusion.runtime import checkpoint, locks

FOLDER = "ema_snapshots"


def steps(workdir: str | Path) -> list[int]:
    """Returns the steps of the complete snapshots of a run, the oldest first."""
    return sorted(checkpoint.all_steps(Path(workdir) / FOLDER))


def superfluous(taken: Sequence[int]) -> int:
    """Returns the step of the snapshot, not the last, that is missed least.

    >>> superfluous([1, 2, 3, 4]), superfluous([2, 3, 4, 5]), superfluous([2, 4, 5, 6])
    (1, 3, 5)
    """
    before = [0, *taken[:-2]]
    gaps = [b - a for a, b in zip(before, taken[1:], strict=True)]
    return taken[gaps.index(min(gaps))]


class SnapshotWriter:
    """Takes snapshots of some averages; on several hosts, all of them make and call it.

    A run that goes on from a checkpoint takes those after it anew, so that a kill at
    any moment leaves the same ones in the end.
    """

    def __init__(
        self, workdir: Path, names: Sequence[str], step: int, *, every: int, most: int
    ):
        """Opens the folder and removes snapshots after `step`.

        Args:
            workdir: of the run.
            names: of the averages in `TrainState.ema_params`; without any, nothing is
                opened, and no snapshot taken.
            step: from which training goes on.
            every: updates between two snapshots.
            most: number of snapshots that stay.
        """
        self._workdir, self._names = workdir, [*names]
        self._every, self._most = every, most
        self._manager: ocp.CheckpointManager | None = None
        if names:
            self._manager = checkpoint.make_manager(workdir / FOLDER, keep=None)
            for later in self._manager.all_steps():
                if later > step:
                    self._manager.delete(later)

    def take(self, step: int, ema_params: Mapping[str, PyTree]) -> None:
        """Takes a snapshot if it is time and there is none of this step.

        Raises:
            OSError: as `checkpoint.save`.
        """
        manager = self._manager
        if manager is None or step % self._every or not step:
            return
        if step in manager.all_steps():
            return
        locks.check(self._workdir)
        tree = {"params": {}, "ema_params": {k: ema_params[k] for k in self._names}}
        checkpoint.save(manager, step, tree, {"averages": self._names})
        while len(taken := sorted(manager.all_steps())) > self._most:
            manager.delete(superfluous(taken))

    def close(self) -> None:
        """Waits for the disk.

        Raises:
            OSError: if the last snapshot cannot be written.
        """
        if self._manager is not None:
            with checkpoint.closing(self._manager):
                pass
