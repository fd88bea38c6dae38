"""Shards that are incomplete, mixed from two runs, in use or left by a killed process are not read."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.error_lines import assert_one_line
from tests.kill_points import kill_at_every_file_operation, kill_command_at_every_file_operation
from tilelli_jax.commands.data import main
from tilelli_jax.data.config import DataConfig
from tilelli_jax.data.corpus import open_corpus
from tilelli_jax.data.documents import TextSource
from tilelli_jax.data.shards import FILES, write_shards
from tilelli_jax.data.synthetic import village
from tilelli_jax.errors import InputError
from tilelli_jax.io import files

AGAIN = "create them again: tilelli data --source … --out {out} --force"


def parts_of(out):
    """Returns the training and validation bytes; or the error, one line with the command that fixes it."""
    try:
        splits = open_corpus(DataConfig(source=str(out)))
    except InputError as error:
        assert "\n" not in str(error) and AGAIN.format(out=out) in str(error)
        return str(error)
    return tuple(part.read(0, len(part)).tobytes() for part in splits[:2])


@pytest.fixture
def shards(tmp_path):
    """Returns a function that writes shards of a text to `out` and returns their contents."""
    def make(text, *options):
        (tmp_path / "a.txt").write_text(text)
        assert main(["--source", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), *options]) == 0
        assert sorted(os.listdir(tmp_path / "out")) == sorted(FILES)
        return parts_of(tmp_path / "out")
    return make


run_unwrapped = main.__wrapped__  # the command without signal and error handling
OLD, NEW = "An older text, whole. " * 9, "A newer text, larger. " * 9  # of equal size


def test_all_three_files_are_needed(tmp_path, shards):
    out = tmp_path / "out"
    assert shards(OLD) == (OLD[:178].encode(), OLD[178:].encode())
    for name in FILES:
        (out / name).rename(tmp_path / name)
        assert f"{out}: expected train.bin, valid.bin and meta.json; {name} is missing; " in parts_of(out)
        (tmp_path / name).rename(out / name)
    assert parts_of(out)[0] == OLD[:178].encode()


@pytest.mark.parametrize("name", FILES)
def test_files_of_two_runs_raise_an_error(tmp_path, shards, name):
    shards(OLD)
    older = (tmp_path / "out" / name).read_bytes()
    shards(NEW, "--force")
    (tmp_path / "out" / name).write_bytes(older)  # of the same size
    assert "meta.json: expected the train.bin and valid.bin that it describes" in parts_of(tmp_path / "out")


@pytest.mark.parametrize("name", ["train.bin", "valid.bin"])
def test_other_sizes_raise_an_error(tmp_path, shards, name):
    shards(OLD)
    with (tmp_path / "out" / name).open("ab") as file:
        file.write(b"x")
    assert f"{name}: expected {178 if name[0] == 't' else 20} bytes, as meta.json states" in parts_of(
        tmp_path / "out")


@pytest.mark.parametrize(("content", "message"), [
    ("{", "meta.json: "), ("[]", "meta.json: expected an object"),
    ("{}", "train.bin: expected None bytes"), ('{"train": 3}', "train.bin: expected None bytes"),
    ('{"format": 3}', "meta.json: expected format 2, found 3")])
def test_an_invalid_meta_json(tmp_path, shards, content, message):
    shards(OLD)
    (tmp_path / "out" / "meta.json").write_text(content)
    assert message in parts_of(tmp_path / "out")


def test_shards_of_earlier_versions_need_matching_sizes(tmp_path, shards):
    parts, meta = shards(OLD), tmp_path / "out" / "meta.json"
    earlier = {key: value for key, value in json.loads(meta.read_text()).items()
               if key not in ("format", "fingerprint")}
    meta.write_text(json.dumps(earlier))
    assert parts_of(tmp_path / "out") == parts
    earlier["valid"]["bytes"] += 1
    meta.write_text(json.dumps(earlier))
    assert "valid.bin: expected 21 bytes" in parts_of(tmp_path / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fcntl: nothing is locked there")
@pytest.mark.parametrize("options", [[], ["--force"]], ids=["new", "with force"])
def test_a_second_process_gets_an_error(tmp_path, capsys, options):
    out, statuses, listings = tmp_path / "out", [], []

    def meanwhile():
        yield b"some text, "
        statuses.append(main(["--source", "stories", "--out", str(out), "--max-bytes", "1000", *options]))
        listings.append(os.listdir(out))
        yield b"and more"

    write_shards(out, [TextSource("slow", meanwhile())], valid_fraction=0.1, force=bool(options))
    assert statuses == [2] and sorted(name[:11] for name in listings[0]) == [".train.bin.", ".valid.bin."]
    assert_one_line(capsys.readouterr().err, f"{out}: is in use by another process")
    assert parts_of(out) == (b"some text, and mo", b"re")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fcntl: nothing is locked there")
def test_the_lock_is_released(tmp_path, shards):
    shards(OLD)
    os.close(files.lock(tmp_path / "out", wait=False))


def test_other_files_in_the_directory_are_kept(tmp_path, shards):
    shards(OLD)
    (tmp_path / "out" / "README").write_text("mine")
    (tmp_path / "a.txt").write_text(NEW)
    (tmp_path / "out" / "meta.json").unlink()  # and both others, as left by a process killed twice
    for name in ("train.bin", "valid.bin"):
        (tmp_path / "out" / name).unlink()
    run_unwrapped(["--source", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--force"])
    assert parts_of(tmp_path / "out")[0] == NEW[:178].encode()
    assert (tmp_path / "out" / "README").read_text() == "mine"


def test_files_that_are_not_leftovers_are_kept(tmp_path, capsys):
    out = tmp_path / "out"
    for name in (".partial-notes", ".train.bin.swp", ".train.bin.original",
                 ".other.bin.0123abcd.tilelli-tmp"):
        out.mkdir()
        (out / name).write_text("mine")
        assert main(["--source", "stories", "--out", str(out)]) == 2
        assert_one_line(capsys.readouterr().err, f"{out}: holds other files and no shards")
        assert (out / name).read_text() == "mine"
        shutil.rmtree(out)
    (out / ".partial-mine").mkdir(parents=True)
    (out / ".partial-mine" / "file").touch()
    assert main(["--source", "stories", "--out", str(out)]) == 2
    assert (out / ".partial-mine" / "file").exists()


# ---------------------------------------------------------------------------------------------


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork and SIGKILL")


@needs_fork
@pytest.mark.parametrize(("before", "options", "expected"), [
    ("nothing", [], ["none", "rejected"]), ("shards", ["--force"], ["older", "rejected", "newer"]),
    pytest.param("torn", [], ["rejected", "none", "rejected"], marks=pytest.mark.exhaustive)])
def test_killed_at_any_file_operation(tmp_path, shards, before, options, expected):
    """Old shards, new shards or an error remain; the same command again writes the new ones."""
    out, saved, text = tmp_path / "out", tmp_path / "saved", tmp_path / "new.txt"
    older, newer, states = shards(OLD), (NEW[:178].encode(), NEW[178:].encode()), []
    text.write_text(NEW)
    command = ["--source", str(text), "--out", str(out), *options]
    out.rename(saved)
    if before == "torn":  # as left by a process killed between its renames
        (saved / "meta.json").rename(saved / ".meta.json.0123abcd.tilelli-tmp")
        (saved / "valid.bin").rename(saved / ".valid.bin.0123abcd.tilelli-tmp")

    def prepare():
        shutil.rmtree(out, ignore_errors=True)
        if before != "nothing":
            shutil.copytree(saved, out)

    def check(at):
        parts = parts_of(out) if out.exists() and os.listdir(out) else "none"
        assert isinstance(parts, str) or parts in (older, newer)
        states.append({older: "older", newer: "newer", "none": "none"}.get(parts, "rejected"))
        run_unwrapped(command)
        assert parts_of(out) == newer and sorted(os.listdir(out)) == sorted(FILES)

    kills = kill_at_every_file_operation(lambda: run_unwrapped(command), check, prepare=prepare,
                                         below=tmp_path)
    assert kills == len(states) > 15 and parts_of(out) == newer
    assert [state for state, _ in itertools.groupby(states)] == expected


@needs_fork
@pytest.mark.parametrize("source", [
    pytest.param("village-prompts", marks=pytest.mark.exhaustive), "village-calibration"])
def test_killed_while_writing_village_chat_data(tmp_path, source):
    out, states = tmp_path / "out", []
    several = source == "village-prompts"

    def write(number):
        run_unwrapped(["--source", source, "--out", str(out), "--each" if several else "--pairs", str(number),
                       "--force"])

    def current_files():
        return {path.name: path.read_bytes() for path in (out.iterdir() if several else [out])
                if not path.name.startswith(".")}

    write(2)
    older = current_files()
    write(3)
    newer = current_files()

    def check(at):
        parts = current_files()
        states.append("older" if parts == older else "newer" if parts == newer else "torn")
        # Then the last regime's file is missing, which a reader notices.
        assert states[-1] != "torn" or (several and f"{village.REGIMES[-1]}.jsonl" not in parts)
        write(3)
        assert current_files() == newer and os.listdir(tmp_path) == ["out"]
        assert not several or set(os.listdir(out)) == newer.keys()

    assert kill_at_every_file_operation(lambda: write(3), check, prepare=lambda: write(2),
                                        below=tmp_path) == len(states) > 5
    assert [state for state, _ in itertools.groupby(states)] == (
        ["older", "torn", "newer"] if several else ["older"])


@needs_fork
@pytest.mark.exhaustive
def test_killed_at_any_file_operation_of_a_separate_process(tmp_path, shards):
    out, text = tmp_path / "out", tmp_path / "new.txt"
    older, newer = shards(OLD), (NEW[:178].encode(), NEW[178:].encode())
    text.write_text(NEW)
    command = ["-m", "tilelli_jax", "data", "--source", str(text), "--out", str(out), "--force"]

    def check(at):
        parts = parts_of(out)
        assert isinstance(parts, str) or parts in (older, newer)
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        assert parts_of(out) == newer and sorted(os.listdir(out)) == sorted(FILES)

    assert kill_command_at_every_file_operation(command, check, prepare=lambda: shards(OLD, "--force"),
                                                below=tmp_path) > 15
