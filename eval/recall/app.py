"""The page of one network and its sidecar: python -m eval.recall --app (extra: app).

It is served from this machine and asks no other: no fonts or scripts come from elsewhere, and no
statistics go there. Whoever can reach it can ask the network; by default that is this machine alone.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would ask elsewhere for its newest version

import fastapi
import gradio as gr
import jax
import uvicorn

from eval.inputs.rows import read_rows
from eval.matching import is_match, is_refusal
from eval.recall import charts, report, thoughts
from eval.recall.knower import Knower, Told, as_row, question_of
from eval.tables import Row, markdown
from tilelli_jax.errors import InputError
from tilelli_jax.files import write_atomically
from tilelli_jax.signals.crystallisation import band

HOST, PORT = "127.0.0.1", 7860
LONGEST = 10_000  # letters of a question: no end to it would be an end to the memory
DEPTHS = (0.25, 0.5, 0.75, 1.0)
FORMING = ["depth", "layer", "it would say"]
ROWS = 1000  # of a batch in the page; all are in its files
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


class Desk:
    """One network, which is asked one thing at a time: clicks that come together wait for each other.

    Long things are done in pieces, and whoever has come meanwhile is heard between two of them.
    """

    def __init__(self, knower: Knower, most_new: int = thoughts.MOST_NEW) -> None:
        self.knower, self.most_new = knower, most_new
        self._one = ThreadPoolExecutor(1, "network")  # first come, first served: a lock would not be so

    def ask(self, questions: Sequence[str], done: Callable[[int], None] = lambda n: None) -> list[Told]:
        """As `Knower.ask`.

        Args:
            done: called with how many have been read.
        """
        found: list[Told] = []
        size = self.knower.reader.batch_size
        for start in range(0, len(questions), size):
            found += self._one.submit(self.knower.ask, questions[start:start + size]).result()
            done(len(found))
        return found

    def speak(self, question: str, thought: str = "") -> Iterator[thoughts.Spoken]:
        """As `thoughts.speak`."""
        one = self._one.submit
        pieces = one(thoughts.speak, self.knower, question, thought, most=self.most_new).result()
        while (spoken := one(next, pieces, None).result()) is not None:
            yield spoken


def build(desk: Desk, about: Sequence[Row], study: str | Path | None, files: Path) -> gr.Blocks:
    """The page.

    Args:
        about: what its last tab tells, as rows of a table.
        study: the directory of a study that is shown; or a text that says why there is none.
        files: a directory for what can be downloaded.
    """
    # Of those that share a name one goes on to the desk, and the others wait in the page's queue.
    probes, speech, batches = [dict[str, Any](concurrency_limit=1, concurrency_id=name)
                               for name in ("probes", "speech", "batches")]
    with gr.Blocks(title="Does it know?", analytics_enabled=False, fill_width=True) as page:
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
            probed = [said, gauge, crystallisation, writes, forming]
            gr.Markdown("### Does it, then?")
            golds = gr.Textbox(label="Right answers, with | between them: what is said is compared",
                               lines=1, elem_id="golds")
            with gr.Row():
                low = gr.Slider(0, 1, thoughts.LOW, step=0.01,
                                label="low: below it, it is told not to guess")
                high = gr.Slider(0, 1, thoughts.HIGH, step=0.01,
                                 label="high: from it on, it is told to answer directly")
            with gr.Row():
                with gr.Column():
                    plain = gr.Button("Generate: baseline", elem_id="generate-baseline")
                    spoken = gr.Markdown(elem_classes="answers", elem_id="baseline", latex_delimiters=[])
                with gr.Column():
                    seeded = gr.Button("Generate: thought seed", elem_id="generate-seeded")
                    led = gr.Markdown(elem_classes="answers", elem_id="seeded", latex_delimiters=[])
            for event, name in ((probe.click, "probe"), (question.submit, "submit")):
                event(lambda text: _probed(desk, text), question, probed, api_name=name, **probes)

            def baseline(text: str, right: str) -> Iterator[str]:
                yield from _generated(desk, text, right)

            def led_by(text: str, right: str, low: float, high: float) -> Iterator[str]:
                yield from _generated(desk, text, right, (low, high))
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
                return _batched(desk, path, files, lambda n, of: progress((n, of), unit="questions"))
            ask_all.click(batch, given, [told, table, made], api_name="batch", **batches)
        with gr.Tab("Evaluation", elem_id="evaluation"):
            _evaluation(study)
        with gr.Tab("Info") as info:
            gr.Markdown(markdown(about), elem_classes="told")
            memory = gr.Markdown(memory_told(), elem_id="memory")
            gr.Markdown(MEANING)
            info.select(memory_told, None, memory, api_visibility="private")
    return page.queue()


MEANING = """
**What P(knows) means.** A question counts as known where this very network, asked in this very way,
answered it rightly: its likeliest answer had a right one in it. P(knows) is how often that is to be
expected, read from one pass of the question alone. It is no claim that an answer is true, none of
another network or another way of asking, and none of questions unlike those that the sidecar was learned
and calibrated on.
"""


def open_door(host: str, port: int) -> socket.socket:
    """Where the page will be heard; port 0 is any that is free.

    Raises:
        InputError: there is no such place, or it is taken.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"--port: expected a number from 0 to {2**16 - 1}, found {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        door = socket.socket(family, kind, protocol)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind(address)
        except OSError:
            door.close()
            raise
    except (OSError, UnicodeError) as error:
        told = getattr(error, "strerror", None) or error
        raise InputError(f"--host, --port: {host}:{port}: cannot be listened at: {told}") from None
    return door


