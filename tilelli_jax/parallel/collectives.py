"""Counts the collectives of a compiled program and their bytes, from its HLO text."""

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
    """Total of one kind of collective on one device, for one run of the program.

    `bytes` is the size of the full array of the group of devices: the output of an all-gather, the operand
    of an all-reduce, the input of a reduce-scatter.
    """

    kind: str
    count: int
    bytes: int


@dataclasses.dataclass
class _Computation:
    collectives: list[tuple[str, str, int]] = dataclasses.field(default_factory=list)  # kind, identity, bytes
    callees: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)  # name, loop condition
    constants: list[int] = dataclasses.field(default_factory=list)


def read_collectives(hlo: str) -> list[Collectives]:
    """Totals by kind, in descending order of bytes, from `compiled.as_text()`.

    A collective in a loop is counted once per iteration if the loop's condition compares with a constant
    (as for `lax.scan`), otherwise once. All branches of a conditional are counted. A collective that the
    TPU compiler splits over several fusions, to overlap it with computation, is counted once: its parts
    share a channel and a chain.
    """
    computations, entry = _parse(hlo)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    counted: set[str] = set()

    def walk(name: str, times: int) -> None:
        for kind, identity, size in computations[name].collectives:
            if identity not in counted:
                counted.add(identity)
                counts[kind] += times
                sizes[kind] += times * size
        for callee, condition in computations[name].callees:
            walk(callee, times * (_trips(computations[condition]) if condition else 1))

    walk(entry, 1)
    return sorted((Collectives(kind, counts[kind], sizes[kind]) for kind in counts),
                  key=lambda total: -total.bytes)


def _trips(condition: _Computation) -> int:
    """Number of iterations of a loop from 0 to the only constant of its condition; 1 if unknown."""
    return condition.constants[0] if len(condition.constants) == 1 else 1


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    """Every computation by name, and the name of the entry computation."""
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
        computation = computations[name]
        if loop := _WHILE.search(rest):
            computation.callees.append((loop[2], loop[1]))
        computation.callees += [(callee, None) for callee in _CALLEES.findall(rest)]
        if branches := re.search(r"branch_computations=\{([^}]*)\}", rest):
            computation.callees += [(branch.strip(" %"), None) for branch in branches[1].split(",")]
        if operation == "constant" and re.match(r"[su]\d+\[\]", result):
            computation.constants.append(int(rest[:rest.index(")")]))
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            parts = re.search(r'channel_id=(\d+).*chain_id="(\d+)"', rest)
            size = _bytes(result, started=operation.endswith("-start") and kind != "all-reduce")
            if kind == "reduce-scatter":
                size *= _group_size(rest)
            if name.startswith("all-reduce-scatter"):  # TPU: a fusion that returns one shard of the sum
                kind = "reduce-scatter"
            identity = f"{kind} {parts[1]} {parts[2]}" if parts else f"line {number}"
            computation.collectives.append((kind, identity, size))
    return computations, entry


def _bytes(result: str, started: bool) -> int:
    """Bytes of a result type. For a `-start` operation, whose type lists operands first: the second half."""
    shapes = _SHAPE.findall(result)
    if started:  # without the scalars used for synchronisation
        shapes = [(kind, dims) for kind, dims in shapes if dims]
        shapes = shapes[len(shapes) // 2:]
    return sum(_item_bits(kind) * math.prod(map(int, filter(None, dims.split(",")))) // 8
               for kind, dims in shapes)


def _item_bits(kind: str) -> int:
    """Bits of an HLO element type: f32, bf16, pred, s4, f8e4m3fn, c64 …"""
    number = re.match(r"[a-z]+(\d+)", kind)
    return int(number[1]) if number else 8


def _group_size(attributes: str) -> int:
    """Number of devices in a replica group, for each notation of replica groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", attributes):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    return 1
