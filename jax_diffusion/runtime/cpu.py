"""Makes XLA's CPU backend fast: flags, malloc, the main thread, compiled programs.

Only programs call this, as a library must not change the process of its user. Nothing
is changed where there is an accelerator. The benefits were measured with
`tests/benchmarks/unet.py`.
"""

import contextlib
import ctypes
import importlib.util
import os
import platform
import re
import zlib
from pathlib import Path
from typing import Any

import jax

XLA_FLAGS = (
    # Convolutions are Eigen's, not YNNPACK's, which takes three to eight times as long
    # for those with few channels and for gradients by a kernel. oneDNN must not get
    # them (onednn_custom_call): with jaxlib 0.12 some gradients were wrong by a fifth.
    # With "dot" alone, steps are a tenth slower and compile longer.
    "--xla_cpu_experimental_ynn_fusion_type=dot,reduce",
    # Programs of level 3 are no faster, and take a sixth longer to compile.
    "--xla_backend_optimization_level=1",
)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
# What a user may have set, by a variable of its own or in GLIBC_TUNABLES.
MALLOC_SETTINGS = r"malloc[._](trim_threshold|mmap_threshold|mmap_max)"
ACCELERATORS = ("jax_plugins", "libtpu")  # packages that bring JAX another backend


def tune() -> None:
    """Sets options of XLA, JAX and malloc; call it before JAX looks for its devices.

    `XLA_FLAGS` are added to the environment's, unless that sets the same flag.

    glibc is told to keep the memory that XLA frees. A step allocates its temporary
    memory in one piece and frees it at the end; the system would take it back and hand
    it out again page by page, cleared, which takes a tenth to a fifth of a step. Pieces
    of 2 GiB and more, above the largest threshold, still go back. Only the main
    thread's heap can hold such a piece, so JAX is told to run steps in the main thread;
    in another one a step would hardly overlap with anything on the same cores. If the
    environment sets a threshold, as MALLOC_TRIM_THRESHOLD_, glibc is left as it is.
    """
    if any(importlib.util.find_spec(name) for name in ACCELERATORS):
        return
    mine = os.environ.get("XLA_FLAGS", "")
    new = [flag for flag in XLA_FLAGS if flag.partition("=")[0] not in mine]
    os.environ["XLA_FLAGS"] = " ".join([*mine.split(), *new])
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    told = " ".join([*os.environ, os.environ.get("GLIBC_TUNABLES", "")])
    libc = _glibc()
    if libc is not None and not re.search(MALLOC_SETTINGS, told, re.IGNORECASE):
        libc.mallopt(MMAP_THRESHOLD, (1 << 31) - 1)  # the largest int
        libc.mallopt(TRIM_THRESHOLD, -1)  # never trims by itself


def keep_compiled() -> None:
    """Keeps compiled programs on disk for the next process.

    They lie in ~/.cache/jax_diffusion, in a folder for each kind of machine, as code
    that was compiled for one CPU may not run on another. JAX_COMPILATION_CACHE_DIR
    names another place, which is left alone.
    """
    told: Any = jax.config
    if told.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / _machine()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def cache_folder() -> Path:
    """Returns the folder of caches: jax_diffusion in $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "jax_diffusion"


def _machine() -> str:
    """Returns eight digits that two machines share if they run the same code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    wanted = ("model name", "flags", "Features")
    told = [line for line in lines if line.startswith(wanted)][: len(wanted)]
    text = "\n".join([platform.machine(), platform.processor(), *sorted(set(told))])
    return f"{zlib.crc32(text.encode()):08x}"


def model_name() -> str:
    """Returns the name of this host's CPU model, or else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def release_memory() -> None:
    """Gives the memory that a compilation has left behind back to the system."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