def find_study(study: str, sidecar: str) -> str | Path:
    """The directory of results to show, or why there is none.

    Args:
        study: as given; if empty, the directory beside the sidecar where that is of a study.

    Raises:
        InputError: it was given, and has no results of a study of recall.
    """
    path = Path(study) if study else Path(sidecar).resolve().parent
    if not (path / report.RESULTS).is_file():
        if study:
            raise InputError(f"--study: {path / report.RESULTS}: no such file: expected that of a study")
        return ("There is no study beside this sidecar. `python -m eval.recall --config FILE` makes "
                "one, and its sidecar; `--study DIR` shows one that lies elsewhere.")
    try:
        found = report.read_results(path)
        tables(found), report.verdicts(found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        said = (f"{path / report.RESULTS}: expected what a study of recall has found: "
                f"{type(error).__name__}: {error}")
        if study:
            raise InputError(f"--study: {said}") from None
        return said
    return path


def serve(knower: Knower, door: socket.socket, *, model: str, sidecar: str, study: str | Path,
          most_new: int = thoughts.MOST_NEW) -> int:
    """Until it is interrupted.

    Args:
        model, sidecar: where they are, to be told of.
        study: of `find_study`.
    """
    host, port = door.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    # What is uploaded and made goes with the page.
    with tempfile.TemporaryDirectory(prefix="recall-app-") as room:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(room, "gradio"))
        files = Path(room, "files")
        files.mkdir()
        desk = Desk(knower, most_new)
        page = build(desk, facts(knower, model, sidecar), study, files)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the page's own libraries think of each other
            app = gr.mount_gradio_app(fastapi.FastAPI(), page, "/", server_name=host, server_port=port,
                                      theme=THEME, css=STYLE, footer_links=[], ssr_mode=False,
                                      show_error=False, pwa=False, enable_monitoring=False)
        server = _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        server.says = f"{url} (Ctrl-C ends it)"
        # However it is ended, what it has made goes.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            server.run([door])
        except KeyboardInterrupt:
            print()
        finally:
            signal.signal(signal.SIGTERM, before)
    return 0


class _Server(uvicorn.Server):
    """Says where it is when it can be asked, and not before."""

    says = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.says, flush=True)


def facts(knower: Knower, model: str, sidecar: str) -> list[Row]:
    """What there is to tell of a network and its sidecar."""
    config, judge = knower.language.model.config, knower.judge
    low, high = band(config.n_layers)
    prompt = knower.prompter.config
    rows = {
        "network": f"`{model}`", "family": config.family,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "type": knower.language.model.compute.dtype, "layers": config.n_layers, "width": config.d_model,
        "vocabulary": config.vocab_size, "soft cap of the logits": getattr(config, "softcap", 0) or None,
        "middle of the depth": f"layers {low} to {high}, counted from 0",
        "asked as": f"a chat, with `{prompt.instruction!r}`" if prompt.template == "chat" else (
            f"`{prompt.template.replace('{question}', '{question}' + prompt.instruction)!r}`"),
        "sidecar": f"`{sidecar}`", "learned on": judge.network.get("name"),
        "probabilities": judge.calibrator.to_dict()["kind"], "thresholds": _thresholds(knower)}
    return [{"what": name, "is": value} for name, value in rows.items()]


