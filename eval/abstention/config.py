"""The configuration of an abstention study: every key of configs/abstention*.yaml."""

from __future__ import annotations

import dataclasses

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models.causal_lm import ComputeConfig

from ..inputs.networks import NetworkConfig
from ..inputs.study import StudyConfig
from .variants import BASE, VARIANTS

GIVEN = (BASE, *(name for name, variant in VARIANTS.items() if variant.kind != "fitted"))


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Section):
    """How each kind of network is trained. The study sets the data, the start and the losses itself."""

    base: NetworkConfig = setting(NetworkConfig(train="abstention-base"), "the base network, trained on text")
    chat: NetworkConfig = setting(NetworkConfig(train="abstention-chat"), "v4: the base, fine-tuned on chat")
    variant: NetworkConfig = setting(NetworkConfig(train="abstention-variant"), "each variant, from v4")
    sae: NetworkConfig = setting(NetworkConfig(train="abstention-sae"),
                                 "sparse autoencoder of v4's activations")

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            getattr(self, field.name).require("train", "set", key=field.name,
                                              reason="existing networks are under the key networks")


@dataclasses.dataclass(frozen=True)
class PairFilesConfig(Section):
    """Your own files in place of generated ones, each in the format of chat.source."""

    chat: str = setting("", "questions that the response answers or refuses; trains v4")
    answerability: str = setting("", "answerable and unanswerable questions; trains v7 to v9 and fits the "
                                 "heads")
    answers: str = setting("", "pairs of which some have a wrong response; trains v6")
    plain_text: str = setting("", "text without turns, and gibberish; trains v5")
    held_out: str = setting("", "pairs on which no network is trained; chat loss and probes")
    calibration: str = setting("", "prompts with an answer, which set the thresholds")

    @property
    def given(self) -> dict[str, str]:
        """Name → path of the files that are set."""
        return {field.name: path for field in dataclasses.fields(self)
                if (path := getattr(self, field.name))}


DATA_FILES = tuple(field.name for field in dataclasses.fields(PairFilesConfig))


@dataclasses.dataclass(frozen=True)
class PairsConfig(Section):
    """The data of the study: prompt–response pairs about the generated village, or your own files."""

    count: int = setting(20_000, "prompt–response pairs in each training file", min=20)
    unanswerable: float = setting(0.5, "fraction of the pairs whose prompt has no answer", above=0,
                                  below=1)
    seed: int = setting(0, "random seed of the generated pairs", min=0, max=2**31 - 1)
    calibration: int = setting(200, "answerable prompts of the calibration split, which sets the thresholds "
                               "and nothing else", min=20)
    held_out: int = setting(4000, "held-out pairs, on which no network is trained: for the chat loss and to "
                            "fit the probes on v4", min=40)
    files: PairFilesConfig = setting(PairFilesConfig(), "your own files")


@dataclasses.dataclass(frozen=True)
class AnswersConfig(Section):
    """Greedy generation of an answer to each prompt."""

    max_new: int = setting(48, "maximum length of an answer, in bytes", min=1)
    batch_size: int = setting(64, "prompts per batch during generation", min=1)


@dataclasses.dataclass(frozen=True)
class FittedConfig(Section):
    """Heads and probes that are fitted to v4's activations and leave v4 unchanged."""

    prompts: int = setting(4000, "maximum number of prompts to fit to: heads use the training data of v8b "
                           "and v9, probes the held-out pairs", min=40)
    rank: int = setting(8, "number of principal directions of pca-head", min=1)
    latents: int = setting(8, "autoencoder latents per dimension of the residual stream", min=1)
    jobs: int = setting(-1, "processes that fit probes in parallel; -1: one per core", min=-1)


@dataclasses.dataclass(frozen=True)
class AbstentionConfig(StudyConfig):
    """One abstention study."""

    variants: tuple[str, ...] = setting(tuple(VARIANTS), f"variants to train, of {', '.join(VARIANTS)}; the "
                                        "variants that they start from are trained as well")
    seeds: tuple[int, ...] = setting((0, 1, 2, 3, 4), "random seeds; each trains its own base network and "
                                     "all variants of it")
    networks: dict[str, NetworkConfig] = setting(
        {}, f"existing networks to use instead of training them, with the names {', '.join(GIVEN)}; for one "
        "seed only")
    training: TrainingConfig = setting(TrainingConfig(), "how the other networks are trained")
    pairs: PairsConfig = setting(PairsConfig(), "training, held-out and calibration data")
    prompts: str = setting("", "file or directory of evaluation prompts; empty: the built-in prompts")
    batch_size: int = setting(32, "prompts per batch when signals are measured", min=1)
    answers: AnswersConfig = setting(AnswersConfig(), "how answers are generated")
    fitted: FittedConfig = setting(FittedConfig(), "heads and probes on the frozen v4")
    target_fpr: float = setting(0.05, "target false-positive rate: fraction of answerable prompts on which a "
                                "network may abstain", above=0, below=1)
    replicates: int = setting(1000, "number of bootstrap replicates", min=100)
    seed: int = setting(42, "random seed of the bootstrap", min=0, max=2**32 - 1)
    compute: ComputeConfig = setting(ComputeConfig(), "precision and layout of the networks at evaluation")

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ", ".join(VARIANTS)
        if wrong := [name for name in self.variants if name not in VARIANTS]:
            raise InputError(f"variants: expected some of {known}, found {wrong[0]}")
        if not self.variants or len(set(self.variants)) != len(self.variants):
            raise InputError(f"variants: expected at least one of {known}, each once, found "
                             f"{list(self.variants)}")
        if (not self.seeds or len(set(self.seeds)) != len(self.seeds)
                or not all(0 <= seed < 2**32 for seed in self.seeds)):
            raise InputError("seeds: expected at least one integer from 0 to 2³² − 1, each once, found "
                             f"{list(self.seeds)}")
        for name, section in self.networks.items():
            if name not in GIVEN:
                raise InputError(f"networks: expected some of {', '.join(GIVEN)}, found {name!r}")
            section.require("path", key=f"networks.{name}",
                            reason="the key training sets how networks are trained")
        if self.networks and len(self.seeds) > 1:
            raise InputError(f"seeds: expected one seed, because {next(iter(self.networks))} is one given "
                             f"network, found {list(self.seeds)}")
