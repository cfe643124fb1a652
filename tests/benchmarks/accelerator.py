"""How fast and how right one GPU or TPU is, in one table.

    python -m tests.benchmarks.accelerator [--minutes 5] [--torch-python PYTHON]

Takes about five minutes (`--minutes`): no row begins that may not end in time. Prints a
line a row on standard error as it is ready, and in the end all of them as one table on
standard output, with the device's name. A row that fails says why, and the others go
on. The exit status is 1 if a check failed: golden U-Nets, one train step and one
sampler beside the CPU, attention of cuDNN beside XLA's, and a training that resumes. It
is 2 if there is no accelerator.

The train step is that of the config, data apart: with dropout, clipping, AdamW and an
average. "TF32" and "float32" are precisions of products of float32; JAX's default is
the first one on GPUs. On TPUs, which have neither, they are products of three and of
six passes in bfloat16. The share is of the roofline: of the least time that operations
or memory take by the data sheet, at JAX's default precision for float32. "program" is
the memory that XLA plans for it; "peak" what this process has held at most on the
device until then, a row's own only where it rose. Rows that did not run, or in another
process, have none.

PyTorch, with the same U-Net by diffusers, runs in processes of its own, perhaps by
another interpreter. `--toy` runs everything on any device, at sizes of no meaning.
"""

import argparse
import functools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from tests.support import golden_unets

from . import accelerator_checks, accelerator_speed
from .accelerator_speed import (
    FULL,
    GIB,
    TOY,
    Found,
    NoTimeLeft,
    Row,
    Sizes,
    Unsupported,
    seconds_left,
)

HEADS = ("what", "result", "share", "compile s", "program GiB", "peak GiB", "published")
PYTORCH = Path(__file__).with_name("accelerator_pytorch.py")
MODES = ("eager", "channels-last", "compile", "autocast", "compile, autocast")
PUBLISHED = {
    "step": "2,688 (Ho et al., TPU v3-8, 35.7M, batch 128); 748 (torchcfm, RTX 4090, "
    "34M); 145 (EDM, V100, 55.7M)",
    "draw": "15,100 (Ho et al., TPU v3-8)",
}
SHORTEST = 10.0  # seconds that must be left for any row
ANY_CUDA = "import torch; print(torch.__version__, torch.cuda.is_available())"


@functools.cache
def why_no_pytorch(python: str) -> str:
    """Says why PyTorch cannot be measured; empty if it can."""
    ended = subprocess.run([python, "-c", ANY_CUDA], capture_output=True, text=True)
    if ended.returncode:
        return f"{Path(python).name} has no PyTorch"
    version, has_cuda = ended.stdout.split()
    return "" if has_cuda == "True" else f"PyTorch {version} has no CUDA"


def pytorch(python: str, mode: str, sizes: Sizes, deadline: float) -> Found:
    """Images per second of PyTorch."""
    if why := why_no_pytorch(python):
        raise Unsupported(why)
    command = [python, str(PYTORCH), mode, str(sizes.batches[0]), str(sizes.seconds)]
    left = seconds_left(deadline)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=left)
    if ended.returncode:
        raise RuntimeError((ended.stderr.strip().splitlines() or ["no answer"])[-1])
    return Found(f"{float(ended.stdout.split()[-1]):,.0f} images/s")


def all_rows(sizes: Sizes, python: str, deadline: float) -> list[Row]:
    """All rows, the most telling first."""
    networks = list(golden_unets.NETWORKS)
    if sizes is TOY:  # the tests compare all of them
        networks = networks[3:4]
    checks = accelerator_checks.rows(networks, deadline)
    speed = accelerator_speed.rows(sizes, PUBLISHED, deadline)
    theirs = [
        Row(
            f"PyTorch: CIFAR-10 step, {mode}, batch {sizes.batches[0]}",
            "PyTorch",
            functools.partial(pytorch, python, mode, sizes, deadline),
            is_elsewhere=True,
        )
        for mode in MODES
    ]
    return [*checks[:-1], *speed[:3], *theirs, *checks[-1:], *speed[3:]]


def run_row(row: Row) -> tuple[Found, bool, bool]:
    """What a row tells, whether it ran to its end, and whether a check failed."""
    try:
        return row.run(), True, False
    except Unsupported as error:
        return Found(f"not run: {error}"), False, False
    except (NoTimeLeft, subprocess.TimeoutExpired):
        return Found("no time left"), False, False
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        text = f"failed: {type(error).__name__}: {lines[0]:.120}"
        return Found(text.replace("|", "/")), False, row.is_check


def peak_gib(before: float | None) -> tuple[str, float | None]:
    """The cell of the most that the device has held, and the number of bytes."""
    stats = jax.devices()[0].memory_stats() or {}
    after = stats.get("peak_bytes_in_use")
    if after is None:
        return "unknown", None
    rose = before is None or after > before
    return f"{'' if rose else '<= '}{after / GIB:.2f}", after


def run_all(rows: Sequence[Row], deadline: float) -> tuple[list[list[str]], bool]:
    """The cells of all rows, and whether a check failed."""
    table, wrong, longest, peak = [], False, {}, None
    for row in rows:
        begun = time.monotonic()
        needed = longest.get(row.group, max(longest.values(), default=0.0))
        found, ran, failed = Found("no time left"), False, False
        if deadline - begun >= max(needed, SHORTEST):
            found, ran, failed = run_row(row)
        wrong |= failed
        cell, peak = peak_gib(peak)
        cell = cell if ran and not row.is_elsewhere else ""
        table.append([row.name, *found, cell, row.published])
        took = time.monotonic() - begun
        if ran:  # a row that was skipped or failed says nothing of the next one's time
            longest[row.group] = max(longest.get(row.group, 0.0), took)
        print(f"{row.name}: {found.result} ({took:.0f} s)", file=sys.stderr, flush=True)
    return table, wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    # Other processes need memory of the same GPU, and peaks are to be seen.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    if device.platform == "cpu" and not args.toy:
        print(
            "There is no accelerator that JAX can use; --toy runs without one.",
            file=sys.stderr,
        )
        return 2
    rows = all_rows(TOY if args.toy else FULL, args.torch_python, deadline)
    table, wrong = run_all(rows, deadline)
    size = " (toy sizes)" if args.toy else ""
    print(f"{device.device_kind}, {device.platform}, jax {jax.__version__}{size}\n")
    for cells in (list(HEADS), ["---"] * len(HEADS), *table):
        print("|", " | ".join(cells), "|")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
