"""Reports what this installation can do, what is wrong with it, and how to fix it.

    tilelli doctor [--json]

Exit status 0 if training can run here, 1 if something is broken. This process does not import JAX, so that it
also works with an installation in which JAX does not start.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from tilelli_jax.cli import accelerators
from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.extras import DISTRIBUTIONS

GIB = 2**30
# Required packages and their oldest supported versions (as in pyproject.toml).
REQUIRED: dict[str, tuple[int, ...]] = {
    "jax": (0, 10, 2), "jaxlib": (0, 10, 2), "flax": (0, 12, 8), "optax": (0, 2, 8),
    "orbax-checkpoint": (0, 12, 8), "grain": (0, 2, 18), "numpy": (2,), "chex": (0, 1, 92),
    "pyyaml": (6,), "ml_dtypes": (0, 5), "matplotlib": (3, 9), "tqdm": (4, 66)}
VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES")
MEMORY_NEEDED = 2 * GIB  # the demo uses 1 GiB
PROBE_SECONDS = 120
PROBE = """
import json, jax
devices = [dict(kind=d.device_kind, platform=d.platform,
                memory=((d.memory_stats() or {}).get("bytes_limit") if d.platform != "cpu" else None))
           for d in jax.local_devices()]
import flax.nnx, optax, orbax.checkpoint, grain
print("\\n" + json.dumps(devices))
"""
# Files with a container's memory limit and usage: control groups, version 2 and 1.
CGROUPS = (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
           ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"))


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as JAX reports it; memory in bytes, None if unknown."""

    kind: str
    platform: str
    memory: int | None = None


@dataclasses.dataclass(frozen=True)
class Facts:
    """The input of the diagnosis. The defaults describe a working Linux machine without JAX."""

    python: tuple[int, int, int] = (3, 12, 0)
    system: str = "Linux"
    machine: str = "x86_64"
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # versions of installed packages
    environment: dict[str, str] = dataclasses.field(default_factory=dict)  # the VARIABLES that are set
    nvidia_gpu: bool = False
    tpu: bool = False
    memory: int | None = None  # bytes
    memory_free: int | None = None  # bytes
    huge_pages: str | None = None  # Linux's transparent huge pages: always, madvise or never
    devices: tuple[Device, ...] = ()
    failure: str | None = None  # why JAX, or a library that uses it, does not start


@dataclasses.dataclass(frozen=True)
class Finding:
    """A finding: an error prevents training, a warning costs speed or memory, a hint is an improvement."""

    level: Literal["error", "warning", "hint"]
    problem: str
    remedy: str


