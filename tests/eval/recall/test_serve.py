"""The server, as a process, asked by the client package of the API and over plain HTTP."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from tests.error_lines import assert_one_line
from tests.eval.recall.small import ASKED, VANILLA, Place
from tilelli_jax.data.turns import STOP, format_turns, user_turn
from tilelli_jax.eval.calibration import Platt
from tilelli_jax.eval.estimators.interface import LinearProbe
from tilelli_jax.eval.recall import verdicts
from tilelli_jax.eval.recall.predictor import KnowledgePredictor, Prediction
from tilelli_jax.eval.recall.serve import main
from tilelli_jax.eval.recall.verdicts import CalibratedProbe
from tilelli_jax.generation import decoding
from tilelli_jax.loading import store

openai = pytest.importorskip("openai", reason="openai (extra: test) is not installed")
httpx = pytest.importorskip("httpx", reason="httpx, which openai brings, is not installed")
pytest.importorskip("starlette", reason="starlette (extra: serve) is not installed")

ROOT = Path(__file__).parents[3]
KEY, MAX_LEN, SLOTS = "a key", 192, 3
P_TOLERANCE = 1e-6  # that the server is built for; measured: 1e-7


class Served(NamedTuple):
    """A server's process and its URL."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def client(self, **options: Any) -> Any:
        return openai.OpenAI(**{"base_url": f"{self.url}v1", "api_key": KEY, "max_retries": 0,
                                "timeout": 120} | options)

    def post(self, path: str, body: Any = None, key: str = KEY, **options: Any) -> Any:
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return httpx.post(f"{self.url}{path}", headers={"Authorization": f"Bearer {key}"}, timeout=120,
                          **content, **options)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}metrics").text.splitlines()
        value, = [line.split()[1] for line in lines if line.startswith(f"{name} ")]
        return float(value)


