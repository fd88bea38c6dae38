"""Measures what the claims are about: architecture, cross-regime AUROC and abstention of a network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from tilelli_jax.data.synthetic.village import EvaluationPrompt
from tilelli_jax.errors import InputError
from tilelli_jax.loading import store
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.signals.names import BLOCK
from tilelli_jax.signals.uncertainty import UncertaintyReader
from tilelli_jax.training.step import parameter_count, split_params

from ..abstention import measure as measure_lib
from ..abstention import prompts
from ..abstention.config import AnswersConfig
from ..abstention.decision import cross_regime
from ..abstention.detectors import has_refusal_phrase, normalised
from ..abstention.evaluate import Measured, scores_of
from ..stats import Interval
from .config import ArchitectureConfig, ClaimsConfig, CrossRegimeConfig

# Regimes whose prompts the network answers.
HELD_OUT_REGIME, FALSE_INABILITY_REGIME = "ood_topic", "neo_false_inability"
BATCH = 64  # prompts per batch when signals are measured; each batch shape is compiled separately


class Selection(NamedTuple):
    """The prompts of all seven regimes, whose signals are measured, and those that the network answers."""

    prompts: list[EvaluationPrompt]
    held_out: list[str]
    false_inability: list[str]


class Answer(NamedTuple):
    """The answer to a prompt, and whether it is a refusal: by the detector, and by a template."""

    prompt: str
    answer: str
    refused: bool
    by_template: bool


class Measurements(NamedTuple):
    """The measurements of one network. `cross_regime` maps each of its signals to its cross-regime AUROC."""

    architecture: ArchitectureConfig
    cross_regime: dict[str, Interval]
    held_out: list[Answer]
    false_inability: list[Answer]


def select(path: str | Path, claims: ClaimsConfig) -> Selection:
    """Reads the prompts of a directory or file, and selects the first ones of the regimes to answer.

    Raises:
        InputError: as `prompts.read`, or there are fewer prompts than the claims require.
    """
    every = prompts.read(path)

    def first(key: str, regime: str, file: str, n: int) -> list[str]:
        candidates = prompts.read(file, [regime]) if file else every
        texts = [prompt.prompt for prompt in candidates if prompt.regime == regime][:n]
        if len(texts) < n:
            raise InputError(f"{file or path}: expected {n} prompts of {regime} ({key}.prompts), found "
                             f"{len(texts)}")
        return texts
    held_out, false_inability = claims.held_out, claims.false_inability
    return Selection(every, first("held_out", HELD_OUT_REGIME, held_out.file, held_out.prompts),
                     first("false_inability", FALSE_INABILITY_REGIME, false_inability.file,
                           false_inability.prompts))


def check(path: str | Path, selection: Selection, answers: AnswersConfig) -> None:
    """Checks the model's configuration before any tensor is read.

    Raises:
        InputError: the path is not a model directory, the network is not byte-level, or its context window
            is too short for the prompts.
    """
    config = store.load_config(path)
    measure_lib.check_bytes(config, str(path))
    texts = [prompt.prompt for prompt in selection.prompts]
    measure_lib.check_lengths([*texts, *selection.held_out, *selection.false_inability], config,
                              answers.max_new)


def measure(path: str | Path, selection: Selection, claims: ClaimsConfig) -> Measurements:
    """Measures the signals in one pass per prompt, and generates answers greedily.

    Raises:
        InputError: the model cannot be read, or a signal is NaN.
    """
    model = store.load(path)
    questions = [*selection.held_out, *selection.false_inability]
    generated = measure_lib.answers(model, questions, claims.answers)
    answers = [_answer(prompt, answer.decode(errors="replace"), claims.held_out.templates)
               for prompt, answer in zip(questions, generated, strict=True)]
    reader = UncertaintyReader(model, batch_size=BATCH)
    columns = measure_lib.signals(reader, [prompt.prompt for prompt in selection.prompts], str(path))
    scored = scores_of([Measured(columns, {}, {})], [prompt.regime for prompt in selection.prompts])
    return Measurements(_architecture(model), cross_regime(scored), answers[:len(selection.held_out)],
                        answers[len(selection.held_out):])


def as_claims(measurements: Measurements, claims: ClaimsConfig, source: str) -> ClaimsConfig:
    """Returns the measurements as claims, with the prompts and generation settings of other claims.

    Args:
        claims: the claims whose settings to keep.
        source: in words, what was measured.
    """
    aurocs = {name: auroc.point for name, auroc in measurements.cross_regime.items()}
    blocks = [name for name in aurocs if name.startswith(BLOCK)]
    named = {name: auroc for name, auroc in aurocs.items() if name not in blocks}
    return dataclasses.replace(
        claims, source=source, architecture=measurements.architecture,
        cross_regime=CrossRegimeConfig(**named, router_entropy_b=tuple(aurocs[name] for name in blocks)),
        held_out=dataclasses.replace(
            claims.held_out, at_least=sum(answer.refused for answer in measurements.held_out),
            template_at_least=(sum(answer.by_template for answer in measurements.held_out)
                               if claims.held_out.templates else None)),
        false_inability=dataclasses.replace(
            claims.false_inability, refused=sum(answer.refused for answer in measurements.false_inability)))


# ---------------------------------------------------------------------------------------------


def _answer(prompt: str, answer: str, templates: tuple[str, ...]) -> Answer:
    by_template = any(normalised(answer).startswith(normalised(template)) for template in templates)
    return Answer(prompt, answer.strip(), has_refusal_phrase(answer), by_template)


def _architecture(model: Decoder) -> ArchitectureConfig:
    config = model.config
    return ArchitectureConfig(config.family, tuple(getattr(config, "pathways", ())), config.d_model,
                              config.n_layers, config.vocab_size, parameter_count(split_params(model)[1]))
