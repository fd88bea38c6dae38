"""Ways to change one node of what a file holds: JSON, JSON lines, YAML, headers of safetensors, pickles."""

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
Change = Callable[[Any, Rng], tuple[Any, str]]  # a tree → another, and what was done in words

DEEP: Any = None
for _ in range(150):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 0.5, -0.0, 2**31 - 1, 2**31, 2**63, 10**400, 1e308, float("nan"),
    float("inf"), "", " ", "0", "nan", "\ud800", "\0", "a\nb", "x" * 100_000, "../../etc/passwd", "/", ".",
    [], {}, [None], [[]], {"": None}, {"a": 1}, DEEP)


class Twice(dict[str, Any]):
    """Whose first key is written twice, the second time with nothing under it."""

    def items(self) -> Any:
        found = list(super().items())
        return [*found, (found[0][0], None)] if found else []


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all nodes."""
    yield at
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inside:
        yield from places(value, (*at, key))


def _node(tree: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        tree = tree[key]
    return tree


def _with(tree: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    _node(tree, at[:-1])[at[-1]] = value
    return tree


def _drawn(tree: Any, rng: Rng, fits: Callable[[Any], bool]) -> tuple[tuple[Any, ...], Any] | None:
    """One of the nodes that fit. Few of many alike are looked at: those of a long list hide all others."""
    found = [at for at in places(tree) if fits(_node(tree, at))]
    kinds: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for at in found:
        kinds.setdefault(tuple("" if isinstance(key, int) else key for key in at), []).append(at)
    if not found:
        return None
    alike = list(kinds.values())[rng.integers(len(kinds))]
    at = alike[rng.integers(len(alike))]
    return at, _node(tree, at)


def _called(at: tuple[Any, ...]) -> str:
    return ".".join(map(str, at)) or "the whole"


def replaced(tree: Any, rng: Rng) -> tuple[Any, str]:
    found = _drawn(tree, rng, lambda node: True)
    assert found is not None
    at, old = found
    new = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    return _with(tree, at, new), f"{_called(at)}: {old!r:.60} became {new!r:.60}"


def leaf_replaced(tree: Any, rng: Rng) -> tuple[Any, str]:
    found = _drawn(tree, rng, lambda node: not isinstance(node, dict | list))
    if found is None:
        return replaced(tree, rng)
    at, old = found
    new = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    return _with(tree, at, new), f"{_called(at)}: {old!r:.60} became {new!r:.60}"


def number_shifted(tree: Any, rng: Rng) -> tuple[Any, str]:
    """By one, its sign, or by much."""
    found = _drawn(tree, rng, lambda node: isinstance(node, int | float) and not isinstance(node, bool))
    if found is None:
        return replaced(tree, rng)
    at, old = found
    new = [old + 1, old - 1, -old, old * 1000, old / 3][rng.integers(5)]
    return _with(tree, at, new), f"{_called(at)}: {old!r:.60} became {new!r:.60}"


def wrapped(tree: Any, rng: Rng) -> tuple[Any, str]:
    """A node as a list of itself, or as text."""
    found = _drawn(tree, rng, lambda node: True)
    assert found is not None
    at, old = found
    new = [[old], str(old), {"value": old}][rng.integers(3)]
    return _with(tree, at, new), f"{_called(at)}: {old!r:.60} became {new!r:.60}"


def key_deleted(tree: Any, rng: Rng) -> tuple[Any, str]:
    found = _drawn(tree, rng, lambda node: isinstance(node, dict) and bool(node))
    if found is None:
        return replaced(tree, rng)
    at, node = found
    key = list(node)[rng.integers(len(node))]
    del node[key]
    return tree, f"{_called((*at, key))}: deleted"


def key_renamed(tree: Any, rng: Rng) -> tuple[Any, str]:
    found = _drawn(tree, rng, lambda node: isinstance(node, dict) and bool(node))
    if found is None:
        return replaced(tree, rng)
    at, node = found
    key = list(node)[rng.integers(len(node))]
    name = [f"{key}s", str(key).upper(), "", "\ud800", "x" * 5000, f"{key}\n", "family"][rng.integers(7)]
    new = {name if other == key else other: value for other, value in node.items()}
    return _with(tree, at, new), f"{_called((*at, key))}: called {name!r:.60}"


def key_twice(tree: Any, rng: Rng) -> tuple[Any, str]:
    found = _drawn(tree, rng, lambda node: isinstance(node, dict) and bool(node))
    if found is None:
        return replaced(tree, rng)
    at, node = found
    return _with(tree, at, Twice(node)), f"{_called((*at, next(iter(node))))}: twice, the second time null"


def list_changed(tree: Any, rng: Rng) -> tuple[Any, str]:
    """Emptied, doubled, cut, turned round."""
    found = _drawn(tree, rng, lambda node: isinstance(node, list) and bool(node))
    if found is None:
        return key_deleted(tree, rng)
    at, node = found
    kind = int(rng.integers(4))
    new = [[], [*node, *node], node[:-1], node[::-1]][kind]
    return _with(tree, at, new), f"{_called(at)}: {('emptied', 'doubled', 'cut', 'turned round')[kind]}"


CHANGES: tuple[Change, ...] = (replaced, leaf_replaced, leaf_replaced, leaf_replaced, number_shifted, wrapped,
                               key_deleted, key_renamed, key_twice, list_changed)


def _json(change: Change) -> Callable[[Path, Rng], str]:
    def mutate(path: Path, rng: Rng) -> str:
        tree, told = change(json.loads(path.read_bytes()), rng)
        path.write_text(json.dumps(tree))
        return told
    return _named(mutate, change)


def _json_line(change: Change) -> Callable[[Path, Rng], str]:
    def mutate(path: Path, rng: Rng) -> str:
        lines = path.read_text().splitlines()
        number = int(rng.integers(len(lines)))
        tree, told = change(json.loads(lines[number]), rng)
        lines[number] = json.dumps(tree)
        path.write_text("\n".join(lines) + "\n")
        return f"line {number + 1}: {told}"
    return _named(mutate, change)


def _yaml(change: Change) -> Callable[[Path, Rng], str]:
    def mutate(path: Path, rng: Rng) -> str:
        tree, told = change(yaml.safe_load(path.read_text()), rng)
        path.write_text(yaml.dump(tree, Dumper=_Dumper))
        return told
    return _named(mutate, change)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(Twice, lambda dumper, tree: dumper.represent_mapping(
    "tag:yaml.org,2002:map", list(tree.items())))

# What YAML has beyond JSON; each in place of one value.
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
    """Nine lines that stand for a thousand million values, under a key of the file or one more."""
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
    text = path.read_text()
    key = text.partition(":")[0]
    path.write_text(bomb + (text if rng.integers(2) else f"{key}: *a9\n"))
    return "with aliases of aliases"


def _named(mutate: Callable[[Path, Rng], str], change: Change) -> Callable[[Path, Rng], str]:
    mutate.__name__ = change.__name__
    return mutate


OF_JSON = tuple(map(_json, CHANGES))
OF_JSON_LINES = tuple(map(_json_line, CHANGES))
OF_YAML = (*map(_yaml, CHANGES), tagged, tagged, tagged, with_aliases)


# --- Files with a tree and numbers ------------------------------------------------------------


def _header(change: Change) -> Callable[[Path, Rng], str]:
    def mutate(path: Path, rng: Rng) -> str:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        tree, told = change(json.loads(content[8:8 + size]), rng)
        header = json.dumps(tree).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size:])
        return f"header: {told}"
    return _named(mutate, change)


def other_length(path: Path, rng: Rng) -> str:
    """Of the header."""
    content = path.read_bytes()
    length = (0, 1, 2**63, 2**64 - 1, int.from_bytes(content[:8], "little") + 8)[rng.integers(5)]
    path.write_bytes(length.to_bytes(8, "little") + content[8:])
    return f"its header has {length} bytes, it says"


def no_numbers(path: Path, rng: Rng) -> str:
    """Half of what follows the header becomes NaN: all bits set."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    middle = start + (len(content) - start) // 2 // 8 * 8
    path.write_bytes(content[:start] + b"\xff" * (middle - start) + content[middle:])
    return "half of its numbers are NaN"


