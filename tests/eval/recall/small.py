"""A small network with a sidecar and the results of a study, for the tests of the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from tests.references import STORED
from tilelli_jax.estimators.sidecar import SidecarConfig
from tilelli_jax.eval.estimators.table import QuestionTable
from tilelli_jax.eval.inputs.networks import NetworkConfig
from tilelli_jax.eval.recall import evaluate, report, verdicts
from tilelli_jax.eval.recall.app import thought_seeding
from tilelli_jax.eval.recall.config import PromptConfig, RecallConfig
from tilelli_jax.eval.recall.scores import Methods, Scores
from tilelli_jax.eval.recall.verdicts import VerdictRule
from tilelli_jax.eval.stages import write_result
from tilelli_jax.generation.decoding import stream_ids
from tilelli_jax.loading import store
from tilelli_jax.models.arrays import abstract_arrays
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.signals.crystallisation import BY_LAYER, PROMPT_FEATURES

GEMMA = STORED / "recall_cases" / "tiny_gemma4_with_tokenizer"
PROMPT = PromptConfig(template="Q: {question}\nA: ", instruction="")
VANILLA = VanillaConfig(d_model=32, n_layers=5, max_seq_len=192, n_heads=2, dense_expand=2)
AIM = {"precision": 0.85, "guarantee": False, "confidence": 0.9}
ASKED = ["Where does Mira Holt live?", "Who has written all of this?", "What colour is the deep sea?",
         "How many are there, of what?"]  # lengths that share one compiled program
MAX_NEW = 24
BATCHED = 1e-4  # tolerance of P(knows) between batched and single questions; measured: 1e-6


def sidecar_of_chance(path: Path) -> Path:
    """Writes a sidecar with random weights."""
    config = SidecarConfig(d_hidden=8, features=BY_LAYER, prompt_features=PROMPT_FEATURES)
    rng = np.random.default_rng(0)
    arrays = {name: (np.exp if name.endswith(("scale", "temperature")) else np.asarray)(
        0.4 * rng.standard_normal(leaf.shape)).astype(np.float32)
        for name, leaf in abstract_arrays(store.FAMILIES["lrd"][1], config).items()}
    store.save(store.from_arrays(config, arrays), path)
    return path


class Place(NamedTuple):
    """Directories of a network, its sidecar and a study."""

    model: Path
    sidecar: Path
    study: Path


def a_study(out: Path) -> dict[str, Any]:
    """Writes the report of a study with made-up scores, using the study's own functions."""
    rng = np.random.default_rng(0)
    n = 240
    known = rng.integers(0, 2, n)
    split = np.array(["train", "validate", "calibrate", "test"])[np.arange(n) % 4]
    table = QuestionTable(rng.random((n, 5, 12), np.float32), rng.random((n, 10), np.float32),
                  rng.random((n, 5, 3), np.float32), known, rng.random(n) < 0.1, split,
                  np.arange(n), np.array([f"question {i}" for i in range(n)]),
                  np.array([f"answer {i}" for i in range(n)]),
                  np.array(["north", "south"])[rng.integers(0, 2, n)], rng.random(n) * 1000,
                  np.full(n, ""), [[f"answer {i}"] for i in range(n)])
    scopes: dict[str | None, Methods] = {None: {}, "north": {}, "south": {}}
    for methods in scopes.values():
        for method, signal in (("sidecar", 2.0), ("first_token_entropy", 1.0), ("words", 0.1)):
            score = signal * known + rng.standard_normal((1, n))
            methods[method] = Scores(score, 1 / (1 + np.exp(-score)))
    rule, stages = VerdictRule(knows_from=0.9, unknown_below=0.3, aim=AIM), out / "made"
    for stage in ("signals", "answers", "questions", "fit", "verdict", "evaluation"):
        (stages / stage).mkdir(parents=True)
    write_result(stages / "fit", {"methods": {"sidecar": {}, "first_token_entropy": {}, "words": {}},
                                  "seeds": [0], "selected_run": 0, "omitted": {},
                                  "calibrated_on": "calibrate"})
    verdicts.write(stages / "verdict", rule)
    write_result(stages / "evaluation", evaluate.evaluate(table, scopes, 0, rule, 400) | {
        "costs": {}, "verbalised_without_number": None})
    stand_in: Any = SimpleNamespace(
        config=RecallConfig(network=NetworkConfig(path="tiny")), out=out, warnings=[],
        **{name: stages / stage for name, stage in (
            ("signals", "signals"), ("answers", "answers"), ("build", "questions"), ("fitted", "fit"),
            ("verdict", "verdict"), ("evaluation", "evaluation"))})
    return report.write(report.collect(stand_in, "a study of nothing"), out, {"command": "tilelli recall"})


def answers_alone(predictor: Any, question: str, thought: str = "", *, max_new: int = MAX_NEW,
                  chunk: int = 8) -> Iterator[thought_seeding.SeededAnswer]:
    """`answer_seeded` of a network that nobody else uses, decoded without the engine."""
    def continued(ids: Sequence[int], max_new: int, end_ids: Sequence[int]) -> Any:
        return stream_ids(predictor.language.model, ids, max_new=max_new, temperature=0.0, end_ids=end_ids,
                          chunk=chunk)
    return thought_seeding.answer_seeded(predictor, question, thought, continued, max_new=max_new)
