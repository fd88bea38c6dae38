"""Who may import whom, read off the sources; and what importing the library does not do."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "tilelli_jax"

# What a room, or a single module, may import of the library besides itself. Single modules without
# a rule are commands and what belongs to them: they may import everything, and nothing here them.
BELOW = {"config", "errors", "files", "interrupts", "json_text", "tables", "yaml_text", "sharding"}
MAY_IMPORT: dict[str, set[str]] = {
    "interrupts": set(),
    "progress": {"interrupts"},
    "errors": {"interrupts"},
    "files": {"errors", "interrupts"},
    "json_text": {"errors", "files"},
    "tables": set(),
    "yaml_text": {"errors", "files", "json_text"},
    "config": {"errors", "yaml_text"},
    "sharding": {"config", "errors"},
    "nn": set(),
    "data": {"tensors", "config", "errors", "files", "json_text", "tables"},
    "tensors": {"errors", "files", "json_text"},
    "pretrained": {"errors", "files", "json_text", "tensors"},
    "models": {"nn", "data", "sampling", "tensors", "pretrained", *BELOW},
    "estimators": {"models", "nn", *BELOW},
    "store": {"models", "estimators", "tensors", *BELOW},
    "language": {"store", "models", "tensors", *BELOW},
    "signals": {"progress", "estimators", "models", "nn", *BELOW},
    "sampling": {"config", "errors"},
    "decoding": {"sampling", "models", "nn", *BELOW},
    "training": {"store", "decoding", "sampling", "models", "estimators", "nn", "data", *BELOW},
}


def modules() -> dict[str, Path]:
    """Every module of the library by its dotted name; a package is its __init__."""
    found = {}
    for path in sorted((ROOT / LIBRARY).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def at_import(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported."""
    for node in nodes:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        for field in ("body", "orelse", "finalbody", "handlers"):
            yield from at_import(getattr(node, field, []))


