"""The stages of a study of recall: each reads what stands on disk, and leaves its result there.

    signals, answers → questions → fit → verdict → evaluate
What each is made of is its key (eval/stages.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax import store
from tilelli_jax.errors import InputError
from tilelli_jax.language import Language, open_language
from tilelli_jax.sharding import make_mesh
from tilelli_jax.signals.prompts import Prompt, PromptReader
from tilelli_jax.signals.robustness import Robustness
from tilelli_jax.training.experiment import ExperimentConfig

from ..calibration import calibrator_from_dict
from ..inputs import networks
from ..inputs.shards import Shards, fill
from ..stages import Stages, read_result, recipe, without, write_result
from ..tables import write_columns
from . import evaluate, fit, labelling, questions, scores, table, verdicts
from .answering import answer, said
from .config import RecallConfig
from .prompting import Prompter
from .scores import Methods, Scope
from .table import QUESTIONS, Table
from .verdicts import VerdictRule

MIN_GROUPS = 8
SIDECAR = "sidecar"  # of a stage: the directory of the run that is best on validate


class Study:
    """One configuration. Directories of results are made when first asked for.

    Args:
        tell: called with a line for what is being made.
    """

    def __init__(self, config: RecallConfig, out: Path,
                 notify: Callable[[str], None] = lambda line: None) -> None:
        self.config, self.out, self.notify = config, out, notify
        self.stages = Stages(out / "stages", notify)
        self.mesh = make_mesh(config.mesh)
        self.studied = networks.Studied(config.network, out)

    def check(self) -> None:
        """What can be known before anything is asked.

        Raises:
            InputError: the network or its training configuration is not there, the questions cannot be read,
                or the output directory cannot be written.
        """
        networks.check(self.config.network)
        groups = len(set(labelling.groups(self.questions).tolist()))
        if groups < MIN_GROUPS and self.config.split.by == "group":
            raise InputError(f"questions.sources: expected {MIN_GROUPS} groups at least (equal questions, "
                             f"equal ids, one entity), found {groups}")
        if self.config.network.train and "facts" in self.config.questions.sources:
            self._check_world()
        self.stages.open()

    @functools.cached_property
    def questions(self) -> list[questions.Question]:
        found = questions.read(self.config.questions)
        if len(found) < self.config.questions.items:
            self.notify(f"questions: {len(found)}, which are all that there are; "
                      f"{self.config.questions.items} were asked for")
        return found

    @functools.cached_property
    def language(self) -> Language:
        section = self.config.network
        return open_language(self.studied.path, section.tokenizer, self.config.compute, self.mesh)

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        prompter = Prompter(self.language, self.config.prompt)
        return [prompter(question.text, f"question {question.id}") for question in self.questions]

    @functools.cached_property
    def signals(self) -> Path:
        """Shards: `by_layer`, `overall`, `entropies`, `best`, `strongest_layer`, `strongest_token`,
        `tokens` (how many a prompt has), and as configured `final` and `robustness`; see `table.Table`."""
        options = self.config.signals
        manifest = recipe("signals", **self._asked, options=without(
            config_lib.to_dict(options), "batch_size", "max_bytes", "shard_items"))

        def work(path: Path) -> None:
            model = self.language.model
            reader = PromptReader(model, batch_size=options.batch_size, max_bytes=options.max_bytes,
                            rounded=options.rounded, mesh=self.mesh)
            noise = Robustness(model, sigma=options.sigma, k=options.noise_samples, seed=options.seed,
                               batch_size=options.batch_size, mesh=self.mesh) if options.noise else None
            fill(path, range(len(self.prompts)), options.shard_items,
                 lambda chosen: self._read(reader, noise, chosen))
        if not self.stages.is_made("signals", manifest):
            self.prompts  # noqa: B018 (what cannot be asked is refused before anything is)
        return self.stages.make("signals", manifest, work)

    @functools.cached_property
    def answers(self) -> Path:
        """Shards: `tokens`, those of all answers, and `lengths`, how many each has."""
        options = self.config.answers
        manifest = recipe("answers", **self._asked, max_new=options.max_new, ends=options.ends)

        def some(chosen: Sequence[int]) -> dict[str, np.ndarray]:
            found = answer(self.language, [self.prompts[i] for i in chosen], options)
            return {"tokens": np.concatenate([*found, np.zeros(0, np.int32)]).astype(np.int32),
                    "lengths": np.array([len(ids) for ids in found], np.int64)}

        def work(path: Path) -> None:
            fill(path, range(len(self.prompts)), self.config.signals.shard_items, some)
        return self.stages.make("answers", manifest, work)

    @functools.cached_property
    def build(self) -> Path:
        """`questions.parquet`: what was asked, said and known, and to which part each question belongs."""
        manifest = recipe("questions", signals=self.signals.name, answers=self.answers.name,
                               match=self.config.answers.match, parts=config_lib.to_dict(self.config.split))
        return self.stages.make("questions", manifest, self._label)

    @functools.cached_property
    def table(self) -> Table:
        return table.read(self.signals, self.build)

    @functools.cached_property
    def fitted(self) -> Path:
        """`scores.parquet`: what every method says of all questions, learned from all and from each data set;
        the sidecars; and in result.json what was learned and chosen."""
        manifest = recipe("fit", questions=self.build.name,
                         options=without(config_lib.to_dict(self.config.fit), "jobs"))
        table.check_parts(self.table)  # before anything is learned
        return self.stages.make("fit", manifest, self._fit)

    @functools.cached_property
    def verdict(self) -> Path:
        """`verdict.json`: calibration and thresholds of the sidecar that is kept."""
        manifest = recipe("verdict", fit=self.fitted.name, options=config_lib.to_dict(self.config.verdict))
        return self.stages.make("verdict", manifest, self._judge)

    @functools.cached_property
    def evaluation(self) -> Path:
        manifest = recipe("evaluate", verdict=self.verdict.name, replicates=self.config.replicates,
                         seed=self.config.seed)
        return self.stages.make("evaluate", manifest, self._evaluate)

    def keep_sidecar(self) -> Path:
        """`out/sidecar`: the sidecar that is best on validate, with all that `--predict` needs."""
        made, path = read_result(self.fitted), self.out / SIDECAR
        (path / verdicts.FILE).unlink(missing_ok=True)  # no thresholds beside another's weights
        store.save(store.load(self.fitted / f"{SIDECAR}-{made['seeds'][made['run']]}"), path)
        verdicts.write(path, verdicts.read(self.verdict))
        return path

    # ---------------------------------------------------------------------------------------------

    def _check_world(self) -> None:
        """Raises InputError where the network is to learn of another world than it is asked about."""
        learned = config_lib.load(ExperimentConfig, self.config.network.train).data
        for name in ("facts_people", "facts_seed"):
            asked, told = getattr(self.config.questions, name), getattr(learned, name)
            if learned.source == "facts" and asked != told:
                raise InputError(f"questions.{name}: expected {told}, as data.{name} of "
                                 f"{self.config.network.train}, found {asked}")

    @functools.cached_property
    def _asked(self) -> dict[str, Any]:
        """What everything that a network says depends on."""
        asked = hashlib.sha256(json.dumps(self.questions).encode()).hexdigest()[:16]
        return {"network": self.studied.contents, "questions": asked,
                "prompt": config_lib.to_dict(self.config.prompt),
                "compute": self.config.compute.dtype}

    def _read(self, reader: PromptReader, noise: Robustness | None,
              chosen: Sequence[int]) -> dict[str, np.ndarray]:
        prompts = [self.prompts[i] for i in chosen]
        found = dict(reader(prompts, "signals"))
        in_order = [found[i] for i in range(len(prompts))]
        arrays = {name: np.stack([getattr(read.crystallisation, name) for read in in_order])
                  for name in ("by_layer", "overall", "entropies", "best", "strongest_layer",
                               "strongest_token")}
        arrays["tokens"] = np.array([len(prompt.ids) for prompt in prompts], np.int64)
        options = self.config.signals
        if options.final:
            with np.errstate(over="ignore"):  # the next lines name it
                arrays["final"] = np.stack([read.final for read in in_order]).astype(options.dtype)
            if not (finite := np.isfinite(arrays["final"]).all(axis=(1, 2))).all():
                bad = self.questions[chosen[int(np.argmin(finite))]].id
                raise InputError(f"question {bad}: the stream is not finite as {options.dtype}; "
                                 "signals.dtype=float32 has room for more")
        if noise is not None:
            arrays["robustness"] = noise([prompt.ids for prompt in prompts], list(chosen))
        return arrays

    def _label(self, path: Path) -> None:
        answers, signals, tokenizer = Shards(self.answers), Shards(self.signals), self.language.tokenizer
        each = np.split(answers.joined("tokens"), np.cumsum(answers.joined("lengths"))[:-1])
        spoken = [said(tokenizer.decode(ids.tolist())) for ids in each]
        columns = labelling.labelled(self.questions, spoken, self.config.answers.match, self.config.split)
        write_columns(path / QUESTIONS, {
            **columns, "tokens": signals.joined("tokens"),
            "strongest_write_layer": signals.joined("strongest_layer"),
            "strongest_write": [tokenizer.decode([token])
                                for token in signals.joined("strongest_token").tolist()]})

    def _fit(self, path: Path) -> None:
        options, found = self.config.fit, self.table
        # Of several data sets, each is learned from alone as well.
        scopes: list[Scope] = [None]
        left_out = {}
        for name in found.datasets if options.cross and len(found.datasets) > 1 else ():
            try:
                table.check_parts(found, name)
                scopes.append(name)
            except InputError as error:
                left_out[name] = str(error)
                self.notify(f"fit: nothing is learned from {name} alone: {error}")
        methods: dict[Scope, Methods] = {}
        for scope in scopes:
            of = "" if scope is None else f"from {scope} alone: "
            fitted = fit.fit(found, options, scope, notify=functools.partial(self._notify, f"fit: {of}"))
            methods[scope] = fitted.methods
            if scope is None:
                runs = fitted.about[fit.SIDECAR]["runs"]
                best = int(np.argmax([run["validation"] for run in runs]))
                for seed, sidecar in zip(options.seeds, fitted.sidecars, strict=True):
                    store.save(sidecar, path / f"{SIDECAR}-{seed}")
                write_result(path, {
                    "methods": fitted.about, "seeds": list(options.seeds), "run": best,
                    "calibrator": fitted.calibrators[best].to_dict(), "calibrated_on": found.calibrated_on,
                    "left_out": left_out})
        scores.write(path, methods)

    def _judge(self, path: Path) -> None:
        made, config, rows = read_result(self.fitted), self.config, self.table.rows("calibrate")
        found = scores.read(self.fitted)[None][fit.SIDECAR].scores[made["run"], rows]
        at = verdicts.thresholds(self.table.known[rows], found, self.table.group[rows], config.verdict)
        verdicts.write(path, VerdictRule(
            calibrator_from_dict(made["calibrator"]), at.green, at.red, config_lib.to_dict(config.verdict),
            {"name": self.studied.name, "contents": self.studied.contents,
             "n_layers": self.table.by_layer.shape[1]}, config.prompt, config.signals.rounded,
            config.compute.dtype))

    def _evaluate(self, path: Path) -> None:
        made, config = read_result(self.fitted), self.config
        write_result(path, evaluate.evaluate(self.table, scores.read(self.fitted), made["run"],
                                             verdicts.read(self.verdict), config.replicates, config.seed))

    def _notify(self, stage: str, what: str) -> None:
        self.notify(stage + what)
