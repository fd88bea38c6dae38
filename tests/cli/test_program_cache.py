"""The cache of compiled programs: for which CPU and flags, its size, and partial entries."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from tilelli_jax.cli import program_cache


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled programs are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tilelli_jax" / "programs"


def test_other_flags_have_programs_of_their_own() -> None:
    one = program_cache.fingerprint("--a=1 --b=2")
    assert one == program_cache.fingerprint(" --b=2  --a=1 "), "whatever their order"
    assert len({one, program_cache.fingerprint("--a=1"), program_cache.fingerprint("--a=1 --b=3")}) == 3


def test_so_has_another_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(text: str) -> str:
        monkeypatch.setattr(program_cache, "Path", lambda _: SimpleNamespace(read_text=lambda: text))
        return program_cache.fingerprint("")

    one = on("processor : 0\nflags : sse avx\n\nprocessor : 1\nflags : sse avx\n")
    assert one == on("processor : 0\nflags : sse avx\n"), "however many cores"
    assert len({one, on("flags : sse avx avx2\n"), on("Features : fp asimd\n"), on("nothing\n")}) == 4


def test_so_has_another_version_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for jax, jaxlib in (("0.10.2", "0.10.2"), ("0.10.3", "0.10.2"), ("0.10.2", "0.10.3")):
        monkeypatch.setattr(program_cache.importlib.metadata, "version", {"jax": jax, "jaxlib": jaxlib}.get)
        found.add(program_cache.fingerprint(""))
    assert len(found) == 3


def test_what_was_not_used_for_longest_is_deleted(place: Path) -> None:
    for i, (name, used) in enumerate((("a/old", 100), ("b/read", 900), ("a/older", 50), ("a/new", 800))):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 10)
        os.utime(path, (used, i) if name == "b/read" else (0, used))  # read, or written, then

    def kept() -> list[str]:
        return sorted(path.name for path in place.glob("*/*"))
    program_cache.prune(place, 40)
    assert kept() == ["new", "old", "older", "read"]
    program_cache.prune(place, 30)
    assert kept() == ["new", "old", "read"]
    program_cache.prune(place, 29)
    assert kept() == ["new", "read"]
    program_cache.prune(place, 5)
    assert kept() == []


def test_nothing_to_delete(place: Path) -> None:
    program_cache.prune(place, 0)
    assert not place.exists()


def test_partial_entries_are_deleted(tmp_path: Path) -> None:
    program_cache.drop_partial(tmp_path)
    whole = zlib.compress(b"program" * 100)
    for name, content in (("jit_a-1-cache", whole), ("jit_b-2-cache", whole[:-3]), ("jit_c-3-cache", b""),
                          ("other", b"")):
        (tmp_path / name).write_bytes(content)
    program_cache.drop_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("[a-z]*")) == ["jit_a-1-cache", "other"]


def test_entries_older_than_the_last_check_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "jit_a-1-cache").write_bytes(b"")
    os.utime(tmp_path / "jit_a-1-cache", (100, 100))
    program_cache.drop_partial(tmp_path)
    program_cache.drop_partial(tmp_path)
    assert (tmp_path / "jit_a-1-cache").exists()


def test_zstandard(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    whole = zstandard.ZstdCompressor().compress(b"program" * 100)
    program_cache.drop_partial(tmp_path)
    (tmp_path / "jit_a-1-cache").write_bytes(whole)
    (tmp_path / "jit_b-2-cache").write_bytes(whole[:-3])
    program_cache.drop_partial(tmp_path)
    assert [path.name for path in tmp_path.glob("jit*")] == ["jit_a-1-cache"]


LINES = """
import sys
from tilelli_jax.cli import program_cache
{first}
program_cache.enable()
import jax
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize("first", ["", "import jax"])
@pytest.mark.parametrize("given", [None, "/elsewhere"])
def test_enabled_before_and_after_the_import_of_jax(first: str, given: str | None, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != program_cache.VARIABLE}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), **({program_cache.VARIABLE: given} if given else {})}
    done = subprocess.run([sys.executable, "-c", LINES.format(first=first)], env=environment, check=True,
                          capture_output=True, text=True)
    flags = os.environ.get("XLA_FLAGS", "")
    expected = given or str(tmp_path / "tilelli_jax" / "programs" / program_cache.fingerprint(flags))
    assert done.stdout == f"{expected}\n"


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tilelli_jax").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(program_cache.VARIABLE)
    monkeypatch.setitem(sys.modules, "jax", None)
    program_cache.enable()
    assert program_cache.VARIABLE not in os.environ
