"""P(knows) of questions, from one forward pass of each prompt; nothing is generated.

    from tilelli_jax.eval.recall.predictor import KnowledgePredictor
    predictor = KnowledgePredictor.open("runs/recall-demo/networks/…/model", "runs/recall-demo/sidecar")
    for prediction in predictor.predict(["Where does Mira Holt live?"]):
        print(prediction.p, prediction.verdict, prediction.strongest_write)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.estimators.fit_sidecar import sidecar_logits
from tilelli_jax.estimators.sidecar import Sidecar
from tilelli_jax.loading import store
from tilelli_jax.loading.fingerprint import network_fingerprint
from tilelli_jax.loading.language import LanguageModel, load_with_tokenizer
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.parallel.sharding import Mesh
from tilelli_jax.signals.crystallisation import BY_LAYER, PROMPT_FEATURES
from tilelli_jax.signals.prompts import PromptOutputs, PromptReader

from ..inputs import networks
from ..thresholds import Verdict
from . import verdicts
from .answering import answer, answer_text
from .config import PromptConfig
from .prompting import Prompter
from .verdicts import VerdictRule


class Prediction(NamedTuple):
    """The prediction for one question.

    `p` is P(knows); `verdict` is None without thresholds. `strongest_layer` (counted from 0) and
    `strongest_write` are the layer and the token of the MLP write with the highest peak in the middle
    layers. `outputs` are all signals of the prompt; `by_probe` is P(knows) by the study's linear probes.
    """

    question: str
    p: float
    verdict: Verdict | None
    strongest_layer: int
    strongest_write: str
    outputs: PromptOutputs
    by_probe: dict[str, float]


@dataclasses.dataclass
class KnowledgePredictor:
    """One network with its sidecar; compiled programs are reused between calls.

    Attributes:
        rule: calibration and thresholds of the sidecar's scores.
    """

    language: LanguageModel
    sidecar: Sidecar
    rule: VerdictRule
    prompter: Prompter
    reader: PromptReader

    @classmethod
    def open(cls, model: str | Path, sidecar: str | Path = "", *, tokenizer: str | Path = "",
             prompt: PromptConfig | None = None, compute: ComputeConfig | None = None,
             mesh: Mesh | None = None, batch_size: int = 16, max_bytes: int = 2**31,
             any_network: bool = False) -> KnowledgePredictor:
        """Opens a network and the sidecar that was trained on it.

        Args:
            model: directory of the network, in Tilelli's or Hugging Face's format.
            sidecar: OUT/sidecar of a study, a converted lrd.pt, or the name of a shipped study; "" is the one
                shipped for this network.
            prompt, compute: replace the prompt and the data type of the sidecar's study.
            any_network: accept a sidecar that was trained on another network.

        Raises:
            InputError: one of them cannot be read, or the sidecar was trained on another network.
        """
        networks.check_source(model, "--model")
        networks.check_tokenizer(tokenizer, "--tokenizer")
        from . import shipped  # not above: it imports the study
        sidecar = shipped.find_sidecar(sidecar, Path(model), str(tokenizer))
        loaded = store.load(sidecar)
        if not isinstance(loaded, Sidecar):
            raise InputError(f"{sidecar}: expected a sidecar, found family {loaded.config.family}")
        check_features(loaded, sidecar)
        rule = verdicts.read(Path(sidecar))
        language = load_with_tokenizer(model, tokenizer, compute or ComputeConfig(dtype=rule.dtype), mesh)
        has_rule = (Path(sidecar) / verdicts.FILE).is_file()
        if not has_rule and language.chat_template is None and prompt is None:
            raise InputError(f"{sidecar}: without {verdicts.FILE} prompts use a chat template: expected a "
                             f"chat_template in the tokenizer of {model}, found none")
        if rule.network and not any_network:
            layers = language.model.config.n_layers
            if layers != rule.network["n_layers"]:
                raise InputError(f"{sidecar}: trained on another network: expected "
                                 f"{rule.network['n_layers']} layers in {model}, found {layers}; "
                                 "--any-network accepts it")
            if rule.network["fingerprint"] != network_fingerprint(Path(model), str(tokenizer)):
                raise InputError(f"{sidecar}: trained on '{rule.network['name']}': expected its weights in "
                                 f"{model}, found others; --any-network accepts them")
        if rule.network and any_network:  # probes read the activations of their own network only
            rule = dataclasses.replace(rule, probes={})
        reader = PromptReader(language.model, batch_size=batch_size, max_bytes=max_bytes,
                              rounded=rule.rounded, mesh=mesh)
        prompter = Prompter(language, prompt or rule.prompt, () if prompt else rule.examples)
        return cls(language, loaded, rule, prompter, reader)

    def answer(self, questions: Sequence[str]) -> list[str]:
        """Returns the network's greedy answers, generated as in the sidecar's study.

        Raises:
            InputError: a question is empty or too long.
        """
        prompts = [self.prompter(question, f"question {i}") for i, question in enumerate(questions, 1)]
        generated = answer(self.language, prompts, self.rule.answers, prompt=self.prompter.config)
        return [answer_text(self.language.tokenizer.decode(answers.greedy.ids.tolist()))
                for answers in generated]

    def predict(self, questions: Sequence[str]) -> list[Prediction]:
        """Returns one prediction for each question.

        Raises:
            InputError: a question is empty or too long, or the network or the sidecar returns numbers that
                are not finite.
        """
        where = (lambda i: "the question") if len(questions) == 1 else (lambda i: f"question {i + 1}")
        prompts = [self.prompter(question, where(i)) for i, question in enumerate(questions)]
        by_index = dict(self.reader(prompts))
        return self.of_outputs(questions, [by_index[i] for i in range(len(prompts))])

    def of_outputs(self, questions: Sequence[str], outputs: Sequence[PromptOutputs]) -> list[Prediction]:
        """Returns one prediction for the signals of each question's prompt; see `predict`."""
        where = (lambda i: "the question") if len(questions) == 1 else (lambda i: f"question {i + 1}")
        if not outputs:
            return []
        for i, output in enumerate(outputs):
            if not np.isfinite(output.final).all():  # the features would be 0, and P(knows) meaningless
                raise InputError(f"{where(i)}: expected a finite residual stream, found infinite or NaN "
                                 "values: the network's weights may be damaged")
        by_layer, prompt_features = (np.stack([getattr(output.crystallisation, name) for output in outputs])
                             for name in ("by_layer", "prompt_features"))
        scores = sidecar_logits(self.sidecar, by_layer, prompt_features)
        probabilities, decode = self.rule.probabilities(scores), self.language.tokenizer.decode
        if np.isnan(probabilities).any():
            raise InputError("P(knows): expected numbers, found NaN: the sidecar's weights may be damaged")
        return [Prediction(question, float(p), self.rule.verdict(float(score)),
                           int(output.crystallisation.strongest_layer),
                           decode([int(output.crystallisation.strongest_token)]), output,
                           {name: probe.probability(output.final)
                            for name, probe in self.rule.probes.items()})
                for question, p, score, output in zip(questions, probabilities, scores, outputs, strict=True)]


def as_row(prediction: Prediction) -> dict[str, object]:
    """Returns a prediction as a row of a file of scores."""
    return {"question": prediction.question, "p": prediction.p, "verdict": prediction.verdict,
            "strongest_write_layer": prediction.strongest_layer,
            "strongest_write": prediction.strongest_write,
            **{f"p_{name}": p for name, p in prediction.by_probe.items()}}


def check_features(sidecar: Sidecar, source: str | Path) -> None:
    """Raises InputError if a sidecar expects other features than BY_LAYER and PROMPT_FEATURES."""
    config = sidecar.config
    for kind, expected, names, n in (("features", BY_LAYER, config.features, config.n_features),
                                     ("prompt_features", PROMPT_FEATURES, config.prompt_features,
                                      config.n_prompt_features)):
        if n != len(expected):
            raise InputError(f"{source}: n_{kind}: expected {len(expected)}, found {n}")
        for i, (name, expected_name) in enumerate(zip(names, expected, strict=False)):
            if name != expected_name:
                raise InputError(f"{source}: {kind}: expected {expected_name} at {i}, found {name}")
