"""The served page: options, concurrent requests, invalid requests, and the page in a browser."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.error_lines import assert_one_line
from tests.eval.recall.small import (
    ASKED,
    BATCHED,
    MAX_NEW,
    Place,
    answers_alone,
)
from tilelli_jax.errors import InputError
from tilelli_jax.eval.recall import app, report
from tilelli_jax.eval.recall.app import info, thought_seeding
from tilelli_jax.eval.recall.command import app as app_command
from tilelli_jax.eval.recall.predictor import KnowledgePredictor, Prediction


@pytest.fixture(scope="module", autouse=True)
def gradio() -> None:
    """Imports gradio when these tests run, so that collecting them does not take seconds."""
    pytest.importorskip("gradio", reason="gradio (extra: app) is not installed")
    pytest.importorskip("plotly", reason="plotly (extra: app) is not installed")

TIMEOUT = 120_000  # ms for every step in the browser: compiling takes many seconds on a busy machine


def test_which_study_is_shown(place: Place, tmp_path: Path) -> None:
    assert info.find_study("", str(place.sidecar)) == place.study
    assert info.find_study(str(place.study), "elsewhere") == place.study
    reason = info.find_study("", str(tmp_path / "sidecar"))
    assert isinstance(reason, str) and "`tilelli recall --config FILE` runs one" in reason
    with pytest.raises(InputError, match=r"--study: .*results.json: expected results .* found no such file"):
        info.find_study(str(tmp_path), str(place.sidecar))
    for content, message in (("{", "not JSON"), ("[]", "expected an object"), ("null", "expected an object"),
                          ('{"layers": {}}', "expected the results of a recall study, found KeyError")):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(InputError, match=rf"^--study: .*results\.json: {message}"):
            info.find_study(str(tmp_path), "")
        assert f"results.json: {message}" in str(info.find_study("", str(tmp_path / "sidecar")))


@pytest.mark.parametrize(("options", "message"), [
    (["--study", "nowhere"], "--study: nowhere/results.json: expected results of a study, found no"),
    (["--port", "70000"], "--port: expected a number from 0 to 65535, found 70000"),
    (["--host", "not a host"], "--host, --port: not a host:0: cannot bind to this address: "),
    (["--max-new", "0"], "--max-new: expected at least 1, found 0"),
    (["who?"], "unrecognized arguments: who?"),
    (["--model", "nowhere"], "nowhere")])
def test_invalid_options(options: list[str], message: str, place: Place,
                         capsys: pytest.CaptureFixture[str]) -> None:
    assert app_command(["--model", str(place.model), "--sidecar", str(place.sidecar), "--port", "0",
                        *options]) == 2
    assert_one_line(capsys.readouterr().err, message)


def test_a_port_in_use(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    from tilelli_jax.serving.listening import open_socket
    with open_socket("127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        assert app_command(["--model", "nowhere", "--sidecar", "nowhere", "--port", str(port)]) == 2
    assert_one_line(capsys.readouterr().err, f"127.0.0.1:{port}: cannot bind to this address: ")


def test_without_the_extra_the_error_names_the_package(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module(f"{app.__name__}.server")
    for name in ("server", "page"):  # they import gradio
        monkeypatch.delitem(sys.modules, f"{app.__name__}.{name}")
        monkeypatch.delattr(app, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert app_command(["--model", "nowhere", "--sidecar", "nowhere"]) == 2
    assert_one_line(capsys.readouterr().err, "this command needs gradio: pip install 'tilelli_jax[app]'")


# The page itself.

class Served(NamedTuple):
    """A process that serves the page, its address, and where it writes files and logs."""

    process: subprocess.Popen[str]
    url: str
    temporary: Path  # directory of its temporary files
    log: Path


@pytest.fixture(scope="module")
def served(place: Place, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
           ) -> Iterator[Served]:
    temporary, log = tmp_path_factory.mktemp("temporary"), tmp_path_factory.mktemp("log") / "stderr"
    process = subprocess.Popen(
        [sys.executable, "-m", "tilelli_jax", "recall", "app", "--model", str(place.model), "--sidecar",
         str(place.sidecar), "--port", "0", "--max-new", str(MAX_NEW), "--allow-host", "proxy.example"],
        env=environment | {"TMPDIR": str(temporary), "NO_PROXY": "127.0.0.1"}, stdout=subprocess.PIPE,
        stderr=log.open("w"), text=True)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 300)[0], "it does not print its address"
        first = process.stdout.readline()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)\n", first)
        yield Served(process, first.split()[0], temporary, log)
        process.terminate()
        assert process.wait(60) == 0
        assert not any(path.is_file() for path in temporary.rglob("*")), "its files are deleted"
    finally:
        process.kill()
        process.wait()


def test_concurrent_requests(served: Served, predictions: list[Prediction],
                             monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Over HTTP, as from a browser: each request gets the result of its question."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    import gradio_client
    client = gradio_client.Client(served.url, verbose=False)
    jobs = [client.submit(question, api_name="/probe") for question in ASKED]
    stream = client.submit(ASKED[0], "", api_name="/baseline")
    for job, prediction in zip(jobs, predictions, strict=True):
        text = job.result(timeout=120)[0]
        assert float(re.findall(r"<b>(\d\.\d+)</b>", text)[0]) == pytest.approx(prediction.p, abs=0.001)
        assert f"<b>{prediction.verdict}</b>" in text
    assert "Cut off" in stream.result(timeout=120)
    seeded = client.predict(ASKED[0], "", 0.4, 0.7, api_name="/seeded")
    assert thought_seeding.seed(predictions[0].p) in seeded and "Cut off" in seeded
    upload = tmp_path / "mine.jsonl"
    upload.write_text("".join(json.dumps({"question": question}) + "\n" for question in ASKED))
    text, _, files = client.predict(gradio_client.handle_file(upload), api_name="/batch")
    assert "4 questions" in text and [Path(file).suffix for file in files] == [".csv", ".jsonl"]
    lines = [json.loads(line) for line in Path(files[1]).read_text().splitlines()]
    expected = [prediction.p for prediction in predictions]
    assert [line["p"] for line in lines] == pytest.approx(expected, abs=BATCHED)


ENDPOINTS = {"probe": 1, "submit": 1, "baseline": 2, "seeded": 4, "batch": 1}  # name → number of inputs


def over_http(url: str, data: Any = None, **headers: str) -> str:
    """Returns the status and the body of the response."""
    request = urllib.request.Request(url, data and json.dumps(data).encode(),
                                     {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return f"{answer.status} {answer.read().decode()}"
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read().decode()}"


def test_no_endpoint_reads_a_file_that_was_not_uploaded(served: Served, tmp_path: Path) -> None:
    """Gradio would copy it to a directory for downloads, for any component."""
    described = json.loads(over_http(f"{served.url}gradio_api/info").partition(" ")[2])
    assert {name.strip("/") for name in described["named_endpoints"]} == ENDPOINTS.keys()
    secret, page = tmp_path / "secret.jsonl", f"{served.url}gradio_api/"
    secret.write_text('{"question": "the launch code is 4711"}\n')
    (tmp_path / "link.jsonl").symlink_to(secret)
    for name, arguments in ENDPOINTS.items():
        for position, path in itertools.product(
                range(arguments), (secret, tmp_path / "link.jsonl", page + "info")):
            data: list[Any] = ["a"] * arguments
            data[position] = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
            started = json.loads(over_http(f"{page}call/{name}", {"data": data}).removeprefix("200 "))
            answer = over_http(f"{page}call/{name}/{started['event_id']}")
            assert "event: error" in answer and "event: complete" not in answer, answer
            assert "4711" not in answer
    copies = [path.read_bytes() for path in served.temporary.rglob("*") if path.is_file()]
    assert not any(b"4711" in content for content in copies)
    assert over_http(f"{page}file={secret}").startswith("403 ")


INVALID_REQUESTS: list[tuple[str, Any, str]] = [  # path, data, response
    ("call/nope", {"data": []}, "400 request: expected an endpoint of this page"),
    ("call/v2/nope", {"text": "x"}, "400 request: expected an endpoint of this page"),
    ("call/v2/probe", {"nope": 1}, "400 request: expected an endpoint of this page"),
    ("queue/join", {"data": [], "fn_index": 99, "session_hash": "x"}, "400 request: expected an endpoint"),
    ("component_server", {"data": 1, "component_id": 999, "session_hash": "x", "fn_name": "x"}, "400 "),
    ("run/probe", {"data": ["x"]}, "404 This API endpoint does not accept direct HTTP POST requests"),
    ("call/probe", {"data": "x"}, "422 "), ("call/probe/nope", None, "200 event: error data: 404: Not Found"),
    ("queue/data?session_hash=x%0Ay", None, "200 data: msg:unexpected_error")]
INVALID_DATA: list[tuple[str, list[Any], str]] = [
    ("seeded", ["q", "", "x", 0.5], "slider"), ("seeded", ["q", "", 0.5, 7], "greater than maximum value 1"),
    ("seeded", ["q"], "data: expected 4 values, found 1"), ("probe", [], "data: expected 1 values, found 0"),
    ("batch", ["<b>x"], "input_value='&lt;b&gt;x'"), ("batch", [[1]], "data: ValidationError"),
    ("probe", [{"path": "/etc/hostname"}], "file: expected one that was uploaded to this page")]


def test_invalid_requests_get_an_error_and_one_line_of_the_log(served: Served) -> None:
    page, before = f"{served.url}gradio_api/", len(served.log.read_text())
    for path, data, message in INVALID_REQUESTS:
        answer = " ".join(re.sub(r'[{}"]', "", over_http(page + path, data)).replace("detail:", "").split())
        assert answer.startswith(message), (path, answer)
    for name, data, message in INVALID_DATA:
        started = json.loads(over_http(f"{page}call/{name}", {"data": data}).removeprefix("200 "))
        answer = over_http(f"{page}call/{name}/{started['event_id']}")
        assert answer.startswith('200 event: error\ndata: {"error": "') and message in answer, answer
    lines = served.log.read_text()[before:].splitlines()
    assert 0 < len(lines) <= len(INVALID_REQUESTS) + len(INVALID_DATA), lines
    assert all("WARNING" in line for line in lines), lines


def test_no_api_documentation(served: Served) -> None:
    """FastAPI's documentation would load scripts from another machine."""
    for path in ("docs", "redoc", "openapi.json", "docs/oauth2-redirect"):
        assert over_http(served.url + path).startswith("404 ")