def start(place: Place, environment: dict[str, str], log: Path, *options: str) -> Served:
    """A server that is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tilelli_jax.serve", "--model", str(place.model), "--port", "0", *options],
        env={"TILELLI_API_KEY": KEY} | environment, stdout=subprocess.PIPE, stderr=log.open("w"), text=True)
    assert process.stdout is not None
    lines = []
    while not lines or not lines[-1].startswith("ready: "):
        assert select.select([process.stdout], [], [], 300)[0], (lines, log.read_text())
        lines.append(process.stdout.readline())
        assert lines[-1], (lines, log.read_text())
    return Served(process, lines[0].partition(": ")[0], log)


@pytest.fixture(scope="module")
def served(place: Place, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
           ) -> Iterator[Served]:
    os.environ["NO_PROXY"] = "127.0.0.1"
    server = start(place, environment, tmp_path_factory.mktemp("serve") / "log", "--sidecar",
                   str(place.sidecar), "--slots", str(SLOTS), "--max-waiting", "64", "--name", "tiny")
    try:
        yield server
        server.process.terminate()
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.log.read_text()
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def model(place: Place) -> Any:
    return store.load(place.model)


def generated(model: Any, text: str, **options: Any) -> str:
    """What `generate` continues a text with."""
    return decoding.generate(model, text, **options)[0].text


def test_models_and_health(served: Served) -> None:
    listed, = served.client().models.list().data
    assert (listed.id, listed.max_model_len) == ("tiny", MAX_LEN)
    assert listed.knows == {"estimator": "sidecar", "calibrated_on": "tiny"}
    assert served.client().models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{served.url}health").json() == {"status": "ready"}
    assert served.metric("tilelli_slots") == SLOTS


def test_completions_equal_generate(served: Served, model: Any) -> None:
    """The same seed gives the same text; several prompts and n give those of the following streams."""
    reply = served.client().completions.create(
        model="tiny", prompt=["Where is", "A much longer prompt, of other length"], n=2, max_tokens=20,
        temperature=0.7, seed=5)
    prompts = ["Where is"] * 2 + ["A much longer prompt, of other length"] * 2
    expected = [continued.text for continued in decoding.generate(model, prompts, max_new=20, temperature=0.7,
                                                                  seed=5)]
    assert [choice.text for choice in reply.choices] == expected
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in reply.choices} == {"length"}
    assert reply.usage.prompt_tokens == 8 + 37 and reply.usage.completion_tokens == 80
    assert len(reply.knows) == 2
    by_ids = served.client().completions.create(model="tiny", prompt=list(b"Where is"), max_tokens=20,
                                                temperature=0.7, seed=5)
    assert by_ids.choices[0].text == expected[0]


def test_chats_in_turns(served: Served, model: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."},
                {"role": "user", "content": "Who are you?"}]
    reply = served.client().chat.completions.create(model="tiny", messages=messages, max_tokens=30,
                                                    temperature=0)
    prompt = format_turns([("Hello", "Hi.")]) + user_turn("Who are you?")
    expected = generated(model, prompt, max_new=30, temperature=0.0, stop=STOP)
    assert reply.choices[0].message.content == expected
    assert reply.object == "chat.completion" and reply.usage.prompt_tokens == len(prompt)
    assert reply.knows["prompt"] == "other" and 0 < reply.knows["p"] < 1
    rest = served.client().chat.completions.create(model="tiny", messages=messages)
    assert rest.usage.total_tokens == MAX_LEN, "without a limit it fills the context"


def test_streams(served: Served, model: Any) -> None:
    chunks = list(served.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=25, temperature=1, seed=2,
        n=2, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].knows["p"] > 0 and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 50 and not chunks[-1].choices
    for k in range(2):
        parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == k]
        text = "".join(part.delta.content or "" for part in parts)
        expected = decoding.generate(model, [user_turn("Hello")] * 2, max_new=25, seed=2, stop=STOP)[k].text
        assert text == expected and parts[-1].finish_reason == "length"
    chunks = list(served.client().completions.create(model="tiny", prompt="Hello", max_tokens=9, seed=2,
                                                     stream=True))
    assert chunks[0].knows["p"] > 0 and not chunks[0].choices[0].text, "it comes before any text"
    assert "".join(chunk.choices[0].text for chunk in chunks) == generated(model, "Hello", max_new=9, seed=2)


def test_stop_strings_across_tokens(served: Served, model: Any) -> None:
    whole = generated(model, "Hello", max_new=60, seed=4)
    stop = whole[20:23]
    expected = whole[:whole.find(stop)]
    reply = served.client().completions.create(model="tiny", prompt="Hello", max_tokens=60, seed=4,
                                               stop=["@@@", stop])
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (expected, "stop")
    chunks = served.client().completions.create(model="tiny", prompt="Hello", max_tokens=60, seed=4,
                                                stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_log_probabilities(served: Served) -> None:
    reply = served.client().completions.create(model="tiny", prompt="Hello", max_tokens=5, temperature=0,
                                               logprobs=3)
    found = reply.choices[0].logprobs
    assert "".join(found.tokens) == reply.choices[0].text and found.text_offset == [0, 1, 2, 3, 4]
    for token, log_prob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 3 and top[token] == log_prob == max(top.values())
    chat = served.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=4, temperature=0,
        logprobs=True, top_logprobs=2)
    entries = chat.choices[0].logprobs.content
    assert [len(entry.top_logprobs) for entry in entries] == [2] * 4
    assert all(bytes(entry.bytes).decode() == entry.token and entry.logprob < 0 for entry in entries)


def test_echo(served: Served, model: Any) -> None:
    """The prompt's own log-probabilities, as benchmark harnesses read them."""
    options = {"model": "tiny", "prompt": "Hello", "echo": True, "logprobs": 2, "temperature": 0}
    reply = served.client().completions.create(**options, max_tokens=3).choices[0]
    assert reply.text == "Hello" + generated(model, "Hello", max_new=3, temperature=0.0)
    found = reply.logprobs
    assert found.tokens[:5] == list("Hello") and found.token_logprobs[0] is found.top_logprobs[0] is None
    logits = np.asarray(model(np.frombuffer(b"Hello", np.uint8)[None].astype(np.int32)))[0]
    expected = jax.nn.log_softmax(logits)[np.arange(4), list(b"ello")]
    np.testing.assert_allclose(found.token_logprobs[1:5], expected, atol=1e-5)
    assert all(len(top) == 2 and max(top.values()) >= log_prob - 1e-6
               for top, log_prob in zip(found.top_logprobs[1:], found.token_logprobs[1:], strict=True))
    alone = served.client().completions.create(**options, max_tokens=0).choices[0]
    assert alone.text == "Hello" and alone.logprobs.token_logprobs == found.token_logprobs[:5]


