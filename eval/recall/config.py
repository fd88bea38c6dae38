"""The settings of a recall study: every key of configs/recall-*.yaml."""

from __future__ import annotations

import dataclasses
from typing import Literal

from tilelli_jax.config import Section, setting
from tilelli_jax.data.synthetic import facts
from tilelli_jax.errors import InputError
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.parallel.sharding import MeshConfig

from ..estimators import panel
from ..estimators.config import FitConfig
from ..inputs.networks import NetworkConfig
from ..inputs.study import StudyConfig
from ..matching import Rule

Task = Literal["correctness", "answerability"]
BEST_FREE = "best_free"  # in a comparison, the free score with the best validation AUROC
ANSWER_ENDS = ("<turn|>", "<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>")


@dataclasses.dataclass(frozen=True)
class QuestionsConfig(Section):
    """The questions of the study."""

    sources: tuple[str, ...] = setting(
        ("popqa", "triviaqa"), "where questions come from: popqa and triviaqa (Hugging Face hub), another "
        "data set there (hf:NAME[#SUBSET][@REVISION], its validation split), facts (the built-in world), or "
        "files of questions (JSON lines, JSON, CSV, TSV or parquet; docs/recall.md lists the layouts)")
    task: Task = setting(
        "correctness", "label of a question: correctness, whether the network's answer is correct (questions "
        "without an answer are evaluated apart); answerability, whether it has an answer")
    items: int = setting(3000, "number of questions, divided equally among the sources; at least 20 / "
                         "split.test; 60 / split.test suffice if the network answers between 17 % and 83 % "
                         "of them correctly", min=1)
    seed: int = setting(17, "seed for sampling and ordering questions", min=0, max=2**32 - 1)
    facts_people: int = setting(facts.PEOPLE, "source facts: number of people in the world; must equal "
                                "data.facts_people of the network's training",
                                min=facts.NAMES, max=facts.NAMES**2)
    facts_seed: int = setting(0, "source facts: seed of the world; must equal data.facts_seed of the "
                              "network's training", min=0, max=2**32 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources or len(set(self.sources)) != len(self.sources):
            raise InputError(f"sources: expected at least one source, each once, found {list(self.sources)}")
        if self.facts_people % facts.NAMES:
            raise InputError(f"facts_people: expected a multiple of {facts.NAMES}, found {self.facts_people}")


@dataclasses.dataclass(frozen=True)
class PromptConfig(Section):
    """How a question becomes a prompt."""

    template: str = setting("chat", "chat: the tokenizer's chat template with the question as the user's "
                            "turn; otherwise a text that contains {question} once, in the form that the "
                            "network was trained on")
    instruction: str = setting(" Answer concisely with just the answer.", "text appended to the question")
    system: str = setting("", "system prompt: the first turn of a chat, or the first text; empty: none")
    shots: int = setting(0, "examples before each question: questions outside the study with their answers, "
                         "drawn with questions.seed", min=0, max=100)
    separator: str = setting("\n\n", "text between examples, where the template is not chat")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template != "chat" and self.template.count("{question}") != 1:
            raise InputError("template: expected chat, or a text that contains {question} once, found "
                             f"{self.template!r}")


@dataclasses.dataclass(frozen=True)
class SignalsConfig(Section):
    """The forward pass of each prompt and what is kept of it."""

    batch_size: int = setting(16, "maximum number of prompts per batch", min=1)
    max_bytes: int = setting(2**31, "maximum bytes of scratch memory, not counting the network's own pass",
                             min=2**20, max=2**60)
    lens_bfloat16: bool = setting(False, "round every step of the logit lens to bfloat16, as Recall's "
                                  "features do")
    dtype: Literal["float16", "float32"] = setting("float16", "data type of the kept residual stream on disk")
    sigma: float = setting(0.1, "robustness: standard deviation of the noise in the middle layers relative "
                           "to the residual stream", above=0)
    noise_samples: int = setting(4, "robustness: noisy passes of each prompt", min=1)
    seed: int = setting(0, "seed of the noise", min=0, max=2**32 - 1)
    shard_items: int = setting(256, "questions per file; an interrupted run continues after the last "
                               "complete file", min=1)


@dataclasses.dataclass(frozen=True)
class AnswersConfig(Section):
    """The network's answers and how they are graded."""

    max_new: int = setting(32, "maximum number of tokens of an answer", min=1)
    batch_size: int = setting(32, "answers generated at once", min=1)
    end_tokens: tuple[str, ...] = setting(ANSWER_ENDS, "tokens that end an answer, besides the network's "
                                          "own, if the tokenizer has them; a byte-level network ends "
                                          "it at a newline")
    stop_at_line_break: bool | None = setting(
        None, "end an answer at its first line break, so that the scores of its tokens are of the line that "
        "is graded; null: unless the prompt is a chat")
    match: Rule = setting("strict", "rule that decides whether an answer is correct: strict, or published "
                          "(the rule of Recall)")


@dataclasses.dataclass(frozen=True)
class SamplesConfig(Section):
    """The sampled answers, drawn if an estimator needs them."""

    n: int = setting(5, "sampled answers of each question", min=2)
    questions: int | None = setting(None, "number of questions that are sampled, the first of the study's "
                                    "random order; null: all", min=1)
    temperature: float = setting(1.0, "temperature of the samples", above=0)
    depth: float = setting(0.5, "relative depth (0 to 1) of the layer whose residual stream at each sample's "
                           "last token is kept for eigenscore", min=0, below=1)
    seed: int = setting(0, "seed of the samples", min=0, max=2**32 - 1)


@dataclasses.dataclass(frozen=True)
class SplitConfig(Section):
    """The train, validate, calibrate and test splits."""

    by: Literal["group", "published"] = setting(
        "group", "group: questions with equal text, id or entity stay in one split; published: single "
        "questions are assigned, and the validate split also serves for calibration")
    validate: float = setting(0.1, "fraction of questions that select the epoch, the layer and the "
                              "regularisation", above=0, below=1)
    calibrate: float = setting(0.15, "fraction of questions that fit probabilities and thresholds; ignored "
                               "with by=published", above=0, below=1)
    test: float = setting(0.2, "fraction of questions held out for the report", above=0, below=1)
    seed: int = setting(17, "seed of the assignment", min=0, max=2**32 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validate + self.calibrate + self.test >= 1:
            raise InputError("validate, calibrate and test: expected a sum below 1, found "
                             f"{self.validate + self.calibrate + self.test:g}")


@dataclasses.dataclass(frozen=True)
class VerdictConfig(Section):
    """The thresholds of the verdicts."""

    precision: float = setting(0.85, "target precision of the verdicts 'likely knows' and 'likely beyond its "
                               "knowledge'", above=0, below=1)
    guarantee: bool = setting(False, "choose thresholds that keep the target precision on new questions of "
                              "the same kind (Learn-then-Test); by default it is only reached on the "
                              "calibration questions")
    confidence: float = setting(0.9, "confidence of the guarantee", above=0, below=1)


@dataclasses.dataclass(frozen=True)
class RecallConfig(StudyConfig):
    """One study: one network and a set of questions."""

    network: NetworkConfig = setting(None, "the network under study")
    questions: QuestionsConfig = setting(QuestionsConfig(), "the questions")
    prompt: PromptConfig = setting(PromptConfig(), "how a question becomes a prompt")
    signals: SignalsConfig = setting(SignalsConfig(), "the forward pass of each prompt")
    answers: AnswersConfig = setting(AnswersConfig(), "the network's answers and how they are graded")
    estimators: tuple[str, ...] = setting(("prompt",), panel.DESCRIPTION)
    samples: SamplesConfig = setting(SamplesConfig(), "sampled answers")
    split: SplitConfig = setting(SplitConfig(), "train, validate, calibrate and test splits")
    fit: FitConfig = setting(FitConfig(), "the sidecar and the other estimators that learn")
    verdict: VerdictConfig = setting(VerdictConfig(), "thresholds of the verdicts")
    primary: tuple[str, ...] = setting((), "comparisons of AUROC that were fixed in advance, each 'A - B' of "
                                       "two estimators, or of best_free, the free score with the best "
                                       "validation AUROC; corrected for one another only")
    replicates: int = setting(2000, "bootstrap replicates; the smallest p before correction is "
                              "2 / (replicates + 1)", min=100)
    seed: int = setting(42, "seed of the bootstrap", min=0, max=2**32 - 1)
    compute: ComputeConfig = setting(ComputeConfig(), "data type and kernels of the network")
    mesh: MeshConfig = setting(MeshConfig(), "devices")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network is None:
            raise InputError("network: expected a section with path or train, found nothing")
        chosen = panel.chosen(self.estimators)
        if any(BEST_FREE in comparison for comparison in self.primary) and not chosen.keys() & set(
                panel.PRESETS["free"]):
            raise InputError(f"estimators: expected a free score for {BEST_FREE} in primary, found none")
        for comparison in self.primary:
            names = comparison.split(" - ")
            if len(names) != 2 or not {*names} <= {*chosen, BEST_FREE}:
                raise InputError("primary: expected 'A - B' of two of the study's estimators or "
                                 f"{BEST_FREE}, found {comparison!r:.60}")
        if self.verdict.guarantee and self.split.by == "published":
            raise InputError("verdict.guarantee: expected false with split.by published, which has no "
                             "calibration questions of its own")
