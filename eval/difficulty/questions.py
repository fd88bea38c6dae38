"""The study of language models: SQuAD, HellaSwag, or pieces of any text."""

from __future__ import annotations

import dataclasses
import functools
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
from tilelli_jax.files import read_text
from tilelli_jax.language import Language, open_language
from tilelli_jax.sharding import Mesh
from tilelli_jax.signals.activations import rows_of
from tilelli_jax.signals.patching import Patched, patched_nll
from tilelli_jax.signals.places import check_place

from ..checks import Floats
from ..folds import Folds, number_of_folds, stratified, usable
from ..inputs.networks import NetworkConfig
from ..inputs.rows import hugging_face, read_rows
from . import cheap, labels, texts
from .asking import NLLScorer
from .config import HellaSwagConfig, SquadConfig, StudyConfig, TextConfig
from .subject import Block, Measured, Numbers, Positions
from .texts import Question

PARTS = 20  # that the groups are dealt into before some of them are held out


class Questions:
    """See `subject.Subject`."""

    unit = "nats"

    def __init__(self, config: StudyConfig, mesh: Mesh | None = None) -> None:
        """Raises InputError: the data cannot be read, or are too few."""
        assert isinstance(config.data, SquadConfig | HellaSwagConfig | TextConfig)
        self.config, self.data, self.mesh = config, config.data, mesh
        self.questions = _read(config.data)
        if len(self.questions) < 10:
            raise InputError(f"data.source: {config.data.source}: expected at least 10 items, found "
                             f"{len(self.questions)}")
        by_topic = config.split.by == "topic"  # what is held out together is resampled together, too
        self.groups = np.array([question.topic if by_topic else question.group
                                for question in self.questions])
        self.about: Mapping[str, Sequence[Any]] = {
            "prompt": [question.prompt for question in self.questions],
            "answer": [question.endings[question.right] for question in self.questions],
            "topic": [question.topic for question in self.questions],
            "domain": [question.domain for question in self.questions]}
        self.fingerprint = hashlib.sha256(json.dumps(self.questions).encode()).hexdigest()[:16]
        self._asker: tuple[Language, tuple[int, ...], NLLScorer] | None = None
        found = len(np.unique(self.groups[self._parts == "train"]))
        if found < 2:  # known before anything is extracted
            raise InputError("split.by: expected at least two groups to learn from, for folds that keep them "
                             f"whole, found {found} (of a text: data.separator)")

    def __len__(self) -> int:
        return len(self.questions)

    def open(self, config: NetworkConfig, path: str) -> Language:
        return open_language(path, config.tokenizer, self.config.compute, self.mesh)

    def measure(self, network: Language, items: Sequence[int], layers: Sequence[int]) -> Measured:
        scorer = self._asker_of(network, tuple(layers))
        chosen = [self.questions[i] for i in items]
        found = scorer.ask(chosen, items)
        right = np.array([question.right for question in chosen])
        at = np.arange(len(chosen))
        numbers = {"amount": found.ending_nats[at, right], "prompt_nats": found.prompt_nats,
                   "prompt_tokens": found.prompt_tokens, "answer_tokens": found.ending_tokens[at, right]}
        if found.ending_nats.shape[1] > 1:  # of equals, the first
            picked = found.ending_nats.argmin(axis=1)
            numbers |= {"picked": picked, "wrong": (picked != right).astype(np.int64)}
        return Measured(numbers, found.activations)

    def split(self, numbers: Numbers) -> NDArray[np.str_]:
        options = self.config.split
        return labels.purged(self._parts, self.about["prompt"], numbers["prompt_nats"],
                             memorized_nll=options.memorized_nll, max_similarity=options.max_similarity)

    @functools.cached_property
    def _parts(self) -> NDArray[np.str_]:
        """train or test for each item, before any is purged."""
        options = self.config.split
        if options.by == "order":
            return labels.split_in_order(len(self), options.train)
        return dealt(self.groups, np.array(self.about["domain"]), options.train, self.config.seed)

    def blocks(self, numbers: Numbers, split: NDArray[np.str_]) -> dict[str, Block]:
        found = cheap.prompt_statistics(self.about["prompt"], split == "train", self.groups.tolist())
        return {"cheap": Block(tuple(found), np.stack(list(found.values()), axis=1)),
                "surprise": Block(("prompt_nats",), numbers["prompt_nats"][:, None]),
                "length": Block(("log_answer_tokens",), cheap.answer_length(numbers["answer_tokens"]))}

    def folds(self, labels: NDArray[np.integer], train: NDArray[np.intp], most: int) -> Folds:
        groups = self.groups[train]
        k = min(number_of_folds(labels, most), len(np.unique(groups)))  # groups are kept whole
        if k < 2 or np.bincount(labels, minlength=2).min() < 2:  # no two folds
            return []
        return usable(stratified(labels, k, seed=self.config.seed, groups=groups), labels)

    def rows(self, network: Language, items: Sequence[int], layer: int,
             positions: Positions = "all") -> Iterator[np.ndarray]:
        options, whole = self.config.extract, positions == "all"
        ids = [self._ids(network, i) if whole else self._prompt(network, i) for i in items]
        found = rows_of(network.model, ids, place=options.place, layer=layer, numbers=items,
                        skip=options.skip if whole else 0, seed=self.config.seed,
                        dtype=np.dtype(options.dtype), batch_size=options.batch_size, mesh=self.mesh)
        return (values if whole else values[-1:] for values in found)

    def patched(self, network: Language, sae: TopKSAE, items: Sequence[int], latents: Sequence[int],
                layer: int, positions: Positions) -> Floats:
        options = self.config.extract
        rows = []
        for i in items:
            prompt = len(self._prompt(network, i))
            start = min(options.skip, prompt - 1) if positions == "all" else prompt - 1
            rows.append(Patched(self._ids(network, i), prompt, start, prompt))
        return patched_nll(network.model, sae, rows, latents, place=options.place, layer=layer,
                            batch_size=options.batch_size, mesh=self.mesh)

    def _prompt(self, network: Language, item: int) -> list[int]:
        return network.encode(self.questions[item].prompt)[-self.data.max_tokens:]

    def _ids(self, network: Language, item: int) -> list[int]:
        question = self.questions[item]
        return self._prompt(network, item) + network.encode(question.endings[question.right])

    def _asker_of(self, network: Language, layers: tuple[int, ...]) -> NLLScorer:
        if self._asker is None or self._asker[0] is not network or self._asker[1] != layers:
            options = self.config.extract
            try:
                for layer in layers:
                    check_place(network.model, options.place, layer)
            except ValueError as error:
                raise InputError(f"extract.{error}".replace("extract.layer:", "extract.layers:")) from None
            self._asker = network, layers, NLLScorer(
                network.model, network.encode, max_tokens=self.data.max_tokens, place=options.place,
                layers=layers, positions=options.positions, skip=options.skip, batch_size=options.batch_size,
                dtype=np.dtype(options.dtype), mesh=self.mesh)
        return self._asker[2]


