"""tilelli chat: turns, commands, and interruptions."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.monitoring
import pytest

import tilelli_jax
from tests.hugging_face_directory import END, words_of, write_directory
from tests.reference_impl.memorised_text import reciter
from tilelli_jax.commands import chat
from tilelli_jax.commands.chat import crop, main, reply
from tilelli_jax.loading.store import build
from tilelli_jax.models import VanillaConfig
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.sampling import Sampling

ROOT = Path(__file__).parents[2]
FIRST = "USER: hi\nTILELLI:"  # the model's input for a first question "hi"
GREEDY = Sampling(temperature=0.0, max_new=60)


def answering(answer: str | bytes) -> Decoder:
    """Returns a model that gives `answer` if the first question is "hi"."""
    answer = answer.encode() if isinstance(answer, str) else answer
    return reciter(FIRST.encode() + answer)


def save(model: Decoder, path: Path) -> Path:
    tilelli_jax.save(model, path)
    return path


def run_chat(model: Path, typed: str, monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return main(["--model", str(model), "--temperature", "0", *map(str, options)])


# One turn.

@pytest.mark.parametrize(("answer", "expected"), [
    (" Hello!\nUSER: and", " Hello!"),
    ("\nUSER: and", ""),
    (" a\nUSE\nUS\n\nUSER:", " a\nUSE\nUS\n"),
    (" USER: is not at the beginning\nUSER: is", " USER: is not at the beginning"),
    (" Grüße, 🙂 €!\nUSER:", " Grüße, 🙂 €!"),
    (b" \xff\xc3(\x80\nUSER:", " ��(�"),
])
def test_a_reply_ends_before_the_next_turn(answer: str | bytes, expected: str) -> None:
    pieces = list(reply(answering(answer), FIRST, GREEDY))
    assert "".join(pieces) == expected


def test_pieces_of_a_reply_split_no_character() -> None:
    answer = "äöü€🙂" * 4
    pieces = list(reply(answering(" " + answer), FIRST, Sampling(temperature=0.0, max_new=50)))
    assert len(pieces) == 7  # 50 bytes, 8 at a time
    assert "".join(pieces) == " " + answer[:19] and "�" not in "".join(pieces)


@pytest.mark.parametrize("cut", range(1, 8))
def test_incomplete_text_at_the_length_limit_is_dropped(cut: int) -> None:
    """An incomplete character, or a possible start of the next turn."""
    model = answering(" ok\nUSER:")
    assert "".join(reply(model, FIRST, Sampling(temperature=0.0, max_new=3 + cut))) == " ok"
    model = answering(" ok\nUSERS")
    text = "".join(reply(model, FIRST, Sampling(temperature=0.0, max_new=3 + cut)))
    assert text.rstrip("\0") == (" ok" if cut < 6 else " ok\nUSERS")
    model = answering(" ok🙂")
    text = "".join(reply(model, FIRST, Sampling(temperature=0.0, max_new=3 + cut)))
    assert text.rstrip("\0") == (" ok" if cut < 4 else " ok🙂")


def test_another_length_needs_no_compilation(request: pytest.FixtureRequest) -> None:
    compiled = []

    def listen(event: str, _: float, **__: object) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    request.addfinalizer(lambda: jax.monitoring.unregister_event_duration_listener(listen))
    model = reciter(FIRST.encode(), size=112)  # a size that no other test has compiled
    list(reply(model, FIRST, GREEDY))
    assert compiled
    compiled.clear()
    for history, max_new in ((FIRST, 61), (FIRST, 90), ("USER: something else\nTILELLI:", 41), ("x", 64)):
        list(reply(model, history, Sampling(temperature=0.7, top_k=3, max_new=max_new, seed=3)))
    assert compiled == []


# The part of the conversation that the model sees.

HISTORY = "USER: one\nTILELLI: first\nUSER: two\nTILELLI: second\nUSER: three\nTILELLI:"


def test_a_long_history_loses_whole_turns_first() -> None:
    turns = [HISTORY.index("USER: two"), HISTORY.index("USER: three")]
    for size in range(len(HISTORY) + 3, 0, -1):
        cropped = crop(HISTORY, size)
        assert len(cropped) <= size
        if size >= len(HISTORY):
            assert cropped == HISTORY
        elif size >= len(HISTORY) - turns[0]:
            assert cropped == HISTORY[turns[0]:]
        elif size >= len(HISTORY) - turns[1]:
            assert cropped == HISTORY[turns[1]:]
        else:
            assert cropped == HISTORY[-size:]


def test_a_long_turn_loses_whole_characters() -> None:
    long = "USER: " + "€" * 100 + "\nTILELLI:"
    for size in range(12, 60):
        cropped = crop(long, size)
        assert re.fullmatch("€+\nTILELLI:", cropped) and size - 3 < len(cropped.encode()) <= size


@pytest.mark.parametrize(("max_new", "seen"), [(200, 32), (10, 54)])
def test_cropping_leaves_room_for_the_answer(
        max_new: int, seen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    histories = []

    def recorded(model: Decoder, history: str, sampling: Sampling) -> Iterator[str]:
        histories.append((history, sampling))
        yield " yes"
        yield "\n"

    monkeypatch.setattr(chat, "reply", recorded)
    model = save(reciter(b"", size=64), tmp_path / "model")
    assert run_chat(model, "one\n\n two  \n/reset\nthree\nfour\n" + "x" * 200, monkeypatch,
                    "--max-new", max_new, "--seed", 4, "--top-k", 5, "--top-p", 0.5) == 0
    full = ["USER: one\nTILELLI:", "USER: one\nTILELLI: yes\nUSER: two\nTILELLI:", "USER: three\nTILELLI:",
            "USER: three\nTILELLI: yes\nUSER: four\nTILELLI:"]
    for (found, sampling), expected in zip(histories[:4], full, strict=True):
        assert found == (expected if len(expected) <= seen else expected[expected.index("yes\n") + 4:])
        assert (sampling.top_k, sampling.top_p, sampling.max_new) == (5, 0.5, max_new)
    assert [sampling.seed for _, sampling in histories] == [5, 6, 7, 8, 9]
    assert histories[4][0] == "x" * (seen - 9) + "\nTILELLI:"
    out = capsys.readouterr().out
    note = "(from here on the model no longer sees the start of this conversation)"
    assert out.count(note) == 1 + (seen < 40)
    assert out.count("(conversation cleared)") == 1


@pytest.mark.parametrize(("max_new", "positions", "note"), [
    (60, "learned", "(the conversation exceeds the 64 bytes that the model was trained on; each byte sees "
                    "the last 64 only)"),
    (60, "none", "(the conversation exceeds the 64 bytes that the model was trained on)"),
    (40, "learned", None)])
def test_exceeding_the_trained_length_is_printed_once(
        max_new: int, positions: Literal["learned", "none"], note: str | None, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def answers(model: Decoder, history: str, sampling: Sampling) -> Iterator[str]:
        yield "x" * sampling.max_new

    monkeypatch.setattr(chat, "reply", answers)
    config = VanillaConfig(d_model=8, n_layers=1, max_seq_len=64, n_heads=1, positions=positions)
    model = save(build(config), tmp_path / "model")
    assert run_chat(model, "one\n/reset\ntwo", monkeypatch, "--max-new", max_new) == 0
    out = capsys.readouterr().out
    assert out.count("(the conversation exceeds") == (1 if note else 0)
    assert note is None or f"{note}\n" in out


# The conversation.

def test_commands_and_the_end_of_input(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(answering(" Hello!\nUSER: and"), tmp_path / "model")
    typed = "hi\n/temp 0.5\n/temp cold\n/temp -1\n/temp nan\n/temp\n/what\n/help\n/reset\nhi"
    assert run_chat(model, typed, monkeypatch) == 0
    out, err = capsys.readouterr()
    assert err == "" and out == (
        f"{model}: vanilla. /reset, /temp T, /help, /quit; Ctrl-C stops an answer.\n"
        "USER: hi\nTILELLI: Hello!\n"
        "USER: /temp 0.5\n(temperature 0.5)\n"
        "USER: /temp cold\n(/temp: expected a number ≥ 0, found 'cold')\n"
        "USER: /temp -1\n(/temp: expected a number ≥ 0, found '-1')\n"
        "USER: /temp nan\n(/temp: expected a number ≥ 0, found 'nan')\n"
        "USER: /temp\n(/temp: expected a number ≥ 0, found '')\n"
        "USER: /what\n(commands: /reset, /temp T, /help, /quit)\n"
        "USER: /help\n(commands: /reset, /temp T, /help, /quit)\n"
        "USER: /reset\n(conversation cleared)\n"
        "USER: hi\nTILELLI: Hello!\n"
        "USER: \n")
    assert run_chat(model, "/quit\nhi\n", monkeypatch) == 0
    assert capsys.readouterr().out.endswith("USER: /quit\n")


def test_temp_sets_the_temperature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temperatures = []

    def recorded(model: Decoder, history: str, sampling: Sampling) -> Iterator[str]:
        temperatures.append(sampling.temperature)
        yield ""

    monkeypatch.setattr(chat, "reply", recorded)
    model = save(reciter(b"", size=64), tmp_path / "model")
    assert run_chat(model, "a\n/temp 1.5\na\n/temp x\na\n/reset\na", monkeypatch) == 0
    assert temperatures == [0.0, 1.5, 1.5, 1.5]


@pytest.mark.parametrize("options", [
    ("--temperature", "-1"), ("--top-k", "-1"), ("--top-p", "2"), ("--max-new", "-5"), ("--seed", "-1"),
    ("--model", "nowhere")])
def test_bad_options_are_one_line_and_exit_2(
        options: tuple[str, str], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    assert run_chat(Path("nowhere"), "", monkeypatch, *options) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


# Networks that were trained on text only.

@pytest.mark.parametrize(("answer", "max_new", "hinted"), [
    ("SER: and so on, for longer than allowed", 20, False),  # knows the user's turn, and gives a long answer
    ("ncle Bob was at home. And then the day", 20, True),
    ("ncle.\nUSER:", 20, False)])  # ends its turn, so nothing is asked
def test_a_network_that_never_saw_turns(
        answer: str, max_new: int, hinted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """The reciter's answer begins at the byte that follows "\\nU" in the probe."""
    assert len(chat.PROBE) - len(chat.PROBE_END) == len(FIRST)
    model = save(answering(answer), tmp_path / "model")
    assert run_chat(model, "hi\n/reset\nhi", monkeypatch, "--max-new", max_new) == 0
    out = capsys.readouterr().out
    hint = ("\n(this network was trained on text, not on chat: it does not know where a turn ends. `tilelli "
            f"generate --model {model}` continues text; `tilelli train --config sft-demo "
            f"chat.source=FILE train.init_from={model} run_dir=DIR` fine-tunes it)\n")
    assert out.count(hint) == hinted and out.count("trained on text") == hinted


