"""Prepares shards: `tilelli data --source SRC … --out DIR`.

DIR gets train.bin, valid.bin and meta.json; `data.source=DIR` then trains on it. Sources are joined in
order, the files of a glob in the order of their names: the end of each goes to valid.bin and the rest to
train.bin, with the separator between two. `data.source='*.txt'` joins files in the same way: with the same
valid_fraction and the default separator it trains on the same bytes.

Of the village there is more than text: `village-chat` and `village-calibration` are written to a file of JSON
lines, `village-prompts` to a directory with one such file for each regime.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilelli_jax.data import village
from tilelli_jax.data.config import DataConfig
from tilelli_jax.data.documents import is_data_set, is_json_lines, named_files, open_sources
from tilelli_jax.data.file_sets import replace_files
from tilelli_jax.data.shards import write_shards
from tilelli_jax.data.village import files as village_files
from tilelli_jax.errors import ArgumentParser, InputError, command
from tilelli_jax.tables import table

log = logging.getLogger(__name__)
# Options of what is made of the village, and for which of it.
VILLAGE = {"pairs": ("village-chat", "village-calibration"), "each": ("village-prompts",),
           "unanswerable": ("village-chat",), "kinds": ("village-chat",),
           "seed": ("village-chat", "village-calibration", "village-prompts"),
           "people": ("village-chat", "village-calibration", "village-prompts"),
           "village_seed": ("village-chat", "village-calibration", "village-prompts")}
MADE = VILLAGE["seed"]
TEXT = ("column", "max_bytes")  # options of texts alone


@command
def main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    if not str(arguments.out).strip() or not all(arguments.source):
        raise InputError("--out, --source: expected a name, found an empty one")
    out = Path(arguments.out)
    _check_village(arguments)
    if arguments.source[0] in MADE:
        _write_village(arguments.source[0], out, arguments)
        return
    if arguments.max_bytes is not None and arguments.max_bytes < 1:
        raise InputError(f"--max-bytes: expected at least 1, found {arguments.max_bytes}")
    _check_files(arguments.source, arguments.column)
    config = DataConfig(valid_fraction=arguments.valid_fraction)
    size = arguments.max_bytes or config.stories_bytes
    separator = _separator(arguments.separator)
    sources = [source for name in arguments.source for source in open_sources(
        name, column=arguments.column, separator=separator,
        stories_bytes=(size, int(size * config.valid_fraction)))]
    meta = write_shards(out, sources, valid_fraction=config.valid_fraction, separator=separator,
                        max_bytes=arguments.max_bytes, force=arguments.force)
    print(_table(out, meta))


def _check_files(names: Sequence[str], column: str | None) -> None:
    """Notes what is taken twice. Raises InputError where a column is named and nothing there has any."""
    files = {name: named_files(name) for name in names}
    taken = [one for name in names for one in [str(path.resolve()) for path in files[name]] or [name]]
    for one, count in collections.Counter(taken).items():
        if count > 1:
            log.warning("%s: is taken %d times", one, count)
    if column is not None and not any(is_data_set(name) or any(map(is_json_lines, files[name]))
                                      for name in names):
        raise InputError(f"--column: is for .jsonl files and data sets, found {', '.join(names)}")


def _separator(text: str) -> bytes:
    """As texts are read: with `\\n` for `\\r\\n`."""
    for escape, meant in (("\\r", "\r"), ("\\n", "\n"), ("\\t", "\t"), ("\r\n", "\n")):
        text = text.replace(escape, meant)
    try:
        return text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no UTF-8
        raise InputError(f"--separator: expected UTF-8, found {text!r}") from None


def _check_village(arguments: argparse.Namespace) -> None:
    made = [source for source in arguments.source if source in MADE]
    if made and len(arguments.source) > 1:
        raise InputError(f"--source: {made[0]} goes with no other source, found {len(arguments.source)}")
    for name in TEXT if made else ():
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')}: is for texts, found --source {made[0]}")
    for name, sources in VILLAGE.items():
        if getattr(arguments, name) is not None and arguments.source[0] not in sources:
            raise InputError(f"--{name.replace('_', '-')}: is for --source {' or '.join(sources)}, "
                             f"found {arguments.source[0]}")
        if name.endswith("seed") and not 0 <= (getattr(arguments, name) or 0) < 2**32:
            raise InputError(f"--{name.replace('_', '-')}: expected 0 to {2**32 - 1}, "
                             f"found {getattr(arguments, name)}")


def _write_village(source: str, out: Path, arguments: argparse.Namespace) -> None:
    world = village.world(arguments.village_seed or 0,
                          village.DEFAULT if arguments.people is None else arguments.people)
    seed = arguments.seed or 0
    if source == "village-prompts":
        each = village.EACH if arguments.each is None else arguments.each
        contents = {out / name: content for name, content in
                    village_files.of_regimes(village.prompts(world, each, seed)).items()}
        with replace_files(out, [path.name for path in contents], force=arguments.force) as beside:
            for path, content in contents.items():
                beside[path.name].write_bytes(content)
    else:
        pairs, share = arguments.pairs, arguments.unanswerable
        if source == "village-calibration":
            content = village_files.of_calibration(
                village.calibration(world, 200 if pairs is None else pairs, seed))
        else:
            content = village_files.of_chat(village.chat(
                world, 20_000 if pairs is None else pairs, seed, 0.5 if share is None else share,
                tuple(arguments.kinds or village.SEMANTIC)))
        contents = {out: content}
        village_files.write(contents, arguments.force)
    print(table([("", "lines", "bytes"), *((str(path), f"{content.count(10):,}", f"{len(content):,}")
                                           for path, content in contents.items())], right=(1, 2)))


def _table(out: Path, meta: dict[str, Any]) -> str:
    rows = [("", "bytes", "sha256")]
    rows += [(entry["source"], f"{entry['bytes']:,}", "") for entry in meta["sources"]]
    rows += [(str(out / f"{part}.bin"), f"{meta[part]['bytes']:,}", meta[part]["sha256"][:16])
             for part in ("train", "valid")]
    return table(rows, right=(1,))


def _parser() -> argparse.ArgumentParser:
    defaults = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    parser = ArgumentParser(prog="tilelli data", description=(
        "Makes byte shards (train.bin, valid.bin, meta.json) from text, reading it piece by "
        "piece, so that it may be larger than memory."))
    parser.add_argument("--source", required=True, nargs="+", metavar="SRC", help=(
        "text files, .jsonl files, globs of them, hf:NAME[#SUBSET][@REVISION][:COLUMN] (Hugging Face), "
        "stories, facts or village (built in); village-chat, village-calibration, village-prompts"))
    parser.add_argument("--out", required=True, metavar="DIR",
                        help="the directory that gets the shards; for village-chat and "
                        "village-calibration the file")
    parser.add_argument("--valid-fraction", type=float, default=defaults["valid_fraction"],
                        metavar="F", help="share of each source, at its end, that is kept for "
                        "validation [%(default)s]")
    parser.add_argument("--column", metavar="C", help="the field with the text, in .jsonl files "
                        "and data sets [text, or the only one that holds a string]")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="take at most so many bytes (a "
                        "validation part that a source has itself comes on top) [everything]")
    parser.add_argument("--separator", default="\\n\\n", metavar="STR", help="put between two "
                        r"files or records, in both shards; \n, \r and \t are understood, \r\n is \n, as in "
                        "texts [%(default)s]")
    parser.add_argument("--force", action="store_true", help="replace the shards in DIR, or the files")
    made = parser.add_argument_group("what is made of the village")
    made.add_argument("--pairs", type=int, metavar="N",
                      help="of chat, with repetition [20000]; for calibration, all different [200]")
    made.add_argument("--seed", type=int, metavar="S", help="of what is asked about it [0]")
    made.add_argument("--people", type=int, metavar="P", help="data.village_people of the text that was "
                      f"read [{village.DEFAULT}]")
    made.add_argument("--village-seed", type=int, metavar="S", help="data.village_seed of that text [0]")
    made.add_argument("--unanswerable", type=float, metavar="F", help="share of the pairs [0.5]")
    made.add_argument("--kinds", nargs="+", metavar="K", help="of those, some of "
                      f"{', '.join(village.KINDS)} [{' '.join(village.SEMANTIC)}]")
    made.add_argument("--each", type=int, metavar="N", help=f"prompts of a regime [{village.EACH}]")
    return parser
