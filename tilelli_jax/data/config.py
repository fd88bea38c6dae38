"""What is read, and how it is cut into examples."""

from __future__ import annotations

import dataclasses

from tilelli_jax.config import setting
from tilelli_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Byte text to learn from."""

    source: str = setting(
        "stories",
        "stories (the built-in corpus); a directory with train.bin and valid.bin; a .txt file or a "
        "glob of them; or hf:NAME[:COLUMN], a Hugging Face data set")
    valid_fraction: float = setting(
        0.1, "share of each text file, at its end, that is kept for validation; likewise of an hf "
        "source without a validation split; for stories, validation bytes per training byte")
    stories_bytes: int = setting(4_000_000, "size of the built-in corpus's training part, in bytes")
    stories_seed: int = setting(0, "seed of the built-in corpus")
    hf_bytes: int = setting(4_000_000_000, "most bytes of text taken from an hf source")
    cache_dir: str = setting("data", "where the shards made from hf sources are kept")
    shuffle_seed: int = setting(0, "seed of the order of training windows")
    prefetch: int = setting(2, "batches read ahead of the step in progress")

    def __post_init__(self) -> None:
        if not self.source:
            raise InputError("source: expected a file, a directory, 'stories' or hf:NAME")
        if not 0 < self.valid_fraction < 1:
            raise InputError(f"valid_fraction: expected a number between 0 and 1, "
                             f"found {self.valid_fraction}")
        if self.stories_bytes < 1000:
            raise InputError(f"stories_bytes: expected at least 1000, found {self.stories_bytes}")
        for seed in ("stories_seed", "shuffle_seed"):
            if getattr(self, seed) < 0:
                raise InputError(f"{seed}: expected 0 or more, found {getattr(self, seed)}")
        if self.hf_bytes < 1:
            raise InputError(f"hf_bytes: expected at least 1, found {self.hf_bytes}")
        if self.prefetch < 0:
            raise InputError(f"prefetch: expected 0 or more, found {self.prefetch}")
