"""Mutators of one node of a tree in a file: JSON, JSON lines, YAML, headers of safetensors, pickles."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Rng = np.random.Generator
Change = Callable[[Any, Rng], tuple[Any, str]]  # a tree → the changed tree and a description

DEEP: Any = None
for _ in range(150):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 0.5, -0.0, 2**31 - 1, 2**31, 2**63, 10**400, 1e308, float("nan"),
    float("inf"), "", " ", "0", "nan", "\ud800", "\0", "a\nb", "x" * 100_000, "../../etc/passwd", "/", ".",
    [], {}, [None], [[]], {"": None}, {"a": 1}, DEEP)


class DuplicateKeyDict(dict[str, Any]):
    """A dict that writes its first key twice, the second time with the value null."""

    def items(self) -> Any:
        items = list(super().items())
        return [*items, (items[0][0], None)] if items else []


def positions(tree: Any, position: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The positions (keys and indices from the root) of all nodes."""
    yield position
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield from positions(value, (*position, key))


def _node(tree: Any, position: tuple[Any, ...]) -> Any:
    for key in position:
        tree = tree[key]
    return tree


def _set_node(tree: Any, position: tuple[Any, ...], value: Any) -> Any:
    if not position:
        return value
    _node(tree, position[:-1])[position[-1]] = value
    return tree


def _random_node(tree: Any, rng: Rng, fits: Callable[[Any], bool]) -> tuple[tuple[Any, ...], Any] | None:
    """Position and value of a random node that fits, or None.

    Nodes that differ only in list indices form a group; first a group is drawn, so that long lists do not
    dominate.
    """
    fitting = [position for position in positions(tree) if fits(_node(tree, position))]
    groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for position in fitting:
        groups.setdefault(tuple("" if isinstance(key, int) else key for key in position), []).append(position)
    if not fitting:
        return None
    group = list(groups.values())[rng.integers(len(groups))]
    position = group[rng.integers(len(group))]
    return position, _node(tree, position)


def _position_text(position: tuple[Any, ...]) -> str:
    return ".".join(map(str, position)) or "the root"


def replaced(tree: Any, rng: Rng) -> tuple[Any, str]:
    drawn = _random_node(tree, rng, lambda node: True)
    assert drawn is not None
    position, old = drawn
    new = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    return _set_node(tree, position, new), f"{_position_text(position)}: {old!r:.60} became {new!r:.60}"


def leaf_replaced(tree: Any, rng: Rng) -> tuple[Any, str]:
    drawn = _random_node(tree, rng, lambda node: not isinstance(node, dict | list))
    if drawn is None:
        return replaced(tree, rng)
    position, old = drawn
    new = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    return _set_node(tree, position, new), f"{_position_text(position)}: {old!r:.60} became {new!r:.60}"


def number_shifted(tree: Any, rng: Rng) -> tuple[Any, str]:
    """Changes a number by 1, its sign, or by a large factor."""
    drawn = _random_node(tree, rng, lambda node: isinstance(node, int | float) and not isinstance(node, bool))
    if drawn is None:
        return replaced(tree, rng)
    position, old = drawn
    new = [old + 1, old - 1, -old, old * 1000, old / 3][rng.integers(5)]
    return _set_node(tree, position, new), f"{_position_text(position)}: {old!r:.60} became {new!r:.60}"


def wrapped(tree: Any, rng: Rng) -> tuple[Any, str]:
    """Wraps a node in a list or a dict, or converts it to text."""
    drawn = _random_node(tree, rng, lambda node: True)
    assert drawn is not None
    position, old = drawn
    new = [[old], str(old), {"value": old}][rng.integers(3)]
    return _set_node(tree, position, new), f"{_position_text(position)}: {old!r:.60} became {new!r:.60}"


def key_deleted(tree: Any, rng: Rng) -> tuple[Any, str]:
    drawn = _random_node(tree, rng, lambda node: isinstance(node, dict) and bool(node))
    if drawn is None:
        return replaced(tree, rng)
    position, node = drawn
    key = list(node)[rng.integers(len(node))]
    del node[key]
    return tree, f"{_position_text((*position, key))}: deleted"


