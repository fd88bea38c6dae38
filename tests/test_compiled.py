"""The environment of tests: XLA flags and the cache, and what is left as it was given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import compiled
from tilelli_jax.cli import program_cache


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs of tests are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tilelli_jax" / "tests"


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
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(place / program_cache.fingerprint(flags))
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
