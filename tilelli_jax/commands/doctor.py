"""Says what this installation can do, what is wrong with it, and how to mend it.

    tilelli doctor [--json]

Exit status 0 when training can run here, 1 when something is broken. Nothing of JAX is imported
in this process: an installation that does not start is what this command is for.
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
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from tilelli_jax.errors import ArgumentParser, command
from tilelli_jax.extras import DISTRIBUTIONS

GIB = 2**30
# What has to be installed, and the oldest version that will do (as in pyproject.toml).
REQUIRED: dict[str, tuple[int, ...]] = {
    "jax": (0, 10, 2), "jaxlib": (0, 10, 2), "flax": (0, 12, 8), "optax": (0, 2, 8),
    "orbax-checkpoint": (0, 12, 8), "grain": (0, 2, 18), "numpy": (2,), "chex": (0, 1, 92),
    "pyyaml": (6,), "ml_dtypes": (0, 5), "matplotlib": (3, 9), "tqdm": (4, 66)}
VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES")
MEMORY_NEEDED = 2 * GIB  # the demo takes 1
PROBE_SECONDS = 120
PROBE = """
import json, jax
devices = [dict(kind=d.device_kind, platform=d.platform,
                memory=((d.memory_stats() or {}).get("bytes_limit") if d.platform != "cpu" else None))
           for d in jax.local_devices()]
import flax.nnx, optax, orbax.checkpoint, grain
print("\\n" + json.dumps(devices))
"""
# Files with the memory limit of a container and what it uses: control groups, version 2 and 1.
CGROUPS = (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
           ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"))
# Google's PCI devices that are TPUs, v3 to tpu7x.
TPU_PCI_IDS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as JAX sees it; memory in bytes where JAX knows it."""

    kind: str
    platform: str
    memory: int | None = None


