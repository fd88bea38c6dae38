"""The memory of Recall's page over many questions.

    python -m bench.page_memory [--probes N] [--per-session N] [--endpoint NAME] [--model DIR --sidecar DIR]

A process of its own serves the page at a free port of this machine, with a small random network unless
another one is named. It is asked over HTTP through gradio's API, one question after the other: 1 to 120
letters, never the same text twice. By default each question comes in a session of its own, as from a user
who opens the page anew. No process and no file remains at the end.

`resident` is all memory of the server (VmRSS). `anonymous` leaves out the pages of files, such as libraries,
which Linux drops and reads again as it likes. `files` are those below the server's temporary directory.
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

from tilelli_jax.eval.recall import verdicts
from tilelli_jax.eval.recall.config import PromptConfig
from tilelli_jax.eval.recall.verdicts import VerdictRule

from bench.measure import arguments, machine, told
from tilelli_jax import store
from tilelli_jax.estimators.sidecar import SidecarConfig
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.signals.crystallisation import BY_LAYER, OVERALL
from tilelli_jax.tables import table

CONFIG = VanillaConfig(d_model=32, n_layers=5, max_seq_len=192, n_heads=2, dense_expand=2)
PROMPT = PromptConfig(template="Q: {question}\nA: ", instruction="")
LETTERS = 120  # of the longest question
MAX_NEW = 24  # tokens of an answer
ENDPOINTS: dict[str, list[object]] = {"probe": [], "baseline": [""], "seeded": ["", 0.4, 0.7]}
PATIENCE = 300  # seconds that the server may take to start, or to answer


class Server(NamedTuple):
    """A process that serves the page, where it answers, and the directory of its temporary files."""

    process: subprocess.Popen[str]
    url: str
    room: Path


class Seen(NamedTuple):
    """After so many questions: MiB of the server, and how many files it has made."""

    probes: int
    resident: float
    anonymous: float
    files: int


def random_study(folder: Path) -> tuple[Path, Path]:
    """The directories of a network and a sidecar with random weights."""
    model, sidecar = folder / "model", folder / "sidecar"
    store.save(store.build(CONFIG, 0), model)
    store.save(store.build(SidecarConfig(d_hidden=8, features=BY_LAYER, globals=OVERALL), 0), sidecar)
    verdicts.write(sidecar, VerdictRule(prompt=PROMPT))
    return model, sidecar


@contextlib.contextmanager
def serving(model: Path, sidecar: Path) -> Iterator[Server]:
    """Raises RuntimeError where the server does not start."""
    with tempfile.TemporaryDirectory(prefix="page-memory-") as name:
        process = subprocess.Popen(
            [sys.executable, "-m", "tilelli_jax", "recall", "app", "--model", str(model),
             "--sidecar", str(sidecar), "--port", "0", "--max-new", str(MAX_NEW)],
            env={**os.environ, "TMPDIR": name}, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline() if select.select([process.stdout], [], [], PATIENCE)[0] else ""
            found = re.match(r"http://127\.0\.0\.1:\d+/", line)
            if found is None:
                raise RuntimeError(f"the server did not start: {line!r}")
            yield Server(process, found[0], Path(name))
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def questions(seed: int = 0) -> Iterator[str]:
    """Texts of 1 to LETTERS letters after a number, by which no two are the same."""
    rng, i = random.Random(seed), 0
    while True:
        yield f"{i} " + "".join(rng.choices(string.ascii_lowercase + "   ", k=rng.randint(1, LETTERS)))
        i += 1


def ask(url: str, endpoint: str, question: str, session: str) -> None:
    """Raises RuntimeError where the question is not answered."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the proxy knows no way here
    call = f"{url}gradio_api/call/{endpoint}"
    body = {"data": [question, *ENDPOINTS[endpoint]], "session_hash": session}
    asked = urllib.request.Request(call, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with opener.open(asked, timeout=PATIENCE) as answer:
        event = json.load(answer)["event_id"]
    with opener.open(f"{call}/{event}", timeout=PATIENCE) as answer:
        said = answer.read().decode()
    if "event: complete" not in said:
        raise RuntimeError(f"{question!r} was not answered: {said[:300]}")


def measured(asking: Callable[[int], None], seeing: Callable[[int], Seen], probes: int, every: int
             ) -> list[Seen]:
    """What is seen before the first question, after each `every`, and after the last.

    Args:
        asking: asks question i.
        seeing: looks at the server after so many questions.
    """
    found = [seeing(0)]
    for i in range(probes):
        asking(i)
        if (i + 1) % every == 0 or i + 1 == probes:
            found.append(seeing(i + 1))
    return found


def memory(pid: int) -> tuple[float, float]:
    """MiB of a process: resident, and anonymous."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident, anonymous = (int(status.partition(f"{field}:")[2].split()[0]) / 1024
                           for field in ("VmRSS", "RssAnon"))
    return resident, anonymous


def report(found: list[Seen]) -> str:
    """A table, and by how much anonymous memory grew in the last half of the questions."""
    rows = [("probes", "resident, MiB", "anonymous, MiB", "files")]
    rows += [(str(one.probes), f"{one.resident:.1f}", f"{one.anonymous:.1f}", str(one.files))
             for one in found]
    last = found[-1]
    middle = next(one for one in found if 2 * one.probes >= last.probes)
    growth = (last.anonymous - middle.anonymous) / max(last.probes - middle.probes, 1)
    return (f"{table(rows, right=range(4))}\n"
            f"from {middle.probes} to {last.probes}: {growth:+.4f} MiB a probe")


def run(model: Path, sidecar: Path, endpoint: str, probes: int, every: int, per_session: int) -> list[Seen]:
    """Starts a server, asks it, and ends it."""
    with serving(model, sidecar) as server:
        texts = questions()

        def seeing(n: int) -> Seen:
            files = sum(path.is_file() for path in server.room.rglob("*"))
            return Seen(n, *memory(server.process.pid), files)
        return measured(lambda i: ask(server.url, endpoint, next(texts), f"session-{i // per_session}"),
                        seeing, probes, every)


def main() -> None:
    parser = arguments(__doc__)
    for name, default, about in (("--probes", 2000, "questions"), ("--per-session", 1, "questions a session"),
                                 ("--every", 50, "questions between two rows of the table")):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{about} [%(default)s]")
    parser.add_argument("--endpoint", choices=ENDPOINTS, default="probe", help="what is asked [%(default)s]")
    for name in ("--model", "--sidecar"):
        parser.add_argument(name, type=Path, metavar="DIR", help="in place of random ones; both or none")
    options = parser.parse_args()
    if min(options.probes, options.every, options.per_session) < 1:
        parser.error("--probes, --every, --per-session: expected 1 at least")
    if (options.model is None) != (options.sidecar is None):
        parser.error("--model, --sidecar: expected both or none")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # however it is ended, the server ends with it
    with told(options.out) as tell, tempfile.TemporaryDirectory() as name:
        model, sidecar = ((options.model, options.sidecar) if options.model else random_study(Path(name)))
        tell(f"{machine()}; {options.endpoint}, {options.per_session} a session")
        tell(report(run(model, sidecar, options.endpoint, options.probes, options.every,
                        options.per_session)))


if __name__ == "__main__":
    main()
