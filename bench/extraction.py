"""Extraction for the study of difficulty against the published kit's loop in PyTorch.

    python -m bench.extraction [--rounds N] [--items N]

A random GPT-NeoX of Pythia-70M's shape, the same here and in transformers, is asked items as long as SQuAD's
(random token ids; prompts of 154 tokens on average and 200 at most, answers of 1 to 6): the surprise at
prompt and answer, and the stream after one layer at the prompt's last token, in float16. The kit's loop
takes one item after the other, by a forward pass of prompt and answer with a hook on the layer and one of
the prompt alone. Ours is eval/difficulty's Asker: one pass for both, in batches of like lengths. Both come to
the same numbers, which is checked first. The kit pins PyTorch to one thread; its loop is timed with
PyTorch's default, too, and with both forms of attention.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tilelli_jax.eval.difficulty.asking import NLLScorer
from tilelli_jax.eval.difficulty.texts import Question

from bench.measure import arguments, in_turn, machine, on_torch_device, ratio, told
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.store import build
from tilelli_jax.tables import table

CONFIG = GPTNeoXConfig(vocab_size=50304, d_model=512, n_layers=6, n_heads=8, d_hidden=2048)
LAYER, MOST, ANSWER = 3, 200, 6
MEAN, SPREAD, LEAST = 160, 48, 20  # of a normal distribution: cut to LEAST … MOST its mean is 154, its sd 40
NATS, ACTIVATIONS = 1e-4, 1e-2  # by how much the two sides may differ


class Extracted(NamedTuple):
    """Mean surprise at prompts and answers, nats `[items]`; the stream, float16 `[items, d_model]`."""

    prompt: np.ndarray
    answer: np.ndarray
    stream: np.ndarray


Extract = Callable[[], Extracted]


def items_like_squad(n: int, vocab: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers, as token ids."""
    rng = np.random.default_rng(0)
    prompts = np.clip(rng.normal(MEAN, SPREAD, n).round().astype(int), LEAST, MOST)
    answers = rng.integers(1, ANSWER + 1, n)
    return [(rng.integers(0, vocab, prompt).tolist(), rng.integers(0, vocab, answer).tolist())
            for prompt, answer in zip(prompts, answers, strict=True)]


def ours(model: Any, items: list[tuple[list[int], list[int]]]) -> Extract:
    scorer = NLLScorer(model, lambda text: [int(word) for word in text.split()], max_tokens=MOST,
                  place="resid_post", layers=(LAYER,))
    questions = [Question(" ".join(map(str, prompt)), (" ".join(map(str, answer)),), 0, "", "")
                 for prompt, answer in items]

    def run() -> Extracted:
        found = scorer.ask(questions)
        return Extracted(found.prompt_nats, found.ending_nats[:, 0], np.concatenate(found.activations[LAYER]))
    return run


def theirs(model: Any, items: list[tuple[list[int], list[int]]], threads: int) -> Extract:
    """The published loop: two forward passes of one row for each item."""
    import torch
    from torch.nn import functional

    def nll(logits: Any, ids: Any, first: int) -> float:
        """Mean at the tokens from the first on."""
        return functional.cross_entropy(logits[0, first - 1:-1].float(), ids[0, first:]).item()

    def run() -> Extracted:
        prompts, answers, streams = [], [], []
        with torch_threads(threads), hooked(model.gpt_neox.layers[LAYER]) as seen, torch.no_grad():
            for prompt, answer in items:
                (ids,) = on_torch_device(torch.tensor([prompt + answer]))
                answers.append(nll(model(ids, use_cache=False).logits, ids, len(prompt)))
                streams.append(seen[-1][0, len(prompt) - 1].to(torch.float16).cpu().numpy())
                (ids,) = on_torch_device(torch.tensor([prompt]))
                prompts.append(nll(model(ids, use_cache=False).logits, ids, 1))
                seen.clear()
        return Extracted(np.array(prompts), np.array(answers), np.stack(streams))
    return run


@contextlib.contextmanager
def hooked(layer: Any) -> Iterator[list[Any]]:
    """What the layer returns, call by call."""
    seen: list[Any] = []
    handle = layer.register_forward_hook(
        lambda module, given, found: seen.append(found[0] if isinstance(found, tuple) else found))
    try:
        yield seen
    finally:
        handle.remove()


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_theirs(path: Path, attention: str) -> Any:
    import torch
    import transformers
    transformers.logging.disable_progress_bar()
    (model,) = on_torch_device(transformers.GPTNeoXForCausalLM.from_pretrained(
        path, attn_implementation=attention, dtype=torch.float32).eval())
    return model


def check(found: Extracted, expected: Extracted) -> None:
    """Raises AssertionError where the two sides differ."""
    np.testing.assert_allclose(found.prompt, expected.prompt, rtol=0, atol=NATS)
    np.testing.assert_allclose(found.answer, expected.answer, rtol=0, atol=NATS)
    assert found.stream.dtype == expected.stream.dtype == np.float16
    np.testing.assert_allclose(found.stream.astype(np.float32), expected.stream.astype(np.float32), rtol=0,
                               atol=ACTIVATIONS)


def compare(rounds: int, n_items: int, tell: Callable[[str], None]) -> None:
    import torch
    import transformers
    model, items = build(CONFIG, 0), items_like_squad(n_items, CONFIG.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        networks = {name: load_theirs(Path(folder), name) for name in ("eager", "sdpa")}
    lengths, threads = [len(prompt) for prompt, _ in items], torch.get_num_threads()
    tell(f"{machine()}, transformers {transformers.__version__}; GPT-NeoX {CONFIG.n_layers} × "
         f"{CONFIG.d_model}, {CONFIG.vocab_size} tokens, float32; {n_items} prompts of {min(lengths)} to "
         f"{max(lengths)} tokens (mean {statistics.mean(lengths):.0f}, sd {statistics.pstdev(lengths):.0f}), "
         f"{rounds} round{'s' * (rounds > 1)} in turn")
    candidates = {"ours": ours(model, items), **{
        f"the kit's loop, {name} attention, {n} thread{'s' * (n > 1)}": theirs(networks[name], items, n)
        for n in dict.fromkeys((threads, 1)) for name in networks}}
    found = candidates["ours"]()
    for run in list(candidates.values())[1:]:
        check(found, run())
    seconds = in_turn(dict(candidates), rounds)
    rows = [("extraction", "items/s (range)", "ours / this one")]
    for who, taken in seconds.items():
        low, middle, high = (n_items / f(taken) for f in (max, statistics.median, min))
        rows.append((who, f"{middle:.1f} ({low:.1f}–{high:.1f})", f"{ratio(taken, seconds['ours']):.2f}"))
    tell(table(rows))


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--items", type=int, default=128, metavar="N",
                        help="items in each turn [%(default)s]")
    options = parser.parse_args()
    with told(options.out) as tell:
        compare(options.rounds, options.items, tell)


if __name__ == "__main__":
    main()
