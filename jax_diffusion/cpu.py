"""What programs set so that XLA's CPU backend is fast; for accelerators, nothing.

Measured with `tests/benchmarks/unet.py`. A library must not change its user's process,
so only programs call this.
"""

import ctypes
import importlib.util
import os
import platform

import jax
import jaxlib

# With these, XLA calls oneDNN for convolutions, as PyTorch does, instead of YNNPACK: a
# train step takes a tenth less, in bfloat16 a third. oneDNN is in jaxlib's x86 builds
# from 0.12 on; before, the second flag would leave convolutions to Eigen.
ONEDNN_FLAGS = (
    "--xla_cpu_experimental_onednn_custom_call=true",
    "--xla_cpu_experimental_ynn_fusion_type=dot,reduce",
)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
ACCELERATORS = ("jax_plugins", "libtpu")  # packages that bring JAX another backend


def tune() -> None:
    """Sets options of XLA, JAX and malloc, before JAX has looked for its devices.

    XLA_FLAGS that are set already are kept. glibc is told to keep what XLA frees: a
    step allocates its temporary memory in one piece and frees it at the end, which the
    system would take back, and hand out again page by page, cleared: a tenth of a step.
    Only the main thread's heap can hold such a piece, so the main thread runs the step;
    dispatched to another it would hardly overlap with anything on the same cores.
    """
    if any(importlib.util.find_spec(name) for name in ACCELERATORS):
        return
    if jaxlib.version.__version_info__ >= (0, 12) and platform.machine() == "x86_64":
        flags = os.environ.get("XLA_FLAGS", "")
        new = [flag for flag in ONEDNN_FLAGS if flag.split("=")[0] not in flags]
        os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *new])
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    libc = _glibc()
    if libc is not None:
        libc.mallopt(MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)


def release_memory() -> None:
    """Gives back what a compilation has left behind."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
