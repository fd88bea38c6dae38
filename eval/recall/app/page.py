"""The page's layout and its event handlers (extra: app).

The page contacts no other machine: it loads no remote fonts or scripts and sends no statistics.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # else gradio looks up its newest version online
# Else gradio keeps records of 10,000 requests and builds a table of them after each.
os.environ |= {"GRADIO_ANALYTICS_MAX_EVENTS": "1", "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9)}

import fastapi
import gradio as gr
from gradio.route_utils import FnIndexInferError  # a request for an unknown endpoint

from tilelli_jax.serving.hosts import App, Receive, Scope, Send, TrustedHosts

from ...document import SCROLL_SHADOWS
from ...tables import Row, markdown
from . import thought_seeding
from .handlers import DEPTHS, batched, generated, probed
from .info import MEANING, example_question, memory_text, metrics_markdown, study_figures, study_markdown
from .request_queue import RequestQueue
from .uploads import Page, one_line

log = logging.getLogger(__name__)
HINT = ('<div class="result">Probe reads P(knows) and the signals behind it from one pass of the question; '
        "no answer is generated.</div>")
TOKEN_COLUMNS = ["depth", "layer", "next token"]
THEME = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"],
                          font_mono=["ui-monospace", "monospace"])  # system fonts: others are downloaded
# "wide" three times: gradio's own rules for tables are as specific as one class and two elements.
STYLE = """
.modebar-container { display: none !important } /* Plotly's toolbar covers the charts' titles */
@media (max-width: 600px) { #ask, #bounds { flex-direction: column } }
.result { font-size: 1.1rem; min-height: 1.6rem } .input-error { color: #B33A00; font-size: 1.1rem }
.answers pre, .answers code { white-space: pre-wrap !important; word-break: break-word }
.figures .two { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)) }
.figures figure { margin: 0 } .figures img { width: 100%; background: white }
.figures figcaption { text-align: center }
.wide.wide.wide table { display: block; width: fit-content; max-width: 100%; overflow-x: auto; border: 0;
  padding: 0; font-variant-numeric: tabular-nums; SHADOWS }
.wide.wide.wide tr { background: none }
.wide.wide.wide td, .wide.wide.wide th { overflow-wrap: normal; word-break: normal; border-width: 0 0 1px;
  padding: .25rem .5rem; font-size: .85rem }
