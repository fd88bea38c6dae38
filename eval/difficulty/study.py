"""The stages of a study: each reads what stands on disk, and leaves its result there.

    extract → items → sae → features → probe → selective, calibrate, cascade; causal
A stage makes what it needs of those before it. What it is made of is its key (eval/stages.py): the
contents of networks and data, its options, and the keys of the stages that it reads.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eval import calibration, cascade, probes, selective
from eval.difficulty import autoencoder, causal, ladder
from eval.difficulty.autoencoder import Judged
from eval.difficulty.config import NetworkConfig, SeriesConfig, StudyConfig
from eval.difficulty.extract import Extraction, extract, read_table, write_table
from eval.difficulty.features import make_features, read_features
from eval.difficulty.forecasts import Forecasts
from eval.difficulty.items import Items, make_items, read_items
from eval.difficulty.questions import Questions
from eval.difficulty.subject import Subject
from eval.folds import Folds
from eval.metrics import auprc, auroc
from eval.probes import ProbeOptions
from eval.stages import Stages, fingerprint, key
from eval.tables import as_json
from tilelli_jax import config as config_lib
from tilelli_jax import store
from tilelli_jax.errors import InputError
from tilelli_jax.files import write_atomically
from tilelli_jax.sharding import make_mesh

FORMAT = 1  # to be raised where a stage's result for the same key would be another one
RESULT = "result.json"
Told = Callable[[str], None]


class Study:
    """One configuration. `extract`, `items` and `dear` are directories of results, made when first asked for.

    Args:
        tell: called with a line for what is being made.
    """

    def __init__(self, config: StudyConfig, out: Path, tell: Told = lambda line: None) -> None:
        self.config, self.out, self.tell = config, out, tell
        self.stages = Stages(out / "stages", tell)
        self.mesh = make_mesh(config.mesh)
        self.layers = {layer: Layer(self, layer) for layer in config.extract.layers}

    @functools.cached_property
    def subject(self) -> Subject:
        kind = Forecasts if isinstance(self.config.data, SeriesConfig) else Questions
        return kind(self.config, self.mesh)

    @functools.cached_property
    def network_path(self) -> Path:
        return self._made(self.config.network, "network")

    @functools.cached_property
    def network(self) -> Any:
        return self.subject.open(self.config.network, str(self.network_path))

    @functools.cached_property
    def extract(self) -> Path:
        options = self.config.extract
        made_of = recipe("extract", network=_contents(self.network_path, self.config.network),
                         data=self.subject.fingerprint, subject=_plain(self.config.data, "source"),
                         options=_plain(options, "batch_size"),
                         compute=self.config.compute.dtype, seed=self.config.seed)
        return self.stages.make("extract", made_of, lambda path: extract(
            path, self.subject, self.network, range(len(self.subject)), options.layers, options.shard_items))

    @functools.cached_property
    def items(self) -> Path:
        made_of = recipe("items", extract=self.extract.name, split=_plain(self.config.split),
                         labels=_plain(self.config.labels), seed=self.config.seed)
        return self.stages.make("items", made_of, lambda path: make_items(
            path, self.subject, Extraction(self.extract), self.config))

    @functools.cached_property
    def table(self) -> Items:
        """What `items` holds."""
        return read_items(self.items)

    @functools.cached_property
    def folds(self) -> Folds:
        """Of the items to learn from. Raises InputError where they do not bear two folds."""
        table = self.table
        found = self.subject.folds(table.hard[table.train], table.train, self.config.probe.folds)
        if len(found) < 2:
            raise InputError(f"probe.folds: the {len(table.train)} items to learn from leave {len(found)} "
                             "folds that have both hard and easy items; expected two at least")
        return found

    @functools.cached_property
    def dear(self) -> Path | None:
        """The dearer network, asked the test items; None where the study has none."""
        section = self.config.dear
        if section is None:
            return None
        items = self.table.test.tolist()
        network_path = self._made(section, "dear")
        made_of = recipe("dear", network=_contents(network_path, section), items=self.items.name,
                         shard_items=self.config.extract.shard_items, compute=self.config.compute.dtype,
                         seed=self.config.seed)

        def work(path: Path) -> None:
            network = self.subject.open(section, str(network_path))
            extract(path, self.subject, network, items, (), self.config.extract.shard_items)
        return self.stages.make("dear", made_of, work)

    def _made(self, section: NetworkConfig, name: str) -> Path:
        """The directory of a network, after it has been trained if that is what its section says."""
        if section.path:
            return Path(section.path)
        run = self.out / "networks" / f"{name}-{key(config_lib.read_yaml(section.train))}"
        return autoencoder.train(section.train, run, [])


class Layer:
    """The stages of one layer, likewise; None where the study has no autoencoder, or no dearer network."""

    def __init__(self, study: Study, layer: int) -> None:
        self.study, self.config, self.layer = study, study.config, layer

    @functools.cached_property
    def sae(self) -> Path | None:
        study, options = self.study, self.config.sae
        if not options.path and not options.train:
            return None
        source = (_contents(Path(options.path.format(layer=self.layer)), what="an autoencoder")
                  if options.path else config_lib.read_yaml(options.train))
        made_of = recipe("sae", items=study.items.name, layer=self.layer, source=source,
                         held_out=options.held_out, seed=self.config.seed)
        return self._make("sae", made_of, lambda path: autoencoder.make(
            path, self.config, study.subject, lambda: study.network, study.table, self.layer,
            study.network_path))

    @functools.cached_property
    def judged(self) -> Judged | None:
        """The autoencoder's measures. Raises InputError for one that has learned too little."""
        if self.sae is None:
            return None
        found = autoencoder.read(self.sae)
        found.check(self.config.sae)
        return found

    @functools.cached_property
    def features(self) -> Path:
        judged = self.judged
        made_of = recipe("features", extract=self.study.extract.name, layer=self.layer,
                         sae=None if judged is None else judged.fingerprint)
        return self._make("features", made_of, lambda path: make_features(
            path, Extraction(self.study.extract), self.layer,
            None if judged is None else store.load(judged.model)))

    @functools.cached_property
    def probe(self) -> Path:
        made_of = recipe("probe", items=self.study.items.name, features=self.features.name,
                         options=_plain(self.config.probe, "jobs"), seed=self.config.seed)
        return self._make("probe", made_of, self._probe)

    @functools.cached_property
    def selective(self) -> Path:
        made_of = recipe("selective", probe=self.probe.name)
        return self._make("selective", made_of, self._selective)

    @functools.cached_property
    def calibrate(self) -> Path:
        return self._make("calibrate", recipe("calibrate", probe=self.probe.name), self._calibrate)

    @functools.cached_property
    def cascade(self) -> Path | None:
        dear = self.study.dear
        if dear is None:
            return None
        made_of = recipe("cascade", probe=self.probe.name, dear=dear.name, costs=_plain(self.config.cascade))
        return self._make("cascade", made_of, lambda path: self._cascade(path, dear))

    @functools.cached_property
    def causal(self) -> Path | None:
        judged = self.judged
        if judged is None:
            return None
        made_of = recipe("causal", features=self.features.name, items=self.study.items.name,
                         options=_plain(self.config.causal), seed=self.config.seed,
                         replicates=self.config.probe.replicates)
        return self._make("causal", made_of, lambda path: self._causal(path, judged))

    # ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def _blocks(self) -> dict[str, probes.Block]:
        """All that a rung may see, `[items, features]` each."""
        found = read_features(self.features)
        blocks: dict[str, probes.Block] = {
            name: block.values for name, block in self.study.table.blocks.items()}
        blocks["raw"] = found.raw
        if found.codes is not None:
            blocks["sae"] = found.codes
        return blocks

    @property
    def _options(self) -> ProbeOptions:
        return ProbeOptions(seed=self.config.seed, jobs=self.config.probe.jobs)

    def _make(self, name: str, made_of: Mapping[str, Any], work: Callable[[Path], None]) -> Path:
        return self.study.stages.make(f"{name}-{self.layer}", made_of, work)

    def _tell(self, stage: str, what: str) -> None:
        self.study.tell(f"{stage}-{self.layer}: {what}")

    def _probe(self, path: Path) -> None:
        table, blocks = self.study.table, self._blocks
        train, test = table.train, table.test
        climbed = probes.climb(
            _rows(blocks, train), table.hard[train], _rows(blocks, test), table.hard[test], self.study.folds,
            rungs=ladder.rungs(blocks), comparisons=ladder.COMPARISONS, options=self._options,
            replicates=self.config.probe.replicates, seed=self.config.seed, groups=table.groups[test],
            tell=lambda rung: self._tell("probe", rung))
        write_table(path / "scores.parquet", {
            "item": test, "hard": table.hard[test], "error": table.error[test], "group": table.groups[test],
            **{name: rung.probabilities for name, rung in climbed.rungs.items()}})
        domains = sorted(set(table.domain[test].tolist()) - {""})
        _write(path, {
            "test": len(test), "train": len(train), "hard": float(table.hard[test].mean()),
            "hard_train": float(table.hard[train].mean()), "purged": int((table.split == "purge").sum()),
            "groups": len(np.unique(table.groups[test])), "constant": table.constant,
            "constant_raw": len(probes.constant_columns(blocks["raw"][train])),
            "constant_sae": len(probes.constant_columns(blocks["sae"][train])) if "sae" in blocks else None,
            "rungs": {name: {"auroc": rung.auroc, "auprc": auprc(table.hard[test], rung.probabilities),
                             "C": rung.probe.strength, "constant": rung.is_constant,
                             "cross_validated": rung.probe.cross_validated[rung.probe.strength],
                             "domains": {
                                 domain: auroc(table.hard[test][here], rung.probabilities[here])
                                 for domain in domains if (here := table.domain[test] == domain).any()}}
                      for name, rung in climbed.rungs.items()},
            "comparisons": [{"a": c.a, "b": c.b, "difference": c.difference, "p": c.p, "p_holm": c.p_holm}
                            for c in climbed.comparisons]})

    def _selective(self, path: Path) -> None:
        scores = read_table(self.probe / "scores.parquet")
        errors, groups = scores["error"].astype(float), scores["group"].astype(str)
        order = selective.Order(errors, errors)
        _write(path, {
            "mean_error": float(errors.mean()), "coverages": selective.GRID,
            "oracle": order.risks(selective.GRID),
            "rungs": {name: _public(selective.risk_coverage(
                errors, scores[name], replicates=self.config.probe.replicates, seed=self.config.seed,
                groups=groups)) for name in rung_names(scores)}})

    def _calibrate(self, path: Path) -> None:
        table, blocks, told = self.study.table, self._blocks, result(self.probe)
        train, test = table.train, table.test
        by_name = {rung.name: rung for rung in ladder.rungs(blocks)}
        found: dict[str, Any] = {}
        probabilities: dict[str, Any] = {"hard": table.hard[test]}
        for name, rung in told["rungs"].items():
            self._tell("calibrate", name)
            features = probes.columns(blocks, by_name[name].blocks)
            fitted = probes.make_probe(rung["C"], not isinstance(features, np.ndarray), self._options).fit(
                features[train], table.hard[train])
            variants = calibration.recalibrate(fitted, features[train], table.hard[train], features[test],
                                               table.hard[test], self.study.folds)
            found[name] = {kind: {"ece": v.ece, "brier": v.brier, "log_loss": v.log_loss, "auroc": v.auroc}
                           for kind, v in variants.items()}
            probabilities |= {f"{name}.{kind}": v.probabilities for kind, v in variants.items()}
        write_table(path / "probabilities.parquet", probabilities)
        _write(path, {"rungs": found})

    def _cascade(self, path: Path, dear: Path) -> None:
        scores, asked = read_table(self.probe / "scores.parquet"), Extraction(dear)
        if asked.items.tolist() != scores["item"].tolist():
            raise InputError(f"{dear}: expected the test items in their order")
        cheap = scores["error"].astype(float)
        strong = asked.numbers["wrong" if "wrong" in asked.numbers else "amount"].astype(float)
        costs = cascade.Costs(**_plain(self.config.cascade))
        frontiers = {name: cascade.frontier(cheap, strong, scores[name], costs)
                     for name in rung_names(scores)}
        write_table(path / "errors.parquet", {"item": scores["item"], "cheap": cheap, "dear": strong})
        ends = float(cheap.mean()), float(strong.mean())
        found = {}
        for name, points in frontiers.items():
            better = np.flatnonzero(points.dominating(*ends, costs))
            best = min(better, key=lambda i: points.errors[i], default=None)
            found[name] = {
                "dominating": len(better), "points": len(points.costs), "best": None if best is None else {
                    "cost": points.costs[best], "error": points.errors[best],
                    "handed_on": points.handed_on[best]}}
        _write(path, {"always_cheap": ends[0], "always_dear": ends[1],
                      "dear_better": float((strong < cheap).mean()), "rungs": found})

    def _causal(self, path: Path, judged: Judged) -> None:
        options, study, table = self.config.causal, self.study, self.study.table
        most = read_features(self.features).most
        assert most is not None
        chosen = causal.rank_latents(most[table.train], table.hard[table.train], options.latents,
                                     strength=options.strength, options=self._options)
        controls = causal.as_often_active(most[table.train], chosen, options.controls, seed=self.config.seed)
        rng = np.random.default_rng(self.config.seed)
        items = table.test if not options.items or options.items >= len(table.test) else np.sort(
            rng.choice(table.test, options.items, replace=False))
        model = store.load(judged.model)
        found: dict[str, Any] = {}
        for where in options.positions:
            self._tell("causal", f"{where}, {len(items)} items × {2 + len(chosen) + len(controls)}")
            file = path / f"losses-{where}.parquet"
            names = ["natural", "reconstructed", *map(str, [*chosen, *controls])]
            if not file.is_file():
                losses = study.subject.patched(study.network, model, items.tolist(), [*chosen, *controls],
                                               self.layer, where)  # type: ignore[arg-type]
                write_table(file, {"item": items, **dict(zip(names, losses.T, strict=True))})
            losses = np.stack([read_table(file)[name] for name in names], axis=1)
            effects = causal.effects(losses, chosen, controls, groups=table.groups[items],
                                     replicates=self.config.probe.replicates, seed=self.config.seed)
            found[where] = {
                "natural": effects.natural, "reconstructed": effects.reconstructed,
                "reconstruction": effects.reconstruction,
                "chosen": {latent: _effect(effect) | {"beyond_controls": effects.beyond_controls(latent)}
                           for latent, effect in effects.chosen.items()},
                "controls": {latent: _effect(effect) for latent, effect in effects.controls.items()}}
        _write(path, {"items": len(items), "unit": study.subject.unit, "positions": found})