def test_p_knows_equals_predict(served: Served, predictions: list[Prediction]) -> None:
    """By /v1/knows, and in the pass of a completion whose prompt is the sidecar's."""
    reply = served.post("v1/knows", {"questions": ASKED}).json()
    for found, prediction in zip(reply["data"], predictions, strict=True):
        assert found["p"] == pytest.approx(prediction.p, abs=P_TOLERANCE)
        assert (found["question"], found["verdict"], found["strongest_layer"], found["estimator"]) == (
            prediction.question, prediction.verdict, prediction.strongest_layer, "sidecar")
    for prediction in predictions[:2]:
        completed = served.client().completions.create(
            model="tiny", prompt=f"Q: {prediction.question}\nA: ", max_tokens=1)
        assert completed.knows["p"] == pytest.approx(prediction.p, abs=P_TOLERANCE)
        assert completed.knows["prompt"] == "calibrated"


def test_abstaining(served: Served, predictions: list[Prediction]) -> None:
    """Nothing is generated for a question below the threshold; the others are answered."""
    by_p = sorted(predictions, key=lambda prediction: prediction.p)
    low, high = by_p[0], by_p[-1]
    rule = {"below": (low.p + high.p) / 2, "text": "No idea."}
    client, before = served.client(), served.metric('tilelli_tokens_total{kind="completion"}')
    for stream in (False, True):
        reply = client.completions.create(model="tiny", prompt=f"Q: {low.question}\nA: ", max_tokens=5,
                                          stream=stream, extra_body={"abstain": rule})
        last = list(reply)[-1] if stream else reply
        assert (last.choices[0].text, last.choices[0].finish_reason) == ("No idea.", "abstained")
    assert reply is not None and served.metric('tilelli_tokens_total{kind="completion"}') == before
    answered = client.completions.create(model="tiny", prompt=f"Q: {high.question}\nA: ", max_tokens=5,
                                         extra_body={"abstain": rule})
    assert answered.choices[0].finish_reason == "length" and answered.usage.completion_tokens == 5


def test_many_clients_get_their_own_texts(served: Served, model: Any) -> None:
    """Sixteen at once, of which a third goes away in the middle; no slot is lost."""
    def ask(i: int) -> str | None:
        if i % 3 == 2:
            with served.client().completions.create(model="tiny", prompt=f"Prompt {i}", max_tokens=100,
                                                    seed=i, stream=True) as stream:
                next(iter(stream))
            return None
        return served.client().completions.create(model="tiny", prompt=f"Prompt {i}" + "." * i,
                                                  max_tokens=10 + i, seed=i).choices[0].text
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, range(16)))
    for i, text in enumerate(texts):
        if text is not None:
            assert text == generated(model, f"Prompt {i}" + "." * i, max_new=10 + i, seed=i)
    deadline = time.monotonic() + 60
    while served.metric("tilelli_slots_active") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert served.metric("tilelli_slots_active") == served.metric("tilelli_queue") == 0