def test_no_other_site_reaches_the_page(served: Served) -> None:
    """Through a host name that resolves to this machine (DNS rebinding)."""
    for host in ("rebound.example", "rebound.example:7860"):
        for url in (served.url, f"{served.url}gradio_api/info"):
            answer = over_http(url, Host=host, Origin=f"http://{host}")
            assert answer.startswith("421 Host: expected the server's address")
    port = served.url.rstrip("/").rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "proxy.example"):
        assert over_http(f"{served.url}gradio_api/info", Host=host).startswith("200 ")


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.exhaustive
@pytest.mark.skipif(chromium() is None,
                    reason="opens the page in Chromium or Chrome, and there is none on this machine")
def test_in_a_browser(served: Served, place: Place, predictor: KnowledgePredictor,
                      predictions: list[Prediction], tmp_path: Path) -> None:
    """Probes and answers a question, scores a file, shows a study; no request leaves this machine."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright (extra: test) is not installed")
    screenshots = Path(os.environ.get("TILELLI_ARTEFACTS") or tmp_path)
    screenshots.mkdir(parents=True, exist_ok=True)
    errors: list[str] = []
    remote: list[str] = []
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(TIMEOUT)
        api.expect.set_options(timeout=TIMEOUT)  # `expect` has its own default
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: remote.append(request.url)
                if not request.url.startswith((served.url, "data:", "blob:")) else None)
        page.goto(served.url)

        asked = report.read_results(place.study)["examples"][0]["question"]
        api.expect(page.get_by_placeholder(f"for example: {asked}")).to_be_visible()
        api.expect(page.locator("#prediction")).to_contain_text("no answer is generated")
        assert not page.locator("#gauge").is_visible(), "nothing empty at the start"
        page.screenshot(path=screenshots / "start.png")
        probe = page.get_by_role("button", name="Probe", exact=True)
        probe.click()
        api.expect(page.locator("#prediction")).to_contain_text("found an empty question")
        page.get_by_label("Question").fill(ASKED[0])
        probe.click()
        number = page.locator("#gauge .indicatorlayer .number")
        api.expect(number).to_have_text(re.compile(r"^0\.\d{3}$"))
        assert float(number.text_content()) == pytest.approx(predictions[0].p, abs=0.001)
        api.expect(page.locator("#prediction")).to_contain_text(f"→ {predictions[0].verdict}")
        for chart, title in ("crystallisation", "entropy, nats"), ("writes", "peak, nats"):
            api.expect(page.locator(f"#{chart} .ytitle")).to_have_text(title)
        api.expect(page.locator("#tokens")).to_contain_text("100%")
        assert not page.locator(".modebar-container").first.is_visible(), "it would cover the titles"
        for width, stacked in ((1000, False), (400, True), (1280, False)):
            page.set_viewport_size({"width": width, "height": 900})
            text, button = page.locator("#question").bounding_box(), probe.bounding_box()
            assert (button["y"] >= text["y"] + text["height"]) is stacked, (width, text, button)
            page.screenshot(path=screenshots / f"probe-{width}.png", full_page=True)

        expected = list(answers_alone(predictor, ASKED[0], max_new=MAX_NEW))[-1].answer
        page.get_by_label("Correct answers").fill(f"Rome|{expected}")
        page.get_by_role("button", name="Generate: baseline").click()
        page.get_by_role("button", name="Generate: thought seed").click()
        api.expect(page.locator("#baseline")).to_contain_text("✓ correct")
        api.expect(page.locator("#baseline")).to_contain_text(str(expected))
        api.expect(page.locator("#seeded")).to_contain_text("Cut off")
        api.expect(page.locator("#seeded")).to_contain_text(
            thought_seeding.seed(predictions[0].p, *thought_seeding.start_bounds(predictor.rule.thresholds)))
        page.screenshot(path=screenshots / "generated.png", full_page=True)

        page.get_by_role("tab", name="Batch").click()
        upload = tmp_path / "mine.jsonl"
        upload.write_text("".join(json.dumps({"question": question}) + "\n" for question in ASKED))
        page.locator("#upload input[type=file]").set_input_files(upload)
        api.expect(page.locator("#upload")).to_contain_text("mine")
        page.get_by_role("button", name="Probe all").click()
        api.expect(page.locator("#summary")).to_contain_text("4 questions")
        with page.expect_download() as download:
            page.locator("#downloads a").nth(1).click()
        lines = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
        assert [line["p"] for line in lines] == pytest.approx(
            [prediction.p for prediction in predictions], abs=BATCHED)
        page.screenshot(path=screenshots / "batch.png")

        page.get_by_role("tab", name="Evaluation").click()
        study = report.read_results(place.study)
        area = study["methods"]["sidecar"]["auroc"]
        shown = page.get_by_role("tabpanel").filter(has_text="a study of nothing")
        api.expect(shown).to_contain_text(f"{area['point']:.3f} [{area['low']:.3f}, {area['high']:.3f}]")
        figures = list((place.study / "figures").iterdir())
        api.expect(shown.locator(".figures img")).to_have_count(len(figures))
        page.screenshot(path=screenshots / "evaluation.png", full_page=True)
        for width in (1000, 400):  # the page fits, and so does the first table, that of the methods
            page.set_viewport_size({"width": width, "height": 900})
            for box in ("html", ".wide table >> nth=0"):
                size = page.locator(box).evaluate("box => [box.scrollWidth, box.clientWidth]")
                assert size[0] <= size[1] <= width, (width, box, size)
            page.screenshot(path=screenshots / f"evaluation-{width}.png", full_page=True)
        wide = page.locator(".wide table").last.evaluate(
            "box => [box.scrollWidth > box.clientWidth, getComputedStyle(box).backgroundImage]")
        assert wide[0] and wide[1].count("linear-gradient") == 4, "shadows show that it can be scrolled"
        page.get_by_role("tab", name="Info").click()
        api.expect(page.get_by_text("layers 1 to 3, counted from 0")).to_be_visible()
        api.expect(page.locator("#memory")).to_contain_text("GiB")
        page.screenshot(path=screenshots / "info.png")
        browser.close()
    assert errors == [] and remote == []
