"""One MLIR context for many programs that are lowered.

JAX makes one for each program and loads every dialect into it: 4 ms, a sixth of the
time of tests, which lower thousands of small programs. It has no option for this.
"""

import contextlib
import functools
import itertools
import threading

USES = 200  # of one context, which keeps the constants of its programs


def share_contexts():
    """Makes JAX take the same context for `USES` programs of a thread."""
    with contextlib.suppress(ImportError, AttributeError):  # of JAX's own modules
        from jax._src.interpreters import mlir

        make, kept = mlir.make_ir_context, threading.local()

        @functools.wraps(make)
        def shared():
            if not hasattr(kept, "uses"):
                kept.uses = itertools.count()
            if next(kept.uses) % USES == 0:
                kept.context = make()
            return kept.context

        mlir.make_ir_context = shared