@pytest.mark.parametrize(("body", "status", "message"), [
    (b"{", 400, "body: not JSON"), (b'{"prompt": "\\ud800"}', 400, "surrogate"),
    (b"\xff", 400, "not UTF-8 at byte 1"),
    (b"[" * 100_000, 400, "body: "), (b'"' + b"a" * (10 << 20) + b'"', 413, "expected at most 1048576 bytes"),
    ({"prompt": "a", "max_tokens": -3}, 400, "max_tokens: expected an integer"),
    ({"prompt": "a", "max_tokens": 10**40}, 400, "max_tokens: expected an integer"),
    ({"prompt": "a", "temperature": 1e400}, 400, "temperature: expected a number"),
    ({"prompt": "a", "top_p": 10**400}, 400, "top_p: expected a number from 0 to 1"),
    ({"prompt": "a", "abstain": {"below": 10**400}}, 400, "abstain.below: expected a number from 0 to 1"),
    ({"prompt": "a", "best_of": 3, "n": 2}, 400, "best_of: not supported by this server unless it is n, 2"),
    ({"prompt": "a" * 300, "max_tokens": 1}, 400, "prompt: expected at most 192 tokens"),
    ({"prompt": "a", "max_tokens": 10_000}, 400, "max_tokens: expected at most 192 together with the prompt"),
    ({"prompt": [256]}, 400, "prompt: expected tokens below 256, found 256"),
    ({"prompt": "a", "model": "other"}, 404, "model: expected tiny, found 'other'"),
    ({"prompt": "a", "echo": True, "stream": True}, 400, "echo: not supported with stream"),
])
def test_invalid_bodies_are_errors_of_the_client(served: Served, body: Any, status: int, message: str
                                                 ) -> None:
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    reply = served.post("v1/completions", body)
    assert reply.status_code == status
    assert message in reply.json()["error"]["message"] and "\n" not in reply.json()["error"]["message"]


def test_the_lines_of_the_docs(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/serve.md, with this server's address and key."""
    first, routing = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serve.md").read_text(), re.DOTALL)
    first = first.replace("http://127.0.0.1:8000/", served.url).replace('api_key="none"', f"api_key={KEY!r}")
    names: dict[str, Any] = {}
    exec(first, names)
    reply = names["reply"]
    assert reply.knows["p"] > 0 and reply.choices[0].finish_reason in ("length", "stop", "abstained")
    assert reply.choices[0].message.content in capsys.readouterr().out
    exec(routing, names)
    assert names["ask"]("Who?", lambda question: f"elsewhere: {question}", 1.0) == "elsewhere: Who?"
    assert names["ask"]("Who?", lambda question: "elsewhere", 0.0) != "elsewhere"


def test_control_characters_are_text(served: Served, model: Any) -> None:
    reply = served.client().completions.create(model="tiny", prompt="\x00\x1b[2J\u202e", max_tokens=3, seed=1)
    assert reply.choices[0].text == generated(model, "\x00\x1b[2J\u202e", max_new=3, seed=1)


def test_errors_are_the_clients_own_exceptions(served: Served) -> None:
    client = served.client()
    for request, error, field in (
            ({"model": "tiny", "prompt": ""}, openai.BadRequestError, "prompt"),
            ({"model": "tiny", "prompt": "a", "suffix": "b"}, openai.BadRequestError, "suffix"),
            ({"model": "other", "prompt": "a"}, openai.NotFoundError, None)):
        with pytest.raises(error) as raised:
            client.completions.create(**request)
        assert raised.value.param == field
    with pytest.raises(openai.AuthenticationError):
        served.client(api_key="another").models.list()
    assert httpx.get(f"{served.url}v1/models").status_code == 401
    assert httpx.get(f"{served.url}v1/nothing").status_code == 404
    assert httpx.get(f"{served.url}v1/completions").status_code == 405
    log = served.log.read_text()
    assert KEY not in log and "another" not in log


def test_a_layer_probe_a_full_queue_and_a_signal(place: Place, environment: dict[str, str], tmp_path: Path
                                                 ) -> None:
    """Without a sidecar: no P(knows). A full queue is 429; SIGTERM lets requests finish and exits with 0."""
    server = start(place, environment, tmp_path / "log", "--slots", "1", "--max-waiting", "1", "--max-len",
                   "96")
    try:
        client = server.client()
        reply = client.completions.create(model="model", prompt="Hello", max_tokens=2)
        assert not hasattr(reply, "knows") and reply.model == "model"
        assert server.post("v1/knows", {"questions": "Who?"}).status_code == 400
        with pytest.raises(openai.BadRequestError, match="abstain: expected a server with a sidecar"):
            client.completions.create(model="model", prompt="a", extra_body={"abstain": {"below": 0.5}})

        def ask(i: int) -> Any:
            return server.post("v1/completions", {"prompt": "Hello", "max_tokens": 90, "seed": i})
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(ask, range(8)))
        refused = [reply for reply in replies if reply.status_code == 429]
        assert refused and {reply.status_code for reply in replies} == {200, 429}
        assert all(reply.headers["retry-after"] == "1" for reply in refused)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            last = pool.submit(ask, 9)
            while not server.metric("tilelli_slots_active"):
                time.sleep(0.005)
            server.process.send_signal(signal.SIGTERM)
            assert last.result().status_code == 200 and len(last.result().json()["choices"][0]["text"]) > 0
        assert server.process.wait(60) == 0
    finally:
        server.process.kill()
        server.process.wait()