# Pretrained networks with a chat template.

NEOX = GPTNeoXConfig(vocab_size=12, d_model=16, n_layers=2, max_seq_len=26, n_heads=2, d_hidden=32,
                     end_ids=(END,))


def test_a_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture[str]) -> None:
    """The template gets all turns, without the first ones where they do not fit; /reset forgets them."""
    pytest.importorskip("transformers", reason="transformers (extra: hf) is not installed")
    network = write_directory(tmp_path, NEOX)
    histories = []
    stream = chat.stream_text

    def recorded(model: Any, tokenizer: Any, ids: list[int], *arguments: Any, **options: Any) -> Any:
        histories.append(ids)
        return stream(model, tokenizer, ids, *arguments, **options)

    monkeypatch.setattr(chat, "stream_text", recorded)
    assert run_chat(tmp_path, "who sat\nthe cat\non the mat\n/reset\nwho", monkeypatch, "--max-new", 8) == 0
    out, err = capsys.readouterr()
    answers = [result.ids for ids in histories
               for result in tilelli_jax.generate_ids(network, [ids], max_new=8, temperature=0)]
    lost = "(from here on the model no longer sees the start of this conversation)"
    turns = [f"MODEL:{words_of(answer)}" for answer in answers]
    note = "(the conversation exceeds the 26 tokens that the model was trained on)"
    assert err == "" and [line for line in out.splitlines()[1:] if line != note] == [
        "USER: who sat", turns[0], "USER: the cat", turns[1], "USER: on the mat", lost, turns[2],
        "USER: /reset", "(conversation cleared)", "USER: who", turns[3], "USER: "]
    first, second = words_of(answers[0]), words_of(answers[1])
    assert [words_of(ids)[1:] for ids in histories] == [
        "<s> <user> who sat <model>", f"<s> <user> who sat <model>{first} <user> the cat <model>",
        f"<s> <user> the cat <model>{second} <user> on the mat <model>", "<s> <user> who <model>"]


