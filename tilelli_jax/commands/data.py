"""Prepares shards: `tilelli data --source SRC … --out DIR`.

Writes train.bin, valid.bin and meta.json to DIR; `data.source=DIR` then trains on it. Sources are joined in
order, the files of a glob in the order of their names: the end of each goes to valid.bin and the rest to
train.bin, with the separator between two. `data.source='*.txt'` joins files in the same way: with the same
valid_fraction and the default separator it trains on the same bytes.

The village also has chat data: `village-chat` and `village-calibration` are written to a file of JSON lines,
`village-prompts` to a directory with one such file per regime.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.cli.tables import table
from tilelli_jax.data.config import DataConfig
from tilelli_jax.data.documents import is_data_set, is_json_lines, named_files, open_sources
from tilelli_jax.data.file_sets import replace_files
from tilelli_jax.data.shards import write_shards
from tilelli_jax.data.synthetic import village
from tilelli_jax.data.synthetic.village import files as village_files
from tilelli_jax.errors import InputError

log = logging.getLogger(__name__)
# Options of the village's chat data, and the sources that each applies to.
VILLAGE = {"pairs": ("village-chat", "village-calibration"), "each": ("village-prompts",),
           "unanswerable": ("village-chat",), "kinds": ("village-chat",),
           "seed": ("village-chat", "village-calibration", "village-prompts"),
           "people": ("village-chat", "village-calibration", "village-prompts"),
           "village_seed": ("village-chat", "village-calibration", "village-prompts")}
CHAT_DATA = VILLAGE["seed"]
SEPARATOR = "\\n\\n"
TEXT = ("column", "max_bytes", "separator", "valid_fraction")  # options for text sources only


@command
def main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    if not str(arguments.out).strip() or not all(arguments.source):
        raise InputError("--out, --source: expected a name, found an empty one")
    out = Path(arguments.out)
    _check_village(arguments)
    if arguments.source[0] in CHAT_DATA:
        _write_village(arguments.source[0], out, arguments)
    else:
        _write_shards(out, arguments)


def _write_shards(out: Path, arguments: argparse.Namespace) -> None:
    if arguments.max_bytes is not None and arguments.max_bytes < 1:
        raise InputError(f"--max-bytes: expected at least 1, found {arguments.max_bytes}")
    _check_files(arguments.source, arguments.column)
    with _options_in_errors():
        config = DataConfig() if arguments.valid_fraction is None else DataConfig(
            valid_fraction=arguments.valid_fraction)
    size = arguments.max_bytes or config.stories_bytes
    separator = _separator(SEPARATOR if arguments.separator is None else arguments.separator)
    sources = [source for name in arguments.source for source in open_sources(
        name, column=arguments.column, separator=separator,
        stories_bytes=(size, int(size * config.valid_fraction)))]
    meta = write_shards(out, sources, valid_fraction=config.valid_fraction, separator=separator,
                        max_bytes=arguments.max_bytes, force=arguments.force)
    print(_table(out, meta))


def _check_files(names: Sequence[str], column: str | None) -> None:
    """Warns of sources read twice. Raises InputError if --column is given but no source has columns."""
    files = {name: named_files(name) for name in names}
    inputs = [source for name in names for source in [str(path.resolve()) for path in files[name]] or [name]]
    for source, count in collections.Counter(inputs).items():
        if count > 1:
            log.warning("%s: is read %d times", source, count)
    if column is not None and not any(is_data_set(name) or any(map(is_json_lines, files[name]))
                                      for name in names):
        raise InputError(f"--column: is for .jsonl files and data sets, found {', '.join(names)}")


def _separator(text: str) -> bytes:
    """Decodes escapes; `\\r\\n` becomes `\\n`, as in texts."""
    for escape, character in (("\\r", "\r"), ("\\n", "\n"), ("\\t", "\t"), ("\r\n", "\n")):
        text = text.replace(escape, character)
    try:
        return text.encode()
    except UnicodeEncodeError:  # the command line's bytes are not UTF-8
        raise InputError(f"--separator: expected UTF-8, found {text!r}") from None


def _check_village(arguments: argparse.Namespace) -> None:
    chat_sources = [source for source in arguments.source if source in CHAT_DATA]
    if chat_sources and len(arguments.source) > 1:
        raise InputError(f"--source: {chat_sources[0]} cannot be combined with other sources, "
                         f"found {len(arguments.source)}")
    for name in TEXT if chat_sources else ():
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')}: is for texts, found --source {chat_sources[0]}")
    for name, sources in VILLAGE.items():
        if getattr(arguments, name) is not None and arguments.source[0] not in sources:
            raise InputError(f"--{name.replace('_', '-')}: is for --source {' or '.join(sources)}, "
                             f"found {arguments.source[0]}")
        if name.endswith("seed") and not 0 <= (getattr(arguments, name) or 0) < 2**32:
            raise InputError(f"--{name.replace('_', '-')}: expected 0 to {2**32 - 1}, "
                             f"found {getattr(arguments, name)}")


def _write_village(source: str, out: Path, arguments: argparse.Namespace) -> None:
    with _options_in_errors(prompts="each" if source == "village-prompts" else "pairs"):
        contents = _village_files(source, out, arguments)
    if source == "village-prompts":
        with replace_files(out, [path.name for path in contents], force=arguments.force) as temporary:
            for path, content in contents.items():
                temporary[path.name].write_bytes(content)
    else:
        village_files.write(contents, arguments.force)
    print(table([("", "lines", "bytes"), *((str(path), f"{content.count(10):,}", f"{len(content):,}")
                                           for path, content in contents.items())], right=(1, 2)))


def _village_files(source: str, out: Path, arguments: argparse.Namespace) -> dict[Path, bytes]:
    """Returns the content of each file of the village's chat data."""
    world = village.world(arguments.village_seed or 0,
                          village.DEFAULT if arguments.people is None else arguments.people)
    seed, pairs, fraction = arguments.seed or 0, arguments.pairs, arguments.unanswerable
    if source == "village-prompts":
        n_prompts = village.EACH if arguments.each is None else arguments.each
        return {out / name: content for name, content in
                village_files.regime_files(village.prompts(world, n_prompts, seed)).items()}
    if source == "village-calibration":
        return {out: village_files.calibration_lines(
            village.calibration(world, 200 if pairs is None else pairs, seed))}
    return {out: village_files.chat_lines(village.chat(
        world, 20_000 if pairs is None else pairs, seed, 0.5 if fraction is None else fraction,
        tuple(arguments.kinds or village.SEMANTIC)))}


