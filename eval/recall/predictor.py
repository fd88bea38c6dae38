"""P(the model knows) of questions, from one pass of each prompt and nothing generated.

    from .predictor import open_knower
    knower = open_knower("runs/recall-demo/networks/…/model", "runs/recall-demo/sidecar")
    for told in knower.ask(["Where does Mira Holt live?"]):
        print(told.p, told.verdict, told.strongest_write)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tilelli_jax import store
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sidecar import Sidecar
from tilelli_jax.language import Language, open_language
from tilelli_jax.models.decoder import ComputeConfig
from tilelli_jax.sharding import Mesh
from tilelli_jax.signals.crystallisation import BY_LAYER, OVERALL
from tilelli_jax.signals.prompts import PromptOutputs, PromptReader
from tilelli_jax.training.sidecar import logits_of

from ..inputs import networks
from ..inputs.networks import NetworkConfig
from ..thresholds import Verdict
from . import verdicts
from .config import PromptConfig
from .prompting import Prompter
from .verdicts import VerdictRule


class Prediction(NamedTuple):
    """Of one question: `p`, P(knows); the word for it, None without thresholds; the most definite write in
    the middle of the depth: its layer, counted from 0, and its token as text; and all that was read."""

    question: str
    p: float
    verdict: Verdict | None
    strongest_layer: int
    strongest_write: str
    read: PromptOutputs


@dataclasses.dataclass
class KnowledgePredictor:
    """One network with a sidecar; what was compiled serves the next call.

    Attributes:
        judge: what makes probabilities and words of the sidecar's scores.
    """

    language: Language
    sidecar: Sidecar
    rule: VerdictRule
    prompter: Prompter
    reader: PromptReader

    def ask(self, questions: Sequence[str]) -> list[Prediction]:
        """Raises InputError where a question is empty or longer than is read, or a number of it is none."""
        where = (lambda i: "the question") if len(questions) == 1 else (lambda i: f"question {i + 1}")
        prompts = [self.prompter(question, where(i)) for i, question in enumerate(questions)]
        found = dict(self.reader(prompts))
        reads = [found[i] for i in range(len(prompts))]
        if not reads:
            return []
        for i, read in enumerate(reads):
            if not np.isfinite(read.final).all():  # the features are 0 then, and any P of them is made up
                raise InputError(f"{where(i)}: the network's stream is not finite: it is broken there")
        scores = logits_of(self.sidecar, np.stack([read.crystallisation.by_layer for read in reads]),
                           np.stack([read.crystallisation.overall for read in reads]))
        chances, decode = self.rule.probabilities(scores), self.language.tokenizer.decode
        if np.isnan(chances).any():
            raise InputError("P(knows): expected numbers, found NaN: the sidecar is broken")
        return [Prediction(question, float(p), self.rule.word(float(score)),
                     int(read.crystallisation.strongest_layer),
                     decode([int(read.crystallisation.strongest_token)]), read)
                for question, p, score, read in zip(questions, chances, scores, reads, strict=True)]


def open_predictor(model: str | Path, sidecar: str | Path, *, tokenizer: str | Path = "",
                prompt: PromptConfig | None = None, compute: ComputeConfig | None = None,
                mesh: Mesh | None = None, batch_size: int = 16, max_bytes: int = 2**31,
                any_network: bool = False) -> KnowledgePredictor:
    """Opens a network and a sidecar that was learned on it.

    Args:
        model: directory of the network, ours or of Hugging Face.
        sidecar: directory that a study has left, or a converted lrd.pt.
        prompt, compute: in place of how the sidecar's study asked, and ran the network.
        any_network: use a sidecar on another network than its own.

    Raises:
        InputError: one of them cannot be read, or the sidecar is none for this network.
    """
    networks.check(NetworkConfig(path=str(model), tokenizer=str(tokenizer)))
    found = store.load(sidecar)
    if not isinstance(found, Sidecar):
        raise InputError(f"{sidecar}: expected a sidecar, found family {found.config.family}")
    check_features(found, sidecar)
    rule = verdicts.read(Path(sidecar))
    language = open_language(model, tokenizer, compute or ComputeConfig(dtype=rule.dtype), mesh)
    if not (Path(sidecar) / verdicts.FILE).is_file() and language.chat is None and prompt is None:
        raise InputError(f"{sidecar}: has no {verdicts.FILE}, so that questions are put as a chat, and the "
                         f"tokenizer of {model} has no chat_template")
    if rule.network and not any_network:
        layers = language.model.config.n_layers
        if layers != rule.network["n_layers"]:
            raise InputError(f"{sidecar}: was learned on a network of {rule.network['n_layers']} layers, "
                             f"and {model} has {layers}; --any-network uses it all the same")
        if rule.network["contents"] != networks.contents(Path(model), str(tokenizer)):
            raise InputError(f"{sidecar}: was learned on '{rule.network['name']}', whose weights are not "
                             f"those of {model}; --any-network uses it all the same")
    reader = PromptReader(language.model, batch_size=batch_size, max_bytes=max_bytes, rounded=rule.rounded,
                    mesh=mesh)
    return KnowledgePredictor(language, found, rule, Prompter(language, prompt or rule.prompt), reader)


def as_row(told: Prediction) -> dict[str, object]:
    """What a file of predictions says of one question."""
    return {"question": told.question, "p": told.p, "verdict": told.verdict,
            "strongest_write_layer": told.strongest_layer, "strongest_write": told.strongest_write}


def check_features(sidecar: Sidecar, source: str | Path) -> None:
    """Raises InputError where a sidecar reads other features than those that there are."""
    for kind, wanted, names, n in (("features", BY_LAYER, sidecar.config.features, sidecar.config.n_features),
                                   ("globals", OVERALL, sidecar.config.globals, sidecar.config.n_globals)):
        if n != len(wanted):
            raise InputError(f"{source}: n_{kind}: expected {len(wanted)}, found {n}")
        for i, (name, expected) in enumerate(zip(names, wanted, strict=False)):
            if name != expected:
                raise InputError(f"{source}: {kind}: expected {expected} at {i}, found {name}")
