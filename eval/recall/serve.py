"""Serves a network in the manner of OpenAI's API, with P(knows) in every reply: tilelli serve --model PATH.

Clients set their base URL to http://HOST:PORT/v1. Whoever can reach the address can query the network; the
default address is this machine only. Ctrl-C and SIGTERM let the running requests finish, then end the server.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tilelli_jax import extras
from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.commands.networks import add_network_options, open_network_options
from tilelli_jax.errors import InputError
from tilelli_jax.generation.engine import Engine
from tilelli_jax.generation.programs import FinalStream, Signals
from tilelli_jax.io.files import read_text
from tilelli_jax.loading.language import Encoding, LanguageModel
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.serving.hosts import LOOPBACK
from tilelli_jax.serving.knowledge import Knowledge, Located
from tilelli_jax.signals.batching import max_time
from tilelli_jax.signals.prompts import PromptSignals

if TYPE_CHECKING:
    from .predictor import KnowledgePredictor  # needs the extra eval, which a server without sidecar does not

KEY = "TILELLI_API_KEY"  # environment variable with the key
MAX_LEN = 1024  # default of --max-len
SIDECAR = "sidecar"


@command
def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    for package in ("starlette", "uvicorn", "prometheus_client"):
        extras.require(package, "tilelli serve")
    from tilelli_jax.serving import listening
    from tilelli_jax.serving.app import Server, Settings
    from tilelli_jax.serving.requests import Abstain
    key = _api_key(options)
    with listening.open_socket(options.host, options.port) as listener:
        language, knows = _open(options)
        context = max_time(language.model) or language.model.config.max_seq_len
        engine = Engine(language.model, slots=options.slots, max_len=options.max_len or min(context, MAX_LEN),
                        max_waiting=options.max_waiting, signals=None if knows is None else knows.signals,
                        reads_questions=knows is not None and knows.reads_questions)
        server = Server(language, engine, Settings(
            name=options.name or Path(options.model).stem, api_key=key, max_body=options.max_body,
            timeout=options.timeout, log_prompts=options.log_prompts,
            abstain=Abstain(_threshold(options, knows)) if options.abstain and knows else None), knows)
        # A key protects from requests of other sites' pages as well.
        return listening.serve(server, listener, allowed=None if key else [options.host, *options.allow_host])


@dataclasses.dataclass(frozen=True)
class SidecarKnows:
    """P(knows) by a sidecar, or by a linear probe of its study.

    The sidecar reads the logit lens of all layers at the question's tokens, which takes longer than the
    prompt's pass itself; a probe reads one vector of it.

    Attributes:
        estimator: "sidecar", or the name of a probe.
    """

    predictor: KnowledgePredictor
    estimator: str = SIDECAR

    @property
    def reads_questions(self) -> bool:
        """See `Knows`."""
        return self.estimator == SIDECAR

    @property
    def signals(self) -> Signals:
        """See `Knows`."""
        reader = self.predictor.reader
        return (PromptSignals(reader.hooks, reader.chunk, self.predictor.rule.rounded) if self.reads_questions
                else FinalStream())

    @property
    def calibrated_on(self) -> str:
        """See `Knows`."""
        return str(self.predictor.rule.network.get("name", "")) or "not calibrated"

    def locate(self, encoding: Encoding, text: str, question: str | None) -> Located:
        """See `Knows`."""
        prompter = self.predictor.prompter
        if question is None:
            question = prompter.question_in(text)
        if question is None:
            return Located(0, len(encoding.ids), False)
        if prompter.text(question) == text:
            prompt = prompter(question)
            return Located(prompt.start, prompt.stop, list(prompt.ids) == encoding.ids)
        start = text.rfind(question)
        inside = [i for i, (first, last) in enumerate(encoding.spans)
                  if first < start + len(question) and last > start >= 0]
        return Located(inside[0], inside[-1] + 1, False) if inside else Located(0, 0, False)

    def prompt(self, question: str, where: str) -> tuple[Sequence[int], int, int]:
        """See `Knows`."""
        return self.predictor.prompter(question, where)

    def predict(self, outputs: Any) -> Knowledge:
        """See `Knows`."""
        if self.reads_questions:
            prediction, = self.predictor.of_outputs([""], [outputs])
            return Knowledge(prediction.p, prediction.verdict, prediction.strongest_layer)
        if not np.isfinite(outputs).all():
            raise InputError("the question: expected a finite residual stream, found infinite or NaN values: "
                             "the network's weights may be damaged")
        return Knowledge(self.predictor.rule.probes[self.estimator].probability(outputs), None, None)


# ---------------------------------------------------------------------------------------------


def _open(options: argparse.Namespace) -> tuple[LanguageModel, SidecarKnows | None]:
    """Loads the network, and its sidecar if one is asked for."""
    if not options.sidecar:
        if options.abstain:
            raise InputError("--abstain: expected --sidecar, found none")
        return open_network_options(options), None
    from .predictor import KnowledgePredictor
    compute = None if options.dtype is None else ComputeConfig(dtype=options.dtype)
    predictor = KnowledgePredictor.open(options.model, options.sidecar, tokenizer=options.tokenizer,
                                        compute=compute)
    known = (SIDECAR, *predictor.rule.probes)
    if options.estimator not in known:
        raise InputError(f"--estimator: expected one of {', '.join(known)}, found {options.estimator!r:.40}")
    return predictor.language, SidecarKnows(predictor, options.estimator)


def _api_key(options: argparse.Namespace) -> str:
    """The key of --api-key-file or the environment; other machines need one unless --no-api-key is given."""
    key = os.environ.get(KEY, "").strip()
    if options.api_key_file:
        key = read_text(options.api_key_file).strip()
        if not key:
            raise InputError(f"--api-key-file: {options.api_key_file}: expected a key, found none")
    if key and options.no_api_key:
        raise InputError(f"--no-api-key: expected no key, found one in --api-key-file or {KEY}")
    if not key and options.host not in LOOPBACK and not options.no_api_key:
        raise InputError(f"--host: {options.host} can be reached from other machines: expected a key in "
                         f"--api-key-file or {KEY}, or --no-api-key, found none")
    return key


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="tilelli serve", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_options(parser, dtype=None)
    parser.add_argument("--name", default="", help="the model's name in replies [the end of its path]")
    parser.add_argument("--sidecar", default="", metavar="DIR|NAME|shipped", help=(
        "sidecar of a study (OUT/sidecar), or of one that comes with the package; `shipped`: the one for "
        "this network. Without it replies have no P(knows)"))
    parser.add_argument("--estimator", default=SIDECAR, metavar="NAME", help=(
        "what predicts P(knows): sidecar, or a probe of its study such as layer_probe, which costs almost "
        "nothing [%(default)s]"))
    parser.add_argument("--abstain", default="", metavar="P|R%", help=(
        "reply \"I don't know.\" and generate nothing if P(knows) is below P; R%%: below the threshold at "
        "which R %% of the questions that the network knows are abstained on. Requests can set another"))
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [%(default)s]")
    parser.add_argument("--port", type=int, default=8000, metavar="N",
                        help="port to listen on; 0 chooses a free one [%(default)s]")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=(
        "also accept requests for this host name; the address and localhost are always accepted. With a key "
        "all names are"))
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help=(
        f"file with the key that requests must have; the environment variable {KEY} sets it too"))
    parser.add_argument("--no-api-key", action="store_true",
                        help="accept requests of other machines without a key")
    parser.add_argument("--slots", type=int, default=4, metavar="N",
                        help="number of requests that are decoded at once [%(default)s]")
    parser.add_argument("--max-len", type=int, default=0, metavar="T", help=(
        f"maximum number of tokens of a prompt with its reply [the network's context, at most {MAX_LEN}]"))
    parser.add_argument("--max-waiting", type=int, default=64, metavar="N",
                        help="maximum number of requests that wait for a slot [%(default)s]")
    parser.add_argument("--max-body", type=int, default=1 << 20, metavar="BYTES",
                        help="limit of a request's body [%(default)s]")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS",
                        help="limit of a request's time [%(default)s]")
    parser.add_argument("--log-prompts", action="store_true", help="write prompts and replies to the log")
    options = parser.parse_args(argv)
    for name, low in (("slots", 1), ("max_waiting", 0), ("max_body", 1), ("max_len", 0), ("timeout", 0.001)):
        if not getattr(options, name) >= low:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {low}, found "
                             f"{getattr(options, name)}")
    _abstain_number(options.abstain)
    return options


def _abstain_number(value: str) -> float:
    """The number of --abstain, as a fraction of 1. Raises InputError if it is none."""
    try:
        number = float(value.removesuffix("%") or "nan") / (100 if value.endswith("%") else 1)
    except ValueError:
        number = np.nan
    if value and not 0 <= number <= 1:
        raise InputError("--abstain: expected a probability from 0 to 1 or a percentage, found "
                         f"{value!r:.40}")
    return number


def _threshold(options: argparse.Namespace, knows: SidecarKnows) -> float:
    """The P(knows) below which the server abstains."""
    number = _abstain_number(options.abstain)
    if not options.abstain.endswith("%"):
        return number
    if knows.estimator != SIDECAR:
        raise InputError(f"--abstain: expected a probability for --estimator {knows.estimator}, found "
                         f"{options.abstain}")
    rule = knows.predictor.rule
    if not rule.known_quantiles:
        raise InputError(f"--abstain: expected a probability, as {options.sidecar} has no quantiles of known "
                         f"questions, found {options.abstain}")
    return rule.threshold_at(number)
