"""The stages of an abstention study. Each reads the results of earlier stages and writes its own.

    data → networks of every seed (base → v4 → the others) → measured, fitted → evaluate

A stage's directory is named by a hash of everything that the result depends on (eval/stages.py). Networks are
trained as runs of `tilelli train` in out/networks/: they resume and log as any other run does.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from tilelli_jax import config as config_lib
from tilelli_jax.commands.splice import splice
from tilelli_jax.data.chat_pairs import read_pairs
from tilelli_jax.data.synthetic import village
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import fingerprint
from tilelli_jax.loading import store
from tilelli_jax.loading.fingerprint import network_fingerprint
from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.signals.uncertainty import UncertaintyReader
from tilelli_jax.training.run import RunDirectory

from ..inputs import networks
from ..inputs.networks import NetworkConfig, run_path, train_network
from ..inputs.study import Study
from ..stages import cached_method, read_result, stage_manifest, without, write_result
from ..tables import read_columns, write_columns
from . import data, evaluate, fitted, measure, prompts
from .config import DATA_FILES, AbstentionConfig
from .measure import Columns
from .variants import BASE, CHAT, SPLICED_FROM, VARIANTS, Variant, dependencies

FEW = 30  # prompts of a regime below which intervals are wide: a note is printed
PROMPTS, CALIBRATION = "prompts.parquet", "calibration.parquet"  # of a measured network: a row per prompt


class AbstentionStudy(Study[AbstentionConfig]):
    """One abstention study. `part` is the subdirectory of a report on a part of the study, which leaves the
    report on the whole study as it is; "" for the whole study.
    """

    STAGES = ("data", "train", "measure")
    MAIN_KEYS = ("training.chat.path", "training.chat.train", "variants", "seeds", "pairs.files.chat",
                 "prompts", "answers.max_new", "target_fpr", "out")
    part = ""

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.config.seeds

    @property
    def report_dir(self) -> Path:
        return self.out / self.part

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants of the configuration, and those that they start from."""
        return dependencies(self.config.variants)

    def stage_paths(self, stage: str) -> Iterator[tuple[str, Path]]:
        if stage == "data":
            yield stage, self.data
            return
        for seed in self.seeds:
            for name in self.variants:
                path = self.network(name, seed) if stage == "train" else self.measured(name, seed)
                yield f"{name}, seed {seed}", path

    def check(self) -> None:
        """Checks the configuration before any network is trained.

        Raises:
            InputError: prompts, training configurations or given networks do not exist or do not fit
                together, or the output directory cannot be written.
        """
        self._check_networks()
        start = self._start_config()
        data.check(self.config.pairs, self._longest,
                   start.max_seq_len if start.positions == "learned" else None, self.config.target_fpr)
        measure.check_lengths([prompt.prompt for prompt in self.prompts], start,
                              self.config.answers.max_new)
        self.stages.open()
        self._warn()

    def _warn(self) -> None:
        """Prints notes on settings that are allowed but probably not intended."""
        counts = Counter(prompt.regime for prompt in self.prompts)
        if few := [regime for regime, n in counts.items() if n < FEW]:
            self.notify(f"note: prompts: fewer than {FEW} of {', '.join(few)}: intervals will be wide")
        if missing := self.village_files:
            self.notify(f"note: pairs.files: {', '.join(missing)}: generated from the built-in village, "
                        "which your own networks and prompts may not cover")

    @property
    def village_files(self) -> list[str]:
        """The data files generated from the village although networks or prompts are the user's own."""
        own = self.config.prompts or {BASE, CHAT} & self.config.networks.keys()
        return [name for name in DATA_FILES if name not in self.config.pairs.files.given] if own else []

    # --- Data and prompts -------------------------------------------------------------------------

    @functools.cached_property
    def world(self) -> village.World:
        """The village of training.base, also where the base network is given."""
        data = self.config.training.base.experiment().data
        return (village.world(data.village_seed, data.village_people) if data.source == "village" else
                village.world())

    @functools.cached_property
    def prompts(self) -> list[village.EvaluationPrompt]:
        """The evaluation prompts."""
        evaluation = prompts.read(self.config.prompts or prompts.BUILT_IN)
        if not self.config.prompts and self.world.seed:
            raise InputError(f"prompts: expected prompts about village_seed {self.world.seed} (tilelli data "
                             "--source village-prompts writes them), found the built-in ones, which are "
                             "about village_seed 0")
        return evaluation

    @functools.cached_property
    def data(self) -> Path:
        """The directory with a file of JSON lines for each of `config.DATA_FILES`; see `data.write`."""
        pairs = self.config.pairs
        manifest = stage_manifest(
            "data", village=[self.world.seed, len(self.world.people)], longest=self._longest,
            options=without(config_lib.to_dict(pairs), "files"), given=data.fingerprints(pairs))
        return self.stages.make("data", manifest, lambda path: data.write(
            path, pairs, self.world, self._longest, self.notify))

    @property
    def _longest(self) -> int:
        """The length of a pair, in bytes, for which both kinds of runs have room."""
        training = self.config.training
        return min(part.experiment().train.seq_len for part in (training.chat, training.variant))

    def _file(self, name: str) -> Path:
        return self.data / f"{name}.jsonl"

    # --- Networks ---------------------------------------------------------------------------------

    @cached_method
    def network(self, name: str, seed: int) -> Path:
        """The model directory of `base` or a variant; trains the network if it does not exist.

        Raises:
            TrainingStopped: a run was stopped before its end.
        """
        if name in self.config.networks:
            return Path(self.config.networks[name].path)
        if name == BASE:
            part = self.config.training.base
            return self._trained(name, seed, part, [f"data.shuffle_seed={seed}"])
        variant = VARIANTS[name]
        if variant.kind == "fitted":
            return self.network(variant.start, seed)
        if variant.kind == "spliced":
            return self._spliced(name, seed)
        part = self.config.training.chat if name == CHAT else self.config.training.variant
        start, source = self.network(variant.start, seed), self._file(variant.data)
        held_out = [self._file("held_out")] if variant.data == "chat" else []
        return self._trained(name, seed, part, [
            f"chat.shuffle_seed={seed}", *_as_overrides(variant), f"chat.source={source}",
            f"train.init_from={start}", *(f"chat.valid={file}" for file in held_out)])

    @cached_method
    def measured(self, name: str, seed: int) -> Path:
        """The directory with signals and answers of a variant: PROMPTS, CALIBRATION, result.json."""
        variant, config = VARIANTS[name], self.config
        path, start = self.network(name, seed), self.network(CHAT, seed)
        manifest = stage_manifest(
            "measured", name=name, network=network_fingerprint(path), start=network_fingerprint(start),
            prompts=self._prompts_hash,
            data=fingerprint([self._file("calibration"), self._file("held_out")]),
            answers=config_lib.to_dict(config.answers), max_loss_pairs=measure.MAX_LOSS_PAIRS,
            numerics=self._numerics,
            fitted=self.fitted(seed).name if variant.kind == "fitted" else None)
        work = self._measure_fitted if variant.kind == "fitted" else self._measure
        return self.stages.make(f"{name}-{seed}", manifest, lambda directory: work(directory, name, seed))

    @cached_method
    def fitted(self, seed: int) -> Path:
        """The directory with the scores of heads and probes: PROMPTS, CALIBRATION, result.json."""
        options = self.config.fitted
        data_files = [self._file(name) for name in ("calibration", "held_out", "answerability")]
        manifest = stage_manifest(
            "fitted", network=network_fingerprint(self.network(CHAT, seed)), prompts=self._prompts_hash,
            data=fingerprint(data_files), options=without(config_lib.to_dict(options), "jobs"),
            numerics=self._numerics, sae=config_lib.to_dict(self.config.training.sae.experiment()), seed=seed)

        def work(path: Path) -> None:
            fit = fitted.fit(path, self._load(self.network(CHAT, seed)), self._labelled("answerability"),
                             self._labelled("held_out"),
                             [[prompt.prompt for prompt in self.prompts], self.calibration], options,
                             self.config.training.sae, seed, self.config.batch_size)
            for file, scores in zip((PROMPTS, CALIBRATION), fit.scores, strict=True):
                write_columns(path / file, scores)
            write_result(path, fit.result)
        return self.stages.make(f"fitted-{seed}", manifest, work)

    @functools.cached_property
    def calibration(self) -> list[str]:
        """The answerable prompts of the calibration split."""
        return [pair.prompt for pair in read_pairs(self._file("calibration")) if pair.answerable]

    def _labelled(self, name: str) -> dict[str, bool]:
        """Returns prompt → whether it can be answered, for as many as heads and probes are fitted to."""
        labels = {pair.prompt: pair.answerable for pair in read_pairs(self._file(name))}
        return dict(list(labels.items())[:self.config.fitted.prompts])

    @functools.cached_property
    def evaluation(self) -> Path:
        """The directory with the tables of the report: result.json."""
        config = self.config
        paths = {name: {seed: self.measured(name, seed) for seed in config.seeds} for name in self.variants}
        fitted_paths = {seed: self.fitted(seed) for seed in config.seeds} if self.has_fitted else {}
        manifest = stage_manifest(
            "evaluate", measured={name: [path.name for path in by_seed.values()]
                                  for name, by_seed in paths.items()},
            fitted=[path.name for path in fitted_paths.values()], target_fpr=config.target_fpr,
            prompts=self._prompts_hash, replicates=config.replicates, seed=config.seed)

        def work(path: Path) -> None:
            measured = {name: [self._read(directory, fitted_paths.get(seed) if name == CHAT else None)
                               for seed, directory in by_seed.items()] for name, by_seed in paths.items()}
            write_result(path, evaluate.evaluate(self.prompts, measured, config))
        return self.stages.make("evaluate", manifest, work)

    # ---------------------------------------------------------------------------------------------

    @property
    def has_fitted(self) -> bool:
        """Whether the study fits heads and probes."""
        return any(VARIANTS[name].kind == "fitted" for name in self.variants)

    @property
    def _numerics(self) -> list[str]:
        """What the rounding of measured signals depends on."""
        return [self.config.compute.dtype, jax.default_backend(), str(self.config.batch_size)]

    @functools.cached_property
    def _prompts_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16]

    def _start_config(self) -> Any:
        """Returns the configuration of v4 or the base if given, otherwise of the base to be trained."""
        for name in (CHAT, BASE):
            if name in self.config.networks:
                return store.load_config(self.config.networks[name].path)
        return self.config.training.base.experiment().model

    def _check_networks(self) -> None:
        given = {name: section.path for name, section in self.config.networks.items()}
        for field in dataclasses.fields(self.config.training):
            networks.check(getattr(self.config.training, field.name), f"training.{field.name}")
        start = self._start_config()
        configs = {name: store.load_config(path) for name, path in given.items()}
        for name, config in configs.items():
            measure.check_bytes(config, f"networks.{name}: {given[name]}")
        measure.check_bytes(start, "training.base")
        for name, config in configs.items():
            if name in VARIANTS and VARIANTS[name].has_head and not config.abstain_head:
                raise InputError(f"networks.{name}: {given[name]}: expected a network with an abstain head, "
                                 "found none")
            if (shape := _shape(config)) != _shape(start):
                raise InputError(f"networks.{name}: {given[name]}: expected the family, d_model, n_layers "
                                 f"and pathways of the other networks, {_shape(start)}, found {shape}")
        for name in self.variants:
            if VARIANTS[name].needs_router and not isinstance(start, RoutedConfig):
                raise InputError(f"variants: {name} requires a router, which family {start.family} lacks")

    def _trained(self, name: str, seed: int, part: NetworkConfig, overrides: Sequence[str]) -> Path:
        """Trains a network and returns its model directory.

        Args:
            overrides: settings of the study, which take precedence over the configuration's.
        """
        overrides = [f"seed={seed}", *overrides]
        run = run_path(self.out / "networks", f"{name}-{seed}", part.experiment(overrides))
        if not RunDirectory(run).summary.is_file():
            self.notify(f"{name}, seed {seed}: {run}")
        return train_network(part.train, run, [*part.set, *overrides])

    def _spliced(self, name: str, seed: int) -> Path:
        head, onto = self.network(SPLICED_FROM, seed), self.network(CHAT, seed)
        manifest = stage_manifest("splice", head=network_fingerprint(head), onto=network_fingerprint(onto))

        def work(path: Path) -> None:
            shutil.rmtree(path / "model", ignore_errors=True)  # left by an interrupted run
            splice(head, onto, path / "model")
        return self.stages.make(f"{name}-network-{seed}", manifest, work) / "model"

    def _load(self, path: Path) -> Decoder:
        return store.load(path, self.config.compute)

    def _measure(self, path: Path, name: str, seed: int) -> None:
        config, model = self.config, self._load(self.network(name, seed))
        start = self._load(self.network(CHAT, seed))
        routed = "router" in model.hooks and "router" in start.hooks
        reader = UncertaintyReader(model, before=start if routed else None, batch_size=config.batch_size)
        texts = [prompt.prompt for prompt in self.prompts]
        answers = measure.answers(model, texts, config.answers)
        held_out = read_pairs(self._file("held_out"))
        run = RunDirectory(self.network(name, seed).parent)
        write_columns(path / CALIBRATION, measure.signals(reader, self.calibration, "calibration"))
        write_columns(path / PROMPTS, {
            "prompt": texts, "regime": [prompt.regime for prompt in self.prompts],
            "answer": answers, "correct": [measure.is_correct(answer, prompt.answer)
                                           for answer, prompt in zip(answers, self.prompts, strict=True)],
            **measure.signals(reader, texts, f"{name}-{seed}")})
        write_result(path, {
            **measure.summarise(self.prompts, answers),
            "chat_loss": measure.chat_loss(model, held_out, config.batch_size),
            "cost": _cost(run)})

    def _measure_fitted(self, path: Path, name: str, seed: int) -> None:
        """Writes the measurements of v4, whose network it is, with the fitted head's abstain_p."""
        start, heads, column = self.measured(CHAT, seed), self.fitted(seed), name.replace("-", "_")
        for file in (PROMPTS, CALIBRATION):
            columns: dict[str, Any] = read_columns(start / file)
            write_columns(path / file, columns | {"abstain_p": read_columns(heads / file)[column]})
        cost = {"steps": None, "tokens": None, "parameters": None, **read_result(heads)["heads"][column]}
        write_result(path, read_result(start) | {"cost": cost})

    def _read(self, path: Path, fitted_path: Path | None) -> evaluate.Measured:
        """Reads a measured network; for v4, adds the scores of the probes in `fitted_path`."""
        columns: list[Columns] = [read_columns(path / file) for file in (PROMPTS, CALIBRATION)]
        if fitted_path is not None:
            for table, file in zip(columns, (PROMPTS, CALIBRATION), strict=True):
                table |= {name: values for name, values in read_columns(fitted_path / file).items()
                          if name.endswith("probe")}
        return evaluate.Measured(columns[0], columns[1], read_result(path))


def _shape(config: RoutedConfig | VanillaConfig) -> tuple[str | int, ...]:
    """Returns what networks must have in common to be compared."""
    pathways = (*config.pathways, config.n_banks) if isinstance(config, RoutedConfig) else ()
    return config.family, config.d_model, config.n_layers, *pathways


def _as_overrides(variant: Variant) -> list[str]:
    """Returns the overrides of a training configuration that train this variant."""
    return [f"finetune.trainable=[{','.join(variant.trains)}]",
            f"finetune.cross_entropy_weight={variant.cross_entropy_weight}",
            f"finetune.abstain_weight={variant.abstain_weight}",
            f"finetune.router_entropy_weight={variant.router_entropy_weight}",
            f"finetune.router_kl_weight={variant.router_kl_weight}",
            f"chat.abstain_position={variant.abstain_position}",
            f"chat.loss_on={'all' if variant.data == 'chat' else 'answerable'}", "train.export=last"]


def _cost(run: RunDirectory) -> dict[str, Any] | None:
    """Returns the cost of training; None if the network is not of a run."""
    if not run.summary.is_file():
        return None
    summary = run.read_summary()
    return {name: summary.get(name) for name in ("steps", "tokens", "seconds", "parameters",
                                                 "trained_parameters")}
