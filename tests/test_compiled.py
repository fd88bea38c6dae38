"""Where tests keep compiled programs: for which CPU and flags, how many, and what is left as it was given."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import compiled


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs of all kinds are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tilelli_jax" / "tests"


def test_other_flags_have_programs_of_their_own() -> None:
    one = compiled.fingerprint("--a=1 --b=2")
    assert one == compiled.fingerprint(" --b=2  --a=1 "), "whatever their order"
    assert len({one, compiled.fingerprint("--a=1"), compiled.fingerprint("--a=1 --b=3")}) == 3


def test_so_has_another_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(text: str) -> str:
        monkeypatch.setattr(compiled, "Path", lambda _: SimpleNamespace(read_text=lambda: text))
        return compiled.fingerprint("")

    one = on("processor : 0\nflags : sse avx\n\nprocessor : 1\nflags : sse avx\n")
    assert one == on("processor : 0\nflags : sse avx\n"), "however many cores"
    assert len({one, on("flags : sse avx avx2\n"), on("Features : fp asimd\n"), on("nothing\n")}) == 4


def test_so_has_another_version_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for jax, jaxlib in (("0.10.2", "0.10.2"), ("0.10.3", "0.10.2"), ("0.10.2", "0.10.3")):
        monkeypatch.setattr(compiled.importlib.metadata, "version", {"jax": jax, "jaxlib": jaxlib}.get)
        found.add(compiled.fingerprint(""))
    assert len(found) == 3


def test_what_was_not_used_for_longest_is_deleted(place: Path) -> None:
    for i, (name, used) in enumerate((("a/old", 100), ("b/read", 900), ("a/older", 50), ("a/new", 800))):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 10)
        os.utime(path, (used, i) if name == "b/read" else (0, used))  # read, or written, then

    def kept() -> list[str]:
        return sorted(path.name for path in place.glob("*/*"))
    compiled.prune(40)
    assert kept() == ["new", "old", "older", "read"]
    compiled.prune(30)
    assert kept() == ["new", "old", "read"]
    compiled.prune(29)
    assert kept() == ["new", "read"]
    compiled.prune(5)
    assert kept() == []


def test_nothing_to_delete(place: Path) -> None:
    compiled.prune(0)
    assert not place.exists()


@pytest.fixture
def bare(place: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which nothing is set; what is set in it is taken back in the end."""
    for name in ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "PYTHONWARNINGS",
                 "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return monkeypatch


def test_where_nothing_is_given(bare: pytest.MonkeyPatch, place: Path) -> None:
    compiled.set_environment()
    flags = os.environ["XLA_FLAGS"]
    assert flags.split() == [f"{flag}={value}" for flag, value in compiled.QUICK.items()]
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(place / compiled.fingerprint(flags))
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
    assert os.environ["PYTHONWARNINGS"] == "ignore:Error reading persistent compilation cache:UserWarning"
    compiled.set_environment()
    assert os.environ["XLA_FLAGS"] == flags, "set in a process that another one has started"


def test_what_is_given_stays(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("JAX_PLATFORMS", "cuda")
    bare.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    bare.setenv("PYTHONWARNINGS", "error")
    bare.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512 --xla_cpu_max_isa=AVX2")
    compiled.set_environment()
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[:2] == ["--xla_cpu_prefer_vector_width=512", "--xla_cpu_max_isa=AVX2"]
    assert {flag.partition("=")[0] for flag in flags[2:]} == compiled.QUICK.keys() - {
        "--xla_cpu_prefer_vector_width"}
    assert os.environ["JAX_PLATFORMS"] == "cuda"
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"
    assert os.environ["PYTHONWARNINGS"].split(",")[0] == "error"


def test_nothing_is_added_where_the_optimisation_is_given(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    compiled.set_environment()
    assert os.environ["XLA_FLAGS"] == "--xla_backend_optimization_level=3"


def test_the_environment_of_these_tests() -> None:
    assert Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).is_absolute()
    assert "optimization_level" in os.environ["XLA_FLAGS"]
