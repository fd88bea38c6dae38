"""The village's files: the repository's prompts, chat and calibration by the command, invalid options."""

import json
from pathlib import Path

import pytest

from tests.error_lines import assert_one_line
from tilelli_jax.commands.data import main
from tilelli_jax.data.synthetic import village

PROMPTS = Path(__file__).parents[2] / "eval/abstention/prompts"
WORLD = village.world()


def test_the_repository_files_equal_the_generated_ones(tmp_path):
    assert main(["--source", "village-prompts", "--out", str(tmp_path / "p")]) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()}
    assert files == {path.name: path.read_bytes() for path in PROMPTS.iterdir()}
    assert files.keys() == {f"{regime}.jsonl" for regime in village.REGIMES}
    rows = [json.loads(line) for regime in village.REGIMES
            for line in files[f"{regime}.jsonl"].splitlines()]
    assert [village.EvaluationPrompt(**row) for row in rows] == village.prompts(WORLD)


def test_chat_and_calibration_as_files(tmp_path, capsys):
    out = tmp_path / "new" / "chat.jsonl"
    options = ["--source", "village-chat", "--out", str(out), "--pairs", "50", "--seed", "4",
               "--people", "48", "--village-seed", "2", "--unanswerable", "0.3",
               "--kinds", "real_topic", "gibberish"]
    assert main(options) == 0 and "50" in capsys.readouterr().out
    expected = village.chat(village.world(2, 48), 50, 4, 0.3, ("real_topic", "gibberish"))
    assert [village.VillagePair(**json.loads(line)) for line in out.read_text().splitlines()] == expected
    before = out.read_bytes()
    assert main([*options, "--pairs", "3"]) == 2
    assert_one_line(capsys.readouterr().err, str(out), "--force")
    assert out.read_bytes() == before
    assert main([*options, "--pairs", "3", "--force"]) == 0 and out.read_bytes().count(b"\n") == 3
    out = tmp_path / "calibration.jsonl"
    assert main(["--source", "village-calibration", "--out", str(out), "--pairs", "9"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [pair.prompt for pair in village.calibration(WORLD, 9)]
    assert all(row["answerable"] and row["response"] for row in rows)


@pytest.mark.parametrize(("options", "message"), [
    (["--source", "village-chat", "stories"], "cannot be combined with other sources"),
    (["--source", "stories", "village-chat"], "cannot be combined with other sources"),
    (["--source", "stories", "--pairs", "3"], "--pairs: is for --source village-chat or village-"),
    (["--source", "village-prompts", "--kinds", "real_topic"], "--kinds: is for --source village-chat"),
    (["--source", "village-chat", "--village-seed", "-1"], "--village-seed: expected 0 to"),
    (["--source", "village-chat", "--people", "7"], "--people: expected a multiple of 48"),
    (["--source", "village-chat", "--people", "0"], "--people: expected a multiple of 48"),
    (["--source", "village-chat", "--kinds", "nice"], "--kinds: expected some of unknown_entity"),
    (["--source", "village-calibration", "--pairs", "100000"], "--pairs: expected 100000 "),
    (["--source", "village-prompts", "--each", "-1"], "--each: expected at least 0"),
    (["--source", "village-chat", "--pairs", "-1"], "--pairs: expected at least 0, found -1"),
    (["--source", "village-chat", "--unanswerable", "2"],
     "--unanswerable: expected a fraction from 0 to 1, found 2.0"),
    (["--source", "village-chat", "--valid-fraction", "0.1"],
     "--valid-fraction: is for texts, found --source village-chat"),
    (["--source", "village-prompts", "--separator", ""],
     "--separator: is for texts, found --source village-prompts"),
])
def test_invalid_options_are_one_line_and_write_nothing(tmp_path, capsys, options, message):
    assert main([*options, "--out", str(tmp_path / "out")]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out, message in ((tmp_path / "file" / "chat.jsonl", "cannot be written"),
                         (tmp_path, "expected a file, found a directory")):
        assert main(["--source", "village-chat", "--pairs", "2", "--out", str(out)]) == 2
        assert_one_line(capsys.readouterr().err, message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
