"""Fair timing on a noisy machine: models in turn, medians of ratios, and the machine's limits."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilelli_jax.files import write_atomically

Candidate = Callable[[], object]  # does the work once and waits for the result


def arguments(doc: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what is printed there, too")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, metavar="N",
                            help="turns of each model [%(default)s]")
    return parser


@contextlib.contextmanager
def told(out: Path | None) -> Iterator[Callable[[str], None]]:
    """Gives what prints a text; in the end, all of them are in the file."""
    texts: list[str] = []

    def tell(text: str) -> None:
        print(text, flush=True)
        texts.append(text)

    yield tell
    if out is not None:
        write_atomically(out, "".join(text + "\n" for text in texts).encode())


def in_turn(candidates: dict[str, Candidate], rounds: int, rest: float = 0.05) -> dict[str, list[float]]:
    """Seconds of each model in each round; all are run once beforehand.

    The rest lets the thread pool of one library go to sleep before another one is timed. In each
    turn the second run counts: the first takes memory from the system that the others gave back,
    which in a loop of steps happens once.
    """
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            time.sleep(rest)
            run()
            seconds[name].append(_timed(run))
    return seconds


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median over the rounds of a / b: what both share of a round's slowness cancels."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def milliseconds(seconds: Sequence[float]) -> str:
    """Median and range, to three digits or so."""
    low, middle, high = (1e3 * f(seconds) for f in (min, statistics.median, max))
    digits = 1 if middle >= 10 else 3
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def matmul_limit(n: int = 1536, repeats: int = 9) -> float:
    """FLOP/s of the best of some large f32 products: what a step could reach at the very most."""
    a = jnp.ones((n, n))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    return 2 * n**3 / min(_timed(lambda: product(a).block_until_ready()) for _ in range(repeats))


def read_limit(n_bytes: int, repeats: int = 30) -> float:
    """Bytes/s at which XLA multiplies a vector by a matrix of that size: decoding can do no better."""
    width = 1024
    matrix = jnp.ones((max(n_bytes // (4 * width), 1), width))
    vector = jnp.ones(width)
    product = jax.jit(lambda m, v: m @ v)
    product(matrix, vector).block_until_ready()
    seconds = statistics.median(_timed(lambda: product(matrix, vector).block_until_ready())
                                for _ in range(repeats))
    return matrix.nbytes / seconds


def copy_limit(n_bytes: int = 1 << 28, repeats: int = 9) -> float:
    """Bytes/s, read and written, at which memory (no cache holds so much) is copied by one thread."""
    source = np.ones(n_bytes, np.uint8)
    target = np.empty_like(source)
    return 2 * n_bytes / min(_timed(lambda: np.copyto(target, source)) for _ in range(repeats))


def on_torch_device(*things: Any) -> tuple[Any, ...]:
    """Tensors and modules, on the GPU where JAX has one."""
    return tuple(thing.to("cuda" if jax.default_backend() == "gpu" else "cpu") for thing in things)


def torch_wait() -> None:
    """Until PyTorch's GPU has done what it was given."""
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(module: str, *arguments: str) -> float:
    """MiB resident at the peak of a fresh process that runs `module` and ends with `print_peak`.

    Or by which it grows, where it ends with `print_growth`.
    """
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=True,
                          stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def print_peak() -> None:
    """In MiB: of the GPU where there is one, otherwise resident in this process.

    VmHWM, not getrusage: the latter begins with the peak of the process that forked this one.
    """
    if stats := jax.devices()[0].memory_stats():
        peak = stats["peak_bytes_in_use"]
        if "torch" in sys.modules:
            import torch
            peak += torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        print(peak / 2**20)
        return
    print(_resident("VmHWM"))


def print_growth(run: Candidate) -> None:
    """MiB by which this process grows at the peak of a run; the first one, which compiles, is not it."""
    run()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system: else it would not be counted
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = _resident("VmRSS")
    run()
    print(_resident("VmHWM") - before)


def _resident(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


def machine() -> str:
    """One line on what was measured on."""
    name = jax.devices()[0].device_kind
    if jax.devices()[0].platform == "cpu":
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    torch = f", torch {version('torch')}" if find_spec("torch") else ""
    return f"{jax.device_count()} × {name}, {os.cpu_count()} CPUs, jax {jax.__version__}{torch}"


def _timed(run: Candidate) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
