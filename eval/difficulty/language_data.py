"""The data of a study of language models: SQuAD, HellaSwag, or pieces of any text."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import TopKSAE
from tilelli_jax.io.files import read_text
from tilelli_jax.loading.language import LanguageModel, load_with_tokenizer
from tilelli_jax.parallel.sharding import Mesh
from tilelli_jax.signals.activations import activation_rows
from tilelli_jax.signals.patching import PatchedText, patched_nll

from ..checks import Floats
from ..folds import Folds, number_of_folds, stratified, usable
from ..inputs.networks import NetworkConfig
from ..inputs.rows import hugging_face, read_rows
from . import cheap, labels, texts
from .config import DifficultyConfig, HellaSwagConfig, SquadConfig, TextConfig
from .scoring import NLLScorer
from .study_data import FeatureBlock, Measurements, Numbers, Positions, check_layers
from .texts import TextItem

PARTS = 20  # folds of whole groups; the test split consists of some of these folds


class LanguageData:
    """See `study_data.StudyData`."""

    unit = "nats"

    def __init__(self, config: DifficultyConfig, mesh: Mesh | None = None) -> None:
        """Raises InputError if the data cannot be read, or have too few items or groups."""
        assert isinstance(config.data, SquadConfig | HellaSwagConfig | TextConfig)
        self.config, self.data, self.mesh = config, config.data, mesh
        self.questions = _read_questions(config.data)
        if len(self.questions) < 10:
            raise InputError(f"data.source: {config.data.source}: expected at least 10 items, found "
                             f"{len(self.questions)}")
        by_topic = config.split.by == "topic"  # the bootstrap resamples the groups of the split
        self.groups = np.array([question.topic if by_topic else question.group
                                for question in self.questions])
        self.metadata: Mapping[str, Sequence[Any]] = {
            "prompt": [question.prompt for question in self.questions],
            "answer": [question.endings[question.right] for question in self.questions],
            "topic": [question.topic for question in self.questions],
            "domain": [question.domain for question in self.questions]}
        self.fingerprint = hashlib.sha256(json.dumps(self.questions).encode()).hexdigest()[:16]
        self._cached_scorer: tuple[LanguageModel, tuple[int, ...], NLLScorer] | None = None
        options = config.split
        self.planned_split = (
            labels.split_in_order(len(self), options.train) if options.by == "order" else
            split_groups(self.groups, np.array(self.metadata["domain"]), options.train, config.seed))
        train_groups = len(np.unique(self.groups[self.planned_split == "train"]))
        if train_groups < 2:  # fails before the extraction
            raise InputError("split.by: expected at least two groups in the train split, for "
                             f"cross-validation over whole groups, found {train_groups} (for a text, see "
                             "data.separator)")

    def __len__(self) -> int:
        return len(self.questions)

    def open(self, config: NetworkConfig, path: str) -> LanguageModel:
        return load_with_tokenizer(path, config.tokenizer, self.config.compute, self.mesh)

    def measure(self, network: LanguageModel, items: Sequence[int], layers: Sequence[int]) -> Measurements:
        scorer = self._scorer(network, tuple(layers))
        questions = [self.questions[i] for i in items]
        answers = scorer.score(questions, items)
        right = np.array([question.right for question in questions])
        rows = np.arange(len(questions))
        numbers = {"loss": answers.ending_nll[rows, right], "prompt_nll": answers.prompt_nll,
                   "prompt_tokens": answers.prompt_tokens,
                   "answer_tokens": answers.ending_tokens[rows, right]}
        if answers.ending_nll.shape[1] > 1:  # ties: argmin picks the first
            picked = answers.ending_nll.argmin(axis=1)
            numbers |= {"picked": picked, "wrong": (picked != right).astype(np.int64)}
        return Measurements(numbers, answers.activations)

    def split(self, numbers: Numbers) -> NDArray[np.str_]:
        options = self.config.split
        return labels.purged(self.planned_split, self.metadata["prompt"], numbers["prompt_nll"],
                             memorized_nll=options.memorized_nll, max_similarity=options.max_similarity)

    def blocks(self, numbers: Numbers, split: NDArray[np.str_]) -> dict[str, FeatureBlock]:
        statistics = cheap.prompt_statistics(self.metadata["prompt"], split == "train", self.groups.tolist())
        return {"cheap": FeatureBlock(tuple(statistics), np.stack(list(statistics.values()), axis=1)),
                "nll": FeatureBlock(("prompt_nll",), numbers["prompt_nll"][:, None]),
                "length": FeatureBlock(("log_answer_tokens",), cheap.answer_length(numbers["answer_tokens"]))}

    def folds(self, labels: NDArray[np.integer], train: NDArray[np.intp], max_folds: int) -> Folds:
        groups = self.groups[train]
        k = min(number_of_folds(labels, max_folds), len(np.unique(groups)))  # folds consist of whole groups
        if k < 2 or np.bincount(labels, minlength=2).min() < 2:  # too few for two folds
            return []
        return usable(stratified(labels, k, seed=self.config.seed, groups=groups), labels)

    def activation_rows(self, network: LanguageModel, items: Sequence[int], layer: int,
                        positions: Positions = "all") -> Iterator[np.ndarray]:
        options, all_positions = self.config.extract, positions == "all"
        ids = [self._ids(network, i) if all_positions else self._prompt(network, i) for i in items]
        rows = activation_rows(network.model, ids, hook=options.hook, layer=layer, item_ids=items,
                       skip=options.skip if all_positions else 0, seed=self.config.seed,
                       dtype=np.dtype(options.dtype), batch_size=options.batch_size, mesh=self.mesh)
        return (values if all_positions else values[-1:] for values in rows)

    def patched_losses(self, network: LanguageModel, sae: TopKSAE, items: Sequence[int],
                       latents: Sequence[int], layer: int, positions: Positions) -> Floats:
        options = self.config.extract
        rows = []
        for i in items:
            prompt = len(self._prompt(network, i))
            start = min(options.skip, prompt - 1) if positions == "all" else prompt - 1
            rows.append(PatchedText(self._ids(network, i), prompt, start, prompt))
        return patched_nll(network.model, sae, rows, latents, hook=options.hook, layer=layer,
                           batch_size=options.batch_size, mesh=self.mesh)

    def _prompt(self, network: LanguageModel, item: int) -> list[int]:
        return network.encode(self.questions[item].prompt)[-self.data.max_tokens:]

    def _ids(self, network: LanguageModel, item: int) -> list[int]:
        question = self.questions[item]
        return self._prompt(network, item) + network.encode(question.endings[question.right])

    def _scorer(self, network: LanguageModel, layers: tuple[int, ...]) -> NLLScorer:
        cached = self._cached_scorer
        if cached is None or cached[0] is not network or cached[1] != layers:
            options = self.config.extract
            check_layers(network.model, options.hook, layers)
            cached = self._cached_scorer = network, layers, NLLScorer(
                network.model, network.encode, max_tokens=self.data.max_tokens, hook=options.hook,
                layers=layers, positions=options.positions, skip=options.skip, batch_size=options.batch_size,
                dtype=np.dtype(options.dtype), mesh=self.mesh)
        return cached[2]


def split_groups(groups: NDArray[np.str_], domains: NDArray[np.str_], train: float,
                 seed: int) -> NDArray[np.str_]:
    """Splits whole groups at random, with the same fractions in every domain: train or test, `[items]`.

    Raises:
        InputError: there are fewer than two groups.
    """
    # StratifiedGroupKFold requires a domain with at least as many items as folds.
    largest_domain = int(np.unique(domains, return_counts=True)[1].max())
    parts = min(PARTS, len(np.unique(groups)), largest_domain)
    if parts < 2:
        raise InputError(f"split.by: expected at least two groups, found {parts} (for a text, see "
                         "data.separator)")
    split = np.full(len(groups), "train", dtype="<U5")
    test_parts = min(max(1, round((1 - train) * parts)), parts - 1)
    splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about domains with fewer items than folds
        for number, (_, items) in enumerate(splitter.split(groups, domains, groups)):
            if number < test_parts:
                split[items] = "test"
    return split


def _read_questions(data: SquadConfig | HellaSwagConfig | TextConfig) -> list[TextItem]:
    if isinstance(data, TextConfig):
        size = data.prompt + data.ending
        text = (texts.built_in(data.items, size) if data.source == "stories" else
                _read_text(Path(data.source)))
        return texts.passages(text, prompt=data.prompt, ending=data.ending,
                              separator=data.separator)[:data.items]
    # A filter by domain needs all rows.
    max_rows = data.items if getattr(data, "domain", "all") == "all" else 10**9
    rows = (hugging_face(data.source, max_rows) if data.source.startswith("hf:") else
            read_rows(Path(data.source), max_rows))
    if isinstance(data, SquadConfig):
        return texts.squad(rows, data.source)
    questions = texts.hellaswag(rows, data.source)
    return [question for question in questions if data.domain in ("all", question.domain)][:data.items]


def _read_text(path: Path) -> str:
    """Reads a text; its line ends and a byte-order mark make no difference to the pieces."""
    try:
        return re.sub(r"\r\n?", "\n", read_text(path))
    except InputError as error:
        raise InputError(f"data.source: {error}") from None
