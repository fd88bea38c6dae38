"""The stages of a study. Each reads the results of earlier stages from disk and writes its own.

    extract → items → sae → sae_eval → features → probe → selective, calibrate, cascade; causal
A stage first runs the stages it depends on. Its key (eval/stages.py) is a hash of everything its result
depends on: the contents of networks and data, its options, and the keys of the stages it reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax import extras
from tilelli_jax.errors import InputError
from tilelli_jax.io.json_text import read_json
from tilelli_jax.loading import store
from tilelli_jax.loading.fingerprint import network_fingerprint
from tilelli_jax.parallel.sharding import make_mesh
from tilelli_jax.training.run import RunDirectory

from ..conclusions import few_groups_warning
from ..folds import Folds
from ..inputs import networks
from ..inputs.study import Study
from ..probes import Block, ProbeOptions
from ..stages import RESULTS, key, read_result, stage_manifest, without, write_result
from ..tables import read_columns, write_columns
from . import autoencoder, causal, measures
from .autoencoder import SAEEvaluation
from .chronos_data import ChronosData
from .config import DifficultyConfig, SeriesConfig
from .extract import Extraction, extract
from .features import make_features, read_features
from .items import Items, check_plan, make_items, read_items
from .ladder import Notify
from .language_data import LanguageData
from .measures import BootstrapOptions
from .study_data import StudyData


class DifficultyStudy(Study[DifficultyConfig]):
    """One difficulty study. `extract`, `items` and `large` are directories, computed at first access."""

    STAGES = ("extract", "sae", "probe", "selective", "calibrate", "cascade", "causal")
    MAIN_KEYS = ("network.path", "data.family", "data.source", "data.items", "extract.hook", "extract.layers",
                 "sae.path", "sae.train", "large_model.path", "out")

    def __init__(self, config: DifficultyConfig, out: Path, notify: Notify = lambda line: None) -> None:
        super().__init__(config, out, notify)
        self.mesh = make_mesh(config.mesh)
        self.studied = networks.StudyNetwork(config.network, out)
        self.layers = {layer: Layer(self, layer) for layer in config.extract.layers}

    @property
    def seeds(self) -> tuple[int, ...]:
        return (self.config.seed,)

    def stage_paths(self, stage: str) -> Iterator[tuple[str, Path]]:
        if stage == "extract":
            yield stage, self.extract
            yield stage, self.items
            return
        for layer in self.layers.values():
            path = layer.evaluation_path if stage == "sae" else getattr(layer, stage)
            if path is None:
                required = "a section large_model" if stage == "cascade" else "sae.path or sae.train"
                raise InputError(f"--stage {stage}: expected a configuration with {required}, found none")
            yield stage, path

    def check(self) -> None:
        """Checks all inputs before the first computation.

        Raises:
            InputError: a network, an autoencoder or a training configuration is missing, the data cannot be
                read or are too few, or the output directory cannot be written.
        """
        config = self.config
        if isinstance(config.data, SeriesConfig):
            extras.require("statsmodels", "data.family series")  # imported only for the cheap features
        for name, section in (("network", config.network), ("large_model", config.large_model)):
            if section is not None:
                networks.check(section, name)
        if config.sae.train:
            networks.check(config.sae.network, "sae")
        for number in config.extract.layers if config.sae.path else ():
            autoencoder.read_config(config.sae.model_path(number), config.extract.hook, number)
        for line in check_plan(self.data, config):
            self.notify(f"split: {line}")
        self.stages.open()

    @functools.cached_property
    def data(self) -> StudyData:
        data_class = ChronosData if isinstance(self.config.data, SeriesConfig) else LanguageData
        return data_class(self.config, self.mesh)

    @functools.cached_property
    def network(self) -> Any:
        return self.data.open(self.config.network, str(self.studied.path))

    @functools.cached_property
    def extract(self) -> Path:
        options = self.config.extract
        manifest = stage_manifest("extract", **self._dependencies, layers=sorted(options.layers),
                                  positions=options.positions)
        return self.stages.make("extract", manifest, lambda path: extract(
            path, self.data, self.network, range(len(self.data)), options.layers, options.shard_items))

    @functools.cached_property
    def items(self) -> Path:
        config = self.config
        manifest = stage_manifest("items", extract=self.extract.name, split=config_lib.to_dict(config.split),
                                  labels=config_lib.to_dict(config.labels), seed=config.seed)
        return self.stages.make("items", manifest, lambda path: make_items(
            path, self.data, Extraction(self.extract), self.config))

    @functools.cached_property
    def table(self) -> Items:
        """The table of items."""
        table = read_items(self.items)
        for line in few_groups_warning(len(np.unique(table.groups[table.test]))):  # some may be purged
            self.notify(f"items: {line}")
        return table

    @functools.cached_property
    def folds(self) -> Folds:
        """The cross-validation folds of the train items. Raises InputError if fewer than two are possible."""
        table = self.table
        folds = self.data.folds(table.hard[table.train], table.train, self.config.probe.folds)
        if len(folds) < 2:
            raise InputError("probe.folds: expected at least two folds with both hard and easy items, found "
                             f"{len(folds)} for the {len(table.train)} train items")
        return folds

    @functools.cached_property
    def large(self) -> Path | None:
        """The larger model's results on the test items; None if the study has no larger model."""
        section = self.config.large_model
        if section is None:
            return None
        items = self.table.test.tolist()
        large = networks.StudyNetwork(section, self.out, "large_model")
        manifest = stage_manifest("large_model", **self._dependencies | {"network": large.fingerprint},
                                  items=key({"items": items}))

        def work(path: Path) -> None:
            network = self.data.open(section, str(large.path))
            extract(path, self.data, network, items, (), self.config.extract.shard_items)
        return self.stages.make("large_model", manifest, work)

    def large_model_errors(self, large: Extraction) -> np.ndarray:
        """Returns the larger model's error on its items, in the unit of the small model's error: `[items]`.

        The NLL of an answer is a mean over its tokens. If the tokenizers differ, the mean of the larger model
        is rescaled to the number of tokens of the small model.
        """
        if "wrong" in large.numbers:
            return large.numbers["wrong"].astype(float)
        loss = large.numbers["loss"].astype(float)
        if "answer_tokens" not in large.numbers:
            return loss
        small_tokens = Extraction(self.extract).numbers["answer_tokens"][large.items]
        return loss * large.numbers["answer_tokens"] / small_tokens

    @functools.cached_property
    def _dependencies(self) -> dict[str, Any]:
        """Everything that a network's results on the items depend on."""
        options = self.config.extract
        return {"network": self.studied.fingerprint, "data": self.data.fingerprint,
                "data_options": without(config_lib.to_dict(self.config.data), "source"),
                "compute": self.config.compute.dtype,
                "hook": options.hook, "skip": options.skip, "dtype": options.dtype,
                "seed": self.config.seed}


