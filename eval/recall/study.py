"""The stages of a recall study; each reads its inputs from disk and writes its result there.

    signals, answers (judgements, agreement) → questions → fit → verdict → evaluate
The hash of everything that a result depends on is part of its directory's name (eval/stages.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax.cli.progress import shown
from tilelli_jax.errors import InputError
from tilelli_jax.loading import store
from tilelli_jax.loading.language import LanguageModel, load_with_tokenizer
from tilelli_jax.loading.model_card import CardInfo
from tilelli_jax.parallel.sharding import make_mesh
from tilelli_jax.signals.prompts import PromptIds, PromptReader
from tilelli_jax.signals.robustness import Robustness

from ..calibration import calibrator_from_dict
from ..conclusions import few_groups_warning
from ..estimators import panel
from ..estimators.table import UNANSWERABLE, QuestionTable
from ..inputs import networks
from ..inputs.shards import Shards, fill, stored_items
from ..inputs.study import Study
from ..stages import read_result, stage_manifest, without, write_result
from ..tables import read_columns, write_columns
from . import evaluate, fit, labelling, measurements, questions, scores, table, verdicts
from .config import RecallConfig
from .measurements import StudyInputs
from .prompting import Prompter
from .scores import Methods, Scope
from .table import QUESTIONS
from .verdicts import CalibratedProbe, VerdictRule

MIN_GROUPS = 8
SIDECAR = "sidecar"  # directory of the sidecar that is best on the validate split


class RecallStudy(Study[RecallConfig]):
    """One recall study. A stage runs when its directory is first accessed."""

    STAGES = ("build", "fit", "evaluate")
    MAIN_KEYS = ("network.path", "questions.sources", "questions.items", "prompt.template", "answers.max_new",
                 "estimators", "split.test", "fit.seeds", "verdict.precision", "compute.dtype", "out")

    def __init__(self, config: RecallConfig, out: Path,
                 notify: Callable[[str], None] = lambda line: None) -> None:
        super().__init__(config, out, notify)
        self.mesh = make_mesh(config.mesh)
        self.studied = networks.StudyNetwork(config.network, out)

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.config.fit.seeds

    def stage_paths(self, stage: str) -> Iterator[tuple[str, Path]]:
        yield stage, {"build": lambda: self.build, "fit": lambda: self.fitted,
                      "evaluate": lambda: self.evaluation}[stage]()

    def check(self) -> None:
        """Checks everything that does not need the network to run.

        Raises:
            InputError: the network or its training configuration does not exist, the questions cannot be
                read or form too few groups, or the output directory cannot be written.
        """
        networks.check(self.config.network, "network")
        labelled = [question for question in self.questions
                    if question.answerable or self.config.questions.task == "answerability"]
        labelling.check_number(len(labelled), self.config.split)
        groups = len(set(labelling.groups(labelled).tolist()))
        if groups < MIN_GROUPS and self.config.split.by == "group":
            raise InputError(f"questions.sources: expected at least {MIN_GROUPS} groups (questions with "
                             f"equal text, id or entity form one), found {groups}")
        for line in few_groups_warning(round(groups * self.config.split.test), "questions"):
            self.notify(f"split.test: {line}")
        for line in [*labelling.few_questions_warning(len(labelled), self.config.split),
                     *labelling.missing_groups([question.dataset for question in labelled],
                                               [question.entity for question in labelled],
                                               self.config.split)]:
            self.notify(f"questions: {line}")
        if self.config.network.train and "facts" in self.config.questions.sources:
            self._check_world()
        self.stages.open()

    @functools.cached_property
    def drawn(self) -> questions.QuestionSet:
        """The questions of the study, and the examples in their prompts."""
        drawn = questions.draw(self.config.questions, self.config.prompt.shots)
        if len(drawn.questions) < self.config.questions.items:
            self.notify(f"questions: all {len(drawn.questions)} available ones are used; questions.items is "
                        f"{self.config.questions.items}")
        return drawn

    @property
    def questions(self) -> list[questions.Question]:
        return self.drawn.questions

    @functools.cached_property
    def needs(self) -> set[str]:
        """What the estimators need to be measured."""
        needs = set(panel.needs(self.config.estimators))
        return needs | ({"final"} if "answer_final" in needs else set())

    @functools.cached_property
    def language(self) -> LanguageModel:
        section = self.config.network
        return load_with_tokenizer(self.studied.path, section.tokenizer, self.config.compute, self.mesh)

    @functools.cached_property
    def prompter(self) -> Prompter:
        return Prompter(self.language, self.config.prompt, self.examples)

    @property
    def examples(self) -> list[tuple[str, str]]:
        """The examples of the prompts, with the first correct answer of each."""
        return [(example.text, example.answers[0]) for example in self.drawn.examples]

    @functools.cached_property
    def prompts(self) -> list[PromptIds]:
        if "agreement" in self.needs:  # invalid ones are errors before anything is measured
            for question in self.questions:
                for text in question.paraphrases:
                    self.prompter(text, f"a paraphrase of question {question.id}")
        return [self.prompter(question.text, f"question {question.id}") for question in self.questions]

    @functools.cached_property
    def inputs(self) -> StudyInputs:
        return StudyInputs(self.config, self.needs, self.language, self.prompter, self.questions,
                           self.prompts)

    @functools.cached_property
    def signals(self) -> Path:
        """Runs one pass of each prompt. Returns a directory of shards.

        See `measurements.signals`.
        """
        options = self.config.signals
        manifest = stage_manifest("signals", **self._inputs, options=without(
            config_lib.to_dict(options), "batch_size", "max_bytes", "shard_items"),
            needs=sorted(self.needs & {"final", "robustness"}))

        def work(path: Path) -> None:
            model = self.language.model
            reader = PromptReader(model, batch_size=options.batch_size, max_bytes=options.max_bytes,
                                  rounded=options.lens_bfloat16, mesh=self.mesh)
            noise = None
            if "robustness" in self.needs:
                noise = Robustness(model, sigma=options.sigma, k=options.noise_samples, seed=options.seed,
                                   batch_size=options.batch_size, mesh=self.mesh)
            with shown(len(self.prompts), "signals", "question", done=stored_items(path)) as advance:
                fill(path, range(len(self.prompts)), options.shard_items,
                     lambda rows: measurements.signals(self.inputs, reader, noise, rows, advance))
        if not self.stages.is_complete("signals", manifest):
            self.prompts  # noqa: B018 (raises InputError for an invalid question before the stage starts)
        return self.stages.make("signals", manifest, work)

    @functools.cached_property
    def answers(self) -> Path:
        """Generates the answers. Returns a directory of shards.

        See `measurements.answers`.
        """
        options = self.config.answers
        manifest = stage_manifest(
            "answers", **self._inputs, max_new=options.max_new, end_tokens=options.end_tokens,
            stop_at_line_break=options.stop_at_line_break,
            needs=sorted(self.needs & {"answer_final", "samples"}),
            samples=config_lib.to_dict(self.config.samples) if "samples" in self.needs else None)

        def work(path: Path) -> None:
            with shown(len(self.prompts), "answers", "question", done=stored_items(path)) as advance:
                fill(path, range(len(self.prompts)), self.config.signals.shard_items,
                     lambda rows: measurements.answers(self.inputs, rows, advance))
        return self.stages.make("answers", manifest, work)

    @functools.cached_property
    def judgements(self) -> Path | None:
        """Asks the network about its answers. Returns a directory of shards, or None if it is not needed.

        See `measurements.judgements`.
        """
        needs = self.needs & {"p_true", "verbalised"}
        if not needs:
            return None
        manifest = stage_manifest("judgements", answers=self.answers.name, needs=sorted(needs))

        def work(path: Path) -> None:
            texts = self._answer_texts()
            with shown(len(self.prompts) * len(needs), "judgements", "judgement",
                       done=stored_items(path) * len(needs)) as advance:
                fill(path, range(len(self.prompts)), self.config.signals.shard_items,
                     lambda rows: measurements.judgements(self.inputs, rows, texts, advance))
        return self.stages.make("judgements", manifest, work)

    @functools.cached_property
    def agreement(self) -> Path | None:
        """Answers the paraphrases. Returns a directory of shards, or None if it is not needed.

        See `measurements.agreement`.
        """
        if "agreement" not in self.needs:
            return None
        manifest = stage_manifest("agreement", answers=self.answers.name)

        def work(path: Path) -> None:
            texts = self._answer_texts()
            total = sum(len(question.paraphrases) for question in self.questions)
            done = sum(len(question.paraphrases) for question in self.questions[:stored_items(path)])
            with shown(total, "agreement", "paraphrase", done=done) as advance:
                fill(path, range(len(self.prompts)), self.config.signals.shard_items,
                     lambda rows: measurements.agreement(self.inputs, rows, texts, advance))
        return self.stages.make("agreement", manifest, work)

    @functools.cached_property
    def build(self) -> Path:
        """Grades the answers and assigns splits. Returns the directory of `questions.parquet`."""
        manifest = stage_manifest("questions", signals=self.signals.name, answers=self.answers.name,
                                  match=self.config.answers.match, task=self.config.questions.task,
                                  splits=config_lib.to_dict(self.config.split))
        path = self.stages.make("questions", manifest, self._label)
        columns = read_columns(path / QUESTIONS)
        for name in sorted(set(columns["dataset"].tolist())):
            correct = columns["correct"][(columns["dataset"] == name) & (columns["answers"] != "[]")]
            if len(correct):
                self.notify(f"questions: {name}: {correct.mean():.1%} of {len(correct)} answered correctly")
        labelled = columns["split"].astype(str) != UNANSWERABLE
        labels = columns["known"][labelled], columns["split"][labelled]
        labelling.check_labels(*labels, self.config.split)  # before any fit
        for line in labelling.small_splits_warning(*labels, self.config.split):
            self.notify(f"questions: {line}")
        return path

    @functools.cached_property
    def warnings(self) -> list[str]:
        """What limits the results of these questions: sentences for the report."""
        columns, options = read_columns(self.build / QUESTIONS), self.config.split
        return [*labelling.missing_groups(columns["dataset"].tolist(), columns["entity"].tolist(), options),
                *labelling.small_splits_warning(columns["known"], columns["split"], options)]

    @functools.cached_property
    def table(self) -> QuestionTable:
        return table.read(self.signals, self.build, self.answers, self.judgements, self.agreement)

    @functools.cached_property
    def fitted(self) -> Path:
        """Fits every method to all data sets and to each alone.

        Returns the directory of `scores.parquet` (every method's scores of all questions), the sidecars, and
        result.json (what was selected).
        """
        measured = [path.name for path in (self.judgements, self.agreement) if path is not None]
        manifest = stage_manifest("fit", questions=self.build.name, measured=measured,
                                  estimators=list(panel.chosen(self.config.estimators)),
                                  options=without(config_lib.to_dict(self.config.fit), "jobs"))
        return self.stages.make("fit", manifest, self._fit)

    @functools.cached_property
    def verdict(self) -> Path:
        """Chooses thresholds. Returns the directory of `verdict.json`, which the exported sidecar uses."""
        manifest = stage_manifest("verdict", fit=self.fitted.name,
                                  options=config_lib.to_dict(self.config.verdict))
        return self.stages.make("verdict", manifest, self._choose_thresholds)

    @functools.cached_property
    def evaluation(self) -> Path:
        """Evaluates all methods on the test split. Returns the directory of result.json."""
        manifest = stage_manifest("evaluate", verdict=self.verdict.name, replicates=self.config.replicates,
                                  seed=self.config.seed, primary=list(self.config.primary))
        return self.stages.make("evaluate", manifest, self._evaluate)

    def export_sidecar(self, command: str) -> Path:
        """Writes `out/sidecar`, for `tilelli recall predict`: the sidecar with the best validation AUROC.

        Args:
            command: the study's command, for the model card.
        """
        fit_result, path = read_result(self.fitted), self.out / SIDECAR
        (path / verdicts.FILE).unlink(missing_ok=True)  # no thresholds beside another sidecar's weights
        run = fit_result["selected_run"]
        store.save(store.load(self.fitted / f"{SIDECAR}-{fit_result['seeds'][run]}"), path, CardInfo(
            data=[f"network: {self.studied.path}", f"fingerprint of the network: {self.studied.fingerprint}",
                  f"questions: {len(self.questions):,} of {', '.join(self.config.questions.sources)}"],
            losses={"validation AUROC": fit_result["methods"][SIDECAR]["runs"][run]["validation_auroc"]},
            command=command, made_from="Fitted by `tilelli recall`; `tilelli recall predict` asks it."))
        verdicts.write(path, verdicts.read(self.verdict))
        return path

    # ---------------------------------------------------------------------------------------------

    def _check_world(self) -> None:
        """Raises InputError if the network is trained on another world of facts than the questions' one."""
        data = self.config.network.experiment().data
        for name in ("facts_people", "facts_seed"):
            actual, expected = getattr(self.config.questions, name), getattr(data, name)
            if data.source == "facts" and actual != expected:
                raise InputError(f"questions.{name}: expected {expected}, as data.{name} of "
                                 f"{self.config.network.train}, found {actual}")

    @functools.cached_property
    def _inputs(self) -> dict[str, Any]:
        """Everything that the network's outputs depend on, for manifests."""
        digest = hashlib.sha256(json.dumps(self.drawn).encode()).hexdigest()[:16]
        return {"network": self.studied.fingerprint, "questions": digest,
                "prompt": config_lib.to_dict(self.config.prompt),
                "compute": self.config.compute.dtype}

    def _answer_texts(self) -> list[str]:
        answers = Shards(self.answers)
        return measurements.texts(self.language, answers.joined("tokens"), answers.joined("lengths"))

    def _label(self, path: Path) -> None:
        signals, tokenizer = Shards(self.signals), self.language.tokenizer
        columns = labelling.label(self.questions, self._answer_texts(), self.config.answers.match,
                                  self.config.split, self.config.questions.task)
        write_columns(path / QUESTIONS, {
            **columns, "tokens": signals.joined("tokens"),
            "samples": measurements.sampled_texts(self.language, measurements.read(self.answers),
                                                  len(self.questions)),
            "strongest_write_layer": signals.joined("strongest_layer"),
            "strongest_write": [tokenizer.decode([token])
                                for token in signals.joined("strongest_token").tolist()]})

    def _fit(self, path: Path) -> None:
        options, data = self.config.fit, self.table
        scopes: list[Scope] = [None]  # all data sets; then each alone, if there are several
        excluded = {}
        for name in data.datasets if options.cross_dataset and len(data.datasets) > 1 else ():
            try:
                table.check_dataset(data, name)
                scopes.append(name)
            except InputError as error:
                excluded[name] = str(error)
                self.notify(f"fit: no method is trained on {name} alone: {error}")
        methods: dict[Scope, Methods] = {}
        for scope in scopes:
            prefix = "fit: " if scope is None else f"fit: {scope} alone: "
            fitted = fit.fit(data, self.config.estimators, options, scope,
                             notify=functools.partial(self._notify, prefix))
            methods[scope] = fitted.methods
            if scope is None:
                runs = fitted.info[fit.SIDECAR]["runs"]
                best = int(np.argmax([run["validation_auroc"] for run in runs]))
                for seed, sidecar in zip(options.seeds, fitted.sidecars, strict=True):
                    store.save(sidecar, path / f"{SIDECAR}-{seed}")
                write_result(path, {
                    "methods": fitted.info, "seeds": list(options.seeds), "selected_run": best,
                    "calibrator": fitted.calibrators[best].to_dict(), "calibrated_on": data.calibrated_on,
                    "excluded_datasets": excluded, "omitted": fitted.omitted,
                    "probes": {name: CalibratedProbe(*probe).to_dict()
                               for name, probe in fitted.probes.items()}})
        scores.write(path, methods)

    def _choose_thresholds(self, path: Path) -> None:
        fit_result, config, rows = read_result(self.fitted), self.config, self.table.rows("calibrate")
        log_odds = scores.read(self.fitted)[None][fit.SIDECAR].scores[fit_result["selected_run"], rows]
        thresholds = verdicts.thresholds(self.table.known[rows], log_odds, self.table.group[rows],
                                         config.verdict)
        calibrator = calibrator_from_dict(fit_result["calibrator"])
        verdicts.write(path, VerdictRule(
            calibrator, thresholds.knows_from, thresholds.unknown_below,
            config_lib.to_dict(config.verdict),
            {"name": self.studied.name, "fingerprint": self.studied.fingerprint,
             "n_layers": self.table.by_layer.shape[1]}, config.prompt, config.signals.lens_bfloat16,
            config.compute.dtype, tuple(self.examples), config.answers,
            {name: CalibratedProbe.from_dict(probe) for name, probe in fit_result["probes"].items()},
            verdicts.known_quantiles(self.table.known[rows], calibrator(log_odds))))

    def _evaluate(self, path: Path) -> None:
        run, config = read_result(self.fitted)["selected_run"], self.config
        costs = measurements.costs(self.signals, self.answers, self.judgements, self.agreement)
        write_result(path, evaluate.evaluate(
            self.table, scores.read(self.fitted), run, verdicts.read(self.verdict), config.replicates,
            config.seed, config.primary) | {
                "costs": costs, "verbalised_without_number": None if self.table.verbalised is None else int(
                    np.isnan(self.table.verbalised).sum())})

    def _notify(self, prefix: str, line: str) -> None:
        self.notify(prefix + line)
