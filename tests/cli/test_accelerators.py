"""Accelerators of a machine that the installed JAX cannot use."""

from __future__ import annotations

import pytest

from tilelli_jax.cli import accelerators

INSTALL = "this machine has {}, but this JAX supports the CPU only: pip install 'tilelli_jax[{}]'"


@pytest.fixture
def machine(monkeypatch):
    """Returns a function that fakes the machine's accelerators and the installed packages."""
    def fake(present=(), installed=()):
        for name in ("nvidia_gpu", "tpu", "apple_gpu"):
            monkeypatch.setattr(accelerators, f"has_{name}", lambda name=name: name in present)
        monkeypatch.setattr(accelerators, "is_installed", lambda package: package in installed)
    return fake


@pytest.mark.parametrize(("present", "name", "extra", "package"), [
    ("nvidia_gpu", "an NVIDIA GPU", "cuda", "jax-cuda13-plugin"), ("tpu", "a TPU", "tpu", "libtpu"),
    ("apple_gpu", "an Apple GPU", "metal", "jax-mps")])
def test_an_accelerator_without_its_extra(machine, present, name, extra, package):
    machine([present])
    assert accelerators.unsupported(["cpu"]) == [INSTALL.format(name, extra)]
    assert accelerators.unsupported(["gpu"]) == [], "JAX uses another one"
    machine([present], [package])
    assert accelerators.unsupported(["cpu"]) == [], "the CPU was chosen"
    machine()
    assert accelerators.unsupported(["cpu"]) == []


def test_this_machine_is_found_without_an_error():
    for has in (accelerators.has_nvidia_gpu, accelerators.has_tpu, accelerators.has_apple_gpu):
        assert has() in (True, False)