@contextlib.contextmanager
def _options_in_errors(**options: str) -> Iterator[None]:
    """Names the option in an error that names a setting; `options` has those whose names differ."""
    try:
        yield
    except InputError as error:
        name, _, message = str(error).partition(":")
        raise InputError(f"--{options.get(name, name).replace('_', '-')}:{message}") from None


def _table(out: Path, meta: dict[str, Any]) -> str:
    rows = [("", "bytes", "sha256")]
    rows += [(entry["source"], f"{entry['bytes']:,}", "") for entry in meta["sources"]]
    rows += [(str(out / f"{part}.bin"), f"{meta[part]['bytes']:,}", meta[part]["sha256"][:16])
             for part in ("train", "valid")]
    return table(rows, right=(1,))


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="tilelli data", description=(
        "Writes byte shards (train.bin, valid.bin, meta.json) from text. Reads text in chunks, so that it "
        "may be larger than memory."))
    parser.add_argument("--source", required=True, nargs="+", metavar="SRC", help=(
        "text files, .jsonl files, globs of them, hf:NAME[#SUBSET][@REVISION][:COLUMN] (Hugging Face), "
        "stories, facts or village (built in); village-chat, village-calibration, village-prompts"))
    parser.add_argument("--out", required=True, metavar="DIR",
                        help="output directory of the shards; for village-chat and village-calibration the "
                        "output file")
    parser.add_argument("--valid-fraction", type=float, metavar="F",
                        help="fraction of each source, at its end, held out for validation "
                        f"[{DataConfig().valid_fraction}]")
    parser.add_argument("--column", metavar="C", help="field with the text, in .jsonl files "
                        "and data sets [text, or the only field with a string]")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="maximum number of bytes to read, without "
                        "the sources' own validation splits [everything]")
    parser.add_argument("--separator", metavar="STR", help="text between two "
                        r"files or records, in both shards; \n, \r and \t are escapes, \r\n becomes \n, as "
                        f"in texts [{SEPARATOR}]")
    parser.add_argument("--force", action="store_true", help="replace existing shards or files")
    group = parser.add_argument_group("chat data of the village (village-chat, -calibration, -prompts)")
    group.add_argument("--pairs", type=int, metavar="N",
                       help="number of pairs: of chat, with repetition [20000]; for calibration, all "
                       "different [200]")
    group.add_argument("--seed", type=int, metavar="S", help="seed of the questions [0]")
    group.add_argument("--people", type=int, metavar="P",
                       help=f"data.village_people of the training text [{village.DEFAULT}]")
    group.add_argument("--village-seed", type=int, metavar="S",
                       help="data.village_seed of the training text [0]")
    group.add_argument("--unanswerable", type=float, metavar="F",
                       help="fraction of chat pairs without an answer [0.5]")
    group.add_argument("--kinds", nargs="+", metavar="K", help="kinds of unanswerable questions, from "
                       f"{', '.join(village.KINDS)} [{' '.join(village.SEMANTIC)}]")
    group.add_argument("--each", type=int, metavar="N", help=f"number of prompts per regime [{village.EACH}]")
    return parser
