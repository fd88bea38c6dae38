"""Fast compilation in tests: XLA flags and a persistent cache of compiled programs.

The cache lies in the user's cache directory, so a second run of the tests compiles only what has changed.
JAX_COMPILATION_CACHE_DIR selects another directory.
"""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

from tilelli_jax.cli import program_cache

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
    os.environ.setdefault(program_cache.VARIABLE,
                          str(program_cache.root("tests") / program_cache.fingerprint(flags)))
    # JAX writes its cache without a lock. A process that finds an incomplete entry compiles the program
    # itself; the warning about it is suppressed.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [
        os.environ.get("PYTHONWARNINGS"), "ignore:Error reading persistent compilation cache:UserWarning"]))
