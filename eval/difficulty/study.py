"""The stages of a study: each reads what stands on disk, and leaves its result there.

    extract → items → sae → judged → features → probe → selective, calibrate, cascade; causal
A stage makes what it needs of those before it. What it is made of is its key (eval/stages.py): the
contents of networks and data, its options, and the keys of the stages that it reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax import store
from tilelli_jax.errors import InputError
from tilelli_jax.json_text import read_json
from tilelli_jax.sharding import make_mesh
from tilelli_jax.training.run import RunDirectory

from ..folds import Folds
from ..inputs import networks
from ..probes import Block, ProbeOptions
from ..stages import RESULTS, Stages, key, read_result, recipe, without, write_result
from ..tables import read_columns, write_columns
from . import autoencoder, causal, measures
from .autoencoder import Judged
from .config import SeriesConfig, StudyConfig
from .extract import Extraction, extract
from .features import make_features, read_features
from .forecasts import Forecasts
from .items import Items, make_items, read_items
from .ladder import Notify
from .measures import Drawn
from .questions import Questions
from .subject import Subject


class Study:
    """One configuration. `extract`, `items` and `dear` are directories of results, made when first asked for.

    Args:
        tell: called with a line for what is being made.
    """

    def __init__(self, config: StudyConfig, out: Path, notify: Notify = lambda line: None) -> None:
        self.config, self.out, self.notify = config, out, notify
        self.stages = Stages(out / "stages", notify)
        self.mesh = make_mesh(config.mesh)
        self.studied = networks.Studied(config.network, out)
        self.layers = {layer: Layer(self, layer) for layer in config.extract.layers}

    def check(self) -> None:
        """What can be known before anything is asked.

        Raises:
            InputError: another study's results, a network, an autoencoder or a training configuration is not
                there, or the output directory cannot be written.
        """
        config = self.config
        for path in config.also:
            read_results(Path(path))
        for section in (config.network, config.large_model):
            if section is not None:
                networks.check(section)
        if config.sae.train:
            config_lib.read_yaml(config.sae.train)
        for number in config.extract.layers if config.sae.path else ():
            autoencoder.read_config(Path(config.sae.path.format(layer=number)), config.extract.place, number)
        self.stages.open()

    @functools.cached_property
    def subject(self) -> Subject:
        kind = Forecasts if isinstance(self.config.data, SeriesConfig) else Questions
        return kind(self.config, self.mesh)

    @functools.cached_property
    def network(self) -> Any:
        return self.subject.open(self.config.network, str(self.studied.path))

    @functools.cached_property
    def extract(self) -> Path:
        options = self.config.extract
        manifest = recipe("extract", **self._asked, layers=sorted(options.layers), positions=options.positions)
        return self.stages.make("extract", manifest, lambda path: extract(
            path, self.subject, self.network, range(len(self.subject)), options.layers, options.shard_items))

    @functools.cached_property
    def items(self) -> Path:
        manifest = recipe("items", extract=self.extract.name, split=config_lib.to_dict(self.config.split),
                         labels=config_lib.to_dict(self.config.labels), seed=self.config.seed)
        return self.stages.make("items", manifest, lambda path: make_items(
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
    def large(self) -> Path | None:
        """The larger model, asked the test items; None where the study has none."""
        section = self.config.large_model
        if section is None:
            return None
        items = self.table.test.tolist()
        large = networks.Studied(section, self.out, "large_model")
        manifest = recipe("large_model", **self._asked | {"network": large.contents}, items=key({"items": items}))

        def work(made: Path) -> None:
            network = self.subject.open(section, str(large.path))
            extract(made, self.subject, network, items, (), self.config.extract.shard_items)
        return self.stages.make("large_model", manifest, work)

    def dear_errors(self, asked: Extraction) -> np.ndarray:
        """The larger model's error on what it was asked, in the unit of the cheap one's: `[items]`.

        Surprise is a mean over an answer's tokens; with another tokenizer these are others, so that it is
        taken over the cheap network's.
        """
        if "wrong" in asked.numbers:
            return asked.numbers["wrong"].astype(float)
        amount = asked.numbers["amount"].astype(float)
        if "answer_tokens" not in asked.numbers:
            return amount
        own = Extraction(self.extract).numbers["answer_tokens"][asked.items]
        return amount * asked.numbers["answer_tokens"] / own

    @functools.cached_property
    def _asked(self) -> dict[str, Any]:
        """What every answer of a network depends on."""
        options = self.config.extract
        return {"network": self.studied.contents, "data": self.subject.fingerprint,
                "subject": without(config_lib.to_dict(self.config.data), "source"),
                "compute": self.config.compute.dtype,
                "place": options.place, "skip": options.skip, "dtype": options.dtype,
                "seed": self.config.seed}


class Layer:
    """The stages of one layer, likewise; None where the study has no autoencoder, or no larger model."""

    def __init__(self, study: Study, layer: int) -> None:
        self.study, self.config, self.layer = study, study.config, layer

    @functools.cached_property
    def model(self) -> Path | None:
        """The autoencoder's directory, after it has been trained if that is what the study says."""
        options = self.config.sae
        if options.path:
            return Path(options.path.format(layer=self.layer))
        return None if self.sae is None else RunDirectory(self.sae / "run").model

    @functools.cached_property
    def sae(self) -> Path | None:
        """None also where it is given."""
        study, options = self.study, self.config.sae
        if not options.train:
            return None
        items = study.table.train.tolist()
        manifest = recipe("sae", **study._asked, layer=self.layer, items=key({"items": items}),
                         source=config_lib.read_yaml(options.train))
        return self._make("sae", manifest, lambda made: autoencoder.learn(
            made, self.config, study.subject, study.network, items, self.layer, study.studied.name))

    @functools.cached_property
    def judged_path(self) -> Path | None:
        study = self.study
        if self.model is None:
            return None
        test = study.table.test
        few = min(self.config.sae.held_out, len(test))
        items = np.sort(np.random.default_rng(self.config.seed).choice(test, few, replace=False)).tolist()
        manifest = recipe("judged", extract=study.extract.name, layer=self.layer, items=key({"items": items}),
                         model=networks.contents(self.model))
        return self._make("judged", manifest, lambda made: autoencoder.judge(
            made, Path(self.model or ""), self.config, study.subject, study.network,
            Extraction(study.extract), items, self.layer))

    @functools.cached_property
    def judged(self) -> Judged | None:
        """The autoencoder's measures. Raises InputError for one that has learned too little."""
        if self.judged_path is None:
            return None
        found = autoencoder.read(self.judged_path)
        if (faults := self.faults(found)) and not self.config.sae.force:
            raise InputError(f"{self.model}: refused: {'; '.join(faults)}; sae.force=true goes on, and the "
                             "report says so")
        return found

    def faults(self, judged: Judged) -> list[str]:
        """Why no conclusion should rest on the autoencoder."""
        return judged.faults(self.config.sae, self.study.studied.name)

    @functools.cached_property
    def features(self) -> Path:
        judged, study = self.judged, self.study
        sae = None if judged is None else networks.contents(Path(self.model or ""))
        manifest = recipe("features", extract=study.extract.name, layer=self.layer, sae=sae)
        return self._make("features", manifest, lambda path: make_features(
            path, Extraction(study.extract), self.layer,
            None if judged is None else store.load(self.model or "")))

    @functools.cached_property
    def probe(self) -> Path:
        study = self.study
        manifest = recipe("probe", items=study.items.name, features=self.features.name,
                         options=without(config_lib.to_dict(self.config.probe), "jobs"),
                         seed=self.config.seed)

        def work(path: Path) -> None:
            tree, scores = measures.probe(study.table, self._blocks, study.folds, self._options, self._drawn,
                                          lambda rung: self._notify("probe", rung))
            write_columns(path / "scores.parquet", scores)
            write_result(path, tree)
        return self._make("probe", manifest, work)

    @functools.cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """Every rung's P(hard) of the held-out items."""
        return read_columns(self.probe / "scores.parquet")

    @functools.cached_property
    def selective(self) -> Path:
        manifest = recipe("selective", probe=self.probe.name)
        return self._make("selective", manifest, lambda path: write_result(
            path, measures.abstain(self.scores, self._drawn)))

    @functools.cached_property
    def calibrate(self) -> Path:
        study = self.study

        def work(path: Path) -> None:
            strengths = {name: rung["C"] for name, rung in read_result(self.probe)["rungs"].items()}
            tree, table = measures.calibrate(study.table, self._blocks, study.folds, self._options, strengths,
                                             lambda rung: self._notify("calibrate", rung))
            write_columns(path / "probabilities.parquet", table)
            write_result(path, tree)
        return self._make("calibrate", recipe("calibrate", probe=self.probe.name), work)

    @functools.cached_property
    def cascade(self) -> Path | None:
        large = self.study.large
        if large is None:
            return None
        manifest = recipe("cascade", probe=self.probe.name, large=large.name, seed=self.config.seed,
                         costs=config_lib.to_dict(self.config.cascade))

        def work(path: Path) -> None:
            asked = Extraction(large)
            if asked.items.tolist() != self.scores["item"].tolist():
                raise InputError(f"{large}: expected the test items in their order")
            tree, table = measures.cascade_metrics(self.scores, self.study.dear_errors(asked), self.config.cascade,
                                           self._drawn)
            write_columns(path / "errors.parquet", table)
            write_result(path, tree)
        return self._make("cascade", manifest, work)

    @functools.cached_property
    def causal(self) -> Path | None:
        if self.judged is None:
            return None
        manifest = recipe("causal", features=self.features.name, items=self.study.items.name,
                         options=config_lib.to_dict(self.config.causal), seed=self.config.seed,
                         replicates=self.config.probe.replicates)
        return self._make("causal", manifest, self._causal)

    # ---------------------------------------------------------------------------------------------

    def _causal(self, path: Path) -> None:
        options, study, table = self.config.causal, self.study, self.study.table
        most = read_features(self.features).most
        assert most is not None and self.judged_path is not None
        chosen = causal.rank_latents(most[table.train], table.hard[table.train], options.latents,
                                     strength=options.strength, options=self._options)
        active = read_columns(self.judged_path / autoencoder.ACTIVE)  # where each will be patched, or nearly
        matched: dict[str, dict[int, list[int]]] = {
            where: causal.as_often_active(active[where], chosen, options.controls, seed=self.config.seed)
            for where in options.positions}
        items = table.test
        if 0 < options.items < len(items):
            rng = np.random.default_rng(self.config.seed)
            items = np.sort(rng.choice(items, options.items, replace=False))
        model = store.load(self.model or "")
        losses: dict[str, np.ndarray] = {}
        for where in options.positions:
            latents = [*chosen, *(other for others in matched[where].values() for other in others)]
            names = ["natural", "reconstructed", *map(str, latents)]
            self._notify("causal", f"{where}, {len(items)} items × {len(names)}")
            file = path / f"losses-{where}.parquet"
            if not file.is_file():
                found = study.subject.patched(study.network, model, items.tolist(), latents, self.layer,
                                              where)
                if not np.isfinite(found).all():
                    bad = int(items[np.argwhere(~np.isfinite(found))[0, 0]])
                    raise InputError(f"item {bad}, layer {self.layer}: its patched {study.subject.unit} are "
                                     "not finite")
                write_columns(file, {"item": items, **dict(zip(names, found.T, strict=True))})
            columns = read_columns(file)
            losses[where] = np.stack([columns[name] for name in names], axis=1)
        write_result(path, {"items": len(items), "unit": study.subject.unit, "positions": measures.effects(
            losses, chosen, matched, table.groups[items], self._drawn)})

    @functools.cached_property
    def _blocks(self) -> dict[str, Block]:
        """All that a rung may see, `[items, features]` each."""
        found = read_features(self.features)
        blocks: dict[str, Block] = {name: block.values for name, block in self.study.table.blocks.items()}
        blocks["raw"] = found.raw
        if found.codes is not None:
            blocks["sae"] = found.codes
        return blocks

    @property
    def _options(self) -> ProbeOptions:
        return ProbeOptions(seed=self.config.seed, jobs=self.config.probe.jobs)

    @property
    def _drawn(self) -> Drawn:
        return Drawn(self.config.probe.replicates, self.config.seed)

    def _make(self, name: str, manifest: Mapping[str, Any], work: Callable[[Path], None]) -> Path:
        return self.study.stages.make(f"{name}-{self.layer}", manifest, work)

    def _notify(self, stage: str, what: str) -> None:
        self.study.notify(f"{stage}-{self.layer}: {what}")


def read_results(path: Path) -> dict[str, Any]:
    """What another study has found: its results.json."""
    try:
        return read_json(path / RESULTS)
    except InputError as error:
        raise InputError(f"also: {error}; run that study first") from None
