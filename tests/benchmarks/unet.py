"""How fast the U-Net is beside the same network in PyTorch, on this machine's CPU.

    python -m tests.benchmarks.unet [--rounds 7] [--torch-python PYTHON]

Prints ratios, our time over the best of PyTorch's eager mode, channels-last and
`torch.compile`: median of rounds in which both sides take turns. PyTorch and diffusers
may live in another interpreter, named by --torch-python; the extra `benchmark` installs
them in this one. Leave the machine alone while it runs, ten minutes on two cores.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
MODES = ("eager", "channels_last", "compile")
TIMED = (
    *("train_step", "sample", "digits_step", "digits_sample", "bf16_step"),
    *("annotated_step", "annotated_sample"),
)
PAUSE = 0.1  # seconds: OpenMP's threads wait in a loop before they sleep


class Side:
    """A process that answers as `worker` says."""

    def __init__(self, command: list[str]):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def ask(self, line: str) -> float:
        assert self.process.stdin and self.process.stdout
        print(line, file=self.process.stdin, flush=True)
        for answer in self.process.stdout:
            try:
                return float(answer)
            except ValueError:  # a library's own words
                continue
        raise RuntimeError(f"{line!r} failed, see above.")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def time_in_turns(
    sides: dict[str, tuple[list[str], str]], rounds: int
) -> dict[str, float]:
    """Median seconds of each side; one round runs all of them once."""
    opened = {name: Side(command) for name, (command, _) in sides.items()}
    for name, (_, case) in sides.items():
        opened[name].ask(f"open {case}")
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in opened.items():
            time.sleep(PAUSE)
            times[name].append(side.ask("time"))
    for side in opened.values():
        side.close()
    return {name: statistics.median(found) for name, found in times.items()}


def peak(command: list[str], case: str) -> float:
    """MiB that a side needs for a case, in a process of its own."""
    side = Side(command)
    side.ask(f"open {case}")
    side.ask("time")
    found = side.ask("memory")
    side.close()
    return found


def main() -> None:
    """Prints a line a comparison, and all ratios in the last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--only", default=",".join(TIMED) + ",memory,loop_overhead")
    args = parser.parse_args()
    ours = [sys.executable, "-m", "tests.benchmarks.ours"]
    theirs = [args.torch_python, str(HERE / "pytorch.py")]
    wanted, ratios = args.only.split(","), {}
    for case in (name for name in TIMED if name in wanted):
        sides = {"ours": (ours, case)}
        sides |= {mode: (theirs, f"{case}/{mode}") for mode in MODES}
        times = time_in_turns(sides, args.rounds)
        ratios[case] = times["ours"] / min(times[mode] for mode in MODES)
        print(case, *(f"{name} {t:.4f} s" for name, t in times.items()), flush=True)
    if "memory" in wanted:
        mib = {"ours": peak(ours, "train_step")}
        mib |= {mode: peak(theirs, f"train_step/{mode}") for mode in MODES}
        ratios["memory"] = mib["ours"] / min(mib[mode] for mode in MODES)
        print("memory", *(f"{name} {m:.0f} MiB" for name, m in mib.items()), flush=True)
    if "loop_overhead" in wanted:
        sides = {"sampler": (ours, "sample"), "bare": (ours, "bare_calls")}
        times = time_in_turns(sides, args.rounds)
        ratios["loop_overhead"] = times["sampler"] / times["bare"]
        print("loop", *(f"{name} {t:.4f} s" for name, t in times.items()), flush=True)
    print(*(f"{name}={ratio:.2f}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    main()
