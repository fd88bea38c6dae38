"""What a network is, what its signals tell and what it declines: all that the claims are about."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from tilelli_jax import store
from tilelli_jax.data.village import Prompt
from tilelli_jax.errors import InputError
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.signals.names import BLOCK
from tilelli_jax.signals.uncertainty import UncertaintyReader
from tilelli_jax.training.step import parameter_count, split_params

from ..abstention import measure, prompts
from ..abstention.config import AnswersConfig
from ..abstention.decision import cross_regime
from ..abstention.detectors import is_refusal, plain
from ..abstention.evaluate import Measured, scores_of
from ..stats import Interval
from .config import ArchitectureConfig, ClaimsConfig, CrossRegimeConfig

HELD_OUT, FALSE_INABILITY = "ood_topic", "neo_false_inability"  # the regimes whose prompts are answered
BATCH = 64  # prompts read at once: each batch of other lengths is compiled anew


class Asked(NamedTuple):
    """Prompts: all of the seven regimes, which are read, and those that are answered."""

    read: list[Prompt]
    held_out: list[str]
    false_inability: list[str]


class Answer(NamedTuple):
    """What was said to a prompt, and whether that is a refusal: by the detector, and by a template."""

    prompt: str
    answer: str
    refused: bool
    by_template: bool


class Found(NamedTuple):
    """Of one network. `areas` are signal → cross-regime AUROC, of every signal that it has."""

    architecture: ArchitectureConfig
    areas: dict[str, Interval]
    held_out: list[Answer]
    false_inability: list[Answer]


def choose(path: str | Path, claims: ClaimsConfig) -> Asked:
    """The prompts of a directory or file, and the first of those that are answered.

    Raises:
        InputError: as `prompts.read`, or there are fewer than are to be asked.
    """
    every = prompts.read(path)

    def first(key: str, regime: str, file: str, n: int) -> list[str]:
        some = prompts.read(file, [regime]) if file else every
        chosen = [one.prompt for one in some if one.regime == regime][:n]
        if len(chosen) < n:
            raise InputError(f"{file or path}: expected {n} prompts of {regime}, as {key}.prompts says, "
                             f"found {len(chosen)}")
        return chosen
    held_out, neo = claims.held_out, claims.false_inability
    return Asked(every, first("held_out", HELD_OUT, held_out.file, held_out.prompts),
                 first("false_inability", FALSE_INABILITY, neo.file, neo.prompts))


def check(path: str | Path, asked: Asked, answers: AnswersConfig) -> None:
    """What can be known before a tensor is read.

    Raises:
        InputError: it is no model directory, of a network that does not read bytes, or of one with too
            short a window for the prompts.
    """
    config = store.load_config(path)
    measure.check_bytes(config, str(path))
    every = [one.prompt for one in asked.read]
    measure.check_lengths([*every, *asked.held_out, *asked.false_inability], config, answers.max_new)


def find(path: str | Path, asked: Asked, claims: ClaimsConfig) -> Found:
    """Reads every prompt once, and has those that are to be answered answered greedily.

    Raises:
        InputError: the model cannot be read, or a signal of it is no number.
    """
    model = store.load(path)
    questions = [*asked.held_out, *asked.false_inability]
    said = measure.answers(model, questions, claims.answers)
    made = [_answer(prompt, answer.decode(errors="replace"), claims.held_out.templates)
            for prompt, answer in zip(questions, said, strict=True)]
    reader = UncertaintyReader(model, batch_size=BATCH)
    columns = measure.read(reader, [one.prompt for one in asked.read], str(path))
    scored = scores_of([Measured(columns, {}, {})], [one.regime for one in asked.read])
    return Found(_architecture(model), cross_regime(scored), made[:len(asked.held_out)],
                 made[len(asked.held_out):])


def as_claims(found: Found, claims: ClaimsConfig, of: str) -> ClaimsConfig:
    """What was found as what is claimed, to be asked for in the same way.

    Args:
        claims: which has the way of asking.
        of: in words, what was measured.
    """
    areas = {name: area.point for name, area in found.areas.items()}
    blocks = [name for name in areas if name.startswith(BLOCK)]
    named = {name: area for name, area in areas.items() if name not in blocks}
    return dataclasses.replace(
        claims, of=of, architecture=found.architecture,
        cross_regime=CrossRegimeConfig(**named, router_entropy_b=tuple(areas[name] for name in blocks)),
        held_out=dataclasses.replace(
            claims.held_out, at_least=sum(one.refused for one in found.held_out),
            template_at_least=(sum(one.by_template for one in found.held_out)
                               if claims.held_out.templates else None)),
        false_inability=dataclasses.replace(
            claims.false_inability, refused=sum(one.refused for one in found.false_inability)))


# ---------------------------------------------------------------------------------------------


def _answer(prompt: str, answer: str, templates: tuple[str, ...]) -> Answer:
    begins = any(plain(answer).startswith(plain(template)) for template in templates)
    return Answer(prompt, answer.strip(), is_refusal(answer), begins)


def _architecture(model: Decoder) -> ArchitectureConfig:
    config = model.config
    return ArchitectureConfig(config.family, tuple(getattr(config, "pathways", ())), config.d_model,
                              config.n_layers, config.vocab_size, parameter_count(split_params(model)[1]))
