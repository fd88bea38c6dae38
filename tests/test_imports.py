"""Allowed imports between packages, checked in the sources; and side effects that importing must not have."""

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

# What a package may import besides itself. `commands` and `train` may import everything, and nothing here may
# import them.
BELOW = {"cli", "config", "errors", "extras", "io", "parallel"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "extras": {"errors"},
    "cli": {"errors", "extras"},
    "io": {"cli", "errors"},
    "config": {"cli", "errors", "io"},
    "parallel": {"config", "errors"},
    "nn": set(),
    "data": {"cli", "config", "errors", "extras", "io"},
    "pretrained": {"errors", "extras", "io"},
    "models": {"nn", "data", "pretrained", *BELOW},
    "estimators": {"models", "nn", *BELOW},
    "loading": {"models", "estimators", "pretrained", *BELOW},
    "signals": {"estimators", "models", "nn", *BELOW},
    "generation": {"loading", "signals", "models", "nn", *BELOW},
    "serving": {"generation", "loading", "models", "data", "cli", "errors", "io"},
    "training": {"loading", "generation", "models", "estimators", "nn", "data", *BELOW},
}


def modules(directory: str, name: str) -> dict[str, Path]:
    """Returns every module below a directory by its dotted name; a package is its __init__."""
    found = {}
    for path in sorted((ROOT / directory).rglob("*.py")):
        parts = path.relative_to(ROOT / directory).with_suffix("").parts
        found[".".join([name, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


NOT_INSTALLED = {"eval", "convert", "tests", "bench", "launch", "tools"}  # not under these names
MODULES = modules("tilelli_jax", LIBRARY)
REMOTE = f"{LIBRARY}.convert.remote_code."  # copied for transformers, never imported here
CONVERT = {name: path for name, path in modules("convert", f"{LIBRARY}.convert").items()
           if not name.startswith(REMOTE)}
EVAL = modules("eval", f"{LIBRARY}.eval")
ALL = MODULES | CONVERT | EVAL


def at_import(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields the statements that run when a module is imported."""
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
    """Returns the modules that a module imports, everywhere or only in statements that run at import."""
    tree = ast.parse(ALL[module].read_text(encoding="utf-8"))
    package = module if ALL[module].name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(tree) if everywhere else at_import(tree.body):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in ALL else base
                      for alias in node.names}
    return frozenset(names)


def roots(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(module)}


def package_of(module: str) -> str:
    """Returns the package of a module: `nn` for `tilelli_jax.nn.conv`."""
    return module.split(".")[1] if "." in module else ""


def test_imports_are_read_correctly() -> None:
    assert ({"jax", "tilelli_jax.models", "tilelli_jax.models.causal_lm"}
            <= imports("tilelli_jax.generation.decoding"))
    assert "tilelli_jax.loading.language" in imports("tilelli_jax.commands.generate")
    assert "matplotlib" in imports("tilelli_jax.training.report")
    assert "matplotlib" not in imports("tilelli_jax.training.report", everywhere=False)


@pytest.mark.parametrize("module", MODULES)
def test_the_library_imports_neither_torch_nor_eval_nor_convert(module: str) -> None:
    assert not roots(module) & {"torch", "torchvision", "sklearn", *NOT_INSTALLED}
    assert not imports(module) & (CONVERT | EVAL).keys()


@pytest.mark.parametrize("name", [name for name in MODULES if package_of(name) in MAY_IMPORT])
def test_packages_import_only_lower_packages(name: str) -> None:
    used = {package_of(other) or "the package itself" for other in imports(name)
            if other.partition(".")[0] == LIBRARY}
    assert used <= MAY_IMPORT[package_of(name)] | {package_of(name)}


def test_every_package_has_a_rule() -> None:
    packages = {package_of(module) for module in MODULES if module.count(".") > 1} - {"commands"}
    assert packages <= MAY_IMPORT.keys() and MAY_IMPORT.keys() <= {package_of(module) for module in MODULES}
    used = {package_of(other) for other in imports(LIBRARY) if other.startswith(f"{LIBRARY}.")}
    assert used <= MAY_IMPORT.keys(), "importing the library imports no command"


def test_of_models_only_the_trigram_baseline_imports_data() -> None:
    assert {module for module in MODULES if package_of(module) == "models"
            and any(package_of(other) == "data" for other in imports(module))
            } <= {"tilelli_jax.models.trigram"}


def test_no_cycles() -> None:
    """Modules can be ordered such that each imports only earlier ones."""
    waiting = {module: {other for other in imports(module, everywhere=False) if other in MODULES}
               for module in MODULES}
    while ready := {module for module, needs in waiting.items() if not needs & waiting.keys()}:
        for module in ready:
            del waiting[module]
    assert not waiting, f"cyclic imports: {sorted(waiting)}"


def test_no_pickle() -> None:
    for module in MODULES:
        assert not {name.partition(".")[0] for name in imports(module)} & {
            "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, module
        assert "allow_pickle=True" not in MODULES[module].read_text(encoding="utf-8"), module


def test_imports_of_convert() -> None:
    """It imports only the library; torch is imported where it is used."""
    for module, path in CONVERT.items():
        assert not roots(module) & {"sklearn", *NOT_INSTALLED} and not imports(module) & EVAL.keys(), module
        assert "torch" not in imports(module, everywhere=False) or path.name.startswith("torch_"), module
        text = path.read_text(encoding="utf-8")
        for call in ("torch.load(", "pickle.load", "pickle.Unpickler"):
            assert call not in text or (path.name, call) == ("checkpoint.py", "torch.load("), (path, call)
    assert "weights_only=True" in (ROOT / "convert" / "checkpoint.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["eval", "convert"])
def test_eval_and_convert_work_under_both_names(package: str) -> None:
    """As `eval` in a clone, as `tilelli_jax.eval` when installed."""
    for module, path in (EVAL if package == "eval" else CONVERT).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                 and not node.level}
        assert not {name for name in named if name.startswith(f"{LIBRARY}.{package}")}, module


def test_imports_of_eval() -> None:
    """It imports the library, and nothing imports it; pure statistics need no JAX."""
    for module, path in EVAL.items():
        assert not roots(module) & {"torch", "pickle", *NOT_INSTALLED}, module
        assert not imports(module) & CONVERT.keys(), module
        if path.parent.name in ("eval", "stats"):
            assert not roots(module) & {"jax", "flax"}, module
            names = ("errors", "cli.interrupts", "io.files", "io.json_text")
            allowed = {f"{LIBRARY}.{name}" for name in names}
            assert not imports(module) & MODULES.keys() - {LIBRARY} - allowed, module


STUDIES = {path.parent.name for path in EVAL.values() if path.name == "__main__.py"} - {"published"}
CHECKED = {"claims": {"abstention"}}  # packages that import a study because they check its claims


def test_studies_do_not_import_each_other() -> None:
    """No study imports another, shared modules import no study, and nothing imports the compatibility mode.

    The exception is `claims`: it checks claims of the abstention study, so it must read prompts, signals and
    refusals in the same way. Nothing imports `claims`.
    """
    assert {"abstention", "comparison", "difficulty", "recall", *CHECKED} <= STUDIES
    assert not CHECKED.keys() & set().union(*CHECKED.values())
    for module in EVAL:
        study = package_of(module.partition(".")[2])
        others = STUDIES - {study} - CHECKED.get(study, set())
        used = [name.partition(".")[2] for name in imports(module) & EVAL.keys()]
        assert not [name for name in used if package_of(name) in others], module
        if "published" not in module:
            assert not [name for name in used if name.startswith("eval.difficulty.published")], module


def test_pure_statistics_load_no_jax() -> None:
    names = [module for module, path in EVAL.items() if path.parent.name == "eval"]
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
              "import tilelli_jax.convert.command\n"
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