@dataclasses.dataclass(frozen=True)
class Facts:
    """All that a diagnosis rests on. The defaults are a healthy Linux machine without JAX."""

    python: tuple[int, int, int] = (3, 12, 0)
    system: str = "Linux"
    machine: str = "x86_64"
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # of what is installed
    environment: dict[str, str] = dataclasses.field(default_factory=dict)  # VARIABLES that are set
    nvidia_gpu: bool = False
    tpu: bool = False
    memory: int | None = None  # bytes
    memory_free: int | None = None  # bytes
    huge_pages: str | None = None  # Linux's setting: always, madvise or never
    devices: tuple[Device, ...] = ()
    failure: str | None = None  # why JAX or what stands on it does not start


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to know: an error keeps training from running, a warning costs, a hint helps."""

    level: Literal["error", "warning", "hint"]
    what: str
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
    """What the facts mean, the worst first."""
    found = [finding for rule in RULES for finding in rule(facts)]
    return sorted(found, key=lambda finding: ("error", "warning", "hint").index(finding.level))


def extras(facts: Facts) -> dict[str, bool]:
    """Which optional extras are installed."""
    return {extra: any(name in facts.versions for name in names) for extra, names in DISTRIBUTIONS.items()}


def text(facts: Facts, findings: Sequence[Finding]) -> str:
    """The report for people."""
    installed = [name for name, there in extras(facts).items() if there]
    missing = [name for name, there in extras(facts).items() if not there]
    memory = "unknown" if facts.memory is None else (
        f"{facts.memory / GIB:.1f} GiB"
        + (f", {facts.memory_free / GIB:.1f} GiB free" if facts.memory_free is not None else ""))
    lines = [
        f"python    {'.'.join(map(str, facts.python))} on {facts.system} {facts.machine}; memory {memory}",
        "versions  " + ", ".join(f"{name} {facts.versions[name]}" for name in REQUIRED
                                 if name in facts.versions),
        "devices   " + (", ".join(map(_device, facts.devices)) or "none"),
        "extras    " + (", ".join(installed) or "none") + f"; not installed: {', '.join(missing) or 'none'}"]
    lines += [f"\n{finding.level}: {finding.what}\n  → {finding.remedy}" for finding in findings]
    broken = any(finding.level == "error" for finding in findings)
    return "\n".join([*lines, "", "broken: see above" if broken else "usable"])


# Rules ---------------------------------------------------------------------------------------


def _python(facts: Facts) -> Iterator[Finding]:
    if facts.python < (3, 11):
        yield Finding("error", f"Python {'.'.join(map(str, facts.python))} is too old",
                      "make the environment with Python 3.11 or newer")


def _packages(facts: Facts) -> Iterator[Finding]:
    missing = [name for name in REQUIRED if name not in facts.versions]
    if missing:
        yield Finding("error", f"not installed: {', '.join(missing)}",
                      "pip install -e . in the project's folder (or: make demo)")
    for name, least in REQUIRED.items():
        if name not in ("jax", "jaxlib") and () < _version(facts, name) < least:
            wanted = f"{name}>={'.'.join(map(str, least))}"
            yield Finding("error", f"{name} {facts.versions[name]} is too old", f"pip install -U '{wanted}'")
    jax, jaxlib, flax = (_version(facts, name) for name in ("jax", "jaxlib", "flax"))
    if jax and not (0, 10, 2) <= jax < (0, 13):
        yield Finding("error", f"jax {facts.versions['jax']} is outside the supported range, "
                               f"0.10.2 up to and without 0.13", "pip install 'jax>=0.10.2,<0.13'")
    if jax and jaxlib and jax[:2] != jaxlib[:2]:
        yield Finding("error", f"jax {facts.versions['jax']} beside jaxlib {facts.versions['jaxlib']}",
                      f"pip install -U 'jax=={facts.versions['jax']}', which brings its own jaxlib")
    if jax and flax and jax >= (0, 12) and flax < (0, 12, 10):
        yield Finding("error", f"flax {facts.versions['flax']} does not import on jax "
                               f"{facts.versions['jax']}",
                      "pip install 'flax>=0.12.10'" if facts.python >= (3, 12) else
                      "Python 3.11 ends at jax 0.10: pip install 'jax==0.10.2' 'flax==0.12.8'")
    if jax and flax and jax < (0, 11) and flax >= (0, 12, 10):
        yield Finding("error", f"flax {facts.versions['flax']} needs a newer jax than "
                               f"{facts.versions['jax']}",
                      "pip install -U 'jax>=0.12,<0.13'" if facts.python >= (3, 12) else
                      "pip install 'flax==0.12.8', the last for Python 3.11")


def _apple(facts: Facts) -> Iterator[Finding]:
    if "jax-metal" in facts.versions:
        yield Finding("error", f"jax-metal {facts.versions['jax-metal']} is installed: it has ended, and "
                               f"from jax 0.5.1 on it keeps JAX from starting",
                      "pip uninstall jax-metal; for the Apple GPU: pip install 'tilelli_jax[metal]' "
                      "(jax-mps)")
    elif (facts.system, facts.machine) == ("Darwin", "arm64") and "jax-mps" not in facts.versions:
        yield Finding("hint", "JAX computes on the CPU of this Mac, not on its GPU",
                      "pip install 'tilelli_jax[metal]' (jax-mps: one device, no float64)")


def _start(facts: Facts) -> Iterator[Finding]:
    if facts.failure and "jax" in facts.versions:
        yield Finding("error", f"JAX does not start: {facts.failure}",
                      "mend what else is named here; if that is not it: "
                      "pip install --force-reinstall jax jaxlib flax")


def _accelerators(facts: Facts) -> Iterator[Finding]:
    platforms = {device.platform for device in facts.devices}
    chosen = facts.environment.get("JAX_PLATFORMS", "")
    for there, name, extra, own_platforms in (
            (facts.nvidia_gpu, "an NVIDIA GPU", "cuda", {"gpu", "cuda"}),
            (facts.tpu, "a TPU", "tpu", {"tpu"})):
        if not there or platforms & own_platforms or facts.failure:
            continue
        if not extras(facts)[extra]:
            yield Finding("warning", f"this machine has {name}, and this JAX is for the CPU only",
                          f"pip install 'tilelli_jax[{extra}]'")
        elif chosen and not own_platforms & set(chosen.split(",")):
            yield Finding("warning", f"JAX_PLATFORMS={chosen} keeps JAX from {name} of this machine",
                          "unset JAX_PLATFORMS")
        elif extra == "cuda" and facts.environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            yield Finding("warning", "CUDA_VISIBLE_DEVICES hides the GPU", "unset CUDA_VISIBLE_DEVICES")
        else:
            yield Finding("warning", f"JAX does not find {name} that this machine has",
                          "see whether nvidia-smi works and its driver is recent enough"
                          if extra == "cuda" else "see whether another process holds the TPU")
    for plugin in DISTRIBUTIONS["cuda"]:
        if _version(facts, plugin)[:2] not in ((), _version(facts, "jaxlib")[:2]):
            yield Finding("warning", f"{plugin} {facts.versions[plugin]} is not made for jaxlib "
                                     f"{facts.versions.get('jaxlib')}, which will not load it",
                          f"pip install -U {plugin}=={facts.versions.get('jaxlib')}")
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)",
                       facts.environment.get("XLA_FLAGS", ""))
    if forced and int(forced[1]) > 1:
        yield Finding("hint", f"XLA_FLAGS has JAX divide the CPU into {forced[1]} devices: good for trying "
                              f"a mesh, slow for work", "unset XLA_FLAGS")


def _memory(facts: Facts) -> Iterator[Finding]:
    free = facts.memory if facts.memory_free is None else facts.memory_free
    if free is not None and free < MEMORY_NEEDED:
        yield Finding("warning", f"too little memory: {free / GIB:.1f} GiB free, where the demo takes 1 and "
                                 f"{MEMORY_NEEDED // GIB} are the least to work with",
                      "end other programs, or choose a smaller train.batch_size and model")
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
        yield Finding("hint", "huge pages make training on a CPU faster, often by a fifth",
                      "export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before starting")


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _python, _packages, _apple, _start, _accelerators, _memory, _huge_pages)


# Facts ---------------------------------------------------------------------------------------


def gather() -> Facts:
    """The facts of this machine and environment; JAX is started in a process of its own."""
    names = (*REQUIRED, "jax-metal", *(name for group in DISTRIBUTIONS.values() for name in group))
    versions = {name: version for name in names if (version := _installed(name))}
    devices, failure = _probe() if "jax" in versions else ((), "jax is not installed")
    memory, free = _memory_bytes()
    return Facts(
        python=sys.version_info[:3], system=platform.system(), machine=platform.machine(),
        versions=versions, environment={key: os.environ[key] for key in VARIABLES if key in os.environ},
        nvidia_gpu=_has_nvidia_gpu(), tpu=_has_tpu(), memory=memory, memory_free=free,
        huge_pages=_huge_page_setting(), devices=devices, failure=failure)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _probe() -> tuple[tuple[Device, ...], str | None]:
    """The devices that JAX finds, or why it, or a library on it, does not start."""
    try:
        result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True,
                                timeout=PROBE_SECONDS, errors="replace",
                                env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    except subprocess.TimeoutExpired:
        return (), f"no answer for {PROBE_SECONDS} seconds (or is the machine too busy?)"
    if result.returncode:
        said = result.stderr.strip().splitlines()
        return (), said[-1] if said else f"exit status {result.returncode}"
    return tuple(Device(**device) for device in json.loads(result.stdout.splitlines()[-1])), None


def _memory_bytes() -> tuple[int | None, int | None]:
    """Memory of this machine or of the container that this runs in, and what of it is free."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None, None
    free = re.search(r"^MemAvailable: *(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    left = int(free[1]) * 1024 if free else None
    for limit, used in CGROUPS:
        if (most := _read(limit).strip()).isdigit() and int(most) < total:
            total = int(most)
            if (taken := _read(used).strip()).isdigit():
                stat = _read(Path(used).with_name("memory.stat"))
                caches = re.search(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE)  # make way
                inside = total - int(taken) + (int(caches[1]) if caches else 0)
                left = inside if left is None else min(inside, left)
    return total, left


def _has_nvidia_gpu() -> bool:
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/proc/driver/nvidia/gpus").is_dir():
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def _has_tpu() -> bool:
    return any(_read(vendor).strip() == "0x1ae0" and _read(vendor.with_name("device")).strip() in TPU_PCI_IDS
               for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"))


def _huge_page_setting() -> str | None:
    chosen = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return chosen[1] if chosen else None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(facts: Facts, name: str) -> tuple[int, ...]:
    """The leading numbers of a version, (0, 12, 0, 1) of 0.12.0.1 and (2, 13) of 2.13+cpu; () if absent."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", facts.versions.get(name, ""))[0])))


def _device(device: Device) -> str:
    memory = f", {device.memory / GIB:.1f} GiB" if device.memory else ""
    return f"{device.kind} ({device.platform}{memory})"
