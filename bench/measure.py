"""Timing on a noisy machine: alternating models, medians of ratios, and the machine's speed limits."""

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

from tilelli_jax.io.files import write_atomically

Candidate = Callable[[], object]  # runs the work once and waits for the result


def arguments(doc: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the output to FILE")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, metavar="N",
                            help="number of rounds in which each model is timed once [%(default)s]")
    return parser


@contextlib.contextmanager
def tee(out: Path | None) -> Iterator[Callable[[str], None]]:
    """Yields a function that prints a line; on exit, writes all lines to the file `out` unless it is None."""
    texts: list[str] = []

    def print_line(text: str) -> None:
        print(text, flush=True)
        texts.append(text)

    yield print_line
    if out is not None:
        write_atomically(out, "".join(text + "\n" for text in texts).encode())


def in_turn(candidates: dict[str, Candidate], rounds: int, pause: float = 0.05) -> dict[str, list[float]]:
    """Times all candidates once per round; returns the seconds per round for each.

    Every candidate is run once before timing. The pause (seconds) lets the thread pool of one library go idle
    before another library is timed. Each timing is of the second of two runs: the first allocates memory that
    the other candidates freed, which in a training loop happens only once.
    """
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            time.sleep(pause)
            run()
            seconds[name].append(_timed(run))
    return seconds


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over the rounds of a / b, so that slow rounds affect both sides equally."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def milliseconds(seconds: Sequence[float]) -> str:
    """Formats median and range in milliseconds, with about three digits."""
    low, middle, high = (1e3 * f(seconds) for f in (min, statistics.median, max))
    digits = 1 if middle >= 10 else 3
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def matmul_limit(n: int = 1536, repeats: int = 9) -> float:
    """FLOP/s of the fastest of several large f32 matrix products: an upper bound for a training step."""
    a = jnp.ones((n, n))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    return 2 * n**3 / min(_timed(lambda: product(a).block_until_ready()) for _ in range(repeats))


def read_limit(n_bytes: int, repeats: int = 30) -> float:
    """Bytes/s at which XLA multiplies a vector by a matrix of `n_bytes`: an upper bound for decoding."""
    width = 1024
    matrix = jnp.ones((max(n_bytes // (4 * width), 1), width))
    vector = jnp.ones(width)
    product = jax.jit(lambda m, v: m @ v)
    product(matrix, vector).block_until_ready()
    seconds = statistics.median(_timed(lambda: product(matrix, vector).block_until_ready())
                                for _ in range(repeats))
    return matrix.nbytes / seconds


def copy_limit(n_bytes: int = 1 << 28, repeats: int = 9) -> float:
    """Bytes/s (read plus written) at which one thread copies an array larger than the caches."""
    source = np.ones(n_bytes, np.uint8)
    target = np.empty_like(source)
    return 2 * n_bytes / min(_timed(lambda: np.copyto(target, source)) for _ in range(repeats))


def on_torch_device(*objects: Any) -> tuple[Any, ...]:
    """Moves tensors and modules to the GPU if JAX uses one."""
    return tuple(obj.to("cuda" if jax.default_backend() == "gpu" else "cpu") for obj in objects)


def torch_synchronize() -> None:
    """Waits until PyTorch's GPU has finished."""
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(module: str, *arguments: str) -> float:
    """Runs `module` in a new process; returns the MiB printed by its `print_peak` or `print_growth`."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=True,
                          stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def print_peak() -> None:
    """Prints the peak memory in MiB: of the GPU if there is one, else the resident memory of this process.

    Reads VmHWM, since getrusage starts with the peak of the parent process.
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
    """Prints the MiB by which this process grows at the peak of its second run; the first run compiles."""
    run()
    ctypes.CDLL(None).malloc_trim(0)  # returns free memory to the system, so that its reuse is counted
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = _resident("VmRSS")
    run()
    print(_resident("VmHWM") - before)


def _resident(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


def machine() -> str:
    """One line that describes the machine and the library versions."""
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