def test_networks_without_a_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    write_directory(tmp_path, NEOX, template=None)
    assert run_chat(tmp_path, "", monkeypatch) == 2
    assert capsys.readouterr() == ("", (
        f"error: {tmp_path}: expected a tokenizer with a chat template, found none; `tilelli generate "
        f"--model {tmp_path}` continues text\n"))
    assert run_chat(tmp_path, "", monkeypatch, "--abstain") == 2
    assert "--abstain: expected a byte-level network" in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_and_not_the_conversation(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    histories = []

    def interrupted(model: Decoder, history: str, sampling: Sampling) -> Iterator[str]:
        histories.append(history)
        yield " one"
        if len(histories) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        yield " two"
        yield " three"

    monkeypatch.setattr(chat, "reply", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert run_chat(save(reciter(b""), tmp_path / "model"), "a\nb\n", monkeypatch) == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert ("USER: a\nTILELLI: one (stopped)\nUSER: b\nTILELLI: one two three\nUSER: \n"
            in capsys.readouterr().out)
    assert histories[1] == "USER: a\nTILELLI: one\nUSER: b\nTILELLI:"


IN_TERMINAL = ("import fcntl, os, sys, termios\n"
               "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
               "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")


class Terminal:
    """The command in its own terminal, where Ctrl-C can be typed."""

    def __init__(self, model: Path):
        self.screen, keyboard = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, "-m", "tilelli_jax", "chat", "--model", str(model),
             "--temperature", "0"],
            cwd=ROOT, stdin=keyboard, stdout=keyboard, stderr=keyboard, start_new_session=True)
        os.close(keyboard)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Reads the screen until the text appears."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.screen], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {text!r} after {self.seen!r}"
            self.seen += os.read(self.screen, 1000).decode(errors="replace")
        self.seen = self.seen[self.seen.index(text) + len(text):]

    def press_ctrl_c_until(self, text: str) -> None:
        """Repeats Ctrl-C, because a signal between printing the prompt and reading the line has no effect."""
        for _ in range(20):
            time.sleep(0.2)
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.wait_for(text, seconds=5)
        raise AssertionError(self.seen)

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())


def test_in_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C at the prompt, Ctrl-C while the first answer is being compiled, an answer, Ctrl-D."""
    second = len(f"{FIRST}\n{FIRST}")
    script = f"{FIRST} never shown".encode().ljust(second) + " Grüße!\nUSER: and".encode()
    terminal = Terminal(save(reciter(script), tmp_path / "model"))
    try:
        terminal.wait_for("USER: ")
        terminal.type("half a ques")
        terminal.press_ctrl_c_until("(/quit or Ctrl-D leaves)\r\nUSER: ")
        terminal.type("hi\n")
        terminal.wait_for("TILELLI:")
        terminal.type("\x03")  # deferred until the answer stops
        terminal.wait_for(" (stopped)\r\nUSER: ")
        terminal.type("hi\n")
        terminal.wait_for("TILELLI: Grüße!\r\nUSER: ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.screen)