def key_renamed(tree: Any, rng: Rng) -> tuple[Any, str]:
    drawn = _random_node(tree, rng, lambda node: isinstance(node, dict) and bool(node))
    if drawn is None:
        return replaced(tree, rng)
    position, node = drawn
    key = list(node)[rng.integers(len(node))]
    name = [f"{key}s", str(key).upper(), "", "\ud800", "x" * 5000, f"{key}\n", "family"][rng.integers(7)]
    new = {name if other == key else other: value for other, value in node.items()}
    return _set_node(tree, position, new), f"{_position_text((*position, key))}: renamed to {name!r:.60}"


def key_repeated(tree: Any, rng: Rng) -> tuple[Any, str]:
    drawn = _random_node(tree, rng, lambda node: isinstance(node, dict) and bool(node))
    if drawn is None:
        return replaced(tree, rng)
    position, node = drawn
    key = _position_text((*position, next(iter(node))))
    return _set_node(tree, position, DuplicateKeyDict(node)), f"{key}: written twice, the second time null"


def list_changed(tree: Any, rng: Rng) -> tuple[Any, str]:
    """Empties, doubles, shortens or reverses a list."""
    drawn = _random_node(tree, rng, lambda node: isinstance(node, list) and bool(node))
    if drawn is None:
        return key_deleted(tree, rng)
    position, node = drawn
    kind = int(rng.integers(4))
    new = [[], [*node, *node], node[:-1], node[::-1]][kind]
    description = ("emptied", "doubled", "shortened", "reversed")[kind]
    return _set_node(tree, position, new), f"{_position_text(position)}: {description}"


CHANGES: tuple[Change, ...] = (replaced, leaf_replaced, leaf_replaced, leaf_replaced, number_shifted, wrapped,
                               key_deleted, key_renamed, key_repeated, list_changed)


def _json(change: Change) -> Callable[[Path, Rng], str]:
    def mutate(path: Path, rng: Rng) -> str:
        tree, description = change(json.loads(path.read_bytes()), rng)
        path.write_text(json.dumps(tree))
        return description
    return _with_name(mutate, change)


def _json_line(change: Change) -> Callable[[Path, Rng], str]:
    def mutate(path: Path, rng: Rng) -> str:
        lines = path.read_text().splitlines()
        number = int(rng.integers(len(lines)))
        tree, description = change(json.loads(lines[number]), rng)
        lines[number] = json.dumps(tree)
        path.write_text("\n".join(lines) + "\n")
        return f"line {number + 1}: {description}"
    return _with_name(mutate, change)


def _yaml(change: Change) -> Callable[[Path, Rng], str]:
    def mutate(path: Path, rng: Rng) -> str:
        tree, description = change(yaml.safe_load(path.read_text()), rng)
        path.write_text(yaml.dump(tree, Dumper=_Dumper))
        return description
    return _with_name(mutate, change)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(DuplicateKeyDict, lambda dumper, tree: dumper.represent_mapping(
    "tag:yaml.org,2002:map", list(tree.items())))

# YAML syntax beyond JSON; each replaces one value.
TAGS = ("!!bool maybe", "!!int x", "!!float x", "!!timestamp soon", "!!binary '?'", "!!null x",
        "!!set {a, b}", "!!omap [a: 1]", "!!python/object:os.system x", "!!python/tuple [1]", "!nobody x",
        "2001-01-01", "1_000", "0x10", "1:30", "~", "yes", ".nan", "-.inf", "&a [*a]", "*nothing",
        "|\n  text", "{a: [}", "'", "\t- x", "!!map x", "!!seq x", "? [a] : b", "<<: {a: 1}", "!!str 1",
        "1e400", "@x", "%TAG")


def tagged(path: Path, rng: Rng) -> str:
    lines = path.read_text().splitlines()
    ends = [i for i, line in enumerate(lines) if ": " in line]
    number = ends[rng.integers(len(ends))]
    value = TAGS[rng.integers(len(TAGS))]
    lines[number] = lines[number].partition(": ")[0] + ": " + value
    path.write_text("\n".join(lines) + "\n")
    return f"line {number + 1} became {lines[number]!r}"


def with_aliases(path: Path, rng: Rng) -> str:
    """Adds nine lines of aliases that expand to 10⁹ values, under a key of the file or a new key."""
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
    text = path.read_text()
    key = text.partition(":")[0]
    path.write_text(bomb + (text if rng.integers(2) else f"{key}: *a9\n"))
    return "with aliases of aliases"


def _with_name(mutate: Callable[[Path, Rng], str], change: Change) -> Callable[[Path, Rng], str]:
    mutate.__name__ = change.__name__
    return mutate


