"""The list of mutations matches the tree, and caught mutations are distinguished from others."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.error_lines import assert_one_line
from tilelli_jax.errors import InputError
from tools import mutations
from tools.mutations import Mutation


def test_the_list_matches_the_tree() -> None:
    listed_mutations = mutations.read(mutations.LIST)
    assert len(listed_mutations) == 43
    mutations.check(listed_mutations, mutations.ROOT)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "main"
    root.mkdir()
    (root / ".gitignore").write_text("ignored.py\n")
    (root / "ignored.py").write_text("")
    (root / "total.py").write_text("def total(a, b):\n    return a + b\n")
    (root / "test_total.py").write_text("from total import total\ndef test():\n    assert total(2, 0) == 2\n")
    (tmp_path / "shared").mkdir()
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


def fault(old: str, new: str) -> Mutation:
    return Mutation("total.py", old, new, "a fault", ("test_total.py",))


def test_outcomes(tree: Path, tmp_path: Path) -> None:
    copy = mutations.copy_tree(tree, tmp_path / "copy")
    assert sorted(path.name for path in copy.iterdir()) == [".gitignore", "test_total.py", "total.py"]
    assert (copy.parent / "shared").resolve() == tmp_path / "shared"
    caught = mutations.run_mutation(copy, fault("a + b", "a * b"), full=False)
    assert caught.caught and str(caught) == "caught by test_total.py::test"
    survived = mutations.run_mutation(copy, fault("a + b", "a - b"), full=False)
    assert not survived.caught and str(survived) == "not caught by the tests that ran"
    broken = mutations.run_mutation(copy, fault("return", "return return"), full=False)
    assert not broken.caught and "pytest ended with 2" in str(broken)
    for name in ("total.py", "test_total.py"):
        assert (copy / name).read_bytes() == (tree / name).read_bytes()


@pytest.mark.parametrize(("mutation", "message"), [
    (fault("a", "b"), "once, found it"), (fault("a + b", "a + b"), "expected new to differ"),
    (Mutation("none.py", "a", "b", "a fault", ("test_total.py",)), "none.py: no such file")])
def test_mutations_that_do_not_match(mutation: Mutation, message: str, tree: Path) -> None:
    with pytest.raises(InputError, match=message):
        mutations.check([mutation], tree)


@pytest.fixture
def listed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two faults of the small tree, of which its test catches the first."""
    path = tree / "mutations.yaml"
    path.write_text(yaml.safe_dump([dataclasses.asdict(fault("a + b", new)) | {"tests": ["test_total.py"]}
                                    for new in ("a * b", "a - b")]))
    monkeypatch.setattr(mutations, "ROOT", tree)
    monkeypatch.setattr(mutations, "LIST", path)
    return path


@pytest.mark.exhaustive
@pytest.mark.parametrize(("options", "status", "end"), [
    (["--min-caught", "1"], 0, "1 of 2 caught"), (["--min-caught", "2"], 1, "1 of 2 caught"),
    ([], 1, "1 of 2 caught"), (["--only", "1"], 0, "1 of 1 caught"),
    (["--only", "2", "--jobs", "2"], 1, "0 of 1 caught"),
    (["--full", "--min-caught", "1"], 0, "1 of 2 caught")])
def test_exit_status(options: list[str], status: int, end: str, listed: Path,
                     capsys: pytest.CaptureFixture[str]) -> None:
    assert mutations.main(options) == status
    assert capsys.readouterr().out.splitlines()[-1] == end


def test_a_test_that_fails_without_a_fault(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (listed.parent / "total.py").write_text("def total(a, b):\n    return a + b + 1\n")
    assert mutations.main([]) == 2
    assert_one_line(capsys.readouterr().err, "tests: expected all to pass without a fault, found pytest "
                                             "exiting with 1: test_total.py::test")


@pytest.mark.parametrize(("text", "message"), [
    ("", "expected a list of mutations"), ("[", "cannot be read"), ("[1]", "entry 1: expected the keys"),
    ("[{file: a, old: b, new: c, kind: d, tests: a.py}]", "entry 1: tests: expected a list of files")])
def test_invalid_lists(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        mutations.read(tmp_path / "list.yaml")


@pytest.mark.parametrize(("options", "message"), [
    (["--only", "44"], "--only: expected numbers from 1 to 43, found 44"), (["--only", "x"], "found 'x'"),
    (["--jobs", "0"], "found '0'")])
def test_invalid_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mutations.main(options) == 2
    assert_one_line(capsys.readouterr().err, message)
