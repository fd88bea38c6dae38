"""Feature extraction of the difficulty study, compared with fm-difficulty-probe's loop in PyTorch.

    python -m bench.extraction [--rounds N] [--items N]

A random GPT-NeoX of Pythia-70M's shape, the same here and in transformers, processes items as long as SQuAD's
(random token ids; prompts of 154 tokens on average and 200 at most, answers of 1 to 6). The features are the
NLL of prompt and answer, and the residual stream after one layer at the prompt's last token, in float16. The
fm-difficulty-probe's loop processes one item at a time: a forward pass of prompt and answer with a hook on
the layer, and one of the prompt alone. Ours (`NLLScorer`) uses one pass for both, in batches of similar
lengths. The benchmark first checks that both give the same numbers. It pins PyTorch to one thread; its loop
is also timed with PyTorch's default number of threads, each with two implementations of attention.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.measure import arguments, in_turn, machine, on_torch_device, ratio, tee
from tilelli_jax.cli.tables import table
from tilelli_jax.eval.difficulty.scoring import NLLScorer
from tilelli_jax.eval.difficulty.texts import TextItem
from tilelli_jax.loading.store import build
from tilelli_jax.models.gpt_neox import GPTNeoXConfig

CONFIG = GPTNeoXConfig(vocab_size=50304, d_model=512, n_layers=6, n_heads=8, d_hidden=2048)
LAYER, MAX_PROMPT, MAX_ANSWER = 3, 200, 6
MEAN, SD, MIN_PROMPT = 160, 48, 20  # prompt tokens; clipped to at most MAX_PROMPT: mean 154, SD 40
NLL_TOLERANCE, ACTIVATION_TOLERANCE = 1e-4, 1e-2  # largest accepted difference between the two sides


class Extracted(NamedTuple):
    """Mean NLL of prompts and answers, nats `[items]`; residual stream, float16 `[items, d_model]`."""

    prompt: np.ndarray
    answer: np.ndarray
    stream: np.ndarray


Extract = Callable[[], Extracted]


def items_like_squad(n: int, vocab: int) -> list[tuple[list[int], list[int]]]:
    """Random prompts and answers, as token ids."""
    rng = np.random.default_rng(0)
    prompts = np.clip(rng.normal(MEAN, SD, n).round().astype(int), MIN_PROMPT, MAX_PROMPT)
    answers = rng.integers(1, MAX_ANSWER + 1, n)
    return [(rng.integers(0, vocab, prompt).tolist(), rng.integers(0, vocab, answer).tolist())
            for prompt, answer in zip(prompts, answers, strict=True)]


def our_extraction(model: Any, items: list[tuple[list[int], list[int]]]) -> Extract:
    scorer = NLLScorer(model, lambda text: [int(word) for word in text.split()], max_tokens=MAX_PROMPT,
                       hook="resid_post", layers=(LAYER,))
    questions = [TextItem(" ".join(map(str, prompt)), (" ".join(map(str, answer)),), 0, "", "")
                 for prompt, answer in items]

    def run() -> Extracted:
        result = scorer.score(questions)
        return Extracted(result.prompt_nll, result.ending_nll[:, 0],
                         np.concatenate(result.activations[LAYER]))
    return run


def published_loop(model: Any, items: list[tuple[list[int], list[int]]], threads: int) -> Extract:
    """The published loop: two forward passes per item, with batch size 1."""
    import torch
    from torch.nn import functional

    def nll(logits: Any, ids: Any, start: int) -> float:
        """Mean NLL in nats of the tokens from `start` on."""
        return functional.cross_entropy(logits[0, start - 1:-1].float(), ids[0, start:]).item()

    def run() -> Extracted:
        prompts, answers, streams = [], [], []
        with torch_threads(threads), hooked(model.gpt_neox.layers[LAYER]) as outputs, torch.no_grad():
            for prompt, answer in items:
                (ids,) = on_torch_device(torch.tensor([prompt + answer]))
                answers.append(nll(model(ids, use_cache=False).logits, ids, len(prompt)))
                streams.append(outputs[-1][0, len(prompt) - 1].to(torch.float16).cpu().numpy())
                (ids,) = on_torch_device(torch.tensor([prompt]))
                prompts.append(nll(model(ids, use_cache=False).logits, ids, 1))
                outputs.clear()
        return Extracted(np.array(prompts), np.array(answers), np.stack(streams))
    return run


@contextlib.contextmanager
def hooked(layer: Any) -> Iterator[list[Any]]:
    """Collects the layer's output at each call."""
    outputs: list[Any] = []
    handle = layer.register_forward_hook(
        lambda module, inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextlib.contextmanager
def torch_threads(n: int) -> Iterator[None]:
    import torch
    previous = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def load_transformers(path: Path, attention: str) -> Any:
    import torch
    import transformers
    transformers.logging.disable_progress_bar()
    (model,) = on_torch_device(transformers.GPTNeoXForCausalLM.from_pretrained(
        path, attn_implementation=attention, dtype=torch.float32).eval())
    return model


def check(result: Extracted, expected: Extracted) -> None:
    """Raises AssertionError if the results differ by more than the tolerances."""
    np.testing.assert_allclose(result.prompt, expected.prompt, rtol=0, atol=NLL_TOLERANCE)
    np.testing.assert_allclose(result.answer, expected.answer, rtol=0, atol=NLL_TOLERANCE)
    assert result.stream.dtype == expected.stream.dtype == np.float16
    np.testing.assert_allclose(result.stream.astype(np.float32), expected.stream.astype(np.float32), rtol=0,
                               atol=ACTIVATION_TOLERANCE)


def compare(rounds: int, n_items: int, print_line: Callable[[str], None]) -> None:
    import torch
    import transformers
    model, items = build(CONFIG, 0), items_like_squad(n_items, CONFIG.vocab_size)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        networks = {name: load_transformers(Path(directory), name) for name in ("eager", "sdpa")}
    lengths, threads = [len(prompt) for prompt, _ in items], torch.get_num_threads()
    print_line(f"{machine()}, transformers {transformers.__version__}; GPT-NeoX {CONFIG.n_layers} × "
               f"{CONFIG.d_model}, {CONFIG.vocab_size} tokens, float32; {n_items} prompts of {min(lengths)} "
               f"to {max(lengths)} tokens (mean {statistics.mean(lengths):.0f}, "
               f"SD {statistics.pstdev(lengths):.0f}), "
               f"{rounds} alternating round{'s' * (rounds > 1)}")
    candidates = {"ours": our_extraction(model, items), **{
        f"fm-difficulty-probe's loop, {name} attention, {n} thread{'s' * (n > 1)}": published_loop(
            networks[name], items, n) for n in dict.fromkeys((threads, 1)) for name in networks}}
    result = candidates["ours"]()
    for run in list(candidates.values())[1:]:
        check(result, run())
    seconds = in_turn(dict(candidates), rounds)
    rows = [("variant", "items/s (range)", "ours / variant")]
    for variant, times in seconds.items():
        low, middle, high = (n_items / f(times) for f in (max, statistics.median, min))
        rows.append((variant, f"{middle:.1f} ({low:.1f}–{high:.1f})", f"{ratio(times, seconds['ours']):.2f}"))
    print_line(table(rows))


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--items", type=int, default=128, metavar="N",
                        help="items per round [%(default)s]")
    options = parser.parse_args()
    with tee(options.out) as print_line:
        compare(options.rounds, options.items, print_line)


if __name__ == "__main__":
    main()