def dealt(groups: NDArray[np.str_], domains: NDArray[np.str_], train: float, seed: int) -> NDArray[np.str_]:
    """train or test for each item, whole groups at random, every domain in the same shares: `[items]`.

    Raises:
        InputError: there are fewer than two groups.
    """
    # The dealer wants as many items in a domain at least.
    most = int(np.unique(domains, return_counts=True)[1].max())
    parts = min(PARTS, len(np.unique(groups)), most)
    if parts < 2:
        raise InputError(f"split.by: expected at least two groups to tell apart, found {parts} (of a text: "
                         "data.separator)")
    split = np.full(len(groups), "train", dtype="<U5")
    held = min(max(1, round((1 - train) * parts)), parts - 1)
    dealer = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a domain with fewer items than there are parts
        for number, (_, out) in enumerate(dealer.split(groups, domains, groups)):
            if number < held:
                split[out] = "test"
    return split


def _read(data: SquadConfig | HellaSwagConfig | TextConfig) -> list[Question]:
    if isinstance(data, TextConfig):
        whole = data.prompt + data.ending
        text = (texts.built_in(data.items, whole) if data.source == "stories" else
                _text(Path(data.source)))
        return texts.passages(text, prompt=data.prompt, ending=data.ending,
                              separator=data.separator)[:data.items]
    most = data.items if getattr(data, "domain", "all") == "all" else 10**9
    rows = (hugging_face(data.source, most) if data.source.startswith("hf:") else
            read_rows(Path(data.source), most))
    if isinstance(data, SquadConfig):
        return texts.squad(rows, data.source)
    found = texts.hellaswag(rows, data.source)
    return [question for question in found if data.domain in ("all", question.domain)][:data.items]


def _text(path: Path) -> str:
    """With line ends as Unix has them and without a byte-order mark: a text from Windows is the same text."""
    try:
        return re.sub(r"\r\n?", "\n", read_text(path))
    except InputError as error:
        raise InputError(f"data.source: {error}") from None


def with_source(config: StudyConfig, source: str) -> StudyConfig:
    """The study with its data from elsewhere."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
