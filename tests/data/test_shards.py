"""`tilelli data` and the shards that it writes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest

from tilelli_jax.commands.data import main
from tilelli_jax.data.config import DataConfig
from tilelli_jax.data.corpus import open_corpus
from tilelli_jax.data.documents import TextSource
from tilelli_jax.data.shards import write_shards
from tilelli_jax.data.synthetic import facts, stories, village
from tilelli_jax.data.text_files import SAMPLE
from tilelli_jax.errors import InputError


def prepare(tmp_path, *sources, options=()):
    """Runs the command; returns its exit status and the contents of the two shards."""
    out = tmp_path / "out"
    status = main(["--source", *map(str, sources), "--out", str(out), *options])
    if status:
        return status, None, None
    assert sorted(os.listdir(out)) == ["meta.json", "train.bin", "valid.bin"]
    return status, (out / "train.bin").read_bytes(), (out / "valid.bin").read_bytes()


def test_shards_of_text_files_equal_opening_them(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("aé" * 50)
    (tmp_path / "b.txt").write_text("b" * 100)
    glob = str(tmp_path / "*.txt")
    status, train, valid = prepare(tmp_path, glob)
    assert status == 0
    splits = open_corpus(DataConfig(source=glob))
    assert train == splits.train.read(0, len(splits.train)).tobytes()
    assert valid == splits.valid.read(0, len(splits.valid)).tobytes()
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["sources"] == [{"source": glob, "bytes": 250, "own_validation": False}]
    assert meta["train"] == {"bytes": len(train), "sha256": hashlib.sha256(train).hexdigest()}
    assert meta["valid"] == {"bytes": len(valid), "sha256": hashlib.sha256(valid).hexdigest()}
    assert meta["valid_fraction"] == 0.1
    shown = capsys.readouterr()
    assert meta["train"]["sha256"][:16] in shown.out and shown.err == ""


@pytest.mark.parametrize("separator", [r"\n--\t", "\r\n--\t", r"\r\n--\t"])
def test_separators_are_between_files_in_both_splits(tmp_path, separator):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text({"b": "", "d": "d"}.get(name, name * 4))
    _, train, valid = prepare(tmp_path, *(tmp_path / f"{name}.txt" for name in "abcdc"),
                              options=["--separator", separator, "--valid-fraction", "0.5"])
    assert train == b"aa\n--\tcc\n--\tcc"  # it has nothing of d, and so no separator for it
    assert valid == b"aa\n--\tcc\n--\td\n--\tcc"


def test_json_lines(tmp_path):
    rows = [{"id": "x", "text": "née"}, {"id": "y", "text": "two"}, {"id": "z", "text": "3"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    _, train, valid = prepare(tmp_path, path, options=["--valid-fraction", "0.01"])
    assert train + valid == "née\n\ntwo\n\n3".encode()
    _, train, valid = prepare(tmp_path, path, options=[
        "--column", "id", "--separator", "", "--valid-fraction", "0.34", "--force"])
    assert (train, valid) == (b"x", b"yz")


def test_stories_are_the_corpus_of_the_default_configuration(tmp_path):
    _, train, valid = prepare(tmp_path, "stories", options=["--max-bytes", "50000"])
    assert train == stories.generate(50_000) and valid == stories.generate(5_000, 0, "valid")


def test_facts_are_the_corpus_of_the_default_configuration(tmp_path):
    _, train, valid = prepare(tmp_path, "facts")
    assert train == facts.text() and valid == facts.text(split="valid")


def test_the_village_is_the_corpus_of_the_default_configuration(tmp_path):
    _, train, valid = prepare(tmp_path, "village")
    world = village.world()
    assert train == village.text(world) and valid == village.text(world, split="valid")


def test_max_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 30)
    (tmp_path / "b.txt").write_text("b" * 30)
    _, train, valid = prepare(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", options=[
        "--max-bytes", "40", "--separator", ""])
    assert train == b"a" * 27 + b"b" * 9 and valid == b"aaab"


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_memory_does_not_grow_with_the_text(tmp_path, kind):
    size = 40_000_000
    path = tmp_path / f"big.{kind}"
    with path.open("wb") as file:
        if kind == "txt":
            file.write(b"a" * SAMPLE)
            file.truncate(size)
        else:
            line = json.dumps({"text": "x" * 10_000}).encode() + b"\n"
            file.writelines(line for _ in range(size // 10_000))
    tracemalloc.start()
    try:
        assert main(["--source", str(path), "--out", str(tmp_path / "out"),
                     "--valid-fraction", "0.5"]) == 0
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "valid.bin").stat().st_size >= size // 2


def test_existing_shards_are_kept_without_force(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("first, a text")
    (tmp_path / "b.txt").write_text("second, a text")
    _, train, _ = prepare(tmp_path, tmp_path / "a.txt")
    assert prepare(tmp_path, tmp_path / "b.txt")[0] == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "out" / "train.bin").read_bytes() == train
    assert prepare(tmp_path, tmp_path / "b.txt", options=["--force"])[1].startswith(b"second")


def test_a_failed_run_changes_nothing(tmp_path):
    def failing(error):
        yield b"some text"
        raise error

    for error in (KeyboardInterrupt(), InputError("bad row"), RuntimeError()):
        with pytest.raises(type(error)):
            write_shards(tmp_path / "new" / "out", [TextSource("x", failing(error))],
                         valid_fraction=0.1)
        assert os.listdir(tmp_path) == []


def test_a_terminated_run_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-m", "tilelli_jax", "data", "--source", "stories",
                                "--out", str(out), "--max-bytes", "100000000000"])
    deadline = time.monotonic() + 60
    while not list(out.glob(".train.bin.*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("line", "message"), [
    ("not json", "line 2: not JSON"),
    ('["text"]', "line 2: expected fields"),
    ('{"other": "x"}', "line 2: expected text under 'text', found only other"),
    ('{"text": 3}', "line 2: expected text under 'text', found a number"),
    ('{"text": null}', "line 2: expected text under 'text', found null"),
    ('{"text": "\\ud800 a"}', "rows.jsonl, line 2: expected text, found a lone surrogate"),
    ('{"text": "a", "more": ["\\udfff"]}', "rows.jsonl, line 2: expected text, found a lone surrogate"),
])
def test_bad_rows_are_named(tmp_path, capsys, line, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    assert prepare(tmp_path, tmp_path / "rows.jsonl")[0] == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize(("line", "found"), [
    ('{"text": 5}', "'text' with a number"), ('{"a": 5, "b": ["x"]}', "'a' with a number, 'b' with a list"),
    ("{}", "none")])
def test_a_row_without_text(tmp_path, capsys, line, found):
    (tmp_path / "rows.jsonl").write_text(line)
    assert prepare(tmp_path, tmp_path / "rows.jsonl")[0] == 2
    message = f"error: {tmp_path / 'rows.jsonl'}, line 1: expected a column with text, found {found}\n"
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.parametrize(("content", "options", "part"), [
    ("x", [], "training"), ("some text", ["--max-bytes", "1"], "training"),
    ("é", ["--valid-fraction", "0.4"], "validation")])
def test_an_empty_split(tmp_path, capsys, content, options, part):
    (tmp_path / "a.txt").write_text(content)
    assert prepare(tmp_path, tmp_path / "a.txt", options=options)[0] == 2
    message = f"error: {tmp_path / 'a.txt'}: the {part} part is empty: the text is too short\n"
    assert capsys.readouterr().err.endswith(message)
    assert os.listdir(tmp_path) == ["a.txt"]


def devices(tmp_path):
    """Returns names of non-regular files, and the error for each."""
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "nothing.txt").symlink_to("nowhere")
    return {**dict.fromkeys((tmp_path / "pipe.txt", tmp_path / "pip*.txt"),
                            "pipe.txt: cannot be read: expected a regular file, found a pipe"),
            "/dev/zero": "/dev/zero: cannot be read: expected a regular file, found a device",
            "/dev/null": "/dev/null: cannot be read: expected a regular file, found a device",
            tmp_path / "loop.txt": "loop.txt: cannot be read: Too many levels of symbolic links",
            tmp_path / "nothing.txt": "nothing.txt: no such file", "a\0b": "no such file or directory"}


def test_files_that_are_not_regular(tmp_path, capsys):
    for name, message in devices(tmp_path).items():
        assert prepare(tmp_path, name)[0] == 2
        assert message in capsys.readouterr().err
        with pytest.raises(InputError, match=message):
            open_corpus(DataConfig(source=str(name)))


def test_files_that_are_read_twice_give_a_warning(tmp_path, caplog):
    for name in ("g0.txt", "g1.txt"):
        (tmp_path / name).write_text(name * 9)
    assert prepare(tmp_path, tmp_path / "g0.txt", tmp_path / "g1.txt")[0] == 0 and not caplog.records
    assert prepare(tmp_path, tmp_path / "g0.txt", tmp_path / "g*.txt", options=["--force"])[0] == 0
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 'g0.txt'}: is read 2 times"]


def test_options_that_would_have_no_effect(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "a.jsonl").write_text('{"other": "some text"}')
    text, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    for sources, options, message in (
            ([text, "facts"], ["--column", "nope"],
             f"--column: is for .jsonl files and data sets, found {text}, facts"),
            (["village-chat"], ["--column", "nope"], "--column: is for texts, found --source village-chat"),
            (["village-prompts"], ["--max-bytes", "9"], "--max-bytes: is for texts, found --source village")):
        assert prepare(tmp_path, *sources, options=options)[0] == 2
        assert f"error: {message}" in capsys.readouterr().err
    assert prepare(tmp_path, text, rows, options=["--column", "other"])[0] == 0


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 100)
    out = tmp_path / "out"
    for name in (".partial-ab12", ".partial-cd34"):  # leftovers of earlier versions
        (out / name).mkdir(parents=True)
    for name in (".partial-cd34/train.bin", ".valid.bin.0123abcd.tilelli-tmp"):
        (out / name).write_text("half of it")
    assert prepare(tmp_path, tmp_path / "a.txt")[0] == 0  # checks the whole directory


def test_bad_arguments_are_one_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "rows.jsonl").write_text('{"a": "x", "b": "y"}')
    for sources, options, message in (
        ([tmp_path / "none.txt"], [], "no such file"),
        ([tmp_path], [], "is a directory"),
        ([tmp_path / "empty.txt"], [], "no bytes"),
        ([tmp_path / "rows.jsonl"], [], "which column"),
        ([tmp_path / "a.txt"], ["--valid-fraction", "1.5"],
         "--valid-fraction: expected a number > 0 and < 1, found 1.5"),
        ([tmp_path / "a.txt"], ["--max-bytes", "0"], "--max-bytes"),
        ([tmp_path / "a.txt"], ["--separator", "\udc80"], "--separator: expected UTF-8, found"),
        ([tmp_path / "a.txt"], ["--out", ""], "--out, --source: expected a name, found an empty one"),
        ([tmp_path / "a.txt"], ["--out", str(tmp_path)], "holds other files and no shards"),
        ([tmp_path / "a.txt"], ["--out", str(tmp_path / "a.txt" / "out")], "cannot be written"),
    ):
        assert prepare(tmp_path, *sources, options=options)[0] == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "empty.txt", "rows.jsonl"]