def resident(process: subprocess.Popen[str]) -> int:
    """Memory of a process, in bytes."""
    pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.exhaustive
def test_a_thousand_requests_leave_nothing_behind(
        place: Place, model: Any, environment: dict[str, str], tmp_path: Path) -> None:
    """50 clients with 20 requests each, a third of which they leave in the middle; then kill and restart."""
    options = "--sidecar", str(place.sidecar), "--slots", "4", "--max-waiting", "40", "--name", "tiny"
    server = start(place, environment, tmp_path / "log", *options)

    def one(client: Any, i: int) -> str:
        """The text, or how the request ended."""
        request = {"model": "tiny", "prompt": f"Prompt {i}" + "." * (i % 37 * 3), "max_tokens": 1 + i % 29,
                   "temperature": i % 2, "seed": i}
        try:
            if i % 3 == 2:
                with client.completions.create(**request, stream=True) as stream:
                    next(iter(stream))
                return "left"
            return client.completions.create(**request).choices[0].text
        except openai.RateLimitError:
            return "refused"

    def twenty(client: int) -> list[tuple[int, str]]:
        with server.client() as api:
            return [(i, one(api, i)) for i in range(20 * client, 20 * client + 20)]

    def idle() -> bool:
        return server.metric("tilelli_slots_active") == server.metric("tilelli_queue") == 0
    try:
        twenty(0)
        before = resident(server.process)
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            ended = [item for items in pool.map(twenty, range(50)) for item in items]
        deadline = time.monotonic() + 60
        while not idle() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert idle() and resident(server.process) <= 1.1 * before
        texts = {i: text for i, text in ended if text not in ("left", "refused")}
        assert len(ended) == 1000 and len(texts) > 100
        assert any(text == "refused" for _, text in ended), "the queue was full at times"
        for i in list(texts)[::23]:
            assert texts[i] == generated(model, f"Prompt {i}" + "." * (i % 37 * 3), max_new=1 + i % 29,
                                         temperature=float(i % 2), seed=i)
        assert "Traceback" not in server.log.read_text()
        port = server.url.rstrip("/").rpartition(":")[2]
        server.process.kill()
        server.process.wait()
        server = start(place, environment, tmp_path / "again", *options, "--port", port)
        assert one(server.client(), 1) == generated(model, "Prompt 1...", max_new=2, temperature=1.0, seed=1)
    finally:
        server.process.kill()
        server.process.wait()


@pytest.mark.parametrize(("options", "message"), [
    (["--host", "0.0.0.0"], "--host: 0.0.0.0 can be reached from other machines: expected a key"),
    (["--abstain", "0.5"], "--abstain: expected --sidecar, found none"),
    (["--abstain", "2"], "--abstain: expected a probability from 0 to 1 or a percentage, found '2'"),
    (["--abstain", "101%"], "--abstain: expected a probability from 0 to 1 or a percentage, found '101%'"),
    (["--abstain", "%"], "--abstain: expected a probability from 0 to 1 or a percentage, found '%'"),
    (["--abstain", "nan"], "--abstain: expected a probability from 0 to 1 or a percentage, found 'nan'"),
    (["--slots", "0"], "--slots: expected at least 1, found 0"),
    (["--max-len", "193"], "max_len: expected 2 to 192, found 193"),
    (["--port", "70000"], "--port: expected a number from 0 to 65535"),
    (["--api-key-file", "nowhere"], "nowhere"),
    (["--sidecar", "nowhere"], "--sidecar: nowhere: expected a sidecar, found nothing"),
])
def test_invalid_options_are_one_line(
        place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str],
        message: str) -> None:
    monkeypatch.delenv("TILELLI_API_KEY", raising=False)
    assert main(["--model", str(place.model), "--port", "0", *options]) == 2
    assert_one_line(capsys.readouterr().err, message)


