"""What a study of abstention is: every key of configs/abstention*.yaml."""

from __future__ import annotations

import dataclasses

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models.decoder import ComputeConfig

from .variants import BASE, VARIANTS

DATA_FILES = ("chat", "semantic", "answers", "bare", "held_out", "calibration")
GIVEN = (BASE, *(name for name, one in VARIANTS.items() if one.kind != "fitted"))


@dataclasses.dataclass(frozen=True)
class RecipeConfig(Section):
    """How networks are trained: a training configuration, and what is different here."""

    train: str = setting("", "its file")
    set: tuple[str, ...] = setting((), "keys of it with other values, as on a command line: train.steps=50")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train:
            raise InputError("train: expected the file of a training configuration, found nothing")


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Section):
    """The three kinds of runs; everything else of them, the study sets itself."""

    base: RecipeConfig = setting(RecipeConfig("abstention-base"), "the network that reads")
    chat: RecipeConfig = setting(RecipeConfig("abstention-chat"), "v4, which learns to chat")
    variant: RecipeConfig = setting(RecipeConfig("abstention-variant"), "all that begin from v4")
    sae: RecipeConfig = setting(RecipeConfig("abstention-sae"), "the autoencoder of v4")


@dataclasses.dataclass(frozen=True)
class PairsConfig(Section):
    """What is learned from, made of the village."""

    pairs: int = setting(20_000, "of a prompt and its response, for each kind of data", min=20)
    unanswerable: float = setting(0.5, "share of them", above=0, below=1)
    seed: int = setting(0, "of what is asked", min=0, max=2**31 - 1)
    calibration: int = setting(200, "questions to put the threshold by, in no other use", min=20)
    held_out: int = setting(4000, "pairs that no network learns from: for the loss of the chat, and for "
                            "probes on v4", min=40)
    files: tuple[str, ...] = setting((), "in place of the village's: some of chat=FILE, semantic=FILE, "
                                     "answers=FILE, bare=FILE, held_out=FILE, calibration=FILE, each as "
                                     "chat.source takes them")

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [entry.partition("=")[0] for entry in self.files]
        for entry, name in zip(self.files, names, strict=True):
            if name not in DATA_FILES or not entry.partition("=")[2]:
                raise InputError(f"files: expected {', '.join(DATA_FILES)} with =FILE, found {entry!r}")
        if len(set(names)) != len(names):
            raise InputError(f"files: expected each once, found {', '.join(names)}")

    @property
    def given(self) -> dict[str, str]:
        """Of `files`, name → path."""
        return dict(entry.split("=", 1) for entry in self.files)


@dataclasses.dataclass(frozen=True)
class AnswersConfig(Section):
    """What is generated after each prompt, greedily."""

    max_new: int = setting(48, "bytes", min=1)
    batch_size: int = setting(64, "at once", min=1)


@dataclasses.dataclass(frozen=True)
class FittedConfig(Section):
    """Heads and probes that are fitted to what v4 says, and change nothing of it."""

    prompts: int = setting(4000, "at most: for heads, of what v8b and v9 learn from; for probes, of what no "
                           "network does", min=40)
    rank: int = setting(8, "directions of the low-rank head", min=1)
    latents: int = setting(8, "latents of the autoencoder for each dimension", min=1)
    jobs: int = setting(-1, "probes fitted side by side; -1 takes every core", min=-1)


@dataclasses.dataclass(frozen=True)
class AbstentionConfig(Section):
    """One study."""

    name: str = setting("", "what the report calls it; by default that of the file")
    out: str = setting("", "directory; by default runs/ and the name of the file")
    variants: tuple[str, ...] = setting(tuple(VARIANTS), f"some of {', '.join(VARIANTS)}; those that they "
                                        "begin from are made as well")
    seeds: tuple[int, ...] = setting((0, 1, 2, 3, 4), "each is a base of its own and all that begins from it")
    given: tuple[str, ...] = setting((), "networks that are there and need no training: base=DIR, v4=DIR …; "
                                     "of one seed")
    training: TrainingConfig = setting(TrainingConfig(), "how the others are trained")
    pairs: PairsConfig = setting(PairsConfig(), "what they learn from")
    prompts: str = setting("", "a directory or file of evaluation prompts; empty: the built-in ones")
    batch_size: int = setting(32, "prompts read at once", min=1)
    answers: AnswersConfig = setting(AnswersConfig(), "what they answer")
    fitted: FittedConfig = setting(FittedConfig(), "heads and probes on a network that stays as it is")
    target_fpr: float = setting(0.05, "share of answerable prompts that may be declined", above=0, below=1)
    replicates: int = setting(1000, "of the bootstrap", min=100)
    seed: int = setting(42, "of the bootstrap", min=0, max=2**32 - 1)
    compute: ComputeConfig = setting(ComputeConfig(), "how the networks are run")

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ", ".join(VARIANTS)
        if wrong := [name for name in self.variants if name not in VARIANTS]:
            raise InputError(f"variants: expected some of {known}, found {wrong[0]}")
        if not self.variants or len(set(self.variants)) != len(self.variants):
            raise InputError(f"variants: expected different ones, one at least, of {known}")
        if (not self.seeds or len(set(self.seeds)) != len(self.seeds)
                or not all(0 <= seed < 2**32 for seed in self.seeds)):
            raise InputError("seeds: expected different whole numbers from 0 to 2³² − 1, one at least, found "
                             f"{list(self.seeds)}")
        for entry in self.given:
            name, equals, path = entry.partition("=")
            if not equals or not path or name not in GIVEN:
                raise InputError(f"given: expected some of {', '.join(GIVEN)} with =DIR, found {entry!r}")
        if len(self.networks) != len(self.given):
            raise InputError(f"given: expected each network once, found {list(self.given)}")
        if self.networks and len(self.seeds) > 1:
            raise InputError(f"seeds: expected one where {next(iter(self.networks))} is given, as it is one "
                             f"network, found {list(self.seeds)}")

    @property
    def networks(self) -> dict[str, str]:
        """Of `given`, name → directory."""
        return dict(entry.split("=", 1) for entry in self.given)
