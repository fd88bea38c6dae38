"""Recall's features of a prompt against Recall's own method in PyTorch.

    python -m bench.recall [--rounds N] [--quick]

A random Gemma 4 with 42 narrow layers, the same here and in transformers, processes prompts as long as
Recall's (34 random token ids, of which 16 belong to the question). The published method handles one prompt at
a time. Hooks record each layer's residual stream, its MLP write and the stream that the write is added to, at
all positions. Then, for each layer, it computes full distributions over the vocabulary at the last position,
at the question's last four positions, and for the writes at all positions. Ours is `PromptReader`, one prompt
at a time and in batches. The benchmark first checks that both give the same numbers. Each case runs in a
separate process, which is restricted to one core, or uses all, before any library counts them.

Memory is the growth of a separate process at the peak of its second run. On a GPU there is one more case:
E4B's shape with random weights in bfloat16, ours only.
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
    tee,
)
from tilelli_jax.cli.tables import table
from tilelli_jax.loading.store import build
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.models.gemma4 import FlaxGemma4ForCausalLM, Gemma4Config
from tilelli_jax.signals.crystallisation import EPS, LAST, band
from tilelli_jax.signals.prompts import PromptIds, PromptReader

CONFIG = Gemma4Config(d_model=256, d_hidden=1024, n_heads=4, n_kv_heads=1, d_head=64, n_kv_heads_full=1,
                      d_head_full=128, d_per_layer=4)  # transformers requires per-layer embeddings
QUICK = dataclasses.replace(CONFIG, vocab_size=61, vocab_per_layer=61, d_model=16, d_hidden=16,
                            layers=("sliding", "full") * 2, n_shared_layers=2, n_heads=2, d_head=8,
                            d_head_full=8)
LENGTH, START, STOP = 34, 4, 20  # prompt length in tokens, and the range of the question in it
BATCH = 16
LOGIT_SCALE = 3  # factor on the final norm: logits of SD 3, neither all equal nor all capped
CASES = ((262144, 1), (32768, 1), (32768, None))  # tokens, cores (None: all)
GPU_BATCHES = (16, 64)
TOLERANCE = 1e-3


class Features(NamedTuple):
    """Features per prompt; the fields are those of `Crystallisation`."""

    by_layer: np.ndarray
    prompt_features: np.ndarray
    best: np.ndarray
    strongest_token: np.ndarray


Extract = Callable[[], Features]


def random_network(config: Gemma4Config) -> FlaxGemma4ForCausalLM:
    """A random network whose attention scores have SD 1.

    Gemma 4 does not scale the scores; trained norms do that. Without the scaling, attention would select
    single keys, and over 42 layers the rounding differences of two libraries would grow to 1e-2.
    """
    model = build(config, 0)
    model.final_norm.scale[...] *= LOGIT_SCALE
    for block in model.blocks:
        block.attention.query_norm.scale[...] *= block.attention.d_head**-0.5
    return model


def random_prompts(n: int, vocab: int) -> list[PromptIds]:
    rng = np.random.default_rng(0)
    return [PromptIds(rng.integers(0, vocab, LENGTH).tolist(), START, STOP) for _ in range(n)]


def our_features(model: Any, prompts: Sequence[PromptIds], batch_size: int) -> Extract:
    reader = PromptReader(model, batch_size=batch_size)

    def run() -> Features:
        in_order = sorted(reader(prompts), key=lambda pair: pair[0])
        results = [signals.crystallisation for _, signals in in_order]
        return Features(*(np.stack([getattr(features, name) for features in results])
                          for name in Features._fields))
    return run


def published_features(network: Any, prompts: Sequence[PromptIds]) -> Extract:
    """One prompt at a time: a pass with hooks, then three products with the unembedding per layer."""
    import torch

    def run() -> Features:
        with torch.no_grad():
            results = [_published(network, prompt) for prompt in prompts]
        return Features(*(np.stack(part) for part in zip(*results, strict=True)))
    return run


def _published(network: Any, prompt: PromptIds) -> Features:
    import torch
    from torch.nn import functional
    with _hooked(network.model.layers) as (hidden, writes, bases):
        network.model(torch.tensor([prompt.ids]), use_cache=True)
    table, cap = network.lm_head.weight, network.config.final_logit_softcapping
    question = slice(prompt.start, prompt.stop)
    last = slice(max(prompt.start, prompt.stop - LAST), prompt.stop)

    def lens(rows: Any) -> Any:
        z = network.model.norm(rows.to(table.dtype)) @ table.T
        return (torch.tanh(z / cap) * cap).float()

    def logit_lens(rows: Any) -> tuple[Any, ...]:
        """log p, and per row: entropy, margin, top probability, most likely token."""
        z = lens(rows)
        log_p = functional.log_softmax(z, dim=-1)
        p = log_p.exp()
        top_two = z.topk(2, dim=-1).values
        return log_p, -(p * log_p).sum(-1), top_two[:, 0] - top_two[:, 1], p.max(-1).values, z.argmax(-1)

    by_layer, top_tokens, strongest_tokens, previous = [], [], [], None
    for i, (stream, write, base) in enumerate(zip(hidden, writes, bases, strict=True)):
        log_p, entropy, margin, top, token = logit_lens(stream[-1:])
        divergence = 0 if previous is None else (log_p.exp() * (log_p - previous)).sum()
        _, entropies, margins, tops, _ = logit_lens(stream[last])
        z = lens(write)  # at all positions
        log_p_write = functional.log_softmax(z, dim=-1)
        peak = np.log(z.shape[-1]) + (log_p_write.exp() * log_p_write).sum(-1)
        strongest_tokens.append(int(z.argmax(-1)[question][peak[question].argmax()]))
        relative_norm = write.norm(dim=-1) / (base.norm(dim=-1) + EPS)
        similarity = functional.cosine_similarity(write, writes[i - 1], dim=-1)[question].mean() if i else 0
        by_layer.append([float(x) for x in (
            entropy, margin, top, divergence, entropies.mean(), margins.mean(), tops.mean(),
            relative_norm[question].max(), relative_norm[-1], peak[question].max(), peak[-1], similarity)])
        top_tokens.append(int(token))
        previous = log_p
    rows = np.nan_to_num(np.array(by_layer, np.float32), nan=0, posinf=0, neginf=0)
    low, high = band(len(rows))
    strongest_token = strongest_tokens[low + int(rows[low:high + 1, 9].argmax())]
    return Features(rows, _overall(rows, top_tokens), np.array(top_tokens), np.array(strongest_token))


def _overall(rows: np.ndarray, top_tokens: list[int]) -> np.ndarray:
    """The ten features of the whole network, from the features by layer `[layers, 12]`."""
    n = len(rows)
    low, high = band(n)
    middle = rows[low:high + 1]
    last_change = max((i for i in range(1, n) if top_tokens[i] != top_tokens[i - 1]), default=0)
    return np.array([rows[-1, 0], rows[:, 0].min(), middle[:, 0].mean(), last_change / (n - 1),
                     rows[int(0.75 * n):, 3].mean(), rows[:, 1].max(), middle[:, 9].max(),
                     middle[:, 9].mean(), middle[:, 7].max(), (low + middle[:, 9].argmax()) / (n - 1)],
                    np.float32)


@contextlib.contextmanager
def _hooked(layers: Any) -> Iterator[tuple[list[Any], list[Any], list[Any]]]:
    """Records per layer, float32 `[time, d_model]`: stream after it, MLP write, stream before the write."""
    hidden: list[Any] = []
    writes: list[Any] = []
    bases: list[Any] = []

    def append(values: list[Any], value: Any) -> None:
        values.append(value[0].float().cpu())

    def append_output(values: list[Any]) -> Callable[..., None]:
        return lambda module, inputs, output: append(values, output)
    handles = []
    for layer in layers:
        handles += [
            layer.register_forward_hook(append_output(hidden)),
            layer.post_feedforward_layernorm.register_forward_hook(append_output(writes)),
            layer.pre_feedforward_layernorm.register_forward_pre_hook(
                lambda module, inputs: append(bases, inputs[0]))]
    try:
        yield hidden, writes, bases
    finally:
        for handle in handles:
            handle.remove()


def load_network(variant: str, directory: Path) -> Any:
    if variant == "published":
        import torch
        import transformers
        transformers.logging.disable_progress_bar()
        return transformers.Gemma4ForCausalLM.from_pretrained(directory, attn_implementation="eager",
                                                              dtype=torch.float32).eval()
    return FlaxGemma4ForCausalLM.from_pretrained(directory)


def candidate(variant: str, network: Any, vocab: int) -> tuple[Extract, int]:
    """Returns the extraction of a variant and its number of prompts."""
    n = BATCH if variant == "batch" else 1
    prompts = random_prompts(n, vocab)
    if variant == "published":
        return published_features(network, prompts), n
    return our_features(network, prompts, n), n


def labels() -> dict[str, str]:
    return {"published": "Recall's method", "alone": "ours, one prompt",
            "batch": f"ours, {BATCH} prompts at once"}


def check(results: Features, expected: Features) -> None:
    """Raises AssertionError if the results differ by more than TOLERANCE."""
    for name in ("by_layer", "prompt_features"):
        np.testing.assert_allclose(getattr(results, name), getattr(expected, name), rtol=0, atol=TOLERANCE)
    for name in ("best", "strongest_token"):
        np.testing.assert_array_equal(getattr(results, name), getattr(expected, name))


def compare(config: Gemma4Config, rounds: int, print_line: Callable[[str], None]) -> None:
    """Compares all variants on the cores available to this process."""
    import transformers
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        random_network(config).save_pretrained(directory)
        memory = {variant: peak_memory("bench.recall", "--memory-of", variant, name) for variant in labels()}
        networks = {variant: load_network(variant, directory) for variant in ("published", "alone")}
    candidates = {variant: candidate(variant, networks.get(variant, networks["alone"]), config.vocab_size)
                  for variant in labels()}
    results = {variant: run() for variant, (run, _) in candidates.items()}
    for variant in ("alone", "batch"):
        check(Features(*(part[:1] for part in results[variant])), results["published"])
    cores = len(os.sched_getaffinity(0))
    print_line(f"{machine()}, transformers {transformers.__version__}; Gemma 4 {config.n_layers} × "
               f"{config.d_model}, float32; prompts of {LENGTH} tokens, "
               f"{rounds} alternating round{'s' * (rounds > 1)}")
    seconds = {variant: [times / candidates[variant][1] for times in all_times] for variant, all_times in
               in_turn({variant: run for variant, (run, _) in candidates.items()}, rounds).items()}
    rows = [(f"{config.vocab_size} tokens, {cores} core{'s' * (cores > 1)}", "s/prompt (range)",
             "speed-up over Recall's", "over ours, one prompt", "MiB")]
    rows += [(labels()[variant], f"{statistics.median(times):.3f} ({min(times):.3f}–{max(times):.3f})",
              f"{ratio(seconds['published'], times):.1f}", f"{ratio(seconds['alone'], times):.2f}",
              f"{memory[variant]:.0f}") for variant, times in seconds.items()]
    print_line(table(rows))


def on_gpu(config: Gemma4Config, batches: Sequence[int], rounds: int,
           print_line: Callable[[str], None]) -> None:
    """Ours only, in bfloat16, compared with the time to read each weight from memory once.

    The per-layer embeddings, of which only a few rows are read, are not counted.
    """
    graph, params = nnx.split(build(config, 0, ComputeConfig(dtype="bfloat16")))
    params = jax.tree.map(lambda array: array.astype(jnp.bfloat16), params)
    model = nnx.merge(graph, params)
    n_bytes = sum(array.nbytes for path, array in jax.tree.leaves_with_path(params)
                  if "embed_per_layer" not in jax.tree_util.keystr(path))
    limit = n_bytes / read_limit(min(n_bytes, 1 << 31))
    print_line(f"{machine()}; Gemma 4 {config.n_layers} × {config.d_model}, {config.vocab_size} tokens, "
               f"bfloat16, {n_bytes / 1e9:.2f} GB of weights to read, {rounds} rounds")
    seconds = in_turn({f"{n} at once": our_features(model, random_prompts(n, config.vocab_size), n)
                       for n in batches}, rounds)
    rows = [("prompts", "prompts/s (range)", "of memory limit")]
    for n, (variant, times) in zip(batches, seconds.items(), strict=True):
        low, middle, high = (n / f(times) for f in (max, statistics.median, min))
        rows.append((variant, f"{middle:.1f} ({low:.1f}–{high:.1f})", f"{limit * middle / n:.0%}"))
    print_line(table(rows))


def run_case(vocab: int, cores: int | None, options: argparse.Namespace) -> str:
    """Runs `compare` in a process with this many cores, on the CPU; returns its output."""
    flags = ["--vocab", str(vocab), "--rounds", str(options.rounds), "--quick" if options.quick else "",
             *(["--cores", str(cores)] if cores else [])]
    process = subprocess.run([sys.executable, "-m", "bench.recall", *filter(None, flags)], check=True,
                             stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    return process.stdout.rstrip("\n")


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--quick", action="store_true",
                        help="use a tiny network, to test the command; its timings are not meaningful")
    for name, kind in (("--vocab", int), ("--cores", int), ("--memory-of", str)):
        parser.add_argument(name, type=kind, nargs=2 if kind is str else None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:options.cores])
    if options.memory_of:
        variant, directory = options.memory_of
        network = load_network(variant, Path(directory))
        vocab = network.config.vocab_size
        print_growth(candidate(variant, network, vocab)[0])
        return
    config = QUICK if options.quick else CONFIG
    with tee(options.out) as print_line:
        if options.vocab:
            config = dataclasses.replace(config, vocab_size=options.vocab, vocab_per_layer=options.vocab)
            compare(config, options.rounds, print_line)
            return
        for vocab, cores in CASES:
            print_line(run_case(config.vocab_size if options.quick else vocab, cores, options))
        if jax.default_backend() == "gpu":
            on_gpu(QUICK if options.quick else Gemma4Config(), GPU_BATCHES, options.rounds, print_line)


if __name__ == "__main__":
    main()
