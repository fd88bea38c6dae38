"""The collectives of a compiled program, read from its HLO text: which, how often, how large."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
         "collective-permute", "collective-broadcast")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^ *(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLEES = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_WHILE = re.compile(r"\bcondition=%?([\w.-]+), body=%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Collectives:
    """What one kind of collective amounts to on one device, each time the program runs.

    `bytes` is the whole array that the group of devices has between it: what an all-gather
    gives, what an all-reduce reduces, what a reduce-scatter is given.
    """

    kind: str
    count: int
    bytes: int


@dataclasses.dataclass
class _Computation:
    found: list[tuple[str, str, int]] = dataclasses.field(default_factory=list)  # kind, identity, bytes
    called: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)  # name, condition
    constants: list[int] = dataclasses.field(default_factory=list)


def read_collectives(hlo: str) -> list[Collectives]:
    """Totals by kind, the largest first, of `compiled.as_text()`.

    What stands in a loop counts as often as the loop runs, where its condition compares with a
    constant (so do those of `lax.scan`), and once otherwise; of a conditional all branches count.
    A collective that the TPU compiler spreads over several fusions, to run beside them, counts
    once: its parts have a channel and a chain in common.
    """
    computations, entry = _parse(hlo)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    seen: set[str] = set()

    def walk(name: str, times: int) -> None:
        for kind, identity, size in computations[name].found:
            if identity not in seen:
                seen.add(identity)
                counts[kind] += times
                sizes[kind] += times * size
        for callee, condition in computations[name].called:
            walk(callee, times * (_trips(computations[condition]) if condition else 1))

    walk(entry, 1)
    return sorted((Collectives(kind, counts[kind], sizes[kind]) for kind in counts),
                  key=lambda total: -total.bytes)


def _trips(condition: _Computation) -> int:
    """How often a loop runs that counts from 0 up to the only constant of its condition."""
    return condition.constants[0] if len(condition.constants) == 1 else 1


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    """Every computation by name, and the name of the one that is run."""
    computations: dict[str, _Computation] = defaultdict(_Computation)
    entry = name = ""
    for number, line in enumerate(hlo.splitlines()):
        if head := _COMPUTATION.match(line):
            name = head[2]
            entry = name if head[1] else entry
            continue
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        result, operation, rest = instruction.groups()
        here = computations[name]
        if loop := _WHILE.search(rest):
            here.called.append((loop[2], loop[1]))
        here.called += [(callee, None) for callee in _CALLEES.findall(rest)]
        if branches := re.search(r"branch_computations=\{([^}]*)\}", rest):
            here.called += [(branch.strip(" %"), None) for branch in branches[1].split(",")]
        if operation == "constant" and re.match(r"[su]\d+\[\]", result):
            here.constants.append(int(rest[:rest.index(")")]))
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            parts = re.search(r'channel_id=(\d+).*chain_id="(\d+)"', rest)
            size = _bytes(result, started=operation.endswith("-start") and kind != "all-reduce")
            if kind == "reduce-scatter":
                size *= _group_size(rest)
            if name.startswith("all-reduce-scatter"):  # TPU: a fusion that keeps a part of the sum
                kind = "reduce-scatter"
            identity = f"{kind} {parts[1]} {parts[2]}" if parts else f"line {number}"
            here.found.append((kind, identity, size))
    return computations, entry


def _bytes(result: str, started: bool) -> int:
    """Bytes of a result type; of a started operation's, which lists operands first, the second half."""
    shapes = _SHAPE.findall(result)
    if started:  # without the scalars of the handshake
        shapes = [(kind, dims) for kind, dims in shapes if dims]
        shapes = shapes[len(shapes) // 2:]
    return sum(_item_bits(kind) * math.prod(map(int, filter(None, dims.split(",")))) // 8
               for kind, dims in shapes)


def _item_bits(kind: str) -> int:
    """Bits of an HLO element type: f32, bf16, pred, s4, f8e4m3fn, c64 …"""
    number = re.match(r"[a-z]+(\d+)", kind)
    return int(number[1]) if number else 8


def _group_size(attributes: str) -> int:
    """Devices in a replica group, however the groups are written."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", attributes):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    return 1