def memory_told() -> str:
    """What this process has used at most, and what the first device tells of itself."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    told = f"**Memory**: {peak / 2**30:.2f} GiB at most so far"
    there = jax.devices()[0].memory_stats() or {}
    if "bytes_in_use" in there:
        told += f"; on the device {there['bytes_in_use'] / 2**30:.2f} GiB"
        told += f" of {there['bytes_limit'] / 2**30:.2f}" if there.get("bytes_limit") else ""
    return told + "."


def tables(found: report.Tree) -> list[tuple[str, list[Row]]]:
    """What a study has found: headings and rows. Raises LookupError or TypeError where it is none."""
    every = [("What foretells that it knows?", report.rows(found)), ("Verdicts", report.of_words(found)),
             ("Data sets", report.of_datasets(found)),
             ("Within one data set, and from one to another", report.elsewhere(found)),
             ("From the rarest to the most popular", report.by_popularity(found))]
    return [(title, list(rows)) for title, rows in every if rows]


# ---------------------------------------------------------------------------------------------


def _probed(desk: Desk, question: str | None) -> tuple[Any, ...]:
    """A click on Probe: text, gauge, two charts, and what is forming."""
    try:
        told, = desk.ask([_short(question)])
    except InputError as error:
        return _refused(error), None, None, None, None
    knower = desk.knower
    return (_said(told), charts.gauge(told.p, knower.judge.thresholds), charts.crystallisation(told),
            charts.writes(told), _forming(knower, told))


def _generated(desk: Desk, question: str | None, golds: str | None,
               bounds: tuple[float, float] | None = None) -> Iterator[str]:
    """A click on Generate: Markdown, as it comes.

    Args:
        bounds: low and high of the thought seed; None for none.
    """
    try:
        text = _short(question)
        thought = "" if bounds is None else thoughts.seed(desk.ask([text])[0].p, *bounds)
        head = f"{_fenced('Seed', thought)}\n\n" if thought else ""
        yield f"{head}…"
        for spoken in desk.speak(text, thought):
            yield head + _spoken(spoken, [gold for gold in (golds or "").split("|") if gold.strip()])
    except InputError as error:
        yield f"**{html.escape(str(error))}**"


def _batched(desk: Desk, path: str | None, files: Path,
             tell: Callable[[int, int], None]) -> tuple[Any, ...]:
    """A click on Probe them all: text, table, and the files of the scores."""
    try:
        if not path:
            raise InputError("choose a file of questions first")
        name = Path(path).name
        try:
            questions = [question_of(row, f"{name}, row {i}")
                         for i, row in enumerate(read_rows(Path(path), 10**9), 1)]
        except InputError as error:
            raise InputError(str(error).replace(path, name)) from None
        for i, question in enumerate(questions, 1):  # all of them, before any is read
            desk.knower.prompter(_short(question, f"{name}, row {i}"), f"{name}, row {i}")
        found = [as_row(told) for told in desk.ask(questions, lambda n: tell(n, len(questions)))]
    except InputError as error:
        return _refused(error), None, None
    stem = f"{Path(path).stem}-scores"
    room = Path(tempfile.mkdtemp(dir=files))
    lines, cells = room / f"{stem}.jsonl", room / f"{stem}.csv"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    write_atomically(lines, text.encode())
    sheet = io.StringIO(newline="")
    writer = csv.DictWriter(sheet, list(found[0]))
    writer.writeheader()
    writer.writerows(found)
    write_atomically(cells, sheet.getvalue().encode())
    words = [row["verdict"] for row in found if row["verdict"] is not None]
    counted = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    more = f"; the first {ROWS} are shown" if len(found) > ROWS else ""
    shown = [{"P(knows)": f"{row['p']:.3f}", "verdict": row["verdict"] or "–",
              "strongest write": f"layer {row['strongest_write_layer']}: {row['strongest_write']!r}",
              "question": row["question"]} for row in found[:ROWS]]
    return (f'<div class="said">{len(found)} questions{f": {counted}" if counted else ""}{more}.</div>',
            {"headers": list(shown[0]), "data": [list(row.values()) for row in shown]},
            [str(cells), str(lines)])


def _evaluation(study: str | Path | None) -> None:
    """The tab of a study's results."""
    if not isinstance(study, Path):
        gr.Markdown(study or "")
        return
    found = report.read_results(study)
    texts = [f"### {found.get('name') or study.name}",
             "\n".join(f"- {text}" for text in report.verdicts(found))]
    for title, rows in tables(found):
        texts += [f"#### {title}", markdown(rows)]
    gr.Markdown("\n\n".join(texts), elem_classes="told", latex_delimiters=[])
    # In the page itself: files of a study need not be served to whoever asks for one.
    pictures = [f'<figure><img alt="{html.escape(path.stem)}" src="data:image/png;base64,'
                f'{base64.b64encode(path.read_bytes()).decode()}">'
                f"<figcaption>{html.escape(path.stem)}</figcaption></figure>"
                for path in sorted((study / "figures").glob("*.png"))]
    gr.HTML(f'<div class="two">{"".join(pictures)}</div>' if pictures else "This study has no figures.",
            elem_classes="figures")


