"""What a study of recall is: every key of configs/recall-*.yaml."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from tilelli_jax.config import Section, setting
from tilelli_jax.data import facts
from tilelli_jax.errors import InputError
from tilelli_jax.models.decoder import ComputeConfig
from tilelli_jax.sharding import MeshConfig
from tilelli_jax.training.sidecar import SidecarOptions

from ..inputs.networks import NetworkConfig
from ..matching import Rule

LEAST = 40  # questions of a study
ANSWER_ENDS = ("<turn|>", "<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>")


@dataclasses.dataclass(frozen=True)
class QuestionsConfig(Section):
    """What is asked."""

    sources: tuple[str, ...] = setting(
        ("popqa", "triviaqa"), "each of them popqa or triviaqa (from Hugging Face's hub), facts (the "
        "built-in world), or a file of questions: JSON lines, JSON, CSV or parquet")
    items: int = setting(3000, "of all sources together, as many of each", min=LEAST)
    seed: int = setting(17, "of the choice and the order of questions", min=0, max=2**32 - 1)
    facts_people: int = setting(facts.PEOPLE, "of facts: as in the data that the network has learned from",
                                min=facts.NAMES, max=facts.NAMES**2)
    facts_seed: int = setting(0, "likewise", min=0, max=2**32 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources or len(set(self.sources)) != len(self.sources):
            raise InputError(f"sources: expected different ones, one at least, found {list(self.sources)}")
        if self.facts_people % facts.NAMES:
            raise InputError(f"facts_people: expected a multiple of {facts.NAMES}, found {self.facts_people}")


@dataclasses.dataclass(frozen=True)
class PromptConfig(Section):
    """How a question is put."""

    template: str = setting("chat", "chat: as the tokenizer's own template has a user's turn; or a text with "
                            "{question} in it")
    instruction: str = setting(" Answer concisely with just the answer.", "put after the question")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template != "chat" and self.template.count("{question}") != 1:
            raise InputError("template: expected chat, or a text with {question} in it once, found "
                             f"{self.template!r}")


@dataclasses.dataclass(frozen=True)
class SignalsConfig(Section):
    """One pass of each prompt."""

    batch_size: int = setting(16, "prompts at once, at most", min=1)
    max_bytes: int = setting(2**31, "of scratch memory beside the network's own pass", min=2**20,
                              max=2**60)
    rounded: bool = setting(False, "the lens in bfloat16 step by step, as the published features were made")
    final: bool = setting(True, "keep the stream at the last position, one vector a layer, for the probes "
                          "and for familiarity")
    dtype: Literal["float16", "float32"] = setting("float16", "its type on disk")
    noise: bool = setting(False, "read each prompt with noise in the middle of the depth, too (robustness): "
                          "as many passes more as readings")
    sigma: float = setting(0.1, "size of that noise beside the stream's", above=0)
    noise_samples: int = setting(4, "with noise", min=1)
    seed: int = setting(0, "of that noise", min=0, max=2**32 - 1)
    shard_items: int = setting(256, "questions in a file; after each of them one may stop and go on later",
                               min=1)


@dataclasses.dataclass(frozen=True)
class AnswersConfig(Section):
    """What the network answers, and whether that is right."""

    max_new: int = setting(32, "tokens of an answer, at most", min=1)
    batch_size: int = setting(32, "answers at once", min=1)
    ends: tuple[str, ...] = setting(ANSWER_ENDS, "tokens that end an answer where the tokenizer has them, "
                                    "besides the network's own; of bytes the end of the line does")
    match: Rule = setting("strict", "strict; or recall, the published rule")


@dataclasses.dataclass(frozen=True)
class SplitConfig(Section):
    """What is learned from, chosen by, calibrated on and held out."""

    by: Literal["group", "published"] = setting(
        "group", "whole groups: equal questions, equal ids, one entity; or published: single questions, and "
        "no part of its own for calibration; the shares below are then of single questions, calibrate none")
    validate: float = setting(0.1, "share that the epoch, the layer and the strength are chosen by", above=0,
                              below=1)
    calibrate: float = setting(0.15, "share for probabilities and thresholds", above=0, below=1)
    test: float = setting(0.2, "share held out", above=0, below=1)
    seed: int = setting(17, "of the choice", min=0, max=2**32 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validate + self.calibrate + self.test >= 1:
            raise InputError("validate, calibrate and test: expected less than 1 together, found "
                             f"{self.validate + self.calibrate + self.test:g}")


@dataclasses.dataclass(frozen=True)
class FitConfig(Section):
    """The estimator and what it is compared with."""

    seeds: tuple[int, ...] = setting((0, 1, 2), "of the sidecar's weights and batches; each is a run")
    sidecar: SidecarOptions = setting(SidecarOptions(), "how it is learned")
    strengths: tuple[float, ...] = setting((1e-3, 1e-2, 0.1, 1.0), "C of the logistic probes to choose from")
    familiarity: float = setting(0.6, "depth of the layer whose values tell how familiar a prompt is",
                                 min=0, below=1)
    calibrate: Literal["platt", "isotonic", "temperature"] = setting(
        "platt", "how scores become probabilities; a temperature alone, as published, undoes no shift")
    jobs: int = setting(-1, "probes fitted side by side; -1 takes every core", min=-1)
    cross: bool = setting(True, "also learn from one data set alone, to be asked about the others")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (not self.seeds or len(set(self.seeds)) != len(self.seeds)
                or not all(0 <= seed < 2**32 for seed in self.seeds)):
            raise InputError("seeds: expected different whole numbers from 0 to 2³² − 1, one at least, found "
                             f"{list(self.seeds)}")
        if not self.strengths or not all(0 < strength < math.inf for strength in self.strengths):
            raise InputError("strengths: expected finite numbers above 0, one at least, found "
                             f"{list(self.strengths)}")


@dataclasses.dataclass(frozen=True)
class VerdictConfig(Section):
    """When to say that it knows."""

    precision: float = setting(0.85, "of what is called known, and of what is called beyond its knowledge",
                               above=0, below=1)
    guarantee: bool = setting(False, "thresholds that hold it for new questions of the same kind")
    confidence: float = setting(0.9, "with which they do", above=0, below=1)


@dataclasses.dataclass(frozen=True)
class RecallConfig(Section):
    """One study: questions, and a network."""

    name: str = setting("", "what the report calls it; by default that of the file")
    out: str = setting("", "directory; by default runs/ and the name of the file")
    network: NetworkConfig = setting(None, "the network that is asked")
    questions: QuestionsConfig = setting(QuestionsConfig(), "what it is asked")
    prompt: PromptConfig = setting(PromptConfig(), "how")
    signals: SignalsConfig = setting(SignalsConfig(), "what is read of it")
    answers: AnswersConfig = setting(AnswersConfig(), "what it answers")
    split: SplitConfig = setting(SplitConfig(), "what is learned from")
    fit: FitConfig = setting(FitConfig(), "the estimators")
    verdict: VerdictConfig = setting(VerdictConfig(), "thresholds")
    replicates: int = setting(2000, "of the bootstrap; its least p is 2 / (replicates + 1), before "
                              "correction", min=100)
    seed: int = setting(42, "of the bootstrap", min=0, max=2**32 - 1)
    compute: ComputeConfig = setting(ComputeConfig(), "how the network is run")
    mesh: MeshConfig = setting(MeshConfig(), "the devices")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network is None:
            raise InputError("network: expected a section with path or train")
        if self.verdict.guarantee and self.split.by == "published":
            raise InputError("verdict.guarantee: expected false with split.by published, which has no "
                             "questions that nothing was fitted to")
