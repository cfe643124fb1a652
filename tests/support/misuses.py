"""Runs many command lines in one process, as a program of its own.

It reads {"folder": FOLDER, "cases": [[program, flags], ...]} from its input and prints
a list with an entry for each: status, stdout, stderr, seconds, mebibytes by which the
peak of memory grew, and the files that were changed in the folder, where it runs.
"""

import contextlib
import importlib
import io
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path


def files_in(folder):
    """Names, sizes and times of all files below a folder."""
    found = {str(p): p.lstat() for p in Path(folder).rglob("*")}
    locks = [name for name in found if name.endswith(".lock")]  # touched by their owner
    return {
        name: None
        if os.path.isdir(name) or name in locks
        else (s.st_mtime_ns, s.st_size)
        for name, s in found.items()
    }


def peak():
    """The most memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_case(program, flags):
    """Runs one command line; returns what it did."""
    from jax_diffusion import cli

    main = importlib.import_module(f"jax_diffusion.{program}").main
    out, err, status = io.StringIO(), io.StringIO(), 0
    before, memory, begun = files_in("."), peak(), time.perf_counter()
    sys.argv = [program, *flags]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run_program(main)
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc(file=err)
            status = 1
    seconds, after = time.perf_counter() - begun, files_in(".")
    names = before.keys() | after.keys()
    return {
        "status": status,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "seconds": seconds,
        "mebibytes": peak() - memory,
        "changed": [n for n in names if before.get(n, 0) != after.get(n, 0)],
    }


def main():
    """Runs the cases of the input."""
    job = json.load(sys.stdin)
    os.chdir(job["folder"])
    print(json.dumps([run_case(*case) for case in job["cases"]]))


if __name__ == "__main__":
    main()
