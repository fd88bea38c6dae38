"""The configuration of an abstention study: every key of configs/abstention*.yaml."""

from __future__ import annotations

import dataclasses

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models.decoder import ComputeConfig

from .variants import BASE, VARIANTS

DATA_FILES = ("chat", "semantic", "answers", "bare", "held_out", "calibration")
GIVEN = (BASE, *(name for name, variant in VARIANTS.items() if variant.kind != "fitted"))


@dataclasses.dataclass(frozen=True)
class RecipeConfig(Section):
    """How networks are trained: a training configuration and overrides."""

    train: str = setting("", "training configuration, a name or a file")
    set: tuple[str, ...] = setting((), "key=value overrides of that file, as on a command line: "
                                       "[train.steps=50]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train:
            raise InputError("train: expected the file of a training configuration, found nothing")


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Section):
    """How each kind of network is trained. The study sets the data, the start and the losses itself."""

    base: RecipeConfig = setting(RecipeConfig("abstention-base"), "pretraining of the base network on text")
    chat: RecipeConfig = setting(RecipeConfig("abstention-chat"), "fine-tuning of the base to v4, on chat")
    variant: RecipeConfig = setting(RecipeConfig("abstention-variant"), "fine-tuning of v4 to each variant")
    sae: RecipeConfig = setting(RecipeConfig("abstention-sae"), "sparse autoencoder of v4's activations")


@dataclasses.dataclass(frozen=True)
class PairsConfig(Section):
    """The data of the study: prompt–response pairs about the generated village, or your own files."""

    pairs: int = setting(20_000, "prompt–response pairs in each training file", min=20)
    unanswerable: float = setting(0.5, "fraction of the pairs whose prompt nobody can answer", above=0,
                                  below=1)
    seed: int = setting(0, "random seed of the generated pairs", min=0, max=2**31 - 1)
    calibration: int = setting(200, "answerable prompts of the calibration split, which sets the thresholds "
                               "and nothing else", min=20)
    held_out: int = setting(4000, "held-out pairs, on which no network is trained: for the chat loss and to "
                            "fit the probes on v4", min=40)
    files: tuple[str, ...] = setting((), "your own files in place of the generated ones: some of chat=FILE, "
                                     "semantic=FILE, answers=FILE, bare=FILE, held_out=FILE, "
                                     "calibration=FILE, each in the format of chat.source")

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [entry.partition("=")[0] for entry in self.files]
        for entry, name in zip(self.files, names, strict=True):
            if name not in DATA_FILES or not entry.partition("=")[2]:
                raise InputError(f"files: expected {', '.join(DATA_FILES)} with =FILE, found {entry!r}")
        if len(set(names)) != len(names):
            raise InputError(f"files: expected each once, found {', '.join(names)}")

    @property
    def own_files(self) -> dict[str, str]:
        """The entries of `files`: name → path."""
        return dict(entry.split("=", 1) for entry in self.files)


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
    rank: int = setting(8, "number of principal directions of the low-rank head", min=1)
    latents: int = setting(8, "autoencoder latents per dimension of the residual stream", min=1)
    jobs: int = setting(-1, "processes that fit probes in parallel; -1: one per core", min=-1)


@dataclasses.dataclass(frozen=True)
class AbstentionConfig(Section):
    """One abstention study."""

    name: str = setting("", "title of the report; empty: the name of the configuration file")
    out: str = setting("", "output directory; empty: runs/ and the name of the configuration file")
    variants: tuple[str, ...] = setting(tuple(VARIANTS), f"variants to train, of {', '.join(VARIANTS)}; the "
                                        "variants that they start from are trained as well")
    seeds: tuple[int, ...] = setting((0, 1, 2, 3, 4), "random seeds; each trains its own base network and "
                                     "all variants of it")
    given: tuple[str, ...] = setting((), "existing networks to use instead of training them: base=DIR, "
                                     "v4=DIR …; for one seed only")
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
            raise InputError("seeds: expected at least one whole number from 0 to 2³² − 1, each once, found "
                             f"{list(self.seeds)}")
        for entry in self.given:
            name, equals, path = entry.partition("=")
            if not equals or not path or name not in GIVEN:
                raise InputError(f"given: expected some of {', '.join(GIVEN)} with =DIR, found {entry!r}")
        if len(self.networks) != len(self.given):
            raise InputError(f"given: expected each network once, found {list(self.given)}")
        if self.networks and len(self.seeds) > 1:
            raise InputError(f"seeds: expected one seed, because {next(iter(self.networks))} is one given "
                             f"network, found {list(self.seeds)}")

    @property
    def networks(self) -> dict[str, str]:
        """The entries of `given`: name → directory."""
        return dict(entry.split("=", 1) for entry in self.given)
