"""What the networks of a study learn from, made of the village or given: JSON lines in one directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from eval.abstention.config import PairsConfig
from tilelli_jax.data import village
from tilelli_jax.data.chat_pairs import Pair, read_pairs
from tilelli_jax.data.turns import answered, asked
from tilelli_jax.data.village import files
from tilelli_jax.errors import InputError
from tilelli_jax.files import fingerprint, write_atomically

MOST_LEFT_OUT = 0.2  # of the pairs, for being too long


def check(options: PairsConfig, longest: int) -> None:
    """Raises InputError where a file that is given cannot be read, or has a pair too long to train on."""
    for name, path in options.given.items():
        for pair in read_pairs(Path(path)):
            if name != "calibration" and (size := _size(pair)) > longest:
                raise InputError(f"{pair.where}: takes a train.seq_len of {size}, found {longest}")


def given(options: PairsConfig) -> dict[str, str]:
    """Fingerprints of the files that are given."""
    return {name: fingerprint([Path(path)]) for name, path in options.given.items()}


def write(path: Path, options: PairsConfig, world: village.World, longest: int,
          tell: Callable[[str], None]) -> None:
    """All files of `config.DATA_FILES` as `path/NAME.jsonl`.

    What a network learns from has no prompt of held_out or calibration in it, and these have none in common.

    Args:
        longest: bytes of a pair, at most; longer ones are left out, and told of.

    Raises:
        InputError: more than MOST_LEFT_OUT of the pairs are too long.
    """
    calibration = village.calibration(world, options.calibration, options.seed)
    spoken_for = {one.prompt for one in calibration}

    def chat(name: str, pairs: int, seed: int, kinds: Sequence[str], *, held_out: bool = False) -> bytes:
        drawn = village.chat(world, 2 * pairs, seed, options.unanswerable, kinds,
                             "calibration" if held_out else "train")
        fitting = [one for one in drawn if _size(Pair(one.prompt, one.response, True, "")) <= longest]
        if (lost := 1 - len(fitting) / len(drawn)) > MOST_LEFT_OUT:
            raise InputError(f"train.seq_len: expected room for most pairs, found {longest}, too little for "
                             f"{lost:.0%} of {name}")
        if held_out:  # each prompt once
            fitting = [one for one in {one.prompt: one for one in fitting}.values()
                       if one.prompt not in spoken_for]
        tell(f"data: {name}: {min(len(fitting), pairs)} pairs; {lost:.1%} of those drawn are longer than "
             f"{longest} bytes, and left out")
        return files.of_chat(fitting[:pairs])
    bare = [(text, known) for text, known in village.bare(
        world, options.pairs, options.seed, options.unanswerable) if len(text.encode()) <= longest]
    made: dict[str, Callable[[], bytes]] = {
        "chat": lambda: chat("chat", options.pairs, 2 * options.seed, village.SEMANTIC),
        "semantic": lambda: chat("semantic", options.pairs, 2 * options.seed + 1, village.SEMANTIC),
        "answers": lambda: chat("answers", options.pairs, 2 * options.seed, ("garbled", "mismatched")),
        "bare": lambda: files.of_bare(bare),
        "held_out": lambda: chat("held_out", options.held_out, 2 * options.seed, village.SEMANTIC,
                                 held_out=True),
        "calibration": lambda: files.of_calibration(calibration)}
    for name, content in made.items():
        own = options.given.get(name)
        write_atomically(path / f"{name}.jsonl", Path(own).read_bytes() if own else content())


def _size(pair: Pair) -> int:
    """The train.seq_len that it takes."""
    if not pair.response:
        return len(pair.prompt.encode())
    return len((asked(pair.prompt) + answered(pair.response)).encode()) - 1