def recipe(stage: str, **parts: Any) -> dict[str, Any]:
    """What a stage is made of."""
    return {"stage": stage, "format": FORMAT, **parts}


def result(path: Path) -> dict[str, Any]:
    """What a stage found."""
    return json.loads((path / RESULT).read_text(encoding="utf-8"))


def rung_names(scores: Mapping[str, Any]) -> list[str]:
    """The columns of a table of scores that are rungs'."""
    return [name for name in scores if name not in ("item", "hard", "error", "group")]


def _write(path: Path, tree: Any) -> None:
    write_atomically(path / RESULT, as_json(tree))


def _rows(blocks: Mapping[str, probes.Block], rows: np.ndarray) -> dict[str, probes.Block]:
    return {name: block[rows] for name, block in blocks.items()}


def _plain(section: Any, *without: str) -> dict[str, Any]:
    return {name: value for name, value in config_lib.to_dict(section).items() if name not in without}


def _public(found: Any) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("risks", "low", "high", "aurc", "fraction_of_oracle")}


def _effect(effect: causal.Effect) -> dict[str, Any]:
    return {"change": effect.change, "p": effect.p, "p_holm": effect.p_holm, "sure": effect.is_sure,
            "items_changed": effect.items_changed}


def _contents(path: Path, section: NetworkConfig | None = None, what: str = "a network") -> str:
    """Of a network's directory and its tokenizer."""
    if not path.is_dir():
        raise InputError(f"{path}: expected the directory of {what}, found "
                         + ("a file" if path.exists() else "nothing"))
    files = [file for file in path.iterdir() if file.suffix in (".json", ".safetensors")]
    if section is not None and section.tokenizer:
        other = Path(section.tokenizer)
        files += [other / "tokenizer.json" if other.is_dir() else other]
    try:
        return fingerprint(files)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