class Layer:
    """The stages of one layer: directories of results, computed at first access.

    A stage is None if it needs an autoencoder or a larger model and the study has none.
    """

    def __init__(self, study: DifficultyStudy, layer: int) -> None:
        self.study, self.config, self.layer = study, study.config, layer

    @functools.cached_property
    def model(self) -> Path | None:
        """The autoencoder's model directory; trains it first if the configuration says so."""
        options = self.config.sae
        if options.path:
            return options.model_path(self.layer)
        return None if self.sae is None else RunDirectory(self.sae / "run").model

    @functools.cached_property
    def sae(self) -> Path | None:
        """The training of the autoencoder; None if the study uses an existing one."""
        study, options = self.study, self.config.sae
        if not options.train:
            return None
        study.folds  # noqa: B018 (raises InputError for too few items before anything is trained)
        items = study.table.train.tolist()
        manifest = stage_manifest("sae", **study._dependencies, layer=self.layer, items=key({"items": items}),
                                  source=config_lib.to_dict(options.network.experiment()))
        return self._make("sae", manifest, lambda path: autoencoder.train_sae(
            path, self.config, study.data, study.network, items, self.layer, study.studied.name))

    @functools.cached_property
    def evaluation_path(self) -> Path | None:
        """The evaluation of the autoencoder on held-out items."""
        study = self.study
        if self.model is None:
            return None
        test = study.table.test
        number = min(self.config.sae.held_out, len(test))
        items = np.sort(np.random.default_rng(self.config.seed).choice(test, number, replace=False)).tolist()
        manifest = stage_manifest("sae_eval", extract=study.extract.name, layer=self.layer,
                                  items=key({"items": items}), model=network_fingerprint(self.model))
        return self._make("sae_eval", manifest, lambda path: autoencoder.evaluate(
            path, Path(self.model or ""), self.config, study.data, study.network,
            Extraction(study.extract), items, self.layer))

    @functools.cached_property
    def evaluation(self) -> SAEEvaluation | None:
        """The autoencoder's quality. Raises InputError if it is insufficient, unless sae.force is set."""
        if self.evaluation_path is None:
            return None
        evaluation = autoencoder.read_evaluation(self.evaluation_path)
        if (faults := self.faults(evaluation)) and not self.config.sae.force:
            raise InputError(f"{self.model}: autoencoder rejected: {'; '.join(faults)}; sae.force=true "
                             "continues with it, and the report says so")
        return evaluation

    def faults(self, evaluation: SAEEvaluation) -> list[str]:
        """Returns the reasons to reject the autoencoder; empty if there are none."""
        return evaluation.faults(self.config.sae, self.study.studied.name)

    @functools.cached_property
    def features(self) -> Path:
        evaluation, study = self.evaluation, self.study
        sae = None if evaluation is None else network_fingerprint(Path(self.model or ""))
        manifest = stage_manifest("features", extract=study.extract.name, layer=self.layer, sae=sae)
        return self._make("features", manifest, lambda path: make_features(
            path, Extraction(study.extract), self.layer,
            None if evaluation is None else store.load(self.model or "")))

    @functools.cached_property
    def probe(self) -> Path:
        study = self.study
        manifest = stage_manifest("probe", items=study.items.name, features=self.features.name,
                                  options=without(config_lib.to_dict(self.config.probe), "jobs"),
                                  seed=self.config.seed)

        def work(path: Path) -> None:
            tree, scores = measures.probe_ladder(
                study.table, self._blocks, study.folds, self._options, self._bootstrap,
                lambda rung: self._notify("probe", rung))
            write_columns(path / "scores.parquet", scores)
            write_result(path, tree)
        return self._make("probe", manifest, work)

    @functools.cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """The scores of the test items: each rung's P(hard)."""
        return read_columns(self.probe / "scores.parquet")

    @functools.cached_property
    def selective(self) -> Path:
        manifest = stage_manifest("selective", probe=self.probe.name)
        return self._make("selective", manifest, lambda path: write_result(
            path, measures.selective_metrics(self.scores, self._bootstrap)))

    @functools.cached_property
    def calibrate(self) -> Path:
        study = self.study

        def work(path: Path) -> None:
            c_values = {name: rung["C"] for name, rung in read_result(self.probe)["rungs"].items()}
            tree, table = measures.calibrate(study.table, self._blocks, study.folds, self._options, c_values,
                                             lambda rung: self._notify("calibrate", rung))
            write_columns(path / "probabilities.parquet", table)
            write_result(path, tree)
        return self._make("calibrate", stage_manifest("calibrate", probe=self.probe.name), work)

    @functools.cached_property
    def cascade(self) -> Path | None:
        large = self.study.large
        if large is None:
            return None
        manifest = stage_manifest("cascade", probe=self.probe.name, large=large.name, seed=self.config.seed,
                                  costs=config_lib.to_dict(self.config.cascade))

        def work(path: Path) -> None:
            extraction = Extraction(large)
            if extraction.items.tolist() != self.scores["item"].tolist():
                raise InputError(f"{large}: expected the test items in order, found other items")
            tree, table = measures.cascade_metrics(self.scores, self.study.large_model_errors(extraction),
                                                   self.config.cascade, self._bootstrap)
            write_columns(path / "errors.parquet", table)
            write_result(path, tree)
        return self._make("cascade", manifest, work)

    @functools.cached_property
    def causal(self) -> Path | None:
        if self.evaluation is None:
            return None
        manifest = stage_manifest("causal", features=self.features.name, items=self.study.items.name,
                                  options=config_lib.to_dict(self.config.causal), seed=self.config.seed,
                                  replicates=self.config.probe.replicates)
        return self._make("causal", manifest, self._causal)

    # ---------------------------------------------------------------------------------------------

    def _causal(self, path: Path) -> None:
        options, study, table = self.config.causal, self.study, self.study.table
        codes = read_features(self.features).max_codes
        assert codes is not None and self.evaluation_path is not None
        chosen = causal.rank_latents(codes[table.train], table.hard[table.train], options.latents,
                                     c_value=options.c_value, options=self._options)
        active = read_columns(self.evaluation_path / autoencoder.ACTIVE)  # at about the patched positions
        matched: dict[str, dict[int, list[int]]] = {
            positions: causal.frequency_matched_controls(active[positions], chosen, options.controls,
                                                         seed=self.config.seed)
            for positions in options.positions}
        items = table.test
        if 0 < options.items < len(items):
            rng = np.random.default_rng(self.config.seed)
            items = np.sort(rng.choice(items, options.items, replace=False))
        model = store.load(self.model or "")
        losses: dict[str, np.ndarray] = {}
        for positions in options.positions:
            controls = [control for latent in chosen for control in matched[positions][latent]]
            latents = [*chosen, *controls]
            names = ["natural", "reconstructed", *map(str, latents)]
            self._notify("causal", f"{positions}, {len(items)} items × {len(names)}")
            file = path / f"losses-{positions}.parquet"
            if not file.is_file():
                patched = study.data.patched_losses(study.network, model, items.tolist(), latents,
                                                       self.layer, positions)
                if not np.isfinite(patched).all():
                    bad = int(items[np.argwhere(~np.isfinite(patched))[0, 0]])
                    raise InputError(f"item {bad}, layer {self.layer}: the loss after patching is not "
                                     "finite")
                write_columns(file, {"item": items, **dict(zip(names, patched.T, strict=True))})
            columns = read_columns(file)
            losses[positions] = np.stack([columns[name] for name in names], axis=1)
        write_result(path, {"items": len(items), "unit": study.data.unit, "positions": measures.effects(
            losses, chosen, matched, table.groups[items], self._bootstrap)})

    @functools.cached_property
    def _blocks(self) -> dict[str, Block]:
        """The feature blocks of all rungs, `[items, features]` each."""
        features = read_features(self.features)
        blocks: dict[str, Block] = {name: block.values for name, block in self.study.table.blocks.items()}
        blocks["raw"] = features.raw
        if features.codes is not None:
            blocks["sae"] = features.codes
        return blocks

    @property
    def _options(self) -> ProbeOptions:
        return ProbeOptions(seed=self.config.seed, jobs=self.config.probe.jobs)

    @property
    def _bootstrap(self) -> BootstrapOptions:
        return BootstrapOptions(self.config.probe.replicates, self.config.seed)

    def _make(self, name: str, manifest: Mapping[str, Any], work: Callable[[Path], None]) -> Path:
        return self.study.stages.make(f"{name}-{self.layer}", manifest, work)

    def _notify(self, stage: str, step: str) -> None:
        self.study.notify(f"{stage}-{self.layer}: {step}")


def read_results(path: Path) -> dict[str, Any]:
    """Reads the results.json of another study."""
    try:
        return read_json(path / RESULTS)
    except InputError as error:
        raise InputError(f"other_studies: {error}; run that study first") from None
