"""Parts for Orbax: readers, NumPy arrays not copied, a full disk told once."""

import asyncio
import logging
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jax_diffusion.runtime.files import reason_of_disk


class LeanNumpyHandler(ocp.type_handlers.NumpyHandler):
    """Writes arrays without copying them all, 64 MiB or one at a time."""

    def __init__(self):
        super().__init__()
        self._deepcopy_host_arrays = False  # nobody changes them meanwhile
        self._left, self._freed = 2**26, asyncio.Condition()

    async def _open_and_write(self, value, *args, **options):
        size = min(value.nbytes, 2**26)
        async with self._freed:
            await self._freed.wait_for(lambda: self._left >= size)
            self._left -= size
        await super()._open_and_write(value, *args, **options)
        async with self._freed:
            self._left += size
            self._freed.notify_all()


def lean_handlers() -> dict[str, Any]:
    """Returns handlers of "state" and "record" that do not copy NumPy arrays."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, LeanNumpyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    state: Any = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    return {"state": state, "record": ocp.JsonCheckpointHandler()}


def is_news(record: logging.LogRecord) -> bool:
    """Whether Orbax logs what it does not raise, too: a full disk is told once."""
    told = "orbax" in record.pathname and record.exc_info
    return not (told and reason_of_disk(told[1]))


def reader() -> ocp.Checkpointer:
    """Returns a reader of "state" and "record", on each host by itself."""
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(), record=ocp.JsonCheckpointHandler()
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone())


def alone() -> ocp.options.MultiprocessingOptions:
    """Makes each host read by itself, so that none waits for one that has failed."""
    index = jax.process_index()
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=index,
        active_processes={index},
        barrier_sync_key_prefix=f"host{index}",
    )
