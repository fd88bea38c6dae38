"""The configuration of training text."""

from __future__ import annotations

import dataclasses

from tilelli_jax.config import Section, setting
from tilelli_jax.data.synthetic import facts, village
from tilelli_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """Byte text to train on."""

    source: str = setting(
        "stories",
        "text to train on: stories, facts or village (built in); a directory of shards (train.bin, "
        "valid.bin, meta.json) written by tilelli data; a .txt file or a glob of them, joined in order of "
        "their names with \\n\\n between two; or hf:NAME[#SUBSET][@REVISION][:COLUMN], a Hugging Face data "
        "set. Text is UTF-8, or UTF-16 with a byte-order mark; \\r\\n is read as \\n; bytes that are not "
        "UTF-8 are kept, with a warning, but a binary file is an error")
    valid_fraction: float = setting(
        0.1, "fraction of each text file, at its end, held out for validation; likewise of an hf source "
        "without a validation split; for stories, validation bytes per training byte; not used for facts and "
        "village", above=0, below=1)
    stories_bytes: int = setting(
        4_000_000, "size of the stories' training split, in bytes; it is generated in memory", min=1000,
        max=10**9)
    stories_seed: int = setting(0, "seed of the stories", min=0, max=2**32 - 1)
    facts_people: int = setting(
        facts.PEOPLE, f"number of people in the world of facts, a multiple of {facts.NAMES}", min=facts.NAMES,
        max=facts.NAMES**2)
    facts_seed: int = setting(0, "seed of the world of facts and of its text", min=0, max=2**32 - 1)
    village_people: int = setting(
        village.DEFAULT, f"number of people in the village, a multiple of {village.RING}", min=village.RING,
        max=village.MAX_PEOPLE)
    village_passes: int = setting(village.PASSES, "how often the training text states every fact", min=1,
                                  max=10_000)
    village_seed: int = setting(0, "seed of the village and of its text", min=0, max=2**32 - 1)
    hf_bytes: int = setting(4_000_000_000, "maximum number of bytes read from an hf source", min=1,
                            max=2**62)
    cache_dir: str = setting("data", "directory for the shards written from hf sources")
    shuffle_seed: int = setting(0, "seed of the order of training windows", min=0, max=2**32 - 1)
    prefetch: int = setting(2, "batches to read ahead of the current update; 0: none", min=0, max=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.facts_people % facts.NAMES:
            raise InputError(f"facts_people: expected a multiple of {facts.NAMES}, "
                             f"found {self.facts_people}")
        if self.village_people % village.RING:
            raise InputError(f"village_people: expected a multiple of {village.RING}, "
                             f"found {self.village_people}")
