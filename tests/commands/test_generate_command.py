"""tilelli generate: its output, and errors for invalid input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tilelli_jax
from tests.hugging_face_directory import BOS, END, WORDS, words_of, write_directory
from tests.reference_impl.memorised_text import reciter
from tests.reference_impl.random_weights import random_network
from tilelli_jax.cli.command import command
from tilelli_jax.commands.generate import main
from tilelli_jax.errors import InputError
from tilelli_jax.generation import decoding
from tilelli_jax.models.gemma4 import Gemma4Config
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.t5 import T5Config

ROOT = Path(__file__).parents[2]
SCRIPT = "0123456789 Grüße\x00an alle. END and more"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "reciter"
    tilelli_jax.save(reciter(SCRIPT.encode(), size=64), path)
    return path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_a_prompt_is_printed_with_its_continuation(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", model, "--prompt", "01", "--temperature", 0, "--max-new", 7) == 0
    assert capsys.readouterr() == ("012345678\n", "")
    assert run("--model", model, "--prompt", "é", "--temperature", 0, "--stop", "Z", "--stop", " END") == 0
    assert capsys.readouterr() == ("é23456789 Grüße\x00an alle.\n",
                                   "note: decoding to 202 tokens: past 64 each sees the last 64 only\n")
    assert run("--model", model, "--prompt", "x", "--max-new", 0) == 0
    assert capsys.readouterr() == ("x\n", "")


def test_several_prompts_are_printed_as_jsonl(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", model, "--prompt", "0", "--prompt", "é", "--temperature", 0, "--max-new", 3) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"prompt": "0", "text": "123", "stopped": False}, {"prompt": "é", "text": "234", "stopped": False}]


def test_every_sampling_option_is_passed_on(
        model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    passed = {}

    def generate(_: object, prompts: list[bytes], **options: object) -> list[decoding.Continuation]:
        passed.update(options, prompts=prompts)
        return [decoding.Continuation(b"!", True, False)] * 2

    monkeypatch.setattr(decoding, "generate", generate)
    assert run("--model", model, "--prompt", "x", "--prompt", "y", "--max-new", 3, "--temperature", 0.5,
               "--top-k", 4, "--top-p", 0.6, "--seed", 7, "--stop", "b") == 0
    assert passed == {"prompts": [b"x", b"y"], "max_new": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.6,
                      "seed": 7, "stop": ["b"]}
    assert capsys.readouterr().out.splitlines() == [
        '{"prompt": "x", "text": "!", "stopped": true}', '{"prompt": "y", "text": "!", "stopped": true}']


LINES = ["0", "Zürich", "  two  words\u2028 on one line ", "{}"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file_of_prompts(
        suffix: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / f"prompts{suffix}", tmp_path / "out.jsonl"
    lines = LINES if suffix == ".txt" else [
        json.dumps({"id": 3, "prompt": line}, ensure_ascii=False) for line in LINES]
    source.write_bytes("\n".join([lines[0], "", *lines[1:3]]).encode() + b"\r\n \n" + lines[3].encode())
    arguments = ("--model", model, "--prompts-file", source, "--temperature", 0, "--max-new", 9,
                 "--stop", "7")
    assert run(*arguments) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in printed.removesuffix("\n").split("\n")]
    assert [row["prompt"] for row in rows] == LINES
    for row in rows:
        following = SCRIPT.encode()[len(row["prompt"].encode()):][:9]
        assert row["stopped"] == (b"7" in following)
        assert row["text"] == following.partition(b"7")[0].decode(errors="replace")
    assert run(*arguments, "--out", out) == 0
    assert capsys.readouterr().out == "" and out.read_text(encoding="utf-8") == printed
    assert sorted(tmp_path.iterdir()) == sorted([source, out])


def test_one_prompt_written_to_a_file(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    assert run("--model", model, "--prompt", "01", "--temperature", 0, "--max-new", 3, "--out", out) == 0
    assert json.loads(out.read_text()) == {"prompt": "01", "text": "234", "stopped": False}


def test_a_failed_write_leaves_the_old_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run("--model", model, "--prompt", "x", "--max-new", 0, "--out", out) == 2
    assert capsys.readouterr().err == f"error: --out: {out} cannot be written: No space left on device\n"
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def bad_model(change: Callable[[Path], object]) -> Callable[[Path, Path], list[object]]:
    def arguments(model: Path, tmp_path: Path) -> list[object]:
        copy = tmp_path / "model"
        copy.mkdir()
        for name in ("config.json", "model.safetensors"):
            (copy / name).write_bytes((model / name).read_bytes())
        change(copy)
        return ["--model", copy, "--prompt", "x"]
    return arguments


def prompts_file(name: str, content: bytes) -> Callable[[Path, Path], list[object]]:
    def arguments(model: Path, tmp_path: Path) -> list[object]:
        (tmp_path / name).write_bytes(content)
        return ["--model", model, "--prompts-file", tmp_path / name]
    return arguments


def options(*more: object) -> Callable[[Path, Path], list[object]]:
    return lambda model, tmp_path: ["--model", model, "--prompt", "x",
                                    *(tmp_path / o if isinstance(o, Path) else o for o in more)]


@pytest.mark.parametrize(("arguments", "message"), [
    (lambda model, tmp: ["--model", tmp / "none", "--prompt", "x"],
     "{tmp}/none: no such file or directory"),
    (lambda model, tmp: ["--model", model / "config.json", "--prompt", "x"],
     "{model}/config.json: expected a model directory (config.json and model.safetensors), found a file"),
    (lambda model, tmp: ["--model", tmp, "--prompt", "x"],
     "{tmp}: not a model directory: config.json is missing"),
    (bad_model(lambda path: (path / "model.safetensors").unlink()),
     "{tmp}/model: not a model directory: model.safetensors is missing"),
    (bad_model(lambda path: os.truncate(path / "model.safetensors", 1000)),
     "{tmp}/model/model.safetensors: cannot be read: "),
    (bad_model(lambda path: (path / "config.json").write_text("{")),
     "{tmp}/model/config.json: not JSON: "),
    (bad_model(lambda path: (path / "config.json").write_text('{"family": "vanilla", "d_modl": 3}')),
     "{tmp}/model/config.json: unknown key 'd_modl' (did you mean 'd_model'?)"),
    (bad_model(lambda path: (path / "config.json").write_text('{"family": "vanilla"}')),
     "{tmp}/model/model.safetensors: tensors do not fit the configuration; missing: blocks.1.attention.out"),
    (lambda model, tmp: ["--model", model, "--prompt", ""], "--prompt: expected at least one character"),
    (options("--max-new", -1), "--max-new: expected an integer ≥ 0 and ≤ 1048576, found -1"),
    (options("--temperature", -1), "--temperature: expected a number ≥ 0 and ≤ 1e+30, found -1.0"),
    (options("--temperature", "nan"), "--temperature: expected a number ≥ 0 and ≤ 1e+30, found nan"),
    (options("--top-k", -1), "--top-k: expected an integer ≥ 0, found -1"),
    (options("--top-p", 0), "--top-p: expected a number > 0 and ≤ 1, found 0.0"),
    (options("--seed", -1), "--seed: expected an integer ≥ 0 and ≤ 4294967295, found -1"),
    (options("--stop", ""), "--stop: expected at least one character"),
    (options("--out", Path("no/out.jsonl")),
     "--out: {tmp}/no/out.jsonl cannot be written: No such file or directory"),
    (options("--out", Path(".")), "--out: {tmp}: expected a file, found a directory"),
    (options("--out", Path("/proc/out.jsonl")), "--out: /proc/out.jsonl cannot be written: "),
    (lambda model, tmp: ["--model", model, "--prompts-file", tmp / "none.txt"],
     "{tmp}/none.txt: no such file"),
    (lambda model, tmp: ["--model", model, "--prompts-file", tmp],
     "{tmp}: cannot be read: expected a regular file, found a directory"),
    (prompts_file("empty.txt", b"\n  \n"), "{tmp}/empty.txt: expected at least one prompt, found none"),
    (prompts_file("p.txt", b"good\nb\xffd\n"), "{tmp}/p.txt, line 2: not UTF-8 at byte 2"),
    (prompts_file("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n'),
     "{tmp}/p.jsonl, line 3: not JSON"),
    (prompts_file("p.jsonl", b'{"text": "a"}'), "{tmp}/p.jsonl, line 1: expected an object"),
    (prompts_file("p.jsonl", b'["a"]'), "{tmp}/p.jsonl, line 1: expected an object"),
    (prompts_file("p.jsonl", b'{"prompt": 3}'), "{tmp}/p.jsonl, line 1: expected an object"),
    (prompts_file("p.jsonl", b'{"prompt": ""}'), "{tmp}/p.jsonl, line 1: expected an object"),
    (prompts_file("p.jsonl", b'{"prompt": "\\ud800"}'),
     "{tmp}/p.jsonl, line 1: expected text, found a lone surrogate"),
])
def test_bad_input_is_one_line_and_exit_2(
        arguments: Callable[[Path, Path], list[object]], message: str, model: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    command_arguments = arguments(model, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run(*command_arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: " + message.format(tmp=tmp_path, model=model))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", [
    [], ["--model", "m"], ["--model", "m", "--prompt", "x", "--prompts-file", "y"],
    ["--model", "m", "--prompt", "x", "--max-new", "many"],
    ["--model", "m", "--prompt", "x", "--tempature", "1"]])
def test_bad_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


# Pretrained networks with a tokenizer.

NEOX = GPTNeoXConfig(vocab_size=12, d_model=16, n_layers=2, max_seq_len=64, n_heads=2, d_hidden=32,
                     end_ids=(END,))
GEMMA = Gemma4Config(
    vocab_size=12, d_model=24, layers=("sliding", "full"), max_seq_len=64, n_heads=4, n_kv_heads=2, d_head=6,
    n_kv_heads_full=2, d_head_full=12, window=5, n_shared_layers=0, d_hidden=20, d_per_layer=4,
    vocab_per_layer=12, end_ids=(END,))
IDS = {word: i for i, word in enumerate(WORDS)}


@pytest.mark.parametrize("config", [NEOX, pytest.param(GEMMA, marks=pytest.mark.exhaustive)],
                         ids=lambda config: config.family)
def test_pretrained_networks(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text is that of `generate_ids` after BOS and the prompt, streamed or as JSON lines."""
    network = write_directory(tmp_path / "hf", config)
    prompts = ["a cat", "who sat on the mat"]
    ids = [[BOS, *(IDS[word] for word in prompt.split())] for prompt in prompts]
    options = {"temperature": 0.9, "top_k": 11, "seed": 5, "max_new": 12}
    expected = tilelli_jax.generate_ids(network, ids, **options)
    assert any(result.ended for result in expected) and not all(result.ended for result in expected)
    arguments = ("--model", tmp_path / "hf", *(
        part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)))
    assert run(*arguments, *(part for prompt in prompts for part in ("--prompt", prompt))) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"prompt": prompt, "text": words_of(result.ids), "stopped": result.ended}
                    for prompt, result in zip(prompts, expected, strict=True)]
    assert run(*arguments, "--prompt", prompts[0]) == 0
    assert capsys.readouterr() == (f"a cat{words_of(expected[0].ids)}\n", "")
    # Up to a stop string, in both forms.
    word = WORDS[expected[0].ids[4]]
    left = words_of(expected[0].ids).partition(word)[0]
    assert run(*arguments, "--prompt", prompts[0], "--stop", word) == 0
    assert capsys.readouterr().out == f"a cat{left}\n"
    assert run(*arguments, "--prompt", prompts[0], "--stop", word, "--out", tmp_path / "out.jsonl") == 0
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {
        "prompt": "a cat", "text": left, "stopped": True}


