"""The data of an abstention study, generated from the village or given as files: JSON lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tilelli_jax.data.chat_pairs import ChatPair, line_pairs, read_pairs
from tilelli_jax.data.synthetic import village
from tilelli_jax.data.synthetic.village import files
from tilelli_jax.data.text_files import text_chunks
from tilelli_jax.data.turns import user_turn
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import fingerprint, write_atomically
from tilelli_jax.io.json_text import lines

from ..thresholds import conformal_min_items
from .config import PairsConfig

MAX_TOO_LONG = 0.2  # fraction of the pairs that may be left out because they are too long
TRAINING = ("chat", "answerability", "answers", "plain_text")  # files on which networks are trained
FITTED = ("answerability", "held_out")  # files to which heads and probes are fitted
MIN_FITTED = 20  # answerable prompts, and unanswerable ones, in each file of FITTED


def check(options: PairsConfig, longest: int, max_prompt: int | None, target_fpr: float) -> None:
    """Checks the user's files before any network is trained.

    Args:
        longest: maximum length of a training pair, in bytes.
        max_prompt: maximum length of a prompt as a turn, in bytes; None: no limit.

    Raises:
        InputError: a file cannot be read, has a pair or a prompt that is too long, or has too few prompts for
            the calibration or to fit heads and probes.
    """
    for name, path in options.files.given.items():
        pairs = read_pairs(Path(path))
        if name != "plain_text" and (bare := [pair for pair in pairs if not pair.response]):
            raise InputError(f"{bare[0].where}: expected a prompt and a response for {name}, found text "
                             "alone")
        if later := [pair for pair in pairs if pair.context]:
            raise InputError(f"{later[0].where}: expected one turn, as each prompt is asked alone, found "
                             "a later turn")
        answerable, unanswerable = ({pair.prompt for pair in pairs if pair.answerable == value}
                                    for value in (True, False))
        if name == "calibration":
            for pair in pairs:
                if max_prompt is not None and (size := len(user_turn(pair.prompt).encode())) > max_prompt:
                    raise InputError(f"{pair.where}: prompt: takes {size} bytes as a turn, and the network "
                                     f"reads {max_prompt}")
            if len(answerable) < (needed := conformal_min_items(target_fpr)):
                raise InputError(f"{path}: expected at least {needed} prompts with an answer for target_fpr "
                                 f"{target_fpr:g}, found {len(answerable)}")
            continue
        for pair in pairs:
            if (size := pair.seq_len) > longest:
                raise InputError(f"{pair.where}: train.seq_len: expected at least {size}, found {longest}")
        if name in FITTED and min(len(answerable), len(unanswerable)) < MIN_FITTED:
            raise InputError(f"{path}: expected at least {MIN_FITTED} prompts with an answer and "
                             f"{MIN_FITTED} without, to fit heads and probes, found {len(answerable)} and "
                             f"{len(unanswerable)}")


def fingerprints(options: PairsConfig) -> dict[str, str]:
    """Returns name → fingerprint of each of the user's files."""
    return {name: fingerprint([Path(path)]) for name, path in options.files.given.items()}


def write(path: Path, options: PairsConfig, world: village.World, longest: int,
          notify: Callable[[str], None]) -> None:
    """Writes every file of `config.DATA_FILES` as `path/NAME.jsonl`.

    No prompt of held_out or calibration occurs in the training files, and these two share none.

    Args:
        longest: maximum length of a pair, in bytes; longer ones are left out. A log line reports their
            fraction, except for plain_text.

    Raises:
        InputError: more than MAX_TOO_LONG of the pairs are too long, or a user's file has a prompt that must
            not occur in it.
    """
    calibration = village.calibration(world, options.calibration, options.seed)
    reserved = {question.prompt for question in calibration}

    def chat(name: str, pairs: int, seed: int, kinds: Sequence[str], *, held_out: bool = False) -> bytes:
        drawn = village.chat(world, 2 * pairs, seed, options.unanswerable, kinds,
                             "calibration" if held_out else "train")
        fitting = [pair for pair in drawn
                   if ChatPair(pair.prompt, pair.response, True, "").seq_len <= longest]
        if (too_long := 1 - len(fitting) / len(drawn)) > MAX_TOO_LONG:
            raise InputError(f"train.seq_len: expected room for most pairs, found {longest}, too little for "
                             f"{too_long:.0%} of {name}")
        if held_out:  # each prompt once
            fitting = [pair for pair in {pair.prompt: pair for pair in fitting}.values()
                       if pair.prompt not in reserved]
        shortage = "" if len(fitting) >= pairs else f" of {pairs} requested, as no other distinct pairs exist"
        notify(f"data: {name}: {min(len(fitting), pairs)} pairs{shortage}; left out {too_long:.1%} of the "
               f"drawn pairs, which are longer than {longest} bytes")
        return files.chat_lines(fitting[:pairs])
    bare = [(text, known) for text, known in village.bare(
        world, options.count, options.seed, options.unanswerable) if len(text.encode()) <= longest]
    generators: dict[str, Callable[[], bytes]] = {
        "chat": lambda: chat("chat", options.count, 2 * options.seed, village.SEMANTIC),
        "answerability": lambda: chat("answerability", options.count, 2 * options.seed + 1, village.SEMANTIC),
        "answers": lambda: chat("answers", options.count, 2 * options.seed, ("garbled", "mismatched")),
        "plain_text": lambda: files.bare_lines(bare),
        "held_out": lambda: chat("held_out", options.held_out, 2 * options.seed, village.SEMANTIC,
                                 held_out=True),
        "calibration": lambda: files.calibration_lines(calibration)}
    own_files = options.files.given
    contents = {name: b"".join(text_chunks(Path(own_files[name]))) if name in own_files else generate()
                for name, generate in generators.items()}
    _check_disjoint(contents, own_files)
    for name, content in contents.items():
        write_atomically(path / f"{name}.jsonl", content)


def prompts_of(content: bytes) -> set[str]:
    """Returns the prompts or plain texts of a file that has passed `read_pairs`."""
    return {pair.prompt for number, row in lines(content.decode(), "pairs.files")
            for pair in line_pairs(row, f"pairs.files, line {number}")}


def _check_disjoint(contents: Mapping[str, bytes], own_files: Mapping[str, str]) -> None:
    prompts = {name: prompts_of(content) for name, content in contents.items()}
    for name, others in (("calibration", [*TRAINING, "held_out"]), ("held_out", TRAINING)):
        for other in others:
            if shared := prompts[name] & prompts[other]:
                first, second = (own_files.get(file, f"the village's {file}") for file in (name, other))
                raise InputError(f"pairs.files: {first}: expected no prompt that is in {second}, found "
                                 f"{min(shared)!r:.60}")
