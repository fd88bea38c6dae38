"""What the page keeps of finished requests (sessions, files, programs), and the benchmark of its memory."""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from bench import page_memory
from bench.page_memory import MemorySample
from tests.eval.recall.small import ASKED, MAX_NEW
from tilelli_jax.eval.recall.app import retention
from tilelli_jax.eval.recall.predictor import KnowledgePredictor, Prediction
from tilelli_jax.eval.recall.verdicts import VerdictRule

pytest.importorskip("gradio", reason="gradio (extra: app) is not installed")
pytest.importorskip("plotly", reason="plotly (extra: app) is not installed")
from fastapi.testclient import TestClient

from tilelli_jax.eval.recall.app import handlers, thought_seeding, uploads
from tilelli_jax.eval.recall.app.page import build, mounted
from tilelli_jax.eval.recall.app.request_queue import RequestQueue

SESSIONS = 4  # in place of retention.SESSIONS
API = "/gradio_api"


def stand_in() -> Any:
    """The part of a request queue that a batch and an answer use."""
    def predict(questions: Sequence[str], done: Callable[[int], None] = lambda n: None) -> list[Any]:
        return [Prediction(question, 0.5, None, 1, "x", None, {}) for question in questions]  # type: ignore[arg-type]

    def answer_seeded(question: str, thought: str = "") -> Iterator[thought_seeding.SeededAnswer]:
        yield from (thought_seeding.SeededAnswer("", question[:n], None) for n in range(1, 4))
        yield thought_seeding.SeededAnswer("", question, True)
    predictor = SimpleNamespace(prompter=lambda *_: None, rule=VerdictRule())
    return SimpleNamespace(predict=predict, answer_seeded=answer_seeded, predictor=predictor)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> uploads.Page:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(uploads, "SESSIONS", SESSIONS)
    built = build(stand_in(), [{"property": "this", "value": "a test"}], "no study", tmp_path)
    assert isinstance(built, uploads.Page)
    return built


@pytest.fixture
def client(page: uploads.Page) -> Iterator[TestClient]:
    with TestClient(mounted(page, "127.0.0.1", 7860), "http://127.0.0.1") as test_client:
        yield test_client


def call(client: TestClient, name: str, *data: Any, session: str) -> Any:
    started = client.post(f"{API}/call/{name}", json={"data": data, "session_hash": session}).json()
    answer = client.get(f"{API}/call/{name}/{started['event_id']}").text
    assert "event: complete" in answer, answer
    return json.loads(answer.rpartition("data: ")[2])


def test_finished_sessions_are_forgotten(page: uploads.Page, client: TestClient) -> None:
    sessions = [f"session {i}" for i in range(3 * SESSIONS)]
    for session in sessions:
        answer, = call(client, "baseline", f"from {session}", "", session=session)
        assert f"from {session}" in answer
    holder, queue = page.state_holder, page._queue
    assert list(holder.session_data) == sessions[-SESSIONS:] and len(holder.time_last_used) == SESSIONS
    # A session is dropped with the next request.
    assert list(queue.pending_event_ids_session) == list(queue.pending_messages_per_session) == sessions[-1:]
    assert len(queue.event_analytics) == 1


def test_a_waiting_session_is_kept() -> None:
    queue = SimpleNamespace(pending_event_ids_session={"waits": {"1"}, "over": set(), "gone": {"2"}},
                            pending_messages_per_session={"waits": "…", "over": "…", "new": "…"})
    retention.forget_sessions(queue)
    assert queue.pending_event_ids_session == {"waits": {"1"}}
    assert list(queue.pending_messages_per_session) == ["waits", "new"]


def test_old_files_are_deleted(page: uploads.Page, client: TestClient, tmp_path: Path) -> None:
    def batch(i: int) -> list[str]:
        content = json.dumps({"question": f"question {i}"}).encode()
        path, = client.post(f"{API}/upload", files={"files": ("mine.jsonl", content)}).json()
        upload = {"path": path, "meta": {"_type": "gradio.FileData"}}
        text, _, downloads = call(client, "batch", upload, session="one")
        assert "1 questions" in text
        lines = client.get(f"{API}/file={downloads[1]['path']}").text
        assert json.loads(lines)["question"] == f"question {i}"
        return [path, *(file["path"] for file in downloads)]

    def files() -> set[str]:
        return {str(path) for path in tmp_path.rglob("*") if path.is_file()}

    first, second = batch(0), batch(1)
    per_batch = 4  # files: the questions, two files of scores, and an empty one of gradio's
    assert files() >= {*first, *second} and len(files()) == 2 * per_batch, "no second copies"
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 3600 * (retention.HOURS + 1),) * 2)
    third = batch(2)
    assert files() >= set(third) and len(files()) == per_batch
    assert len(list(tmp_path.iterdir())) == 3, "directories are deleted with their files"
    assert set().union(*page.temp_file_sets) == set(third)


def test_recent_files_are_kept(tmp_path: Path) -> None:
    for name, hours in (("new", 0.5), ("old", 1.5), ("new.csv", 0.5), ("old.csv", 1.5)):
        path = tmp_path / name
        path.touch() if "." in name else path.mkdir()
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    retention.delete_old(tmp_path, hours=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.csv"]


@pytest.mark.parametrize("handler", ["probe", pytest.param("baseline", marks=pytest.mark.exhaustive)])
def test_new_texts_leave_no_program_array_or_object(handler: str, predictor: KnowledgePredictor,
                                                    predictions: list[Prediction]) -> None:
    queue = RequestQueue(predictor, MAX_NEW)

    def ask(questions: Sequence[str]) -> None:
        for question in questions:
            text = (handlers.probed(queue, question)[0] if handler == "probe"
                    else list(handlers.generated(queue, question, ""))[-1])
            assert "P(knows)" in text or text.startswith("**Answer**")

    def programs_and_arrays() -> tuple[int, ...]:
        gc.collect()
        return (predictor.reader._read._cache_size(), len(queue._engine.programs._programs),
                len(jax.live_arrays()))

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())
    with queue:
        ask(ASKED[:1] * 3)
        before, n_before, n = programs_and_arrays(), objects(), 12
        ask([f"{i} {ASKED[0]}" for i in range(n)])  # lengths that share one compiled program
        after = programs_and_arrays()
        assert after[:-1] == before[:-1] and after[-1] <= before[-1]  # other tests' arrays may be freed
        assert objects() - n_before < n, "less than one object per question"


# The benchmark.

def test_report_of_the_benchmark() -> None:
    calls: list[int] = []
    rows = page_memory.measured(calls.append, lambda n: MemorySample(n, 400 + n, 300 + n / 2, 0), probes=7,
                                every=2)
    assert calls == list(range(7)) and [row.probes for row in rows] == [0, 2, 4, 6, 7]
    lines = page_memory.report(rows).splitlines()
    assert lines[2].split() == ["0", "400.0", "300.0", "0"]
    assert lines[-1].startswith("from 4 to 7: +0.5000 MiB")
    texts = page_memory.questions()
    some = [next(texts) for _ in range(200)]
    assert len(set(some)) == 200 and len({len(text) for text in some}) > 60


@pytest.mark.exhaustive
def test_the_benchmark_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, sidecar = page_memory.random_study(tmp_path / "study")
    rows = page_memory.run(model, sidecar, "seeded", probes=3, every=1, per_session=2)
    assert [row.probes for row in rows] == [0, 1, 2, 3]
    assert all(row.resident > row.anonymous > 50 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["study"]
    with pytest.raises(RuntimeError, match="the server did not start"):
        page_memory.run(tmp_path / "none", sidecar, "probe", 1, 1, 1)
