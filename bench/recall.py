"""Recall's features of a prompt against the published method in PyTorch.

    python -m bench.recall [--rounds N] [--quick]

A random Gemma 4 of 42 narrow layers, the same here and in transformers, reads prompts as long as
Recall's (34 random ids, of which 16 are the question's). The published method, restated: one prompt at a
time; hooks keep each layer's stream, its write and the stream that this is added to, at all positions;
then, layer by layer, whole distributions over the vocabulary of the last position, of the question's
last four, and of the writes at all positions, needed or not. Ours is Reader, a prompt at a time and in
batches. Both come to the same numbers, which is checked first. Each case is a process that is given one
core, or all, before any library looks for them.

Memory is what a process of the model's own grows by at the peak of its second run. With a GPU there
is one more case: E4B's shape with random weights in bfloat16, ours alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.measure import (
    arguments,
    in_turn,
    machine,
    peak_memory,
    print_growth,
    ratio,
    read_limit,
    told,
)
from tilelli_jax.models.decoder import ComputeConfig
from tilelli_jax.models.gemma4 import FlaxGemma4ForCausalLM, Gemma4Config
from tilelli_jax.signals.crystallisation import EPS, LAST, band
from tilelli_jax.signals.prompts import Prompt, PromptReader
from tilelli_jax.store import build
from tilelli_jax.tables import table

CONFIG = Gemma4Config(d_model=256, d_hidden=1024, n_heads=4, n_kv_heads=1, d_head=64, n_kv_heads_full=1,
                      d_head_full=128, d_per_layer=4)  # per layer something: transformers asks for it
QUICK = dataclasses.replace(CONFIG, vocab_size=61, vocab_per_layer=61, d_model=16, d_hidden=16,
                            layers=("sliding", "full") * 2, n_shared_layers=2, n_heads=2, d_head=8,
                            d_head_full=8)
LENGTH, START, STOP = 34, 4, 20  # of a prompt; where its question stands
BATCH = 16
SHARPER = 3  # times the final norm's scale: logits of sd 3, which are neither all alike nor all capped
CASES = ((262144, 1), (32768, 1), (32768, None))  # tokens, cores (None: all)
GPU_BATCHES = (16, 64)
TOLERANCE = 1e-3


class Features(NamedTuple):
    """Of each prompt, as `Crystallisation` has them."""

    by_layer: np.ndarray
    overall: np.ndarray
    best: np.ndarray
    strongest_token: np.ndarray


Extract = Callable[[], Features]


def random_network(config: Gemma4Config) -> FlaxGemma4ForCausalLM:
    """Its scores are of sd 1, as trained norms have to see to: Gemma 4 divides by nothing.

    Else attention picks one key each, and 42 layers make 1e-2 of what two libraries round differently.
    """
    model = build(config, 0)
    model.final_norm.scale[...] *= SHARPER
    for block in model.blocks:
        block.attention.query_norm.scale[...] *= block.attention.d_head**-0.5
    return model


def some_prompts(n: int, vocab: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [Prompt(rng.integers(0, vocab, LENGTH).tolist(), START, STOP) for _ in range(n)]


def ours(model: Any, prompts: Sequence[Prompt], batch_size: int) -> Extract:
    reader = PromptReader(model, batch_size=batch_size)

    def run() -> Features:
        found = [read.crystallisation for _, read in sorted(reader(prompts), key=lambda pair: pair[0])]
        return Features(*(np.stack([getattr(one, name) for one in found]) for name in Features._fields))
    return run


def published(network: Any, prompts: Sequence[Prompt]) -> Extract:
    """One prompt after the other: a pass under hooks, then three products with the table by layer."""
    import torch

    def run() -> Features:
        with torch.no_grad():
            found = [_published(network, prompt) for prompt in prompts]
        return Features(*(np.stack(part) for part in zip(*found, strict=True)))
    return run


def _published(network: Any, prompt: Prompt) -> Features:
    import torch
    from torch.nn import functional
    with _hooked(network.model.layers) as (hidden, writes, beside):
        network.model(torch.tensor([prompt.ids]), use_cache=True)
    table, cap = network.lm_head.weight, network.config.final_logit_softcapping
    question = slice(prompt.start, prompt.stop)
    last = slice(max(prompt.start, prompt.stop - LAST), prompt.stop)

    def lens(rows: Any) -> Any:
        z = network.model.norm(rows.to(table.dtype)) @ table.T
        return (torch.tanh(z / cap) * cap).float()

    def logit_lens(rows: Any) -> tuple[Any, ...]:
        """log p; entropy, margin, top p, likeliest token of each row."""
        z = lens(rows)
        log_p = functional.log_softmax(z, dim=-1)
        p = log_p.exp()
        two = z.topk(2, dim=-1).values
        return log_p, -(p * log_p).sum(-1), two[:, 0] - two[:, 1], p.max(-1).values, z.argmax(-1)

    by_layer, best, strongest, before = [], [], [], None
    for i, (stream, write, base) in enumerate(zip(hidden, writes, beside, strict=True)):
        log_p, entropy, margin, top, token = logit_lens(stream[-1:])
        divergence = 0 if before is None else (log_p.exp() * (log_p - before)).sum()
        _, entropies, margins, tops, _ = logit_lens(stream[last])
        z = lens(write)  # at all positions
        log_p_write = functional.log_softmax(z, dim=-1)
        peak = np.log(z.shape[-1]) + (log_p_write.exp() * log_p_write).sum(-1)
        strongest.append(int(z.argmax(-1)[question][peak[question].argmax()]))
        size = write.norm(dim=-1) / (base.norm(dim=-1) + EPS)
        along = functional.cosine_similarity(write, writes[i - 1], dim=-1)[question].mean() if i else 0
        by_layer.append([float(x) for x in (
            entropy, margin, top, divergence, entropies.mean(), margins.mean(), tops.mean(),
            size[question].max(), size[-1], peak[question].max(), peak[-1], along)])
        best.append(int(token))
        before = log_p
    rows = np.nan_to_num(np.array(by_layer, np.float32), nan=0, posinf=0, neginf=0)
    low, high = band(len(rows))
    strongest_token = strongest[low + int(rows[low:high + 1, 9].argmax())]
    return Features(rows, _overall(rows, best), np.array(best), np.array(strongest_token))


def _overall(rows: np.ndarray, best: list[int]) -> np.ndarray:
    """The ten numbers of the whole, of `[layers, 12]`."""
    n = len(rows)
    low, high = band(n)
    middle = rows[low:high + 1]
    settled = max((i for i in range(1, n) if best[i] != best[i - 1]), default=0)
    return np.array([rows[-1, 0], rows[:, 0].min(), middle[:, 0].mean(), settled / (n - 1),
                     rows[int(0.75 * n):, 3].mean(), rows[:, 1].max(), middle[:, 9].max(),
                     middle[:, 9].mean(), middle[:, 7].max(), (low + middle[:, 9].argmax()) / (n - 1)],
                    np.float32)


@contextlib.contextmanager
def _hooked(layers: Any) -> Iterator[tuple[list[Any], list[Any], list[Any]]]:
    """By layer, float32 `[time, d_model]`: the stream after it, its write, what that is added to."""
    hidden: list[Any] = []
    writes: list[Any] = []
    beside: list[Any] = []

    def keep(kept: list[Any], value: Any) -> None:
        kept.append(value[0].float().cpu())

    def keep_result(kept: list[Any]) -> Callable[..., None]:
        return lambda module, given, found: keep(kept, found)
    handles = []
    for layer in layers:
        handles += [
            layer.register_forward_hook(keep_result(hidden)),
            layer.post_feedforward_layernorm.register_forward_hook(keep_result(writes)),
            layer.pre_feedforward_layernorm.register_forward_pre_hook(
                lambda module, given: keep(beside, given[0]))]
    try:
        yield hidden, writes, beside
    finally:
        for handle in handles:
            handle.remove()


def load(who: str, folder: Path) -> Any:
    if who == "published":
        import torch
        import transformers
        transformers.logging.disable_progress_bar()
        return transformers.Gemma4ForCausalLM.from_pretrained(folder, attn_implementation="eager",
                                                              dtype=torch.float32).eval()
    return FlaxGemma4ForCausalLM.from_pretrained(folder)


def candidate(who: str, network: Any, vocab: int) -> tuple[Extract, int]:
    """What is run, and how many prompts that is."""
    n = BATCH if who == "batch" else 1
    prompts = some_prompts(n, vocab)
    return (published(network, prompts) if who == "published" else ours(network, prompts, n)), n


def names() -> dict[str, str]:
    return {"published": "the published method", "alone": "ours, one prompt",
            "batch": f"ours, {BATCH} prompts at once"}


def check(found: Features, expected: Features) -> None:
    """Raises AssertionError where the two sides differ."""
    for name in ("by_layer", "overall"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=TOLERANCE)
    for name in ("best", "strongest_token"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def compare(config: Gemma4Config, rounds: int, tell: Callable[[str], None]) -> None:
    """On the cores that this process has."""
    import transformers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_network(config).save_pretrained(folder)
        memory = {who: peak_memory("bench.recall", "--memory-of", who, name) for who in names()}
        networks = {who: load(who, folder) for who in ("published", "alone")}
    candidates = {who: candidate(who, networks.get(who, networks["alone"]), config.vocab_size)
                  for who in names()}
    found = {who: run() for who, (run, _) in candidates.items()}
    for who in ("alone", "batch"):
        check(Features(*(part[:1] for part in found[who])), found["published"])
    cores = len(os.sched_getaffinity(0))
    tell(f"{machine()}, transformers {transformers.__version__}; Gemma 4 {config.n_layers} × "
         f"{config.d_model}, float32; prompts of {LENGTH}, {rounds} round{'s' * (rounds > 1)} in turn")
    seconds = {who: [taken / candidates[who][1] for taken in all_taken] for who, all_taken in
               in_turn({who: run for who, (run, _) in candidates.items()}, rounds).items()}
    rows = [(f"{config.vocab_size} tokens, {cores} core{'s' * (cores > 1)}", "s a prompt (range)",
             "times as fast as published", "as ours alone", "MiB more at the peak")]
    rows += [(names()[who], f"{statistics.median(taken):.3f} ({min(taken):.3f}–{max(taken):.3f})",
              f"{ratio(seconds['published'], taken):.1f}", f"{ratio(seconds['alone'], taken):.2f}",
              f"{memory[who]:.0f}") for who, taken in seconds.items()]
    tell(table(rows))


def on_gpu(config: Gemma4Config, batches: Sequence[int], rounds: int,
           tell: Callable[[str], None]) -> None:
    """Ours alone, in bfloat16, beside the time in which memory hands over each weight once.

    The embeddings of each layer, of which only some rows are read, are not in that.
    """
    graph, params = nnx.split(build(config, 0, ComputeConfig(dtype="bfloat16")))
    params = jax.tree.map(lambda array: array.astype(jnp.bfloat16), params)
    model = nnx.merge(graph, params)
    n_bytes = sum(array.nbytes for path, array in jax.tree.leaves_with_path(params)
                  if "embed_per_layer" not in jax.tree_util.keystr(path))
    limit = n_bytes / read_limit(min(n_bytes, 1 << 31))
    tell(f"{machine()}; Gemma 4 {config.n_layers} × {config.d_model}, {config.vocab_size} tokens, "
         f"bfloat16, {n_bytes / 1e9:.2f} GB of weights to read, {rounds} rounds")
    seconds = in_turn({f"{n} at once": ours(model, some_prompts(n, config.vocab_size), n)
                       for n in batches}, rounds)
    rows = [("prompts", "prompts/s (range)", "of the memory limit")]
    for n, (who, taken) in zip(batches, seconds.items(), strict=True):
        low, middle, high = (n / f(taken) for f in (max, statistics.median, min))
        rows.append((who, f"{middle:.1f} ({low:.1f}–{high:.1f})", f"{limit * middle / n:.0%}"))
    tell(table(rows))


def case(vocab: int, cores: int | None, options: argparse.Namespace) -> str:
    """What a process with so many cores tells; on the CPU, even where there is a GPU."""
    words = ["--vocab", str(vocab), "--rounds", str(options.rounds), "--quick" if options.quick else "",
             *(["--cores", str(cores)] if cores else [])]
    done = subprocess.run([sys.executable, "-m", "bench.recall", *filter(None, words)], check=True,
                          stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    return done.stdout.rstrip("\n")


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--quick", action="store_true",
                        help="a network so small that the numbers mean nothing")
    for name, kind in (("--vocab", int), ("--cores", int), ("--memory-of", str)):
        parser.add_argument(name, type=kind, nargs=2 if kind is str else None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:options.cores])
    if options.memory_of:
        who, folder = options.memory_of
        network = load(who, Path(folder))
        vocab = network.config.vocab_size
        print_growth(candidate(who, network, vocab)[0])
        return
    config = QUICK if options.quick else CONFIG
    with told(options.out) as tell:
        if options.vocab:
            config = dataclasses.replace(config, vocab_size=options.vocab, vocab_per_layer=options.vocab)
            compare(config, options.rounds, tell)
            return
        for vocab, cores in CASES:
            tell(case(config.vocab_size if options.quick else vocab, cores, options))
        if jax.default_backend() == "gpu":
            on_gpu(QUICK if options.quick else Gemma4Config(), GPU_BATCHES, options.rounds, tell)


if __name__ == "__main__":
    main()