@functools.cache
def imports(module: str, everywhere: bool = True) -> frozenset[str]:
    """The modules that a module names in its imports: everywhere in it, or only where they run at once."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree) if everywhere else at_import(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base
                      for alias in node.names}
    return frozenset(found)


def room(module: str) -> str:
    """`tilelli_jax.nn.conv` is in the room nn."""
    return module.split(".")[1] if "." in module else ""


def test_the_sources_are_read_rightly() -> None:
    assert {"jax", "tilelli_jax.models", "tilelli_jax.models.decoder"} <= imports("tilelli_jax.decoding")
    assert "tilelli_jax.store" in imports("tilelli_jax.generate")
    assert "matplotlib" in imports("tilelli_jax.training.report")
    assert "matplotlib" not in imports("tilelli_jax.training.report", everywhere=False)


@pytest.mark.parametrize("module", MODULES)
def test_the_library_needs_neither_torch_nor_what_stands_on_it(module: str) -> None:
    foreign = {name.partition(".")[0] for name in imports(module)}
    assert not foreign & {"torch", "torchvision", "sklearn", "eval", "convert", "tests", "bench", "launch"}


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in MAY_IMPORT])
def test_rooms_import_only_what_lies_below_them(name: str) -> None:
    used = {room(other) or "the package itself" for other in imports(name)
            if other.partition(".")[0] == LIBRARY}
    assert used <= MAY_IMPORT[room(name)] | {room(name)}


def test_every_room_has_its_rule() -> None:
    packages = {room(module) for module in MODULES if module.count(".") > 1}
    assert packages <= MAY_IMPORT.keys() and MAY_IMPORT.keys() <= {room(module) for module in MODULES}
    used = {room(other) for other in imports(LIBRARY) if other.startswith(f"{LIBRARY}.")}
    assert used <= MAY_IMPORT.keys(), "importing the library imports no command"


def test_networks_know_of_data_only_what_the_baseline_counts() -> None:
    assert {module for module in MODULES if room(module) == "models"
            and any(room(other) == "data" for other in imports(module))} <= {"tilelli_jax.models.trigram"}


def test_no_cycles() -> None:
    """Modules can be imported in an order in which each needs only those before it."""
    waiting = {module: {other for other in imports(module, everywhere=False) if other in MODULES}
               for module in MODULES}
    while ready := {module for module, needs in waiting.items() if not needs & waiting.keys()}:
        for module in ready:
            del waiting[module]
    assert not waiting, f"in a circle: {sorted(waiting)}"


def test_no_pickle() -> None:
    for module in MODULES:
        assert not {name.partition(".")[0] for name in imports(module)} & {
            "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, module
        assert "allow_pickle=True" not in MODULES[module].read_text(encoding="utf-8"), module


CONVERT = sorted((ROOT / "convert").rglob("*.py"))


def test_what_convert_may_do() -> None:
    """It stands on the library and beside nothing else; torch is asked for where it is used."""
    for path in CONVERT:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
                 for alias in node.names}
        named |= {(node.module or "").partition(".")[0] for node in ast.walk(tree)
                  if isinstance(node, ast.ImportFrom)}
        assert not named & {"eval", "bench", "tests", "launch", "sklearn"}, path
        at_once = ast.unparse(ast.Module([node for node in at_import(tree.body)
                                          if isinstance(node, ast.Import | ast.ImportFrom)], []))
        assert "import torch" not in at_once or path.name.startswith("torch_"), path
        text = path.read_text(encoding="utf-8")
        for call in ("torch.load(", "pickle.load", "pickle.Unpickler"):
            assert call not in text or (path.name, call) == ("checkpoint.py", "torch.load("), (path, call)
    assert "weights_only=True" in (ROOT / "convert" / "checkpoint.py").read_text(encoding="utf-8")


EVAL = sorted((ROOT / "eval").rglob("*.py"))


def test_what_eval_may_do() -> None:
    """It stands on the library, and nothing stands on it; what is pure needs no JAX."""
    for path in EVAL:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                 for alias in node.names}
        named |= {f"{LIBRARY}.{alias.name}" if node.module == LIBRARY else node.module or ""
                  for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        roots = {name.partition(".")[0] for name in named}
        assert not roots & {"torch", "convert", "bench", "tests", "launch", "pickle"}, path
        if path.parent.name in ("eval", "stats"):
            assert not roots & {"jax", "flax"}, path
            assert not {name for name in named if name.startswith(LIBRARY)} - {
                f"{LIBRARY}.{name}" for name in ("files", "errors", "interrupts", "json_text")}, path


STUDIES = {path.parent.name for path in EVAL if path.name == "__main__.py"} - {"published"}
CHECKED = {"claims": {"abstention"}}  # what stands on a study because it checks what that says


def test_studies_stand_apart() -> None:
    """None stands on another, what they share on none, and nothing on the mode of compatibility.

    But for the claims: they are claims of the abstention study, and a check that read prompts, signals
    and refusals in a way of its own would check something else. Nothing stands on them.
    """
    assert {"abstention", "comparison", "difficulty", "recall", *CHECKED} <= STUDIES
    assert not CHECKED.keys() & set().union(*CHECKED.values())
    for path in EVAL:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        named |= {f"{node.module}.{alias.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                  for alias in node.names}
        room = path.relative_to(ROOT / "eval").parts[0]
        others = STUDIES - {room} - CHECKED.get(room, set())
        assert not [name for name in named if name.split(".")[:1] == ["eval"]
                    and set(name.split(".")[1:2]) & others], path
        if "published" not in path.parts:
            assert not [name for name in named if name.startswith("eval.difficulty.published")], path


def test_pure_statistics_load_no_jax() -> None:
    names = [f"eval.{path.stem}" for path in EVAL if path.parent.name == "eval" and path.stem != "__init__"]
    assert len(names) > 5
    script = (f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
              "assert 'sklearn' in sys.modules and not {'jax', 'torch'} & set(sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_everything_starts_no_device_and_loads_no_torch() -> None:
    """Asking for any device would fail on a platform that does not exist."""
    names = sorted(name for name in MODULES if not name.endswith("__main__"))
    script = ("import importlib, os, sys\n"
              "os.environ['JAX_PLATFORMS'] = 'no_such_platform'\n"
              f"for name in {names!r}: importlib.import_module(name)\n"
              "import convert.__main__\n"
              "bad = {'torch', 'sklearn', 'matplotlib.pyplot', 'tensorflow'} & set(sys.modules)\n"
              "assert not bad, bad\n"
              "import jax\n"
              "try: jax.devices()\n"
              "except RuntimeError as error: assert 'no_such_platform' in str(error), error\n"
              "else: raise AssertionError('the test cannot fail')\n"
              "import tilelli_jax\n"
              "assert callable(tilelli_jax.generate) and 'generate' in tilelli_jax.__all__\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
