"""Which accelerators this machine has, and whether the installed JAX supports them. Does not import JAX."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from tilelli_jax.extras import DISTRIBUTIONS

# PCI device ids of Google's TPUs, v3 to tpu7x.
TPU_PCI_IDS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")


class Accelerator(NamedTuple):
    """A kind of accelerator: its name, the extra that supports it, and JAX's names of its platform."""

    name: str
    extra: str
    platforms: frozenset[str]


NVIDIA = Accelerator("an NVIDIA GPU", "cuda", frozenset({"gpu", "cuda"}))
TPU = Accelerator("a TPU", "tpu", frozenset({"tpu"}))
APPLE = Accelerator("an Apple GPU", "metal", frozenset({"mps"}))


def unsupported(platforms: Collection[str]) -> list[str]:
    """Describes each accelerator of this machine that the installed JAX cannot use, and what to install.

    Args:
        platforms: platforms of JAX's devices. If it uses any accelerator, the result is empty.
    """
    if set(platforms) != {"cpu"}:
        return []
    present = [accelerator for accelerator, is_present in ((NVIDIA, has_nvidia_gpu), (TPU, has_tpu),
                                                           (APPLE, has_apple_gpu)) if is_present()]
    return [f"{no_support(accelerator)}: {remedy(accelerator)}" for accelerator in present
            if not any(map(is_installed, DISTRIBUTIONS[accelerator.extra]))]


def no_support(accelerator: Accelerator) -> str:
    """Says that the installed JAX does not support an accelerator."""
    return f"this machine has {accelerator.name}, but this JAX supports the CPU only"


def remedy(accelerator: Accelerator) -> str:
    """Returns the command that installs support of an accelerator."""
    return f"pip install 'tilelli_jax[{accelerator.extra}]'"


def is_installed(package: str) -> bool:
    """Whether a package of this name is installed, without importing it."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def has_nvidia_gpu() -> bool:
    """Whether the machine has an NVIDIA GPU, with or without a JAX that can use it."""
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/proc/driver/nvidia/gpus").is_dir():
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def has_tpu() -> bool:
    """Whether one of the machine's PCI devices is a TPU."""
    return any(_read(vendor) == "0x1ae0" and _read(vendor.with_name("device")) in TPU_PCI_IDS
               for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"))


def has_apple_gpu() -> bool:
    """Whether the machine is a Mac with Apple silicon."""
    return (platform.system(), platform.machine()) == ("Darwin", "arm64")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