def large_numbers(path: Path, rng: Rng) -> str:
    """What follows the header becomes 3e38 in float32."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    many = np.full((len(content) - start) // 4, 3e38, "<f4").tobytes()
    path.write_bytes(content[:start] + many + content[start + len(many):])
    return "its numbers are 3e38"


OF_SAFETENSORS = (*map(_header, CHANGES), other_length, no_numbers, large_numbers)


def _pickled(change: Change) -> Callable[[Path, Rng], str]:
    """Of a `.pt` file; tensors are leaves."""
    def mutate(path: Path, rng: Rng) -> str:
        import torch
        tree, told = change(torch.load(path, weights_only=False), rng)
        torch.save(tree, path)
        return told
    return _named(mutate, change)


def tensor_changed(path: Path, rng: Rng) -> str:
    """Another shape, type or kind of a tensor, or other numbers."""
    import torch
    tree = torch.load(path, weights_only=False)
    found = _drawn(tree, rng, lambda node: isinstance(node, torch.Tensor))
    assert found is not None
    at, old = found
    kinds: dict[str, Callable[[], Any]] = {
        "flat": lambda: old.reshape(-1), "half": lambda: old[:old.shape[0] // 2] if old.ndim else old,
        "int64": lambda: old.long(), "complex": lambda: old.to(torch.complex64), "bool": lambda: old > 0,
        "sparse": lambda: old.to_sparse(), "NaN": lambda: old * torch.nan, "of no numbers": lambda: old[:0],
        "float64": lambda: old.double() * 1e300, "on no device": lambda: old.to("meta"),
        "repeated without memory": lambda: old.reshape(-1)[:1].expand(2**36),
        "wrapped as a parameter": lambda: torch.nn.Parameter(old.float()),
        "a numpy array": lambda: old.float().numpy(), "half precision": lambda: old.half()}
    name = list(kinds)[rng.integers(len(kinds))]
    torch.save(_with(tree, at, kinds[name]()), path)
    return f"{_called(at)}: {name}"


def member_changed(path: Path, rng: Rng) -> str:
    """One member of the archive is spoilt, with the right check sum: only what is in it is wrong."""
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
        for at in rng.integers(len(content), size=3):
            content[at] ^= int(rng.integers(1, 256))
        members[name] = bytes(content)
    with zipfile.ZipFile(path, "w") as archive:
        for other, data in members.items():
            archive.writestr(other, data)
    return f"{name}: {('taken away', 'cut', 'renamed', 'flipped')[kind]}"


OF_PT = (*map(_pickled, CHANGES), *(tensor_changed,) * 5, *(member_changed,) * 5)
