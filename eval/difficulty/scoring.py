"""Scores prompts and endings with a language model: their NLL, and the model's activations.

A prompt that is too long is truncated on the left. No token is added before a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.nn.hooks import Tap
from tilelli_jax.parallel.sharding import Mesh
from tilelli_jax.signals.scoring import Scored, Scorer, Text, recording

from ..checks import Floats
from .study_data import stored
from .texts import TextItem

Encode = Callable[[str], list[int]]


class Answers(NamedTuple):
    """A network's results on questions.

    Attributes:
        prompt_nll: `[items]`, mean NLL of the prompt's tokens except the first; NaN for a prompt of one
            token.
        ending_nll: `[items, endings]`, mean NLL of each ending's tokens.
        prompt_tokens: int `[items]`, the number of tokens of each prompt.
        ending_tokens: int `[items, endings]`, the number of tokens of each ending.
        activations: layer → one array `[positions, d_model]` for each item.
    """

    prompt_nll: Floats
    ending_nll: Floats
    prompt_tokens: np.ndarray
    ending_tokens: np.ndarray
    activations: dict[int, list[np.ndarray]]


class NLLScorer:
    """Scores questions with one causal network, in batches of similar length.

    Each ending takes one pass over prompt and ending. The prompt's NLL comes from the pass of the first
    ending.

    Args:
        encode: the tokenizer: text → token ids.
        max_tokens: maximum length of a prompt in tokens.
        hook, layers: the hook and the layers of the returned activations.
        positions: "boundary": the prompt's last token for questions with one ending, otherwise the first
            token of each ending. "all": all positions of the prompt except the first `skip`.
        dtype: dtype of the returned activations.
    """

    def __init__(self, model: Any, encode: Encode, *, max_tokens: int, hook: str = "",
                 layers: Sequence[int] = (), positions: Literal["boundary", "all"] = "boundary",
                 skip: int = 1, batch_size: int = 16, dtype: Any = np.float16,
                 mesh: Mesh | None = None) -> None:
        self.encode, self.max_tokens, self.hook, self.layers = encode, max_tokens, hook, sorted(layers)
        self.positions, self.skip, self.dtype = positions, skip, dtype
        self.vocab_size = model.config.vocab_size
        make_tap = None
        if layers and positions == "boundary":
            make_tap = recording((hook,), tuple(self.layers))
        elif layers:
            def make_tap(aux_model: Any, metadata: Any) -> Tap:
                return Tap(record=(hook,), layers=tuple(self.layers))
        self._scorer = Scorer(model, make_tap, batch_size=batch_size, mesh=mesh)

    def prompt_ids(self, question: TextItem) -> list[int]:
        return self.encode(question.prompt)[-self.max_tokens:]

    def score(self, questions: Sequence[TextItem], item_ids: Sequence[int] | None = None) -> Answers:
        """Scores questions.

        Args:
            item_ids: the item number of each question, for error messages; None: 0, 1, ….

        Raises:
            InputError: a prompt or an ending has no tokens, a token id is too large, a text is longer than a
                network with learned positions can read, or an NLL or an activation is not finite.
        """
        shown_ids = range(len(questions)) if item_ids is None else item_ids
        prompts = [self.prompt_ids(question) for question in questions]
        endings = [[self.encode(ending) for ending in question.endings] for question in questions]
        for i, ids in enumerate(endings):
            if not prompts[i] or not all(ids) or len(ids) != len(endings[0]):
                raise InputError(f"item {shown_ids[i]}: expected at least one token in the prompt and in "
                                 f"each of {len(endings[0])} endings")
            if (largest := max(map(max, [prompts[i], *ids]))) >= self.vocab_size:
                raise InputError(f"item {shown_ids[i]}: expected token ids below the network's vocabulary "
                                 f"size {self.vocab_size}, found {largest}: does the tokenizer belong to the "
                                 "network?")
            longest = len(prompts[i]) + max(map(len, ids))
            if self._scorer.max_tokens is not None and longest > self._scorer.max_tokens:
                raise InputError(f"item {shown_ids[i]}: expected at most {self._scorer.max_tokens} "
                                 f"tokens, the network's context length, found {longest} in prompt and "
                                 "ending; data.max_tokens shortens prompts")
        several = len(endings[0]) > 1
        pairs = [(i, j) for i, ids in enumerate(endings) for j in range(len(ids))]
        at_boundary = self.layers and self.positions == "boundary"
        texts = [Text(prompts[i] + endings[i][j],
                      [len(prompts[i]) - (0 if several else 1)] if at_boundary else ()) for i, j in pairs]
        ending_nll = np.zeros((len(questions), len(endings[0])))
        prompt_nll = np.zeros(len(questions))
        activations: dict[int, list[Any]] = {
            layer: [[None] * len(ids) for ids in endings] for layer in self.layers}
        for index, result in self._scorer(texts, label="scoring"):
            i, j = pairs[index]
            n = len(prompts[i])
            ending_nll[i, j] = result.nll[n - 1:].mean(dtype=np.float64)
            if j == 0:
                prompt_nll[i] = result.nll[:n - 1].mean(dtype=np.float64) if n > 1 else np.nan
            if not np.isfinite(ending_nll[i, j]):
                raise InputError(f"item {shown_ids[i]}: the NLL of ending {j} is not finite")
            if self.layers and (j == 0 or self.positions == "boundary"):
                for layer, values in self._activations(result, n, shown_ids[i]):
                    activations[layer][i][j] = values
        joined = {layer: [np.concatenate([part for part in parts if part is not None]) for parts in items]
                  for layer, items in activations.items()}
        return Answers(prompt_nll, ending_nll, np.array([len(ids) for ids in prompts]),
                       np.array([[len(ids) for ids in item] for item in endings]), joined)

    def _activations(self, result: Scored, prompt_tokens: int, item: int) -> list[tuple[int, np.ndarray]]:
        arrays = []
        for layer, values in zip(self.layers, result.activations[self.hook], strict=True):
            if self.positions == "all":
                values = values[min(self.skip, prompt_tokens - 1):prompt_tokens]
            arrays.append((layer, stored(values, self.dtype, item, layer)))
        return arrays
