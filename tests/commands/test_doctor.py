"""Every finding from constructed facts, and the command on working and broken installations."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tilelli_jax.commands import doctor
from tilelli_jax.commands.doctor import GIB, REQUIRED, Device, Facts, diagnose, extras, gather, main, text

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU, TPU = (Device("cpu", "cpu"), Device("NVIDIA L4", "gpu", 20 * GIB),
                 Device("TPU v5 lite", "tpu", 16 * GIB))
VERSIONS = {name: ".".join(map(str, oldest)) for name, oldest in REQUIRED.items()} | {
   "jax": "0.12.0.1", "jaxlib": "0.12.0.1", "flax": "0.12.12"}
HEALTHY = Facts(versions=VERSIONS, devices=(CPU,), memory=16 * GIB, memory_free=12 * GIB)


def facts(versions: dict[str, str] | None = None, **changes) -> Facts:
    return dataclasses.replace(HEALTHY, versions=VERSIONS | (versions or {}), **changes)


def only(findings):
    assert len(findings) == 1, findings
    return findings[0]


def test_a_probe_without_an_answer(monkeypatch):
    def run(*arguments, timeout, **options):
        raise subprocess.TimeoutExpired(arguments, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert doctor._probe() == ((), "no answer within 120 seconds; the machine may be busy")


def test_a_healthy_installation_has_no_findings():
    assert diagnose(HEALTHY) == []
    older = facts({"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}, python=(3, 11, 7))
    assert diagnose(older) == []
    assert diagnose(facts({"jax": "0.11.1", "jaxlib": "0.11.1", "flax": "0.12.12"})) == []


@pytest.mark.parametrize(("changed", "level", "problem", "remedy"), [
    pytest.param(facts(python=(3, 10, 2)), "error", "Python 3.10.2", "3.11", id="old python"),
    pytest.param(facts({"jax": "0.10.1", "jaxlib": "0.10.1", "flax": "0.12.8"}),
                 "error", "jax 0.10.1", "jax>=0.10.2,<0.13", id="jax too old"),
    pytest.param(facts({"jax": "0.13.0", "jaxlib": "0.13.0"}),
                 "error", "jax 0.13.0", "jax>=0.10.2,<0.13", id="jax too new"),
    pytest.param(facts({"optax": "0.2.7"}),
                 "error", "optax 0.2.7 is too old", "'optax>=0.2.8'", id="optax too old"),
    pytest.param(facts({"jaxlib": "0.11.2"}),
                 "error", "jaxlib 0.11.2", "jax==0.12.0.1", id="jaxlib of another jax"),
    pytest.param(facts({"flax": "0.12.8"}),
                 "error", "flax 0.12.8 does not import", "flax>=0.12.10", id="old flax on new jax"),
    pytest.param(facts({"flax": "0.12.8"}, python=(3, 11, 7)),
                 "error", "flax 0.12.8 does not import", "jax==0.10.2", id="new jax on python 3.11"),
    pytest.param(facts({"jax": "0.10.2", "jaxlib": "0.10.2"}),
                 "error", "flax 0.12.12", "jax>=0.12", id="new flax on old jax"),
    pytest.param(facts({"jax": "0.10.2", "jaxlib": "0.10.2"}, python=(3, 11, 7)),
                 "error", "flax 0.12.12", "flax==0.12.8", id="new flax on python 3.11"),
    pytest.param(facts({"jax-metal": "0.1.1"}, system="Darwin", machine="arm64"),
                 "error", "jax-metal 0.1.1", "pip uninstall jax-metal", id="jax-metal"),
    pytest.param(facts(system="Darwin", machine="arm64"),
                 "hint", "not on its GPU", "'tilelli_jax[metal]'", id="CPU on a Mac"),
    pytest.param(facts(failure="ImportError: no token", devices=()),
                 "error", "no token", "reinstall", id="jax does not start"),
    pytest.param(facts(nvidia_gpu=True),
                 "warning", "NVIDIA GPU", "'tilelli_jax[cuda]'", id="CPU jax beside a GPU"),
    pytest.param(facts({"jax-cuda12-plugin": "0.12.0"}, nvidia_gpu=True,
                       environment={"JAX_PLATFORMS": "cpu"}),
                 "warning", "JAX_PLATFORMS=cpu", "unset JAX_PLATFORMS", id="platforms hide the GPU"),
    pytest.param(facts({"jax-cuda12-plugin": "0.12.0"}, nvidia_gpu=True,
                       environment={"CUDA_VISIBLE_DEVICES": ""}),
                 "warning", "hides the GPU", "unset CUDA_VISIBLE_DEVICES", id="CUDA hides the GPU"),
    pytest.param(facts({"jax-cuda13-plugin": "0.12.0"}, nvidia_gpu=True,
                       environment={"JAX_PLATFORMS": "cuda,cpu"}),
                 "warning", "does not find an NVIDIA GPU", "nvidia-smi", id="GPU not found"),
    pytest.param(facts({"jax-cuda12-plugin": "0.11.0"}),
                 "warning", "jax-cuda12-plugin 0.11.0", "jax-cuda12-plugin==0.12.0.1", id="plugin"),
    pytest.param(facts(tpu=True), "warning", "a TPU", "'tilelli_jax[tpu]'", id="CPU jax on a TPU VM"),
    pytest.param(facts({"libtpu": "0.0.50"}, tpu=True, environment={"JAX_PLATFORMS": "cpu"}),
                 "warning", "keeps JAX from using a TPU", "unset", id="platforms hide the TPU"),
    pytest.param(facts({"libtpu": "0.0.50"}, tpu=True),
                 "warning", "does not find a TPU", "another process", id="TPU not found"),
    pytest.param(facts(environment={"XLA_FLAGS": "--a --xla_force_host_platform_device_count=8"}),
                 "hint", "into 8 devices", "unset XLA_FLAGS", id="forced devices"),
    pytest.param(facts(memory_free=GIB), "warning", "too little memory: 1.0 GiB", "batch_size", id="memory"),
    pytest.param(facts(memory_free=None, memory=GIB // 2),
                 "warning", "too little memory: 0.5 GiB", "batch_size", id="total memory"),
    pytest.param(facts(devices=(Device("NVIDIA T4", "gpu", GIB),)),
                 "warning", "device memory: NVIDIA T4", "remat", id="device memory"),
    pytest.param(facts(huge_pages="madvise"),
                 "hint", "huge pages", "GLIBC_TUNABLES=glibc.malloc.hugetlb=1", id="huge pages"),
])
def test_finding(changed, level, problem, remedy):
    finding = only(diagnose(changed))
    assert finding.level == level
    assert problem in finding.problem
    assert remedy in finding.remedy


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_package_is_named(name):
    versions = {key: version for key, version in VERSIONS.items() if key != name}
    finding = only(diagnose(dataclasses.replace(HEALTHY, versions=versions)))
    assert finding.level == "error"
    assert finding.problem == f"not installed: {name}"


@pytest.mark.parametrize("fine", [
    facts({"jax-cuda12-plugin": "0.12.0"}, nvidia_gpu=True, devices=(GPU,), huge_pages="madvise"),
    facts({"libtpu": "0.0.50"}, tpu=True, devices=(TPU,)),
    facts({"jax-mps": "0.10"}, system="Darwin", machine="arm64"),
    facts(huge_pages="never"),
    facts(huge_pages="madvise", environment={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
    facts(environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}),
], ids=["gpu", "tpu", "mps", "no huge pages", "huge pages on", "one forced device"])
def test_no_finding(fine):
    assert diagnose(fine) == []


def test_errors_come_first_and_make_it_broken():
    findings = diagnose(facts({"jax-metal": "0.1.1"}, huge_pages="madvise", memory_free=GIB))
    assert [finding.level for finding in findings] == ["error", "warning", "hint"]
    assert text(HEALTHY, findings).endswith("broken: see above")
    assert text(HEALTHY, findings[1:]).endswith("usable")


def test_extras_are_those_installed():
    installed = extras(facts({"jax-cuda13-plugin": "0.12.0", "datasets": "5"}))
    assert {name for name, is_installed in installed.items() if is_installed} == {"cuda", "hf"}


def test_oldest_versions_match_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        name, version = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
        if "python_version >=" not in line:  # the later of two lines for one package
            oldest, numbers = REQUIRED[name], tuple(map(int, version.split(".")))
            assert numbers[:len(oldest)] == oldest and not any(numbers[len(oldest):]), name
    assert REQUIRED.keys() - {"jaxlib"} == {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}


@pytest.mark.parametrize(("limit", "used", "stat", "total", "free"), [
    ("max", str(GIB), "", None, None), (str(2 * GIB), str(GIB), "", 2 * GIB, GIB),
    (str(2 * GIB), "", "", 2 * GIB, None),
    (str(2 * GIB), str(2 * GIB), f"anon 7\ninactive_file {GIB // 2}\n", 2 * GIB, GIB // 2),
    (str(2**62), str(GIB), "", None, None)])
def test_the_memory_limit_of_a_container(tmp_path, monkeypatch, limit, used, stat, total, free):
    monkeypatch.setattr(doctor, "CGROUPS", ())
    machine = doctor._memory_bytes()
    for name, content in (("memory.max", limit), ("memory.current", used), ("memory.stat", stat)):
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr(doctor, "CGROUPS", ((tmp_path / "none", tmp_path / "none"),
                                            (tmp_path / "memory.max", tmp_path / "memory.current")))
    memory = doctor._memory_bytes()
    assert memory[0] == (total or machine[0])
    assert memory[1] == free if free else memory[1] > GIB


def test_this_installation_is_usable(capsys):
    current = gather()
    assert current.failure is None
    assert current.devices
    assert current.python == sys.version_info[:3]
    assert current.memory > current.memory_free > 0 or current.system != "Linux"
    assert main(["--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["usable"] is True
    assert printed["facts"]["versions"]["jax"] == current.versions["jax"]


@pytest.mark.parametrize("module", ["jax", pytest.param("flax", marks=pytest.mark.exhaustive)])
def test_a_library_that_fails_to_import_is_reported(tmp_path, module):
    """A library that fails to import gives a finding instead of a traceback."""
    (tmp_path / f"{module}.py").write_text("raise ImportError('made to fail')\n")
    result = subprocess.run([sys.executable, "-m", "tilelli_jax", "doctor", "--json"], capture_output=True,
                            text=True, env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert result.returncode == 1, result.stderr
    printed = json.loads(result.stdout)
    assert "made to fail" in printed["facts"]["failure"]
    assert any("does not start" in finding["problem"] for finding in printed["findings"])