def test_the_chat_template_of_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The template's own BOS token is the only one; the reply is printed alone."""
    pytest.importorskip("transformers", reason="transformers (extra: hf) is not installed")
    network = write_directory(tmp_path, NEOX)
    ids = [IDS[word] for word in ("<s>", "<user>", "who", "sat", "<model>")]
    expected, = tilelli_jax.generate_ids(network, [ids], max_new=9, temperature=0)
    arguments = ("--model", tmp_path, "--chat", "--prompt", "who sat", "--temperature", 0, "--max-new", 9)
    assert run(*arguments) == 0
    assert capsys.readouterr() == (f"{words_of(expected.ids)}\n", "")
    assert run(*arguments, "--out", tmp_path / "out.jsonl") == 0
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row == {"prompt": "who sat", "text": words_of(expected.ids), "stopped": expected.ended}


def test_options_that_do_not_fit_the_network(
        model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_network(T5Config(vocab_size=8, d_model=12, n_layers=1, n_decoder_layers=1, n_heads=2, d_head=4,
                            d_hidden=8), 0)[0].save_pretrained(tmp_path / "t5")
    random_network(NEOX, 0)[0].save_pretrained(tmp_path / "none")
    write_directory(tmp_path / "base", NEOX, template=None)
    for directory, options, message in (
            (tmp_path / "t5", [], "t5: expected a network that continues texts, found family t5"),
            (tmp_path / "none", [], "none/tokenizer.json: no such file: expected the network's tokenizer"),
            (tmp_path / "base", ["--chat"],
             f"--chat: expected a chat template in {tmp_path}/base, found none"),
            (tmp_path / "base", ["--abstain"],
             "--abstain: expected a byte-level network, found family gpt_neox"),
            (model, ["--tokenizer", tmp_path / "base"],
             f"--tokenizer: expected none, as {model} is a byte-level network, found {tmp_path}/base")):
        assert run("--model", directory, "--prompt", "a", *options) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.endswith(f"{message}\n")
    assert run("--model", tmp_path / "none", "--tokenizer", tmp_path / "base", "--dtype", "bfloat16",
               "--prompt", "a cat", "--max-new", 2, "--temperature", 0) == 0
    assert capsys.readouterr().out.startswith("a cat ")


def test_as_a_process(model: Path) -> None:
    """A prompt that is not UTF-8 works; stderr stays empty."""
    command = [sys.executable, "-m", "tilelli_jax", "generate", "--model", model, "--temperature", "0"]
    done = subprocess.run([*command, "--prompt", b"\xff1", "--max-new", "4"], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (0, "�12345\n", "")


def test_a_closed_pipe_is_no_error() -> None:
    script = ("import sys; from tilelli_jax.cli.command import command\n"
              "@command\ndef main(argv): sys.stdin.read(); print('x' * int(argv[0]))\n"
              "sys.exit(main())")
    for size in (1, 10**6):  # written at the program's end, and earlier
        process = subprocess.Popen([sys.executable, "-c", script, str(size)], cwd=ROOT, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b"" and process.wait() == 141
        process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_one_line() -> None:
    script = ("import sys; from tilelli_jax.cli.command import command\n"
              "@command\ndef main(argv): print('x' * int(argv[0]))\nsys.exit(main())")
    for size in ("1", "1000000"):
        with open("/dev/full", "wb") as full:
            done = subprocess.run([sys.executable, "-c", script, size], cwd=ROOT, stdout=full,
                                  stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (2, b"error: output: No space left on device\n")


def test_closed_output_and_characters_outside_its_encoding() -> None:
    script = ("import sys; from tilelli_jax.cli.command import command\n"
              "@command\ndef main(argv): print('\xd7\ufffd')\nsys.exit(main())")
    for encoding, printed in (("ascii", b"??\n"), ("latin-1", b"\xd7?\n"), ("utf-8", "×\ufffd\n".encode())):
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True,
                              env=os.environ | {"PYTHONIOENCODING": encoding})
        assert (done.returncode, done.stdout, done.stderr) == (0, printed, b"")
    closed = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, script], cwd=ROOT,
                            stderr=subprocess.PIPE)
    assert (closed.returncode, closed.stderr) == (0, b"")


def test_exit_statuses_of_errors(capsys: pytest.CaptureFixture[str]) -> None:
    def exit_status(error: BaseException | int | None) -> int:
        @command
        def main(argv: object) -> int | None:
            if isinstance(error, BaseException):
                raise error
            return error
        return main([])

    assert exit_status(None) == 0 and exit_status(3) == 3
    assert exit_status(InputError("a:\n  b")) == 2
    assert exit_status(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "error: a: b\ninterrupted\n"
    with pytest.raises(ValueError, match="ours"):
        exit_status(ValueError("ours"))