JSON_MUTATORS = tuple(map(_json, CHANGES))
JSON_LINES_MUTATORS = tuple(map(_json_line, CHANGES))
YAML_MUTATORS = (*map(_yaml, CHANGES), tagged, tagged, tagged, with_aliases)


# --- Files with a tree and tensors ------------------------------------------------------------


def _header(change: Change) -> Callable[[Path, Rng], str]:
    def mutate(path: Path, rng: Rng) -> str:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        tree, description = change(json.loads(content[8:8 + size]), rng)
        header = json.dumps(tree).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size:])
        return f"header: {description}"
    return _with_name(mutate, change)


def header_length_changed(path: Path, rng: Rng) -> str:
    """Changes the length of the header that the file states."""
    content = path.read_bytes()
    length = (0, 1, 2**63, 2**64 - 1, int.from_bytes(content[:8], "little") + 8)[rng.integers(5)]
    path.write_bytes(length.to_bytes(8, "little") + content[8:])
    return f"stated header length: {length} bytes"


def nan_numbers(path: Path, rng: Rng) -> str:
    """Sets all bits in the first half of the tensor data, which makes the numbers NaN."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    middle = start + (len(content) - start) // 2 // 8 * 8
    path.write_bytes(content[:start] + b"\xff" * (middle - start) + content[middle:])
    return "half of its numbers are NaN"


def large_numbers(path: Path, rng: Rng) -> str:
    """Sets the tensor data to 3e38 in float32."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    many = np.full((len(content) - start) // 4, 3e38, "<f4").tobytes()
    path.write_bytes(content[:start] + many + content[start + len(many):])
    return "its numbers are 3e38"


SAFETENSORS_MUTATORS = (*map(_header, CHANGES), header_length_changed, nan_numbers, large_numbers)


def _pickled(change: Change) -> Callable[[Path, Rng], str]:
    """Changes the tree of a `.pt` file; tensors are leaves."""
    def mutate(path: Path, rng: Rng) -> str:
        import torch
        tree, description = change(torch.load(path, weights_only=False), rng)
        torch.save(tree, path)
        return description
    return _with_name(mutate, change)


def tensor_changed(path: Path, rng: Rng) -> str:
    """Changes the shape, type, kind or numbers of a tensor."""
    import torch
    tree = torch.load(path, weights_only=False)
    drawn = _random_node(tree, rng, lambda node: isinstance(node, torch.Tensor))
    assert drawn is not None
    position, old = drawn
    groups: dict[str, Callable[[], Any]] = {
        "flat": lambda: old.reshape(-1), "half": lambda: old[:old.shape[0] // 2] if old.ndim else old,
        "int64": lambda: old.long(), "complex": lambda: old.to(torch.complex64), "bool": lambda: old > 0,
        "sparse": lambda: old.to_sparse(), "NaN": lambda: old * torch.nan, "empty": lambda: old[:0],
        "float64": lambda: old.double() * 1e300, "on the meta device": lambda: old.to("meta"),
        "repeated without memory": lambda: old.reshape(-1)[:1].expand(2**36),
        "wrapped as a parameter": lambda: torch.nn.Parameter(old.float()),
        "a numpy array": lambda: old.float().numpy(), "half precision": lambda: old.half()}
    name = list(groups)[rng.integers(len(groups))]
    torch.save(_set_node(tree, position, groups[name]()), path)
    return f"{_position_text(position)}: {name}"


def member_changed(path: Path, rng: Rng) -> str:
    """Damages one member of the archive, with a correct checksum."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = list(members)[rng.integers(len(members))] if rng.integers(2) else next(
        name for name in members if name.endswith("data.pkl"))
    content, kind = bytearray(members[name]), int(rng.integers(4))
    if kind == 0:
        del members[name]
    elif kind == 1:
        members[name] = bytes(content[:len(content) // 2])
    elif kind == 2:
        members[name.replace("/", "//")] = members.pop(name)
    else:
        for offset in rng.integers(len(content), size=3):
            content[offset] ^= int(rng.integers(1, 256))
        members[name] = bytes(content)
    with zipfile.ZipFile(path, "w") as archive:
        for other, data in members.items():
            archive.writestr(other, data)
    return f"{name}: {('removed', 'truncated', 'renamed', 'bits flipped')[kind]}"


PT_MUTATORS = (*map(_pickled, CHANGES), *(tensor_changed,) * 5, *(member_changed,) * 5)