@media (max-width: 600px) { .wide.wide.wide td, .wide.wide.wide th { padding: .2rem; font-size: .72rem } }
""".replace("SHADOWS", SCROLL_SHADOWS)


def build(queue: RequestQueue, info_rows: Sequence[Row], study: str | Path, files: Path) -> gr.Blocks:
    """Builds the page.

    Args:
        info_rows: the table of its last tab.
        study: directory of the study to show, or a text that says why there is none.
        files: directory for downloads; gradio copies each file if this is not GRADIO_TEMP_DIR.
    """
    # Of the events that share an id, one is passed to the request queue; the others wait in gradio's queue.
    probe_limit, generate_limit, batch_limit = [
        dict[str, Any](concurrency_limit=1, concurrency_id=name) for name in ("probe", "generate", "batch")]
    low_start, high_start = thought_seeding.start_bounds(queue.predictor.rule.thresholds)
    with Page(title="Does it know?", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("## Does it know, before it answers?")
        with gr.Tab("Probe"):
            with gr.Row(equal_height=True, elem_id="ask"):
                question = gr.Textbox(label="Question", lines=1, scale=4, elem_id="question",
                                      placeholder=f"for example: {example_question(study)}")
                probe = gr.Button("Probe", variant="primary", scale=1, elem_id="probe")
            prediction = gr.HTML(HINT, elem_id="prediction")
            with gr.Column(visible=False) as signals:
                with gr.Row():
                    with gr.Column(scale=3, min_width=260):
                        gauge = gr.Plot(show_label=False, elem_id="gauge")
                    with gr.Column(scale=5, min_width=320):
                        crystallisation = gr.Plot(show_label=False, elem_id="crystallisation")
                    with gr.Column(scale=5, min_width=320):
                        writes = gr.Plot(show_label=False, elem_id="writes")
                tokens = gr.Dataframe(headers=TOKEN_COLUMNS, interactive=False, datatype="str",
                                      elem_id="tokens", label="Logit lens at the last position of the prompt",
                                      column_widths=["25%", "25%", "50%"], row_count=len(DEPTHS))
            outputs = [prediction, gauge, crystallisation, writes, tokens, signals]
            gr.Markdown("### Generate an answer")
            correct = gr.Textbox(label="Correct answers, separated by | (optional)", lines=1,
                                 elem_id="correct")
            with gr.Row(elem_id="bounds"):
                low = gr.Slider(0, 1, low_start, step=0.001, elem_id="low", label="low",
                                info="below this P(knows) the thought seed says not to guess")
                high = gr.Slider(0, 1, high_start, step=0.001, elem_id="high", label="high",
                                 info="from this P(knows) on it says to answer directly")
            with gr.Row():
                with gr.Column():
                    generate_baseline = gr.Button("Generate: baseline", elem_id="generate-baseline")
                    baseline = gr.Markdown(elem_classes="answers", elem_id="baseline", latex_delimiters=[])
                with gr.Column():
                    generate_seeded = gr.Button("Generate: thought seed", elem_id="generate-seeded")
                    seeded = gr.Markdown(elem_classes="answers", elem_id="seeded", latex_delimiters=[])

            def on_probe(text: str) -> tuple[Any, ...]:
                results = probed(queue, text)
                return *results, gr.update(visible=results[1] is not None)
            for event, name in ((probe.click, "probe"), (question.submit, "submit")):
                event(on_probe, question, outputs, api_name=name, **probe_limit)

            def on_baseline(text: str, correct: str) -> Iterator[str]:
                yield from generated(queue, text, correct)

            def on_seeded(text: str, correct: str, low: float, high: float) -> Iterator[str]:
                yield from generated(queue, text, correct, (low, high))
            generate_baseline.click(on_baseline, [question, correct], baseline, api_name="baseline",
                                    **generate_limit)
            generate_seeded.click(on_seeded, [question, correct, low, high], seeded, api_name="seeded",
                                  **generate_limit)
        with gr.Tab("Batch"):
            gr.Markdown("A file of questions: JSON lines, a JSON list, CSV or parquet, with a column "
                        "`question`. Nothing is generated.")
            with gr.Row():
                upload = gr.File(label="Questions", file_types=[".jsonl", ".json", ".csv", ".parquet"],
                                 elem_id="upload", height=140)
                downloads = gr.File(label="Scores", file_count="multiple", interactive=False,
                                    elem_id="downloads", height=140)
            probe_all = gr.Button("Probe all", variant="primary", elem_id="batch")
            summary = gr.HTML(elem_id="summary")
            table = gr.Dataframe(headers=["P(knows)", "verdict", "strongest write", "question"],
                                 interactive=False, wrap=True, elem_id="scores")

            def on_batch(path: str, progress: gr.Progress = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
                results = batched(queue, path, files, lambda n, total: progress((n, total), unit="questions"))
                page.delete_old_files()  # not earlier: the batch may have read one of them
                return results
            probe_all.click(on_batch, upload, [summary, table, downloads], api_name="batch", **batch_limit)
        with gr.Tab("Evaluation", elem_id="evaluation"):
            if isinstance(study, Path):
                gr.Markdown(study_markdown(study), elem_classes="wide", latex_delimiters=[])
                with gr.Accordion("All metrics of each method", open=False):
                    gr.Markdown(metrics_markdown(study), elem_classes="wide", latex_delimiters=[])
                gr.HTML(study_figures(study), elem_classes="figures")
            else:
                gr.Markdown(study)
        with gr.Tab("Info") as info:
            gr.Markdown(markdown(info_rows), elem_classes="wide")
            memory = gr.Markdown(memory_text(), elem_id="memory")
            gr.Markdown(MEANING)
            info.select(memory_text, None, memory, api_visibility="private")
    # With an open API, requests could bypass the queue, and their errors would be status 500.
    return page.queue(api_open=False)


def mounted(page: gr.Blocks, host: str, port: int, allowed: Sequence[str] = ()) -> TrustedHosts:
    """Returns the page as an ASGI application.

    Args:
        allowed: host names that requests may use, besides the page's address and localhost.
    """
    # The API documentation (Swagger) would load scripts from another machine.
    options: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = gr.mount_gradio_app(fastapi.FastAPI(**options), page, "/", server_name=host, server_port=port,
                              theme=THEME, css=STYLE, footer_links=[], ssr_mode=False, show_error=False,
                              pwa=False, enable_monitoring=False, app_kwargs=options | {
                                  "exception_handlers": dict.fromkeys(CLIENT_ERRORS, _bad_request)})
    return TrustedHosts(_closing_broken_streams(app), allowed)


# What gradio's routes raise for a request that names something unknown or has an unexpected form.
CLIENT_ERRORS = (FnIndexInferError, LookupError, ValueError, TypeError, AttributeError)


async def _bad_request(request: fastapi.Request, error: Exception) -> fastapi.responses.JSONResponse:
    """Answers with status 400 and a text; logs one line."""
    log.warning("%s %r: %s", request.method, request.url.path, one_line(error))
    return fastapi.responses.JSONResponse(
        {"detail": "request: expected an endpoint of this page with its data, found another"}, 400)


def _closing_broken_streams(app: App) -> App:
    """Wraps the application: a client error in a started response ends the stream and logs one line."""
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except RuntimeError as error:  # Starlette raises it for an error after the response has started
            if not isinstance(error.__cause__, (fastapi.HTTPException, *CLIENT_ERRORS)):
                raise
            log.warning("%s %r: %s", scope["method"], scope["path"], one_line(error.__cause__))
            await send({"type": "http.response.body", "body": b""})
    return answer