def test_a_percentage_needs_quantiles(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(place.model), "--sidecar", str(place.sidecar), "--port", "0", "--abstain",
                 "5%"]) == 2
    assert_one_line(capsys.readouterr().err, "--abstain: expected a probability, as",
                    "has no quantiles of known questions")


def test_an_estimator_must_be_of_the_study(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(place.model), "--sidecar", str(place.sidecar), "--port", "0", "--estimator",
                 "layer_probe"]) == 2
    assert_one_line(capsys.readouterr().err, "--estimator: expected one of sidecar, found 'layer_probe'")


def test_a_port_in_use_is_one_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        assert main(["--model", str(place.model), "--port", str(used.getsockname()[1])]) == 2
    assert_one_line(capsys.readouterr().err, "cannot bind to this address")


def test_the_sidecars_question_is_found_in_its_prompt(place: Place) -> None:
    prompter = KnowledgePredictor.open(place.model, place.sidecar).prompter
    assert prompter.question_in("Q: Who?\nA: ") == "Who?"
    for text in ("Q: Who?", "Q: \nA: ", "Who?\nA: ", "Q:  Who?\nA: ", ""):
        assert prompter.question_in(text) is None


def test_without_a_sidecar_the_extra_eval_is_not_needed(place: Place, environment: dict[str, str]) -> None:
    code = ("import sys; sys.modules.update(scipy=None, sklearn=None, joblib=None); "
            "from tilelli_jax.eval.recall import serve; "
            f"sys.exit(serve.main(['--model', {str(place.model)!r}, '--port', '0', '--max-len', '999']))")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 2
    assert_one_line(done.stderr, "max_len: expected 2 to 192, found 999")  # the network has been loaded


def test_a_probe_in_place_of_the_sidecar(place: Place, environment: dict[str, str], tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """Its P(knows) is that of the prediction; the environment's key may end with a line break."""
    rule = verdicts.read(place.sidecar)
    rng = np.random.default_rng(0)
    probe = CalibratedProbe(LinearProbe(2, rng.standard_normal(VANILLA.d_model), 0.1), Platt(0.5, 0.2))
    sidecar = tmp_path / "sidecar"
    shutil.copytree(place.sidecar, sidecar)
    verdicts.write(sidecar, dataclasses.replace(rule, probes={"layer_probe": probe},
                                                known_quantiles=tuple(np.linspace(0.1, 1, 101).tolist())))
    assert main(["--model", str(place.model), "--sidecar", str(sidecar), "--port", "0", "--abstain", "5%",
                 "--estimator", "layer_probe"]) == 2
    assert_one_line(capsys.readouterr().err, "--abstain: expected a probability for --estimator layer_probe")
    predictor = KnowledgePredictor.open(place.model, sidecar)
    server = start(place, environment | {"TILELLI_API_KEY": f"{KEY}\n"}, tmp_path / "log", "--sidecar",
                   str(sidecar), "--estimator", "layer_probe", "--slots", "1")
    try:
        reply = server.post("v1/knows", {"questions": ASKED}).json()
        for found, prediction in zip(reply["data"], predictor.predict(ASKED), strict=True):
            assert found["p"] == pytest.approx(prediction.by_probe["layer_probe"], abs=P_TOLERANCE)
            assert found["estimator"] == "layer_probe"
        assert server.post("v1/knows", {"questions": "Who?", "model": "other"}).status_code == 404
    finally:
        server.process.kill()
        server.process.wait()