@command
def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="tilelli doctor", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    options = parser.parse_args(argv)
    facts = gather()
    findings = diagnose(facts)
    usable = all(finding.level != "error" for finding in findings)
    if options.json:
        print(json.dumps({"usable": usable, "facts": dataclasses.asdict(facts), "extras": extras(facts),
                          "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=2))
    else:
        print(text(facts, findings))
    return 0 if usable else 1


def diagnose(facts: Facts) -> list[Finding]:
    """Returns the findings, the most severe first."""
    findings = [finding for rule in RULES for finding in rule(facts)]
    return sorted(findings, key=lambda finding: ("error", "warning", "hint").index(finding.level))


def extras(facts: Facts) -> dict[str, bool]:
    """Returns, for each optional extra, whether it is installed."""
    return {extra: any(name in facts.versions for name in names) for extra, names in DISTRIBUTIONS.items()}


def text(facts: Facts, findings: Sequence[Finding]) -> str:
    """Formats the report as text."""
    installed = [name for name, is_installed in extras(facts).items() if is_installed]
    missing = [name for name, is_installed in extras(facts).items() if not is_installed]
    memory = "unknown" if facts.memory is None else (
        f"{facts.memory / GIB:.1f} GiB"
        + (f", {facts.memory_free / GIB:.1f} GiB free" if facts.memory_free is not None else ""))
    lines = [
        f"python    {'.'.join(map(str, facts.python))} on {facts.system} {facts.machine}; memory {memory}",
        "versions  " + ", ".join(f"{name} {facts.versions[name]}" for name in REQUIRED
                                 if name in facts.versions),
        "devices   " + (", ".join(map(_device, facts.devices)) or "none"),
        "extras    " + (", ".join(installed) or "none") + f"; not installed: {', '.join(missing) or 'none'}"]
    lines += [f"\n{finding.level}: {finding.problem}\n  → {finding.remedy}" for finding in findings]
    broken = any(finding.level == "error" for finding in findings)
    return "\n".join([*lines, "", "broken: see above" if broken else "usable"])


# Rules ---------------------------------------------------------------------------------------


def _python(facts: Facts) -> Iterator[Finding]:
    if facts.python < (3, 11):
        yield Finding("error", f"Python {'.'.join(map(str, facts.python))} is too old",
                      "create the environment with Python 3.11 or newer")


def _packages(facts: Facts) -> Iterator[Finding]:
    missing = [name for name in REQUIRED if name not in facts.versions]
    if missing:
        yield Finding("error", f"not installed: {', '.join(missing)}",
                      "pip install -e . in the project's folder")
    for name, oldest in REQUIRED.items():
        if name not in ("jax", "jaxlib") and () < _version(facts, name) < oldest:
            requirement = f"{name}>={'.'.join(map(str, oldest))}"
            yield Finding("error", f"{name} {facts.versions[name]} is too old",
                          f"pip install -U '{requirement}'")
    jax, jaxlib, flax = (_version(facts, name) for name in ("jax", "jaxlib", "flax"))
    if jax and not (0, 10, 2) <= jax < (0, 13):
        yield Finding("error", f"jax {facts.versions['jax']} is outside the supported range, "
                               f"0.10.2 up to but excluding 0.13", "pip install 'jax>=0.10.2,<0.13'")
    if jax and jaxlib and jax[:2] != jaxlib[:2]:
        yield Finding("error", f"jax {facts.versions['jax']} does not match "
                               f"jaxlib {facts.versions['jaxlib']}",
                      f"pip install -U 'jax=={facts.versions['jax']}', which installs the matching jaxlib")
    if jax and flax and jax >= (0, 12) and flax < (0, 12, 10):
        yield Finding("error", f"flax {facts.versions['flax']} does not import on jax "
                               f"{facts.versions['jax']}",
                      "pip install 'flax>=0.12.10'" if facts.python >= (3, 12) else
                      "jax 0.10 is the last for Python 3.11: pip install 'jax==0.10.2' 'flax==0.12.8'")
    if jax and flax and jax < (0, 11) and flax >= (0, 12, 10):
        yield Finding("error", f"flax {facts.versions['flax']} needs a newer jax than "
                               f"{facts.versions['jax']}",
                      "pip install -U 'jax>=0.12,<0.13'" if facts.python >= (3, 12) else
                      "pip install 'flax==0.12.8', the last for Python 3.11")


def _apple(facts: Facts) -> Iterator[Finding]:
    if "jax-metal" in facts.versions:
        yield Finding("error", f"jax-metal {facts.versions['jax-metal']} is installed: it is discontinued, "
                               f"and from jax 0.5.1 on it prevents JAX from starting",
                      "pip uninstall jax-metal; for the Apple GPU: pip install 'tilelli_jax[metal]' "
                      "(jax-mps)")
    elif (facts.system, facts.machine) == ("Darwin", "arm64") and "jax-mps" not in facts.versions:
        yield Finding("hint", "JAX computes on the CPU of this Mac, not on its GPU",
                      "pip install 'tilelli_jax[metal]' (jax-mps: one device, no float64)")


def _start(facts: Facts) -> Iterator[Finding]:
    if facts.failure and "jax" in facts.versions:
        yield Finding("error", f"JAX does not start: {facts.failure}",
                      "fix the other problems listed here; if that does not help: "
                      "pip install --force-reinstall jax jaxlib flax")


def _accelerators(facts: Facts) -> Iterator[Finding]:
    platforms = {device.platform for device in facts.devices}
    chosen = facts.environment.get("JAX_PLATFORMS", "")
    for present, accelerator in ((facts.nvidia_gpu, accelerators.NVIDIA), (facts.tpu, accelerators.TPU)):
        name, extra, own_platforms = accelerator
        if not present or platforms & own_platforms or facts.failure:
            continue
        if not extras(facts)[extra]:
            yield Finding("warning", accelerators.no_support(accelerator), accelerators.remedy(accelerator))
        elif chosen and not own_platforms & set(chosen.split(",")):
            yield Finding("warning", f"JAX_PLATFORMS={chosen} keeps JAX from using {name} of this machine",
                          "unset JAX_PLATFORMS")
        elif extra == "cuda" and facts.environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            yield Finding("warning", "CUDA_VISIBLE_DEVICES hides the GPU", "unset CUDA_VISIBLE_DEVICES")
        else:
            yield Finding("warning", f"JAX does not find {name} that this machine has",
                          "check that nvidia-smi works and that its driver is recent enough"
                          if extra == "cuda" else "check whether another process uses the TPU")
    for plugin in DISTRIBUTIONS["cuda"]:
        if _version(facts, plugin)[:2] not in ((), _version(facts, "jaxlib")[:2]):
            yield Finding("warning", f"{plugin} {facts.versions[plugin]} is not built for jaxlib "
                                     f"{facts.versions.get('jaxlib')}, which will not load it",
                          f"pip install -U {plugin}=={facts.versions.get('jaxlib')}")
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)",
                       facts.environment.get("XLA_FLAGS", ""))
    if forced and int(forced[1]) > 1:
        yield Finding("hint", f"XLA_FLAGS makes JAX divide the CPU into {forced[1]} devices, which is useful "
                              f"to test a mesh, but slow", "unset XLA_FLAGS")


def _memory(facts: Facts) -> Iterator[Finding]:
    free = facts.memory if facts.memory_free is None else facts.memory_free
    if free is not None and free < MEMORY_NEEDED:
        yield Finding("warning", f"too little memory: {free / GIB:.1f} GiB free; the demo uses 1 GiB, and "
                                 f"{MEMORY_NEEDED // GIB} GiB is the minimum for training",
                      "close other programs, or choose a smaller train.batch_size and model")
    for device in facts.devices:
        if device.memory is not None and device.memory < MEMORY_NEEDED:
            yield Finding("warning", f"too little device memory: {_device(device)}",
                          "choose a smaller train.batch_size or a larger train.accumulate, or "
                          "compute.remat=true")
            break


def _huge_pages(facts: Facts) -> Iterator[Finding]:
    on_cpu = facts.devices and all(device.platform == "cpu" for device in facts.devices)
    if (facts.system == "Linux" and on_cpu and facts.huge_pages == "madvise"
            and "glibc.malloc.hugetlb" not in facts.environment.get("GLIBC_TUNABLES", "")):
        yield Finding("hint", "huge pages make training on a CPU faster, often by 20 %",
                      "export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before starting")


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _python, _packages, _apple, _start, _accelerators, _memory, _huge_pages)


