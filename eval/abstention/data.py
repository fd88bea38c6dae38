"""What the networks of a study learn from, made of the village or given: JSON lines in one directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tilelli_jax.data import village
from tilelli_jax.data.chat_pairs import Pair, read_pairs
from tilelli_jax.data.text_files import text_chunks
from tilelli_jax.data.turns import answered, asked
from tilelli_jax.data.village import files
from tilelli_jax.errors import InputError
from tilelli_jax.files import fingerprint, write_atomically
from tilelli_jax.json_text import lines

from ..thresholds import conformal_min_items
from .config import PairsConfig

MAX_LEFT_OUT = 0.2  # of the pairs, for being too long
LEARNED = ("chat", "semantic", "answers", "bare")  # what networks learn from
FITTED = ("semantic", "held_out")  # what heads and probes are fitted to
LEAST = 20  # of these, prompts of either kind


def check(options: PairsConfig, longest: int, most: int | None, target_fpr: float) -> None:
    """Of the files that are given, all that can be known before anything is made.

    Args:
        longest: bytes of a pair to train on.
        most: bytes of a prompt in its turn that the network reads; None: any.

    Raises:
        InputError: one cannot be read, has a pair or a prompt that is too long, or too few to calibrate with,
            or to fit heads and probes to.
    """
    for name, path in options.given.items():
        pairs = read_pairs(Path(path))
        if name != "bare" and (bare := [pair for pair in pairs if not pair.response]):
            raise InputError(f"{bare[0].where}: expected prompt and response, as {name} has them, found text "
                             "alone")
        known, unknown = ({pair.prompt for pair in pairs if pair.answerable == it} for it in (True, False))
        if name == "calibration":
            for pair in pairs:
                if most is not None and (size := len(asked(pair.prompt).encode())) > most:
                    raise InputError(f"{pair.where}: prompt: takes {size} bytes as a turn, and the network "
                                     f"reads {most}")
            if len(known) < (least := conformal_min_items(target_fpr)):
                raise InputError(f"{path}: expected {least} prompts with an answer at least, to hold "
                                 f"target_fpr {target_fpr:g}, found {len(known)}")
            continue
        for pair in pairs:
            if (size := _size(pair)) > longest:
                raise InputError(f"{pair.where}: takes a train.seq_len of {size}, found {longest}")
        if name in FITTED and min(len(known), len(unknown)) < LEAST:
            raise InputError(f"{path}: expected {LEAST} prompts with an answer and {LEAST} without at least, "
                             f"to fit heads and probes to, found {len(known)} and {len(unknown)}")


def given(options: PairsConfig) -> dict[str, str]:
    """Fingerprints of the files that are given."""
    return {name: fingerprint([Path(path)]) for name, path in options.given.items()}


def write(path: Path, options: PairsConfig, world: village.World, longest: int,
          notify: Callable[[str], None]) -> None:
    """All files of `config.DATA_FILES` as `path/NAME.jsonl`.

    What a network learns from has no prompt of held_out or calibration in it, and these have none in common.

    Args:
        longest: bytes of a pair, at most; longer ones are left out, and told of.

    Raises:
        InputError: more than MOST_LEFT_OUT of the pairs are too long, or a file that is given has a prompt
            in it that it must not have.
    """
    calibration = village.calibration(world, options.calibration, options.seed)
    spoken_for = {one.prompt for one in calibration}

    def chat(name: str, pairs: int, seed: int, kinds: Sequence[str], *, held_out: bool = False) -> bytes:
        drawn = village.chat(world, 2 * pairs, seed, options.unanswerable, kinds,
                             "calibration" if held_out else "train")
        fitting = [one for one in drawn if _size(Pair(one.prompt, one.response, True, "")) <= longest]
        if (lost := 1 - len(fitting) / len(drawn)) > MAX_LEFT_OUT:
            raise InputError(f"train.seq_len: expected room for most pairs, found {longest}, too little for "
                             f"{lost:.0%} of {name}")
        if held_out:  # each prompt once
            fitting = [one for one in {one.prompt: one for one in fitting}.values()
                       if one.prompt not in spoken_for]
        few = "" if len(fitting) >= pairs else f" of {pairs} asked for, as no others are different"
        notify(f"data: {name}: {min(len(fitting), pairs)} pairs{few}; {lost:.1%} of those drawn are longer "
             f"than {longest} bytes, and left out")
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
    contents = {name: b"".join(text_chunks(Path(options.given[name]))) if name in options.given else content()
                for name, content in made.items()}
    _check_apart(contents, options.given)
    for name, content in contents.items():
        write_atomically(path / f"{name}.jsonl", content)


def prompts_of(content: bytes) -> set[str]:
    """What the lines of a file, which has been read before, ask or say."""
    rows = [row for _, row in lines(content.decode(), "pairs.files")]
    return {(row["text"] if "text" in row else row["prompt"]).strip() for row in rows}


def _check_apart(contents: Mapping[str, bytes], given: Mapping[str, str]) -> None:
    found = {name: prompts_of(content) for name, content in contents.items()}
    for name, others in (("calibration", [*LEARNED, "held_out"]), ("held_out", LEARNED)):
        for other in others:
            if shared := found[name] & found[other]:
                called = [given.get(one, f"the village's {one}") for one in (name, other)]
                raise InputError(f"pairs.files: {called[0]}: expected no prompt that is in {called[1]}, "
                                 f"found {min(shared)!r:.60}")


def _size(pair: Pair) -> int:
    """The train.seq_len that it takes."""
    if not pair.response:
        return len(pair.prompt.encode())
    return len((asked(pair.prompt) + answered(pair.response)).encode()) - 1