def _thresholds(knower: Knower) -> str:
    aim, (green, red) = knower.judge.aim, knower.judge.thresholds
    if green is None and red is None:
        return "none: P(knows) is told, and no word"
    told = "; ".join(f"{word} {'–' if at is None else f'{at:.3f}'}" for word, at in (
        ("likely knows from", green), ("likely beyond its knowledge below", red)))
    if "precision" not in aim:
        return told
    promise = ("promised for new questions of the same kind with "
               f"{aim.get('confidence', 0):.0%} confidence"
               if aim.get("guarantee") else "reached on the questions to calibrate on, and not promised")
    return f"{told} (a precision of {aim['precision']:.0%}, {promise})"


def _short(question: str | None, where: str = "the question") -> str:
    text = (question or "").strip()
    if len(text) > LONGEST:
        raise InputError(f"{where} has {len(text)} letters; expected {LONGEST} at most")
    return text


def _refused(error: InputError) -> str:
    return f'<div class="refused">{html.escape(str(error))}</div>'


def _said(told: Told) -> str:
    return (f'<div class="said">Calibrated P(knows) = <b>{told.p:.3f}</b> → '
            f"<b>{told.verdict or 'no thresholds, and so no word'}</b> · strongest write: layer "
            f"{told.strongest_layer}, <code>{html.escape(repr(told.strongest_write))}</code></div>")


def _forming(knower: Knower, told: Told) -> list[list[str]]:
    """The likeliest next symbol in the lens, at four depths."""
    best = told.read.crystallisation.best
    layers = [max(0, int(depth * len(best)) - 1) for depth in DEPTHS]
    shown = {layer: depth for depth, layer in zip(DEPTHS, layers, strict=True)}  # of few layers, each once
    return [[f"{depth:.0%}", str(layer), repr(knower.language.tokenizer.decode([int(best[layer])]))]
            for layer, depth in shown.items()]


def _spoken(spoken: thoughts.Spoken, golds: Sequence[str]) -> str:
    parts = [_fenced("Thought", spoken.thought)] if spoken.thought else []
    if spoken.answer is not None and (spoken.answer or spoken.done is not None):
        parts.append(_fenced("Answer", spoken.answer))
    if spoken.done is None:
        return "\n\n".join([*parts, "…"])
    if not spoken.done:
        parts.append("*Cut off: there was no room for more.*")
    if spoken.answer is None:
        parts.append("**The thought is unfinished: there is no answer.**")
    elif golds:
        parts.append(_matched(spoken.answer, golds))
    return "\n\n".join(parts)


def _matched(answer: str, golds: Sequence[str]) -> str:
    """A line of the answer has to have a right one in it, by the rule of the studies."""
    lines = answer.splitlines()
    if any(is_match(line, golds) for line in lines):
        return "**✓ a right answer**"
    if lines and is_refusal(lines[0]):
        named = any(is_match(line, golds, "recall") for line in lines)
        return "**– it declines**" + (", and names a right answer all the same" if named else "")
    return "**✗ none of the right answers**"


def _fenced(title: str, text: str) -> str:
    """Whatever a network says is shown, and never followed."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"**{title}**\n{fence}text\n{text}\n{fence}"