# Facts ---------------------------------------------------------------------------------------


def gather() -> Facts:
    """Collects the facts of this machine and environment; starts JAX in a separate process."""
    names = (*REQUIRED, "jax-metal", *(name for group in DISTRIBUTIONS.values() for name in group))
    versions = {name: version for name in names if (version := _installed(name))}
    devices, failure = _probe() if "jax" in versions else ((), "jax is not installed")
    memory, free = _memory_bytes()
    return Facts(
        python=sys.version_info[:3], system=platform.system(), machine=platform.machine(),
        versions=versions, environment={key: os.environ[key] for key in VARIABLES if key in os.environ},
        nvidia_gpu=accelerators.has_nvidia_gpu(), tpu=accelerators.has_tpu(), memory=memory, memory_free=free,
        huge_pages=_huge_page_setting(), devices=devices, failure=failure)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _probe() -> tuple[tuple[Device, ...], str | None]:
    """Returns the devices that JAX finds, or why JAX or a library that uses it does not start."""
    try:
        result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True,
                                timeout=PROBE_SECONDS, errors="replace",
                                env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    except subprocess.TimeoutExpired:
        return (), f"no answer within {PROBE_SECONDS} seconds; the machine may be busy"
    if result.returncode:
        stderr_lines = result.stderr.strip().splitlines()
        return (), stderr_lines[-1] if stderr_lines else f"exit status {result.returncode}"
    return tuple(Device(**device) for device in json.loads(result.stdout.splitlines()[-1])), None


def _memory_bytes() -> tuple[int | None, int | None]:
    """Returns total and free memory in bytes, of this machine or of the container."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None, None
    free = re.search(r"^MemAvailable: *(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    available = int(free[1]) * 1024 if free else None
    for limit, used in CGROUPS:
        if (limit_text := _read(limit).strip()).isdigit() and int(limit_text) < total:
            total = int(limit_text)
            if (used_text := _read(used).strip()).isdigit():
                stat = _read(Path(used).with_name("memory.stat"))
                caches = re.search(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE)  # reclaimable
                in_container = total - int(used_text) + (int(caches[1]) if caches else 0)
                available = in_container if available is None else min(in_container, available)
    return total, available


def _huge_page_setting() -> str | None:
    chosen = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return chosen[1] if chosen else None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(facts: Facts, name: str) -> tuple[int, ...]:
    """Returns a version's leading numbers, (0, 12, 1) for 0.12.1 and (2, 13) for 2.13+cpu; () if absent."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", facts.versions.get(name, ""))[0])))


def _device(device: Device) -> str:
    memory = f", {device.memory / GIB:.1f} GiB" if device.memory else ""
    return f"{device.kind} ({device.platform}{memory})"
