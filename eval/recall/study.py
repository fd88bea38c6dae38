"""The stages of a study of recall: each reads what stands on disk, and leaves its result there.

    signals, answers → questions → fit → evaluate
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

from eval.inputs import networks
from eval.inputs.shards import Shards, fill
from eval.matching import is_match, is_refusal
from eval.recall import evaluate, fit, questions, splits, table, verdicts
from eval.recall.config import RecallConfig
from eval.recall.prompting import Prompter, answer, said
from eval.recall.table import QUESTIONS, Table
from eval.stages import Stages
from eval.tables import as_json, read_columns, write_columns
from tilelli_jax import config as config_lib
from tilelli_jax import store
from tilelli_jax.errors import InputError
from tilelli_jax.files import write_atomically
from tilelli_jax.language import Language, open_language
from tilelli_jax.sharding import make_mesh
from tilelli_jax.signals.prompts import Prompt, Reader
from tilelli_jax.signals.robustness import Robustness

FORMAT = 1  # to be raised where a stage's result for the same key would be another one
RESULT = "result.json"
SCORES = "scores.parquet"
SIDECAR = "sidecar"  # of a stage: the directory of the run that is best on validate


class Study:
    """One configuration. Directories of results are made when first asked for.

    Args:
        tell: called with a line for what is being made.
    """

    def __init__(self, config: RecallConfig, out: Path,
                 tell: Callable[[str], None] = lambda line: None) -> None:
        self.config, self.out, self.tell = config, out, tell
        self.stages = Stages(out / "stages", tell)
        self.mesh = make_mesh(config.mesh)

    def check(self) -> None:
        """What can be known before anything is asked.

        Raises:
            InputError: the network or its training configuration is not there, the questions cannot be read,
                or the output directory cannot be written.
        """
        networks.check(self.config.network)
        assert self.questions
        try:
            self.stages.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out: {self.out}: cannot be written: {error.strerror}") from None

    @functools.cached_property
    def questions(self) -> list[questions.Question]:
        return questions.read(self.config.questions)

    @functools.cached_property
    def network_path(self) -> Path:
        return networks.directory_of(self.config.network, self.out, "network")

    @property
    def network_name(self) -> str:
        return networks.name_of(self.network_path)

    @functools.cached_property
    def network_contents(self) -> str:
        return networks.contents(self.network_path, self.config.network.tokenizer)

    @functools.cached_property
    def language(self) -> Language:
        section = self.config.network
        return open_language(self.network_path, section.tokenizer, self.config.compute, self.mesh)

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        prompter = Prompter(self.language, self.config.prompt)
        return [prompter(question.text, f"question {question.id}") for question in self.questions]

    @functools.cached_property
    def signals(self) -> Path:
        """Shards: `by_layer`, `overall`, `entropies`, `best`, `strongest_layer`, `strongest_symbol`,
        `symbols` (how many a prompt has), and as configured `final` and `robustness`; see `table.Table`."""
        options = self.config.signals
        made_of = self._recipe("signals", **self._asked, options=_plain(
            options, "batch_size", "most_bytes", "shard_items"))

        def work(path: Path) -> None:
            model = self.language.model
            reader = Reader(model, batch_size=options.batch_size, most_bytes=options.most_bytes,
                            rounded=options.rounded, mesh=self.mesh)
            noise = Robustness(model, sigma=options.sigma, k=options.readings, batch_size=options.batch_size,
                               mesh=self.mesh) if options.noise else None
            fill(path, range(len(self.prompts)), options.shard_items,
                 lambda chosen: self._read(reader, noise, chosen))
        if not self.stages.is_made("signals", made_of):
            assert self.prompts  # what cannot be asked is refused before anything is
        return self.stages.make("signals", made_of, work)

    @functools.cached_property
    def answers(self) -> Path:
        """Shards: `symbols`, those of all answers, and `lengths`, how many each has."""
        options = self.config.answers
        made_of = self._recipe("answers", **self._asked, max_new=options.max_new, ends=options.ends)

        def some(chosen: Sequence[int]) -> dict[str, np.ndarray]:
            found = answer(self.language, [self.prompts[i] for i in chosen], options)
            return {"symbols": np.concatenate([*found, np.zeros(0, np.int32)]).astype(np.int32),
                    "lengths": np.array([len(ids) for ids in found], np.int64)}

        def work(path: Path) -> None:
            fill(path, range(len(self.prompts)), self.config.signals.shard_items, some)
        return self.stages.make("answers", made_of, work)

    @functools.cached_property
    def build(self) -> Path:
        """`questions.parquet`: what was asked, said and known, and to which part each question belongs."""
        made_of = self._recipe("questions", signals=self.signals.name, answers=self.answers.name,
                               match=self.config.answers.match, parts=_plain(self.config.parts))
        return self.stages.make("questions", made_of, self._label)

    @functools.cached_property
    def table(self) -> Table:
        found = table.read(self.signals, self.build)
        table.check_parts(found)
        return found

    @functools.cached_property
    def fitted(self) -> Path:
        """`scores.parquet`: scores and probabilities of every method on all questions, learned from all and
        from each data set; the sidecars; and in result.json what was learned and chosen."""
        made_of = self._recipe("fit", questions=self.build.name, options=_plain(self.config.fit, "jobs"),
                               verdict=_plain(self.config.verdict))
        if not self.stages.is_made("fit", made_of):
            assert self.table  # which may have too few of a kind
        return self.stages.make("fit", made_of, self._fit)

    @functools.cached_property
    def evaluation(self) -> Path:
        made_of = self._recipe("evaluate", fit=self.fitted.name, replicates=self.config.replicates)
        return self.stages.make("evaluate", made_of, lambda path: _write(path, evaluate.evaluate(
            self.table, read_columns(self.fitted / SCORES), self.result(self.fitted),
            self.config.replicates)))

    def result(self, path: Path) -> dict[str, Any]:
        """What a stage found."""
        return json.loads((path / RESULT).read_text(encoding="utf-8"))

    # ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def _asked(self) -> dict[str, Any]:
        """What everything that a network says depends on."""
        asked = hashlib.sha256(json.dumps(self.questions).encode()).hexdigest()[:16]
        return {"network": self.network_contents, "questions": asked, "prompt": _plain(self.config.prompt),
                "compute": self.config.compute.dtype}

    def _read(self, reader: Reader, noise: Robustness | None,
              chosen: Sequence[int]) -> dict[str, np.ndarray]:
        prompts = [self.prompts[i] for i in chosen]
        found = dict(reader(prompts, "signals"))
        in_order = [found[i] for i in range(len(prompts))]
        arrays = {name: np.stack([getattr(read.crystallisation, name) for read in in_order])
                  for name in ("by_layer", "overall", "entropies", "best", "strongest_layer",
                               "strongest_symbol")}
        arrays["symbols"] = np.array([len(prompt.ids) for prompt in prompts], np.int64)
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
        config, asked = self.config, self.questions
        answers, signals = Shards(self.answers), Shards(self.signals)
        lengths, tokenizer = answers.joined("lengths"), self.language.tokenizer
        each = np.split(answers.joined("symbols"), np.cumsum(lengths)[:-1])
        spoken = [said(tokenizer.decode(ids.tolist())) for ids in each]
        known = np.array([is_match(one, question.answers, config.answers.match)
                          for one, question in zip(spoken, asked, strict=True)], np.int64)
        datasets = [question.dataset for question in asked]
        group = splits.same([q.text for q in asked], [q.id for q in asked], [q.entity for q in asked])
        part = self._parts(group, datasets, known)
        write_columns(path / QUESTIONS, {
            "id": [q.id for q in asked], "dataset": datasets, "question": [q.text for q in asked],
            "group": group, "popularity": [q.popularity for q in asked], "answer": spoken,
            "refused": [is_refusal(one) for one in spoken], "known": known, "part": part,
            "symbols": signals.joined("symbols"), "strongest_write_layer": signals.joined("strongest_layer"),
            "strongest_write": [tokenizer.decode([symbol])
                                for symbol in signals.joined("strongest_symbol").tolist()]})

    def _parts(self, group: np.ndarray, datasets: Sequence[str], known: np.ndarray) -> np.ndarray:
        """The part of each question."""
        options = self.config.parts
        if options.by == "published":
            found = splits.published(datasets, known, seed=options.seed)["main"]
            found = {"train": found["train"], "validate": found["val"], "test": found["test"]}
        else:
            shares = {"train": 1 - options.validate - options.calibrate - options.test,
                      "validate": options.validate, "calibrate": options.calibrate, "test": options.test}
            strata = [f"{name}|{one}" for name, one in zip(datasets, known, strict=True)]
            try:
                found = splits.grouped(group, strata, shares, options.seed)
            except ValueError as error:
                raise InputError(f"parts.{error}") from None
        part = np.empty(len(known), "<U9")
        for name, rows in found.items():
            part[rows] = name
        return part

    def _fit(self, path: Path) -> None:
        options, found = self.config.fit, self.table
        columns: dict[str, np.ndarray] = {}
        told: dict[str, Any] = {"methods": {}, "scopes": [], "seeds": list(options.seeds)}
        # Of several data sets, each is learned from alone as well.
        scopes = [None, *(found.datasets if options.cross and len(found.datasets) > 1 else [])]
        for scope in scopes:
            if scope is not None:
                table.check_parts(found, scope)
            of = "" if scope is None else f"from {scope} alone: "
            fitted = fit.fit(found, options, scope, tell=functools.partial(self._tell, f"fit: {of}"))
            for name in fitted.methods:
                for run, (scores, chances) in enumerate(zip(
                        fitted.methods[name].scores, fitted.probabilities(name), strict=True)):
                    columns |= {evaluate.column(scope, name, run, "score"): scores,
                                evaluate.column(scope, name, run, "p"): chances}
            if scope is None:
                told["methods"] = {name: one.about for name, one in fitted.methods.items()}
                runs = fitted.methods[fit.SIDECAR].about["runs"]
                best = int(np.argmax([run["validation"] for run in runs]))
                for seed, sidecar in zip(options.seeds, fitted.sidecars, strict=True):
                    store.save(sidecar, path / f"{SIDECAR}-{seed}")
                told["sidecar"] = options.seeds[best]
                told["verdict"] = verdicts.learn(found, fitted, best, self.config, {
                    "name": self.network_name, "contents": self.network_contents,
                    "n_layers": found.by_layer.shape[1]}).to_dict()
            else:
                told["scopes"].append(scope)
        write_columns(path / SCORES, columns)
        _write(path, told)

    def keep_sidecar(self) -> Path:
        """`out/sidecar`: the sidecar that is best on validate, with all that `--predict` needs."""
        made = self.result(self.fitted)
        path = self.out / SIDECAR
        store.save(store.load(self.fitted / f"{SIDECAR}-{made['sidecar']}"), path)
        verdicts.write(path, verdicts.from_dict(made["verdict"]))
        return path

    def _tell(self, stage: str, what: str) -> None:
        self.tell(stage + what)

    def _recipe(self, stage: str, **parts: Any) -> dict[str, Any]:
        return {"stage": stage, "format": FORMAT, **parts}


def _write(path: Path, tree: Any) -> None:
    write_atomically(path / RESULT, as_json(tree))


def _plain(section: Any, *without: str) -> dict[str, Any]:
    return {name: value for name, value in config_lib.to_dict(section).items() if name not in without}
