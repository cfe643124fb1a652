"""What programs set so that XLA's CPU backend is fast. Accelerators are not touched.

Measured with `tests/benchmarks/unet.py`. A library must not change its user's process,
so only programs call this.
"""

import ctypes
import os
import platform

import jax
import jaxlib

# With these, XLA calls oneDNN for convolutions and matrix products, as PyTorch does,
# instead of YNNPACK: a train step takes 10% less, in bfloat16 a third. oneDNN is in
# jaxlib's x86 builds from 0.12 on; before, the second flag would leave nothing but Eigen.
ONEDNN_FLAGS = (
    "--xla_cpu_experimental_onednn_custom_call=true",
    "--xla_cpu_experimental_ynn_fusion_type=reduce",
)
# malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8


def set_flags() -> None:
    """Adds to XLA_FLAGS, what is set there already excepted. Before JAX has a device."""
    has_onednn = jaxlib.version.__version_info__ >= (0, 12)
    if not has_onednn or platform.machine() not in ("x86_64", "AMD64"):
        return
    flags = os.environ.get("XLA_FLAGS", "")
    for flag in ONEDNN_FLAGS:
        if flag.split("=")[0] not in flags:
            flags = f"{flags} {flag}".strip()
    os.environ["XLA_FLAGS"] = flags


def keep_memory() -> None:
    """Lets glibc keep what XLA frees, if the device is a CPU.

    A step allocates its temporary memory in one piece and frees it at the end. glibc
    would give that back to the system, which hands it out again page by page, cleared:
    a tenth of the time of a step.
    """
    libc = _glibc()
    if libc is not None and jax.default_backend() == "cpu":
        libc.mallopt(ARENA_MAX, 1)  # other arenas cannot hold pieces of this size
        libc.mallopt(MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)


def release_memory() -> None:
    """Gives back what a compilation has left behind."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)
