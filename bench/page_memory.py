"""Memory of the server of Recall's page over many questions.

    python -m bench.page_memory [--probes N] [--per-session N] [--endpoint NAME] [--model DIR --sidecar DIR]

A separate process serves the page at a free port of this machine, with a small random network unless --model
is given. The benchmark sends questions over HTTP through gradio's API, one after the other: 1 to 120
characters, all different. By default each question is sent in a new session, as by a user who reopens the
page. No process and no file remains at the end.

`resident` is the server's total memory (VmRSS). `anonymous` excludes pages of files, such as libraries, which
Linux can drop and read again. `files` is the number of files below the server's temporary directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import signal
import string
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench.measure import arguments, machine, tee
from tilelli_jax.cli.tables import table
from tilelli_jax.estimators.sidecar import SidecarConfig
from tilelli_jax.eval.recall import verdicts
from tilelli_jax.eval.recall.config import PromptConfig
from tilelli_jax.eval.recall.verdicts import VerdictRule
from tilelli_jax.loading import store
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.signals.crystallisation import BY_LAYER, PROMPT_FEATURES

CONFIG = VanillaConfig(d_model=32, n_layers=5, max_seq_len=192, n_heads=2, dense_expand=2)
PROMPT = PromptConfig(template="Q: {question}\nA: ", instruction="")
MAX_CHARACTERS = 120  # characters in the longest question
MAX_NEW = 24  # maximum tokens of an answer
ENDPOINTS: dict[str, list[object]] = {"probe": [], "baseline": [""], "seeded": ["", 0.4, 0.7]}
TIMEOUT = 300  # seconds that the server may take to start or to answer


class Server(NamedTuple):
    """The process that serves the page, its URL, and the directory of its temporary files."""

    process: subprocess.Popen[str]
    url: str
    temp_dir: Path


class MemorySample(NamedTuple):
    """Memory of the server in MiB and number of its files, after `probes` questions."""

    probes: int
    resident: float
    anonymous: float
    files: int


def random_study(directory: Path) -> tuple[Path, Path]:
    """Writes a network and a sidecar with random weights; returns their directories."""
    model, sidecar = directory / "model", directory / "sidecar"
    store.save(store.build(CONFIG, 0), model)
    store.save(store.build(SidecarConfig(d_hidden=8, features=BY_LAYER, prompt_features=PROMPT_FEATURES), 0),
               sidecar)
    verdicts.write(sidecar, VerdictRule(prompt=PROMPT))
    return model, sidecar


@contextlib.contextmanager
def serving(model: Path, sidecar: Path) -> Iterator[Server]:
    """Starts the server and ends it on exit. Raises RuntimeError if it does not start."""
    with tempfile.TemporaryDirectory(prefix="page-memory-") as name:
        process = subprocess.Popen(
            [sys.executable, "-m", "tilelli_jax", "recall", "app", "--model", str(model),
             "--sidecar", str(sidecar), "--port", "0", "--max-new", str(MAX_NEW)],
            env={**os.environ, "TMPDIR": name}, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline() if select.select([process.stdout], [], [], TIMEOUT)[0] else ""
            match = re.match(r"http://127\.0\.0\.1:\d+/", line)
            if match is None:
                raise RuntimeError(f"the server did not start: {line!r}")
            yield Server(process, match[0], Path(name))
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def questions(seed: int = 0) -> Iterator[str]:
    """Yields a number followed by 1 to MAX_CHARACTERS random letters and spaces; all texts differ."""
    rng, i = random.Random(seed), 0
    while True:
        yield f"{i} " + "".join(rng.choices(string.ascii_lowercase + "   ", k=rng.randint(1, MAX_CHARACTERS)))
        i += 1


def ask(url: str, endpoint: str, question: str, session: str) -> None:
    """Sends a question and waits for the answer. Raises RuntimeError if there is none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # do not use a proxy
    call = f"{url}gradio_api/call/{endpoint}"
    body = {"data": [question, *ENDPOINTS[endpoint]], "session_hash": session}
    post = urllib.request.Request(call, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with opener.open(post, timeout=TIMEOUT) as answer:
        event = json.load(answer)["event_id"]
    with opener.open(f"{call}/{event}", timeout=TIMEOUT) as answer:
        reply = answer.read().decode()
    if "event: complete" not in reply:
        raise RuntimeError(f"{question!r} was not answered: {reply[:300]}")


def measured(ask_question: Callable[[int], None], sample_memory: Callable[[int], MemorySample], probes: int,
             every: int) -> list[MemorySample]:
    """Samples the memory before the first question, after every `every` questions, and after the last.

    Args:
        ask_question: sends question i.
        sample_memory: returns a sample, given the number of questions so far.
        probes: number of questions.
    """
    samples = [sample_memory(0)]
    for i in range(probes):
        ask_question(i)
        if (i + 1) % every == 0 or i + 1 == probes:
            samples.append(sample_memory(i + 1))
    return samples


def memory(pid: int) -> tuple[float, float]:
    """Resident and anonymous memory of a process, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident, anonymous = (int(status.partition(f"{field}:")[2].split()[0]) / 1024
                           for field in ("VmRSS", "RssAnon"))
    return resident, anonymous


def report(samples: list[MemorySample]) -> str:
    """A table, and the growth of anonymous memory per probe in the second half of the questions."""
    rows = [("probes", "resident, MiB", "anonymous, MiB", "files")]
    rows += [(str(sample.probes), f"{sample.resident:.1f}", f"{sample.anonymous:.1f}", str(sample.files))
             for sample in samples]
    last = samples[-1]
    middle = next(sample for sample in samples if 2 * sample.probes >= last.probes)
    growth = (last.anonymous - middle.anonymous) / max(last.probes - middle.probes, 1)
    return (f"{table(rows, right=range(4))}\n"
            f"from {middle.probes} to {last.probes}: {growth:+.4f} MiB/probe")


def run(model: Path, sidecar: Path, endpoint: str, probes: int, every: int,
        per_session: int) -> list[MemorySample]:
    """Starts a server, sends the questions, and ends it."""
    with serving(model, sidecar) as server:
        texts = questions()

        def sample_memory(n: int) -> MemorySample:
            files = sum(path.is_file() for path in server.temp_dir.rglob("*"))
            return MemorySample(n, *memory(server.process.pid), files)
        return measured(lambda i: ask(server.url, endpoint, next(texts), f"session-{i // per_session}"),
                        sample_memory, probes, every)


def main() -> None:
    parser = arguments(__doc__)
    for name, default, meaning in (
            ("--probes", 2000, "number of questions"), ("--per-session", 1, "questions per session"),
            ("--every", 50, "questions between two rows of the table")):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{meaning} [%(default)s]")
    parser.add_argument("--endpoint", choices=ENDPOINTS, default="probe",
                        help="endpoint that gets the questions [%(default)s]")
    for name in ("--model", "--sidecar"):
        parser.add_argument(name, type=Path, metavar="DIR",
                            help="directory to use instead of a random one; give both or neither")
    options = parser.parse_args()
    if min(options.probes, options.every, options.per_session) < 1:
        parser.error("--probes, --every, --per-session: expected at least 1")
    if (options.model is None) != (options.sidecar is None):
        parser.error("--model, --sidecar: expected both or neither")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends with this process
    with tee(options.out) as print_line, tempfile.TemporaryDirectory() as name:
        model, sidecar = ((options.model, options.sidecar) if options.model else random_study(Path(name)))
        print_line(f"{machine()}; {options.endpoint}, {options.per_session} per session")
        print_line(report(run(model, sidecar, options.endpoint, options.probes, options.every,
                              options.per_session)))


if __name__ == "__main__":
    main()
