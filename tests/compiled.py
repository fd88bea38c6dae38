"""How tests compile: quickly, and each program once for all that run them on this machine.

Compiled programs are kept in the user's cache directory, so that a second run of the tests compiles only what
has changed. JAX_COMPILATION_CACHE_DIR names another directory; an empty one makes a run cold.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

MAX_BYTES = 2 << 30  # of all that is kept, for all versions of JAX and all flags

# Code generation is where tests of tiny networks spend their time: level 0 takes a third of it, and leaves
# all that XLA itself does (partitioning, fusion) as it is. The older way to emit fused loops takes half of
# the rest, as long as there is one. One piece of code, and short vectors, save some more.
QUICK: dict[str, Any] = {
    "--xla_backend_optimization_level": 0,
    "--xla_cpu_parallel_codegen_split_count": 1,
    "--xla_cpu_prefer_vector_width": 128,
}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK["--xla_cpu_use_fusion_emitters"] = "false"
# For processes that a test kills: they read the cache and never write it. A half-written program would stay.
READ_ONLY = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}


def set_environment() -> None:
    """Sets the XLA flags and the cache of this process and its children. Call it before importing JAX."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "optimization_level" not in flags:
        # An instruction set that was asked for is to be used as it comes, with vectors of its own length.
        quick = {flag: value for flag, value in QUICK.items()
                 if flag not in flags and not ("vector_width" in flag and "max_isa" in flags)}
        flags = " ".join([flags, *(f"{flag}={value}" for flag, value in quick.items())])
    os.environ["XLA_FLAGS"] = flags.strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root() / fingerprint(flags)))
    # JAX writes into its cache without a lock. A process that finds an incomplete entry (its writer is not
    # done, or was killed) compiles the program itself, and does not warn.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [
        os.environ.get("PYTHONWARNINGS"), "ignore:Error reading persistent compilation cache:UserWarning"]))


def root() -> Path:
    """Where programs of all kinds are kept."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "tilelli_jax" / "tests"


def fingerprint(flags: str) -> str:
    """Names a directory of programs that run here: those of another CPU may crash."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        features = platform.processor()
    parts = [importlib.metadata.version("jax"), importlib.metadata.version("jaxlib"), platform.machine(),
             features, " ".join(sorted(flags.split()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def prune(max_bytes: int = MAX_BYTES) -> None:
    """Deletes the oldest programs (by access or modification), until no more than `max_bytes` are kept."""
    found = []
    for path in root().glob("*/*"):
        try:
            facts = path.stat()
        except FileNotFoundError:  # another run of the tests prunes, too
            continue
        found.append((max(facts.st_atime, facts.st_mtime), facts.st_size, path))
    kept = 0
    for _, size, path in sorted(found, reverse=True):
        kept += size
        if kept > max_bytes:
            path.unlink(missing_ok=True)
