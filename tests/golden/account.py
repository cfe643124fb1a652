"""Who compared which array of this folder, and how far it was off.

A test decorated with `parity(file)` gets an `Account` of that file, reads its inputs
from it and hands it what we compute. `total` and `report` sum the accounts up.

Tolerances. `noise_floor.json` holds the float32 rounding error of the official code.
Computed by us in float64, a result may be off by that error, not more: by nothing of
our own. Computed in float32 it may be off by `FLOORS` times as much, and where the
official code was run in float64 too, ours in float64 agrees with that to 1e-10.
"""

import collections
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

HERE = Path(__file__).parent
MANIFEST = json.loads((HERE / "manifest.json").read_text())
NOISE_FLOOR = json.loads((HERE / "noise_floor.json").read_text())

# Those of `processes/`, by the same names with the folder's before them.
PROCESSES, _FLOORS = (
    {
        f"processes/{file}": found
        for file, found in json.loads((HERE / "processes" / name).read_text()).items()
    }
    for name in ("manifest.json", "noise_floor.json")
)
NOISE_FLOOR |= _FLOORS

# The floor is the worst rounding that one order of operations made in a few hundred
# numbers. Another order, our rounding of the tables and XLA's own exp and cos made up
# to 4.6 floors on the CPU.
FLOORS = 6
FLOORS_OF_PROCESSES, RELATIVE_OF_PROCESSES = 4, 1e-5

# A folder of one .ci/run, which is of one commit and one machine.
KEPT = os.environ.get("GOLDEN_ACCOUNTS")
KEPT = KEPT and Path(KEPT)
FINDINGS = ("inputs", "ratios", "in_part", "not_expressed")

# Lists of cases that hold their results themselves, beside those of arrays.
LISTS = {
    "schedules": ["official_errors"],
    "respacing": [
        "space_timesteps",
        "space_timesteps_errors",
        "ermongroup_sequences",
        "ermongroup_errors",
    ],
    "sampling_diffusers": ["timesteps"],
}


@functools.cache
def load(file):
    """The arrays of a golden file, and its json."""
    with np.load(HERE / f"{file}.npz", allow_pickle=False) as arrays:
        return dict(arrays), json.loads((HERE / f"{file}.json").read_text())


class Account:
    """What became of the arrays of one file, computed in float32 or in float64."""

    def __init__(self, file, double=False):
        self.file, self.double = file, double
        self.arrays, self.json = load(file)
        self.inputs = set()
        self.ratios = {}  # name -> error / tolerance
        self.in_part = {}  # name -> reason
        self.not_expressed = {}  # name -> reason

    def __getitem__(self, key):
        """An input as it is stored."""
        self.inputs.add(key)
        return self.arrays[key]

    def read(self, prefix, *names):
        """Inputs as JAX arrays, floats in the precision of this account."""
        stored = (self[f"{prefix}/{name}".removeprefix("/")] for name in names)
        return [
            jnp.asarray(a, float if a.dtype.kind == "f" else jnp.int32) for a in stored
        ]

    def compare(self, key, ours, *, tolerance=None, where=None, why=None):
        """Notes error / tolerance, of the rows `where` only if `why` says so."""
        if self.double and f"{key}_f64" in self.arrays:
            key += "_f64"
        golden, ours = self.arrays[key], np.asarray(ours)
        assert ours.shape == golden.shape, (key, ours.shape, golden.shape)
        if tolerance is None:
            tolerance = self._tolerance(key)
        tolerance = np.broadcast_to(tolerance, golden.shape)
        if why is not None:
            ours, golden, tolerance = ours[where], golden[where], tolerance[where]
            self.in_part[key] = why
        ratio = _ratio(ours, golden, tolerance)
        self.ratios[key] = max(ratio, self.ratios.get(key, 0.0))

    def equal(self, name, ours, golden):
        """The same for a result that the json holds: it must be equal."""
        self.ratios[name] = 0.0 if np.array_equal(ours, golden) else np.inf

    def leave(self, reason, *names):
        """Notes arrays that the design cannot express."""
        self.not_expressed.update(dict.fromkeys(names, reason))

    def read_kept(self, name):
        """Whether another process of the same .ci/run has filled it, and its findings.

        The slow half sums up what the fast half has compared a few minutes before.
        """
        if KEPT is None or not (KEPT / name).exists():
            return False
        vars(self).update(json.loads((KEPT / name).read_text()))
        return True

    def keep(self, name):
        if KEPT is not None:
            found = {field: getattr(self, field) for field in FINDINGS}
            found["inputs"] = sorted(self.inputs)
            (KEPT / name).write_text(json.dumps(found, default=float))

    def _tolerance(self, key):
        size = np.abs(self.arrays[key])
        if key.endswith("_f64"):
            return 1e-10 * size + 1e-12 * size.max()
        floor, _ = NOISE_FLOOR[f"{self.file}.npz"][key]
        if self.double:  # floors are stored with three digits
            return 1.01 * floor + 1e-9 * size.max()
        if f"{self.file}.npz" in PROCESSES:
            relative = RELATIVE_OF_PROCESSES * size.max()
            return max(FLOORS_OF_PROCESSES * floor, relative)
        return FLOORS * floor + 1e-6 * size.max()


