"""The server on SmolLM2-135M-Instruct: python -m bench.serve [--model PATH] [--rounds N].

Clients that each send one request after the other, to `tilelli serve` in its own process: time to the first
token and tokens/s for 1, 4 and 16 clients, beside a loop of transformers' `generate` over the same prompts
with the same weights. Then the time to the first token of one client by what is read from the prompt's pass:
nothing, the final stream (a layer probe), or the logit lens of all layers (the sidecar).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.measure import Candidate, arguments, in_turn, machine, milliseconds, ratio, tee
from bench.smollm2 import directories
from bench.smollm2_file import gguf_path
from tilelli_jax.cli.tables import table
from tilelli_jax.generation.engine import Engine, Request
from tilelli_jax.generation.programs import FinalStream, Signals
from tilelli_jax.loading.language import load_with_tokenizer
from tilelli_jax.models.sampling import Sampling
from tilelli_jax.signals.prompts import PromptSignals, lens_hooks

CLIENTS, REQUESTS, NEW, SLOTS, MAX_LEN = (1, 4, 16), 2, 48, 16, 256
QUESTION = "What is known about the {} largest city of the world, and who founded it?"
AIMS = "aims: 16 clients at least 4 × the tokens/s of one; P(knows) at most 5 % of the first token's time"


class Reply(NamedTuple):
    """Seconds to the first token, seconds in all, and the number of tokens of one reply."""

    first: float
    total: float
    tokens: int


@contextlib.contextmanager
def served(model: Path) -> Iterator[str]:
    """The URL of a server that is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tilelli_jax.serve", "--model", str(model), "--port", "0", "--slots",
         str(SLOTS), "--max-len", str(MAX_LEN), "--name", "model"], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"TILELLI_API_KEY": ""})
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        url = next(lines).partition(": ")[0]
        assert any(line.startswith("ready: ") for line in lines), "the server did not start"
        yield url
    finally:
        process.kill()
        process.wait()


def ask(url: str, number: int) -> Reply:
    """One streamed reply."""
    body = {"prompt": QUESTION.format(number), "max_tokens": NEW, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}
    request = urllib.request.Request(f"{url}v1/completions", json.dumps(body).encode())
    begin, first, tokens = time.perf_counter(), 0.0, 0
    with urllib.request.urlopen(request) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - begin
                tokens = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", 0)
    return Reply(first, time.perf_counter() - begin, tokens)


def under_load(url: str, clients: int, rounds: int) -> list[str]:
    """A row: clients, time to the first token, tokens/s."""
    numbers, rates, firsts = itertools.count(), [], []
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        for _ in range(rounds):
            begin = time.perf_counter()
            replies = list(pool.map(lambda number: ask(url, number), itertools.islice(
                numbers, clients * REQUESTS)))
            rates.append(sum(reply.tokens for reply in replies) / (time.perf_counter() - begin))
            firsts += [reply.first for reply in replies]
    return [f"{clients}", milliseconds(firsts), f"{statistics.median(rates):.1f}"]


def transformers_rate(model: Path, rounds: int) -> float:
    """Tokens/s of a loop of `generate`."""
    import torch
    import transformers
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    network.generation_config.eos_token_id = None
    rates = []
    for i in range(rounds + 1):
        ids = tokenizer(QUESTION.format(i), return_tensors="pt")
        begin = time.perf_counter()
        with torch.inference_mode():
            network.generate(**ids, max_new_tokens=NEW, do_sample=False)
        rates.append(NEW / (time.perf_counter() - begin))
    return statistics.median(rates[1:])


def first_tokens(model: Path, rounds: int, print_line: Callable[[str], None]) -> None:
    """Times the pass of one prompt, with and without signals."""
    language = load_with_tokenizer(model)
    encoded = language.tokenizer.encode(QUESTION.format("second"))
    kinds: dict[str, tuple[Signals | None, bool]] = {
        "nothing": (None, False), "final stream (layer probe)": (FinalStream(), False),
        "logit lens (sidecar)": (PromptSignals(lens_hooks(language.model)), True)}
    with contextlib.ExitStack() as stack:
        candidates: dict[str, Candidate] = {}
        for name, (signals, reads_questions) in kinds.items():
            engine = Engine(language.model, slots=1, max_len=64, signals=signals,
                            reads_questions=reads_questions)
            stack.enter_context(engine.running())
            candidates[name] = _one_token(engine, encoded, signals is not None)
        seconds = in_turn(candidates, rounds)
    rows: list[tuple[str, ...]] = [(f"read from a prompt of {len(encoded)} tokens", "ms", "of nothing")]
    rows += [(name, milliseconds(times), f"{ratio(times, seconds['nothing']):.2f}")
             for name, times in seconds.items()]
    print_line(table(rows))


def _one_token(engine: Engine, ids: list[int], reads: bool) -> Candidate:
    request = Request(ids, Sampling(max_new=1, temperature=0.0), question=(0, len(ids)) if reads else (0, 0),
                      observe=(lambda outputs: True) if reads else None)
    return lambda: engine.submit(request, _ignore).wait()


def _ignore(event: Any) -> None:
    """Receives tokens."""


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--model", type=Path, metavar="PATH", help="a network that transformers reads too")
    options = parser.parse_args()
    with tee(options.out) as print_line, tempfile.TemporaryDirectory() as name:
        model = options.model or directories(Path(name))[1]
        source = options.model or f"SmolLM2-135M-Instruct ({gguf_path().name}, decoded)"
        print_line(f"{machine()}; {source}, {NEW} new tokens, {SLOTS} slots, {options.rounds} rounds; {AIMS}")
        with served(model) as url:
            rows = [under_load(url, clients, options.rounds) for clients in CLIENTS]
        rate = transformers_rate(model, options.rounds)
        print_line(table([("clients", "ms to the first token", "tokens/s"), *map(tuple, rows)]))
        print_line(f"a loop of transformers' generate: {rate:.1f} tokens/s; 16 clients / 1 client: "
                   f"{float(rows[-1][2]) / float(rows[0][2]):.2f}")
        first_tokens(model, options.rounds, print_line)


if __name__ == "__main__":
    main()
