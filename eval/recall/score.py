"""The scores of one estimator for some questions, without a study.

    from tilelli_jax.eval.recall.score import score
    score("semantic_entropy", "MODEL", ["Who wrote Emma?", "Who wrote Ulysses?"])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.loading.language import load_with_tokenizer
from tilelli_jax.signals.prompts import PromptReader
from tilelli_jax.signals.robustness import Robustness

from ..checks import Floats
from ..estimators import panel
from ..estimators.interface import Score
from ..inputs.networks import NetworkConfig
from . import measurements, table
from .config import AnswersConfig, PromptConfig, RecallConfig, SamplesConfig
from .measurements import StudyInputs
from .prompting import Prompter
from .questions import Question


def score(estimator: str, model: str | Path, questions: Sequence[str], *, tokenizer: str | Path = "",
          prompt: PromptConfig | None = None, examples: Sequence[tuple[str, str]] = (),
          answers: AnswersConfig | None = None, samples: SamplesConfig | None = None) -> Floats:
    """Returns the score of each question, f64 `[questions]`: the higher, the more likely the network knows.

    Runs the prompt's pass, and measures what else the estimator needs.

    Args:
        estimator: a name of `panel.ESTIMATORS` that learns nothing.
        model: a directory, a GGUF file or a hub id.
        prompt, examples: how a question becomes a prompt; by default by the chat template.
        answers, samples: how answers are generated.

    Raises:
        InputError: the estimator learns from a study's questions, or needs paraphrases; the model cannot be
            read; a question is empty or too long.
    """
    chosen = panel.ESTIMATORS.get(estimator)
    if not isinstance(chosen, Score) or "agreement" in chosen.needs:
        names = [name for name, other in panel.ESTIMATORS.items()
                 if isinstance(other, Score) and "agreement" not in other.needs]
        raise InputError(f"estimator: expected one that learns nothing, {', '.join(names)}, found "
                         f"{estimator!r:.40}; `tilelli recall` fits the others")
    if not questions:
        return np.zeros(0)
    config = RecallConfig(network=NetworkConfig(path=str(model), tokenizer=str(tokenizer)),
                          estimators=(estimator,), prompt=prompt or PromptConfig(),
                          answers=answers or AnswersConfig(), samples=samples or SamplesConfig())
    needs: set[str] = set(chosen.needs)
    language = load_with_tokenizer(model, tokenizer)
    prompter = Prompter(language, config.prompt, examples)
    asked = [Question(str(i), "", text, ("",)) for i, text in enumerate(questions, 1)]
    study = StudyInputs(config, needs, language, prompter, asked,
                  [prompter(question.text, f"question {question.id}") for question in asked])
    rows, options = range(len(asked)), config.signals
    noise = Robustness(language.model, sigma=options.sigma, k=options.noise_samples, seed=options.seed,
                       batch_size=options.batch_size) if "robustness" in needs else None
    reader = PromptReader(language.model, batch_size=options.batch_size)
    signals = measurements.signals(study, reader, noise, rows, _ignore)
    given = measurements.answers(study, rows, _ignore) if needs - {"robustness"} else {}
    texts = (measurements.texts(language, given["tokens"], given["lengths"]) if given else [""] * len(asked))
    n = len(asked)
    columns = {"known": np.zeros(n), "refused": np.zeros(n), "split": [""] * n, "group": np.arange(n),
               "question": list(questions), "answer": texts, "dataset": [""] * n,
               "popularity": np.full(n, np.nan), "category": [""] * n, "answers": ["[]"] * n,
               "samples": measurements.sampled_texts(language, given, n)}
    judged = measurements.judgements(study, rows, texts, _ignore) if needs & {"p_true", "verbalised"} else {}
    return chosen.scores(table.build(columns, signals, given, judged, {}))


def _ignore(n: int) -> None:
    """Receives progress."""
