"""What a compiled step costs on one device, and the least time that it can take.

    compiled = jax.jit(step).lower(*arguments).compile()
    peak = device_peaks.PEAKS[jax.devices()[0].device_kind]
    least = roofline.seconds(roofline.cost(compiled), peak, "bfloat16", overlap=True)

XLA counts the operations and the memory's traffic; the exchanges between devices are
read from the text of the compiled program. All numbers are of one device. XLA counts
the body of a `while` once, however often it runs: operations and traffic of a train
step with microbatches are those of one of them. (Exchanges are counted as often as they
happen, if XLA knows how often that is.) What XLA hands to a library under a name of its
own ("custom-call"), it does not count at all.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_diffusion.runtime.device_peaks import Peak, flop_rate

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


class Collective(NamedTuple):
    """One exchange of a compiled program, as each device takes part in it.

    `bytes` are those of the whole array that the group makes or uses up together: what
    all-gather returns; what reduce-scatter, all-reduce, all-to-all and
    collective-permute are given. A combined exchange of several arrays counts them all.
    """

    kind: str  # of KINDS
    bytes: int
    group: tuple[int, ...]  # the devices of the largest group, by place in the mesh
    times: int = 1  # how often one call of the program does this

    @property
    def sent(self) -> float:
        """Bytes that each device sends if neighbors in a ring pass parts along."""
        size = float(self.times * self.bytes)
        if self.kind == "collective-permute":
            return size
        n = len(self.group)
        rounds = 2 if self.kind == "all-reduce" else 1  # reduce-scatter and all-gather
        return rounds * (n - 1) / n * size


class Traffic(NamedTuple):
    """All exchanges of one kind."""

    count: int
    bytes: int  # as in Collective
    sent: float


class Cost(NamedTuple):
    """What one device does in one call; nan where the backend does not tell."""

    flops: float  # floating-point operations, two for a multiplication and an addition
    bytes: float  # read from its memory and written to it
    collectives: tuple[Collective, ...] = ()

    @property
    def collective_bytes(self) -> float:
        """Bytes that it sends to other devices; it receives as many."""
        return sum(c.sent for c in self.collectives)


def cost(compiled: jax.stages.Compiled) -> Cost:
    """Operations, memory traffic and exchanges of one call, on one device.

    For a program on several devices, XLA's analysis is of the part that each runs.
    """
    found: Any = compiled.cost_analysis() or {}
    if isinstance(found, Sequence):  # one for each program, on some backends
        found = found[0] if found else {}
    flops = float(found.get("flops", math.nan))
    moved = float(found.get("bytes accessed", math.nan))
    return Cost(flops, moved, tuple(collectives(compiled.as_text() or "")))


def elsewhere(*args: Any, default: Any, **ways: Any) -> Any:
    """Patched in place of `lax.platform_dependent`, makes programs for accelerators."""
    del ways
    return default(*args)


def seconds(cost: Cost, peak: Peak, dtype: Any, *, overlap: bool) -> float:
    """The least time of one call, by the roofline (Williams et al. 2009).

    That is the larger of operations over FLOP/s and bytes over bytes/s, and the time of
    the exchanges, one after the other: added to it without `overlap`, hidden behind it
    as far as they can be with it. The truth lies between, above the latter; latencies
    are left out, so that many small exchanges take longer than this. What is not known
    makes it nan.

    Args:
        dtype: in which matrices are multiplied, float32 or bfloat16.
    """
    work = np.maximum(cost.flops / flop_rate(peak, dtype), cost.bytes / peak.memory)
    exchange = sum(c.sent / link_rate(c.group, peak) for c in cost.collectives)
    return float(np.maximum(work, exchange) if overlap else work + exchange)


def link_rate(group: Sequence[int], peak: Peak) -> float:
    """Bytes/s at which each device of a group can send in a ring.

    Where the ring leaves a node, it does so over the network cards of all its members
    there, each with a part of the bytes; devices fill one node after the other.
    """
    nodes = [device // peak.node for device in group]
    if len(set(nodes)) <= 1:
        return peak.link
    return min(nodes.count(nodes[0]) * peak.network, peak.link)


def traffic(found: Iterable[Collective]) -> dict[str, Traffic]:
    """Number, bytes and bytes sent of the exchanges, for every kind that there is."""
    sums: dict[str, Traffic] = {}
    for c in found:
        count, size, sent = sums.get(c.kind, Traffic(0, 0, 0.0))
        size += c.times * c.bytes
        sums[c.kind] = Traffic(count + c.times, size, sent + c.sent)
    return sums


COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.\-]+ = ([^=\"]+?) (" + "|".join(KINDS) + r")(-start)?\("
)
CALLS = re.compile(r"(?:body|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
TRIPS = re.compile(r"known_trip_count\D+(\d+)")
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")  # f32[8,128]
LISTED = re.compile(r"replica_groups=\{(\{.*?\})\}")  # {{0,1},{2,3}}
ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # [2,4]T(1,0): 0 to 7, as a table, turned
IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=" + ORDER)
AXES = re.compile(
    r"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}"
)
PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")


def collectives(hlo_text: str) -> list[Collective]:
    """The exchanges of a compiled program, `Compiled.as_text()`, in its order.

    A pair of -start and -done counts once, and so do all parts of one exchange that
    work is fused with (on TPUs): they have one channel. Of branches, all count.
    """
    lines = re.sub(r"/\*.*?\*/", "", hlo_text).splitlines()  # /*index=5*/ in tuples
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", "".join(lines[:1]))
    everyone = tuple(range(math.prod(int(n) for n in counts)))
    runs, name, found, seen = _runs(lines), "", [], set()
    for line in lines:
        header, match = COMPUTATION.match(line), INSTRUCTION.match(line)
        name = header[1] if header else name
        channel = re.search(r"channel_id=\d+", line)
        if match is None or (channel and channel[0] in seen):
            continue
        seen |= {channel[0]} if channel else set()
        result, kind, start = match.groups()
        group, parts = _group(line) or everyone, _elements(result)
        if start and kind != "all-reduce" and len(parts) > 1:
            result = parts[1]  # (operands, results, ...)
        size = _size(result) * (len(group) if kind == "reduce-scatter" else 1)
        found.append(Collective(kind, size, group, runs.get(name) or 1))
    return found


def _runs(lines: Sequence[str]) -> dict[str, int]:
    """How often each computation runs in one call; those called come before callers."""
    called: dict[str, list[tuple[str, int]]] = {}
    name, entry = "", ""
    for line in lines:
        header = COMPUTATION.match(line)
        if header:
            name = header[1]
            called[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            trips = TRIPS.search(line) if " while(" in line else None
            for names in CALLS.findall(line):
                for other in re.findall(r"[\w.\-]+", names):
                    called[name].append((other, int(trips[1]) if trips else 1))
    runs = dict.fromkeys(called, 0) | ({entry: 1} if entry else {})
    for name in reversed(called):
        for other, times in called[name]:
            if other in runs:
                runs[other] += times * runs[name]
    return runs


def _group(line: str) -> tuple[int, ...]:
    """The devices of the largest group; none where all are meant."""
    if pairs := PAIRS.search(line):
        return tuple(sorted(set(_numbers(pairs[1]))))
    if iota := IOTA.search(line):
        table = _table(iota[2], iota[3]).reshape(-1, _numbers(iota[1])[-1])
        return tuple(table[0].tolist())
    if axes := AXES.search(line):
        return _along_axes(*axes.groups())
    listed = LISTED.search(line)
    groups = re.findall(r"\{([\d, ]+)\}", listed[1]) if listed else []
    return max((tuple(_numbers(group)) for group in groups), key=len, default=())


def _along_axes(mesh: str, order: str | None, names: str) -> tuple[int, ...]:
    """The devices that differ in the named axes of a mesh alone; of 'a':(2)4 only in
    the factor 4 of a's size that follows its factor 2."""
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh)}
    turned = re.search(ORDER, order or "")
    devices = np.arange(math.prod(sizes.values()))
    if turned:
        devices = _table(turned[1], turned[2])
    elif order:
        devices = np.array(_numbers(order))
    parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", names)
    chosen = {
        name: (int(first or 1), int(n or sizes[name])) for name, first, n in parts
    }
    shape, index = [], []
    for name, size in sizes.items():
        first, n = chosen.get(name, (1, 1))
        shape += [first, n, size // (first * n)]
        index += [0, slice(None), 0]
    return tuple(devices.reshape(shape)[tuple(index)].reshape(-1).tolist())


def _table(dims: str, order: str | None) -> np.ndarray:
    """The devices from 0 on as a table of these dimensions, its axes in that order."""
    sizes = _numbers(dims)
    table = np.arange(math.prod(sizes)).reshape(sizes)
    return table.transpose(_numbers(order)) if order else table


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _elements(shape: str) -> list[str]:
    """The parts of a tuple's shape; of an array's, itself."""
    if not shape.startswith("("):
        return [shape]
    parts, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _size(shape: str) -> int:
    """Bytes of an array or of all arrays of a tuple."""
    bits = 0
    for dtype, dims in ARRAY.findall(shape):
        width = re.search(r"\d+", dtype.replace("pred", "s8"))
        count = math.prod(_numbers(dims))
        bits += count * int(width[0]) if width else 0  # a token has none
    return bits // 8
