"""The page itself: what stands where, and which click leads to what (extra: app).

It asks no other machine: no fonts or scripts come from elsewhere, and no statistics go there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would ask elsewhere for its newest version
# It would keep records of 10,000 requests, and make a table of them after each.
os.environ |= {"GRADIO_ANALYTICS_MAX_EVENTS": "1", "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9)}

import fastapi
import gradio as gr
from gradio.route_utils import FnIndexInferError  # of an endpoint that there is not

from tilelli_jax.hosts import App, Receive, Scope, Send, TrustedHosts

from ..tables import Row, markdown
from . import thought_seeding
from .handlers import DEPTHS, batched, generated, probed
from .info import MEANING, conclusions, memory_told, pictures
from .request_queue import RequestQueue
from .uploads import Page, one_line

log = logging.getLogger(__name__)
FORMING = ["depth", "layer", "it would say"]
THEME = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"],
                          font_mono=["ui-monospace", "monospace"])  # no others, which would be fetched
STYLE = """
.said { font-size: 1.1rem; min-height: 1.6rem } .refused { color: #B33A00; font-size: 1.1rem }
.answers pre, .answers code { white-space: pre-wrap !important; word-break: break-word }
.figures .two { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)) }
.figures figure { margin: 0 } .figures img { width: 100%; background: white }
.figures figcaption { text-align: center }
.told { overflow-x: auto }
.told table { font-variant-numeric: tabular-nums } .told td, .told th { white-space: nowrap }
"""


def build(queue: RequestQueue, about: Sequence[Row], study: str | Path, files: Path) -> gr.Blocks:
    """The page.

    Args:
        about: what its last tab tells, as rows of a table.
        study: the directory of a study that is shown; or a text that says why there is none.
        files: a directory for what can be downloaded; gradio makes a copy if it is not GRADIO_TEMP_DIR.
    """
    # Of those that share a name one goes on to the desk, and the others wait in the page's queue.
    probes, speech, batches = [dict[str, Any](concurrency_limit=1, concurrency_id=name)
                               for name in ("probes", "speech", "batches")]
    with Page(title="Does it know?", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("## Does it know, before it answers?")
        with gr.Tab("Probe"):
            with gr.Row(equal_height=True):
                question = gr.Textbox(label="Question", lines=1, scale=4, elem_id="question")
                probe = gr.Button("Probe (no answer generated)", variant="primary", scale=1,
                                  elem_id="probe")
            said = gr.HTML(elem_id="said")
            with gr.Row():
                with gr.Column(scale=3, min_width=260):
                    gauge = gr.Plot(show_label=False, elem_id="gauge")
                with gr.Column(scale=5, min_width=320):
                    crystallisation = gr.Plot(show_label=False, elem_id="crystallisation")
                with gr.Column(scale=5, min_width=320):
                    writes = gr.Plot(show_label=False, elem_id="writes")
            forming = gr.Dataframe(headers=FORMING, label="What is forming, at the end of the prompt",
                                   interactive=False, datatype="str", elem_id="forming",
                                   column_widths=["15%", "15%", "70%"], row_count=len(DEPTHS))
            shown = [said, gauge, crystallisation, writes, forming]
            gr.Markdown("### Does it, then?")
            golds = gr.Textbox(label="Right answers, with | between them: what is said is compared",
                               lines=1, elem_id="golds")
            with gr.Row():
                low = gr.Slider(0, 1, thought_seeding.LOW, step=0.01,
                                label="low: below it, it is told not to guess")
                high = gr.Slider(0, 1, thought_seeding.HIGH, step=0.01,
                                 label="high: from it on, it is told to answer directly")
            with gr.Row():
                with gr.Column():
                    plain = gr.Button("Generate: baseline", elem_id="generate-baseline")
                    spoken = gr.Markdown(elem_classes="answers", elem_id="baseline", latex_delimiters=[])
                with gr.Column():
                    seeded = gr.Button("Generate: thought seed", elem_id="generate-seeded")
                    led = gr.Markdown(elem_classes="answers", elem_id="seeded", latex_delimiters=[])
            for event, name in ((probe.click, "probe"), (question.submit, "submit")):
                event(lambda text: probed(queue, text), question, shown, api_name=name, **probes)

            def baseline(text: str, right: str) -> Iterator[str]:
                yield from generated(queue, text, right)

            def led_by(text: str, right: str, low: float, high: float) -> Iterator[str]:
                yield from generated(queue, text, right, (low, high))
            plain.click(baseline, [question, golds], spoken, api_name="baseline", **speech)
            seeded.click(led_by, [question, golds, low, high], led, api_name="seeded", **speech)
        with gr.Tab("Batch"):
            gr.Markdown("A file of questions: JSON lines, a JSON list, CSV or parquet, with a column "
                        "`question`. Nothing is generated.")
            with gr.Row():
                given = gr.File(label="Questions", file_types=[".jsonl", ".json", ".csv", ".parquet"],
                                elem_id="given", height=140)
                made = gr.File(label="Scores", file_count="multiple", interactive=False, elem_id="made",
                               height=140)
            ask_all = gr.Button("Probe them all", variant="primary", elem_id="batch")
            told = gr.HTML(elem_id="told")
            table = gr.Dataframe(interactive=False, wrap=True, elem_id="scores")

            def batch(path: str, progress: gr.Progress = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
                found = batched(queue, path, files, lambda n, of: progress((n, of), unit="questions"))
                page.delete_old_files()  # now, as one of them may have been read
                return found
            ask_all.click(batch, given, [told, table, made], api_name="batch", **batches)
        with gr.Tab("Evaluation", elem_id="evaluation"):
            if isinstance(study, Path):
                gr.Markdown(conclusions(study), elem_classes="told", latex_delimiters=[])
                gr.HTML(pictures(study), elem_classes="figures")
            else:
                gr.Markdown(study)
        with gr.Tab("Info") as info:
            gr.Markdown(markdown(about), elem_classes="told")
            memory = gr.Markdown(memory_told(), elem_id="memory")
            gr.Markdown(MEANING)
            info.select(memory_told, None, memory, api_visibility="private")
    return page.queue(api_open=False)  # else requests could pass by the queue, and their mistakes were 500


def mounted(page: gr.Blocks, host: str, port: int, allowed: Sequence[str] = ()) -> TrustedHosts:
    """The page as a server's application.

    Args:
        allowed: names under which it may be asked for, besides its address and localhost.
    """
    # Swagger, its documentation, would come from elsewhere.
    options: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = gr.mount_gradio_app(fastapi.FastAPI(**options), page, "/", server_name=host, server_port=port,
                              theme=THEME, css=STYLE, footer_links=[], ssr_mode=False, show_error=False,
                              pwa=False, enable_monitoring=False, app_kwargs=options | {
                                  "exception_handlers": dict.fromkeys(MISTAKES, _refused)})
    return TrustedHosts(_ended(app), allowed)


# What gradio's routes raise where a request names what there is not, or is of another form than they expect.
MISTAKES = (FnIndexInferError, LookupError, ValueError, TypeError, AttributeError)


async def _refused(request: fastapi.Request, error: Exception) -> fastapi.responses.JSONResponse:
    """400 with a text, and one line in the log."""
    log.warning("%s %r: %s", request.method, request.url.path, one_line(error))
    return fastapi.responses.JSONResponse(
        {"detail": "request: expected an endpoint of this page with its data, found another"}, 400)


def _ended(app: App) -> App:
    """The application; a stream that tells of a mistake ends there, with one line in the log."""
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except RuntimeError as error:  # Starlette's, where a mistake is found after the answer has begun
            if not isinstance(error.__cause__, (fastapi.HTTPException, *MISTAKES)):
                raise
            log.warning("%s %r: %s", scope["method"], scope["path"], one_line(error.__cause__))
            await send({"type": "http.response.body", "body": b""})
    return answer
