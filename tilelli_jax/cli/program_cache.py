"""The cache of compiled programs in the user's cache directory, so that a second start compiles nothing.

JAX keeps the programs that take more than a second to compile. JAX_COMPILATION_CACHE_DIR selects another
directory; JAX_ENABLE_COMPILATION_CACHE=false disables the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

MAX_BYTES = 2 << 30  # maximum size of a cache, all versions of JAX and all flags together
VARIABLE = "JAX_COMPILATION_CACHE_DIR"
CHECKED = ".checked"  # a file whose time is that of the last check for partial entries


def enable() -> None:
    """Enables the cache for this process and its children, unless the user has selected another one.

    Where the directory cannot be written, programs are compiled without a cache.
    """
    jax: Any = sys.modules.get("jax")
    if os.environ.get(VARIABLE) is not None or (jax is not None and jax.config.jax_compilation_cache_dir):
        return
    directory = root("programs") / fingerprint(os.environ.get("XLA_FLAGS", ""))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        drop_partial(directory)
        prune(directory.parent)
    except OSError:
        return
    os.environ[VARIABLE] = str(directory)
    if jax is not None:  # has read the environment already
        jax.config.update("jax_compilation_cache_dir", str(directory))
    # Two processes may write one entry at once; the reader then compiles the program itself.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache", UserWarning)


def root(kind: str) -> Path:
    """The parent directory of all caches of a kind, for example `programs`."""
    cache_home = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache_home) if cache_home else Path.home() / ".cache") / "tilelli_jax" / kind


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


def prune(parent: Path, max_bytes: int = MAX_BYTES) -> None:
    """Deletes the least recently used programs of all caches in a directory until `max_bytes` remain."""
    programs = []
    for path in parent.glob("*/*"):
        try:
            stat = path.stat()
        except FileNotFoundError:  # another process prunes at the same time
            continue
        programs.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    total = 0
    for _, size, path in sorted(programs, reverse=True):
        total += size
        if total > max_bytes:
            path.unlink(missing_ok=True)


def drop_partial(directory: Path) -> None:
    """Deletes entries that a killed process left incomplete; JAX would report and skip them for ever.

    Only entries that are newer than the last check are read.
    """
    checked = directory / CHECKED
    with contextlib.suppress(FileNotFoundError):
        last = checked.stat().st_mtime
        entries = [path for path in directory.glob("*-cache") if path.stat().st_mtime >= last]
        for path in entries:
            if not _is_complete(path.read_bytes()):
                path.unlink(missing_ok=True)
    checked.touch()


def _is_complete(entry: bytes) -> bool:
    """Whether a compressed entry is whole; True for a compression that cannot be checked."""
    if entry.startswith(b"\x28\xb5\x2f\xfd"):  # Zstandard, which JAX prefers where it is installed
        try:
            import zstandard
        except ImportError:
            return True
        try:
            zstandard.ZstdDecompressor().decompress(entry)
        except zstandard.ZstdError:
            return False
        return True
    try:
        zlib.decompress(entry)
    except zlib.error:
        return False
    return True