def _ratio(ours, golden, tolerance):
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.abs(ours.astype(np.float64) - golden)
        ratio = np.where(ours == golden, 0.0, error / tolerance)  # inf equals inf
    return np.nan_to_num(ratio, nan=np.inf).max(initial=0.0)


_filled = []  # (file, function that returns the account) of each test


def parity(file, *, precisions=("float32", "float64"), slow=()):
    """Turns a function that fills an account into a test that all is within tolerance.

    An account is filled once a process, however many tests ask for it. Tests of the
    precisions in `slow` are marked so.
    """
    params = [
        pytest.param(p, marks=[pytest.mark.slow] if p in slow else [])
        for p in precisions
    ]

    def decorate(fill):
        @functools.cache
        def account(precision):
            account = Account(file, double=precision == "float64")
            name = f"{fill.__module__}.{fill.__name__}.{precision}.json"
            if not account.read_kept(name):
                with jax.enable_x64(account.double):
                    fill(account)
                account.keep(name)
            return account

        @pytest.mark.parametrize("precision", params)
        def test(precision):
            ratios = account(precision).ratios
            far = {key: float(ratio) for key, ratio in ratios.items() if not ratio <= 1}
            worst = sorted(far.items(), key=lambda item: -item[1])[:8]
            assert not far, f"{len(far)} of {len(ratios)} are off, worst: {worst}"

        test.__name__, test.__doc__ = fill.__name__, fill.__doc__
        _filled.extend((file, functools.partial(account, p)) for p in precisions)
        return test

    return decorate


def total(file):
    """The account of all tests of a file together."""
    together = Account(file)
    together.worst = {}
    for account in (filled() for name, filled in _filled if name == file):
        precision = "float64" if account.double else "float32"
        largest = max(account.ratios.values(), default=0.0)
        together.worst[precision] = max(largest, together.worst.get(precision, 0.0))
        together.inputs.update(account.inputs)
        together.in_part |= account.in_part
        together.not_expressed |= account.not_expressed
        for name, ratio in account.ratios.items():
            together.ratios[name] = max(ratio, together.ratios.get(name, 0.0))
    together.inputs -= together.ratios.keys() | together.not_expressed.keys()
    return together


def names_in(file):
    """Every array of a golden file and every case of its lists."""
    arrays, cases = load(file)
    assert arrays.keys() == (MANIFEST | PROCESSES)[f"{file}.npz"].keys()
    lists = LISTS.get(file, [])
    return set(arrays).union(f"{k}[{i}]" for k in lists for i in range(len(cases[k])))


def report(totals, reasons, *, names):
    """Prints how many were compared, and which were not and why."""
    counts, members = collections.Counter(), collections.defaultdict(list)
    for file, account in totals.items():
        counts["compared"] += len(account.ratios)
        counts["inputs"] += len(account.inputs)
        counts["not expressed"] += len(account.not_expressed)
        for name, reason in (account.not_expressed | account.in_part).items():
            members[reason].append(f"{file}: {name}")
    arrays = sum(len(account.arrays) for account in totals.values())
    what = ", ".join(f"{count} {fate}" for fate, count in counts.items())
    print(f"\ngolden: {arrays} arrays, {counts.total() - arrays} other cases: {what}")
    for precision in ("float32", "float64"):
        worst = (
            (k, a.worst[precision]) for k, a in totals.items() if precision in a.worst
        )
        worst = ", ".join(f"{k} {ratio:.2f}" for k, ratio in worst)
        print(f"largest error / tolerance in {precision}: {worst}")
    for reason, found in members.items():
        print(f"{len(found)} {reasons[reason]}, such as {found[0]}")
        if names:
            print(*(f"    {name}" for name in found), sep="\n")
