"""Asking a language model: its surprise at prompts and endings, and its activations there.

A prompt is cut at its head to the tokens that the protocol allows. Nothing is put before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.nn.tap import Tap
from tilelli_jax.sharding import Mesh
from tilelli_jax.signals.scoring import Scored, Scorer, Text, recording

from ..checks import Floats
from .texts import Question

Encode = Callable[[str], list[int]]


class Answers(NamedTuple):
    """What a network makes of questions.

    `prompt_nats` `[items]`: mean surprise at the prompt's tokens but the first, NaN where there is none.
    `ending_nats` `[items, endings]`: mean surprise at each ending's tokens.
    `ending_tokens` int `[items, endings]`: how many there are; `prompt_tokens` int `[items]`.
    `activations`: layer → for each item `[positions, d_model]`.
    """

    prompt_nats: Floats
    ending_nats: Floats
    prompt_tokens: np.ndarray
    ending_tokens: np.ndarray
    activations: dict[int, list[np.ndarray]]


class NLLScorer:
    """One network, asked in batches of like lengths: one pass of prompt and ending for each ending.

    A causal network's surprise at the prompt is in the pass of its first ending.

    Args:
        max_tokens: of a prompt.
        place, layers: of the activations that are kept.
        positions: boundary: the prompt's last token where there is one ending, otherwise each ending's
            first. all: the prompt's, but the first `skip`.
    """

    def __init__(self, model: Any, encode: Encode, *, max_tokens: int, place: str = "",
                 layers: Sequence[int] = (), positions: Literal["boundary", "all"] = "boundary",
                 skip: int = 1, batch_size: int = 16, dtype: Any = np.float16,
                 mesh: Mesh | None = None) -> None:
        self.encode, self.max_tokens, self.place, self.layers = encode, max_tokens, place, sorted(layers)
        self.positions, self.skip, self.dtype = positions, skip, dtype
        self.vocab_size = model.config.vocab_size
        tap_of = None
        if layers and positions == "boundary":
            tap_of = recording((place,), tuple(self.layers))
        elif layers:
            def tap_of(aux_model: Any, beside: Any) -> Tap:
                return Tap(record=(place,), layers=tuple(self.layers))
        self._scorer = Scorer(model, tap_of, batch_size=batch_size, mesh=mesh)

    def prompt_ids(self, question: Question) -> list[int]:
        return self.encode(question.prompt)[-self.max_tokens:]

    def ask(self, questions: Sequence[Question], numbers: Sequence[int] | None = None) -> Answers:
        """Args: numbers: of the questions, for what is said of one that goes wrong; by default 0, 1, ….

        Raises:
            InputError: an ending has no tokens, there are more than a network with learned positions reads,
                or activations are not finite (named by item and layer).
        """
        known = range(len(questions)) if numbers is None else numbers
        prompts = [self.prompt_ids(question) for question in questions]
        endings = [[self.encode(ending) for ending in question.endings] for question in questions]
        for i, ids in enumerate(endings):
            if not prompts[i] or not all(ids) or len(ids) != len(endings[0]):
                raise InputError(f"item {known[i]}: expected tokens in the prompt and in every one of "
                                 f"{len(endings[0])} endings")
            if (largest := max(map(max, [prompts[i], *ids]))) >= self.vocab_size:
                raise InputError(f"item {known[i]}: expected tokens below the network's {self.vocab_size}, "
                                 f"found {largest}: is the tokenizer the network's own?")
            longest = len(prompts[i]) + max(map(len, ids))
            if self._scorer.most is not None and longest > self._scorer.most:
                raise InputError(f"item {known[i]}: prompt and ending have {longest} tokens, and the network "
                                 f"reads {self._scorer.most}; data.max_tokens cuts prompts")
        several = len(endings[0]) > 1
        of = [(i, j) for i, ids in enumerate(endings) for j in range(len(ids))]
        at_boundary = self.layers and self.positions == "boundary"
        texts = [Text(prompts[i] + endings[i][j],
                      [len(prompts[i]) - (0 if several else 1)] if at_boundary else ()) for i, j in of]
        nats = np.zeros((len(questions), len(endings[0])))
        prompt_nats = np.zeros(len(questions))
        kept: dict[int, list[Any]] = {
            layer: [[None] * len(ids) for ids in endings] for layer in self.layers}
        for index, result in self._scorer(texts, what="asking"):
            i, j = of[index]
            n = len(prompts[i])
            nats[i, j] = result.nats[n - 1:].mean(dtype=np.float64)
            if j == 0:
                prompt_nats[i] = result.nats[:n - 1].mean(dtype=np.float64) if n > 1 else np.nan
            if not np.isfinite(nats[i, j]):
                raise InputError(f"item {known[i]}: the surprise at ending {j} is not finite")
            if self.layers and (j == 0 or self.positions == "boundary"):
                for layer, values in self._kept(result, n, known[i]):
                    kept[layer][i][j] = values
        joined = {layer: [np.concatenate([part for part in parts if part is not None]) for parts in items]
                  for layer, items in kept.items()}
        return Answers(prompt_nats, nats, np.array([len(ids) for ids in prompts]),
                       np.array([[len(ids) for ids in found] for found in endings]), joined)

    def _kept(self, result: Scored, prompt_tokens: int, item: int) -> list[tuple[int, np.ndarray]]:
        found = []
        for layer, values in zip(self.layers, result.seen[self.place], strict=True):
            if self.positions == "all":
                values = values[min(self.skip, prompt_tokens - 1):prompt_tokens]
            with np.errstate(over="ignore"):  # the next line names it
                stored = values.astype(self.dtype)
            if not np.isfinite(stored).all():
                raise InputError(f"item {item}, layer {layer}: activations are not finite as "
                                 f"{stored.dtype}; extract.dtype=float32 has room for more")
            found.append((layer, stored))
        return found
