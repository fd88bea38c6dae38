"""Fast compilation in tests: XLA flags and a persistent cache of compiled programs.

The cache lies in the user's cache directory, so a second run of the tests compiles only what has changed.
JAX_COMPILATION_CACHE_DIR selects another directory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

MAX_BYTES = 2 << 30  # maximum size of the cache, all versions of JAX and all flags together

# Tests of tiny networks spend most of their time in code generation. Level 0 reduces it to a third and
# does not change XLA's own passes (partitioning, fusion). The older emitter of fused loops, if it exists,
# halves the rest. A single compilation unit and short vectors save some more.
QUICK: dict[str, Any] = {
    "--xla_backend_optimization_level": 0,
    "--xla_cpu_parallel_codegen_split_count": 1,
    "--xla_cpu_prefer_vector_width": 128,
}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK["--xla_cpu_use_fusion_emitters"] = "false"
# For processes that a test kills: they must not write the cache, since a partial entry would remain.
READ_ONLY = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}


def set_environment() -> None:
    """Sets XLA flags and cache for this process and its children. Call it before importing JAX."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "optimization_level" not in flags:
        # A requested instruction set keeps its own vector width.
        quick = {flag: value for flag, value in QUICK.items()
                 if flag not in flags and not ("vector_width" in flag and "max_isa" in flags)}
        flags = " ".join([flags, *(f"{flag}={value}" for flag, value in quick.items())])
    os.environ["XLA_FLAGS"] = flags.strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root() / fingerprint(flags)))
    # JAX writes its cache without a lock. A process that finds an incomplete entry compiles the program
    # itself; the warning about it is suppressed.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [
        os.environ.get("PYTHONWARNINGS"), "ignore:Error reading persistent compilation cache:UserWarning"]))


def root() -> Path:
    """The parent directory of all caches."""
    cache_home = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache_home) if cache_home else Path.home() / ".cache") / "tilelli_jax" / "tests"


def fingerprint(flags: str) -> str:
    """Name of the cache directory for these flags, JAX version and CPU; programs of other CPUs may crash."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        features = platform.processor()
    parts = [importlib.metadata.version("jax"), importlib.metadata.version("jaxlib"), platform.machine(),
             features, " ".join(sorted(flags.split()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def prune(max_bytes: int = MAX_BYTES) -> None:
    """Deletes the least recently used programs until at most `max_bytes` remain."""
    programs = []
    for path in root().glob("*/*"):
        try:
            stat = path.stat()
        except FileNotFoundError:  # another test run prunes at the same time
            continue
        programs.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    total = 0
    for _, size, path in sorted(programs, reverse=True):
        total += size
        if total > max_bytes:
            path.unlink(missing_ok=True)
