"""One side of a benchmark: a process that times its cases when it is told to.

Reads lines from standard input: `open CASE` builds a case and runs it twice, `time`
runs it twice more and times the second, `memory` tells what it has needed at most since
the case called `mark`, its code made and its data not yet. It answers each with one
number. Two such processes take turns, so that neither
side's threads, caches or allocator get in the way of the other's.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Case = Callable[[], object]  # runs once, and waits for the result
marked = [0.0]  # MiB at each call of `mark`


def serve(cases: Mapping[str, Callable[[], Case]]) -> None:
    """Answers until standard input ends."""
    run = None
    for line in sys.stdin:
        verb, *rest = line.split()
        if verb == "open":
            run = cases[rest[0]]()
            run(), run()
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            answer = 0.0
        elif verb == "time":
            run()  # threads, caches and clocks have rested while the others ran
            begun = time.perf_counter()
            run()
            answer = time.perf_counter() - begun
        else:
            answer = status("VmHWM") - marked[-1]
        print(answer, flush=True)


def mark() -> None:
    """What this process holds now is not counted as memory of the case."""
    marked.append(status("VmRSS"))


def status(field: str) -> float:
    """A field of this process's memory in MiB (Linux)."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024
