"""`tilelli`: the overview, `--help` of every command, and invalid commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.error_lines import assert_one_line
from tilelli_jax import __main__ as tilelli
from tilelli_jax import config as config_lib
from tilelli_jax import extras
from tilelli_jax.__main__ import COMMANDS, main
from tilelli_jax.errors import InputError

ROOT = Path(__file__).parents[1]


def test_one_screen_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 40 and max(map(len, shown.splitlines())) <= 80
    for name, entry in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(entry.summary)}$", shown, re.M), name
    assert main([]) == 2
    assert capsys.readouterr() == ("", shown)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"tilelli_jax \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_the_overview_does_not_import_jax() -> None:
    script = ("import sys\nfrom tilelli_jax.__main__ import main\nmain(['--help'])\n"
              "assert not {'jax', 'numpy', 'sklearn', 'yaml'} & set(sys.modules), sorted(sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: tilelli {name} ")
    if "\nkeys, with their defaults:\n" in shown:
        assert "positional arguments" not in shown
        assert shown.index("\noptions:\n") < shown.index("\nkeys, with their defaults:\n")


@pytest.mark.parametrize(("argv", "message"), [
    (["trian"], "error: trian: unknown command, did you mean train? (tilelli --help lists them)"),
    (["xyz"], "error: xyz: unknown command (tilelli --help lists them)"),
    (["--verbose"], "error: --verbose: unknown command"),
    (["recall", "predictt"], "error: "),
    (["train"], "error: the following arguments are required: --config, e.g. --config demo"),
    (["recall"], "required: --config, e.g. --config recall-demo"),
    (["train", "--config", "demo", "train.lr=1"],
     "unknown key 'train.lr' (did you mean 'optimizer.learning_rate'?)"),
    (["train", "--config", "demo", "train.qqqqq=1"], "unknown key 'train.qqqqq'\n")])
def test_unknown_commands(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize(("module", "name"), [
    ("eval.recall", "recall"), ("eval.difficulty", "difficulty"), ("eval.abstention", "abstention"),
    ("eval.comparison", "compare"), ("eval.claims", "claims"), ("convert", "convert"),
    ("eval.difficulty.published", "difficulty published")])
def test_commands_work_in_a_clone(module: str, name: str) -> None:
    """Only modules of the top-level packages eval and convert are then imported."""
    script = ("import runpy, sys\nsys.argv = ['x', '--help']\n"
              "try: runpy.run_module(sys.modules['sys'].orig_argv[-1], run_name='__main__', alter_sys=True)\n"
              "except SystemExit as ended: assert ended.code == 0\n"
              "assert not [name for name in sys.modules if name.startswith(('tilelli_jax.eval', "
              "'tilelli_jax.convert'))]\n")
    done = subprocess.run([sys.executable, "-c", script, module], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: tilelli {name} ")


EXHAUSTIVE = pytest.mark.exhaustive


@pytest.mark.parametrize(("argv", "package", "what"), [
    ("compare --config lite-vs-vanilla", "scipy", "this command"),
    ("recall --config recall-demo", "sklearn", "this command"),
    ("recall predict --model x --sidecar x QUESTION", "scipy", "this command"),
    ("recall app --model x --sidecar x", "sklearn", "this command"),
    ("difficulty --config difficulty-demo", "sklearn", "this command"),
    ("difficulty published --config x.yaml", "scipy", "this command"),
    ("abstention --config abstention-demo", "scipy", "this command"),
    ("abstention calibrate --model x --on x.jsonl", "sklearn", "this command"),
    ("claims --model x", "scipy", "this command"),
    # Packages that are imported late; these tests import everything else.
    ("difficulty --config difficulty-demo", "pyarrow", "tilelli difficulty"),
    pytest.param("difficulty --config difficulty-etth1", "statsmodels", "data.family series",
                 marks=EXHAUSTIVE),
    pytest.param("compare --config lite-vs-vanilla", "pyarrow", "tilelli compare", marks=EXHAUSTIVE),
    pytest.param("demo", "pyarrow", "tilelli recall", marks=EXHAUSTIVE),
    pytest.param("abstention --config abstention-demo", "pyarrow", "tilelli abstention", marks=EXHAUSTIVE)])
def test_a_package_that_is_not_installed(argv: str, package: str, what: str, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """One line before any work, and nothing written."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.startswith("tilelli_jax.eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(argv.split()) == 2
    assert_one_line(capsys.readouterr().err,
                    f"error: {what} needs {package}: pip install 'tilelli_jax[eval]'\n")
    assert not list(tmp_path.iterdir())


def test_every_optional_package_has_its_extra() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in {*extras.EXTRA.values(), *extras.DISTRIBUTIONS}:
        assert re.search(rf"^{extra} = \[", text, re.M), extra


def test_shipped_configurations_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert config_lib.shipped().keys() == names and "demo" in names
    assert config_lib.find("demo").read_text() == (ROOT / "configs/demo.yaml").read_text()
    (tmp_path / "recall-demo").mkdir()  # a directory is not a configuration
    assert config_lib.find("recall-demo").is_file()
    (tmp_path / "demo").write_text("a: 1\n")
    assert config_lib.read_yaml("demo") == {"a": 1}, "a path has priority"
    with pytest.raises(InputError, match=(
            r"^dmo: no such file, and no configuration of that name is shipped; did you mean 'demo'\?")):
        config_lib.find("dmo")


def test_the_package_list_matches_the_tree() -> None:
    """pyproject.toml lists packages by hand, because three of them are in other directories."""
    import tomllib
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = set()
    for directory, name in (("tilelli_jax", "tilelli_jax"), ("convert", "tilelli_jax.convert"),
                            ("eval", "tilelli_jax.eval"), ("configs", "tilelli_jax.configs")):
        for path in (ROOT / directory).rglob("*.py"):
            packages.add(".".join([name, *path.parent.relative_to(ROOT / directory).parts]))
    assert set(tree["packages"]) == packages
    for package, patterns in tree["package-data"].items():
        directory = ROOT / package.removeprefix("tilelli_jax.").replace(".", "/")
        assert all(list(directory.glob(pattern)) for pattern in patterns), package


def test_the_console_script() -> None:
    assert 'tilelli = "tilelli_jax.__main__:main"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert tilelli.main is main
