"""The stages of a study of abstention: each reads what stands on disk, and leaves its result there.

    data → networks of every seed (base → v4 → the others) → measured, fitted → evaluate
What each is made of is its key (eval/stages.py). Networks that are trained are runs of
`tilelli train` in out/networks/: they resume, and tell of themselves, as any other does.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from tilelli_jax import config as config_lib
from tilelli_jax import store
from tilelli_jax.commands.splice import splice
from tilelli_jax.data import village
from tilelli_jax.data.chat_pairs import read_pairs
from tilelli_jax.errors import InputError
from tilelli_jax.files import fingerprint
from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.signals.uncertainty import UncertaintyReader
from tilelli_jax.training.experiment import ExperimentConfig
from tilelli_jax.training.run import RunDirectory

from ..inputs.networks import contents, run_path, trained
from ..stages import Stages, once, read_result, recipe, without, write_result
from ..tables import read_columns, write_columns
from . import data, evaluate, fitted, measure, prompts
from .config import DATA_FILES, AbstentionConfig, RecipeConfig
from .measure import Columns
from .variants import BASE, CHAT, SPLICED_FROM, VARIANTS, Variant, dependencies

FEW = 30  # prompts of a regime, of which the study was meant to have so many
PROMPTS, CALIBRATION = "prompts.parquet", "calibration.parquet"  # of a measured network: a row for each


class Study:
    """One configuration. Directories of results are made when first asked for.

    Args:
        tell: called with a line for what is being made.
    """

    def __init__(self, config: AbstentionConfig, out: Path,
                 notify: Callable[[str], None] = lambda line: None) -> None:
        self.config, self.out, self.notify = config, out, notify
        self.stages = Stages(out / "stages", notify)
        self.variants = dependencies(config.variants)

    def check(self) -> None:
        """What can be known before anything is trained.

        Raises:
            InputError: prompts, training configurations or given networks are not there or do not fit, or
                the output directory cannot be written.
        """
        self._check_networks()
        start = self._start_config()
        data.check(self.config.pairs, self._longest,
                   start.max_seq_len if start.positions == "learned" else None, self.config.target_fpr)
        measure.check_lengths([one.prompt for one in self.prompts], start, self.config.answers.max_new)
        self.stages.open()
        self._warn()

    def _warn(self) -> None:
        """What is allowed, and hardly meant."""
        few = {regime: n for regime, n in Counter(one.regime for one in self.prompts).items() if n < FEW}
        if few:
            self.notify(f"note: prompts: fewer than {FEW} of {', '.join(few)}: intervals will be wide")
        if lacking := self.of_the_village:
            self.notify(f"note: pairs.files: {', '.join(lacking)}: of the village, of which a network that is "
                      "given may know nothing, and prompts of one's own may not be")

    @property
    def of_the_village(self) -> list[str]:
        """Data that are made of the village although networks or prompts are somebody's own."""
        own = self.config.prompts or {BASE, CHAT} & self.config.networks.keys()
        return [name for name in DATA_FILES if name not in self.config.pairs.given] if own else []

    # --- What is learned from, and what is asked --------------------------------------------------

    @functools.cached_property
    def world(self) -> village.World:
        """The village that the base reads of; of a base that is there, that of training.base all the same."""
        told = self._experiment(self.config.training.base).data
        return (village.world(told.village_seed, told.village_people) if told.source == "village" else
                village.world())

    @functools.cached_property
    def prompts(self) -> list[village.Prompt]:
        found = prompts.read(self.config.prompts or prompts.BUILT_IN)
        if not self.config.prompts and self.world.seed:
            raise InputError(f"prompts: expected others than the built-in ones, which are of village_seed 0, "
                             f"for {self.world.seed}: tilelli data --source village-prompts "
                             "makes them")
        return found

    @functools.cached_property
    def data(self) -> Path:
        """JSON lines: a file for each of `config.DATA_FILES`; see `data.write`."""
        pairs = self.config.pairs
        manifest = recipe("data", village=[self.world.seed, len(self.world.people)], longest=self._longest,
                         options=without(config_lib.to_dict(pairs), "files"), given=data.given(pairs))
        return self.stages.make("data", manifest, lambda path: data.write(
            path, pairs, self.world, self._longest, self.notify))

    @property
    def _longest(self) -> int:
        """What both kinds of runs have room for."""
        training = self.config.training
        return min(self._experiment(part).train.seq_len for part in (training.chat, training.variant))

    def _file(self, name: str) -> Path:
        return self.data / f"{name}.jsonl"

    # --- Networks ---------------------------------------------------------------------------------

    @once
    def network(self, name: str, seed: int) -> Path:
        """The model directory of `base` or a variant, trained if need be.

        Raises:
            TrainingStopped: a run has not come to its end.
        """
        if name in self.config.networks:
            return Path(self.config.networks[name])
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
            f"train.init_from={start}", *(f"chat.valid={one}" for one in held_out)])

    @once
    def measured(self, name: str, seed: int) -> Path:
        """What a variant of a seed shows of every prompt, and answers: PROMPTS, CALIBRATION, result.json."""
        variant, config = VARIANTS[name], self.config
        path, start = self.network(name, seed), self.network(CHAT, seed)
        manifest = recipe(
            "measured", name=name, network=contents(path), start=contents(start), prompts=self._asked,
            data=fingerprint([self._file("calibration"), self._file("held_out")]),
            answers=config_lib.to_dict(config.answers), held_out=measure.HELD_OUT, run_by=self._run_by,
            fitted=self.fitted(seed).name if variant.kind == "fitted" else None)
        work = self._measure_fitted if variant.kind == "fitted" else self._measure
        return self.stages.make(f"{name}-{seed}", manifest, lambda at: work(at, name, seed))

    @once
    def fitted(self, seed: int) -> Path:
        """What heads and probes on v4 say: PROMPTS, CALIBRATION, result.json, and the autoencoder."""
        options = self.config.fitted
        manifest = recipe("fitted", network=contents(self.network(CHAT, seed)), prompts=self._asked,
                         data=fingerprint([self._file(name) for name in ("calibration", "held_out",
                                                                         "semantic")]),
                         options=without(config_lib.to_dict(options), "jobs"), run_by=self._run_by,
                         sae=self._recipe(self.config.training.sae), seed=seed)

        def work(path: Path) -> None:
            found = fitted.fit(path, self._load(self.network(CHAT, seed)), self._labelled("semantic"),
                               self._labelled("held_out"),
                               [[one.prompt for one in self.prompts], self.calibration], options,
                               self.config.training.sae, seed, self.config.batch_size)
            for file, scores in zip((PROMPTS, CALIBRATION), found.scores, strict=True):
                write_columns(path / file, scores)
            write_result(path, found.about)
        return self.stages.make(f"fitted-{seed}", manifest, work)

    @functools.cached_property
    def calibration(self) -> list[str]:
        """Answerable prompts that nothing is learned from."""
        return [pair.prompt for pair in read_pairs(self._file("calibration")) if pair.answerable]

    def _labelled(self, name: str) -> dict[str, bool]:
        """Prompt → whether it can be answered, each once, as many as heads and probes are fitted to."""
        found = {pair.prompt: pair.answerable for pair in read_pairs(self._file(name))}
        return dict(list(found.items())[:self.config.fitted.prompts])

    @functools.cached_property
    def evaluation(self) -> Path:
        """The tables of the report."""
        config = self.config
        made = {name: {seed: self.measured(name, seed) for seed in config.seeds} for name in self.variants}
        of_fitted = {seed: self.fitted(seed) for seed in config.seeds} if self.has_fitted else {}
        manifest = recipe("evaluate", measured={name: [path.name for path in some.values()]
                                               for name, some in made.items()},
                         fitted=[path.name for path in of_fitted.values()], target_fpr=config.target_fpr,
                         prompts=self._asked,
                         replicates=config.replicates, seed=config.seed)

        def work(path: Path) -> None:
            found = {name: [self._read(at, of_fitted.get(seed) if name == CHAT else None)
                            for seed, at in some.items()] for name, some in made.items()}
            write_result(path, evaluate.evaluate(self.prompts, found, config))
        return self.stages.make("evaluate", manifest, work)

    # ---------------------------------------------------------------------------------------------

    @property
    def has_fitted(self) -> bool:
        """Whether heads and probes are fitted."""
        return any(VARIANTS[name].kind == "fitted" for name in self.variants)

    @property
    def _run_by(self) -> list[str]:
        """What rounding depends on."""
        return [self.config.compute.dtype, jax.default_backend(), str(self.config.batch_size)]

    @functools.cached_property
    def _asked(self) -> str:
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16]

    def _experiment(self, part: RecipeConfig) -> ExperimentConfig:
        try:
            return config_lib.load(ExperimentConfig, part.train, part.set)
        except InputError as error:
            training = self.config.training
            name = next(field.name for field in dataclasses.fields(training)
                        if getattr(training, field.name) is part)
            raise InputError(f"training.{name}: {error}") from None

    def _recipe(self, part: RecipeConfig) -> dict[str, Any]:
        return config_lib.parse_overrides(part.set, config_lib.read_yaml(part.train))

    def _start_config(self) -> Any:
        """Of the network that the variants begin with: of one that is there, or of the one to be made."""
        for name in (CHAT, BASE):
            if name in self.config.networks:
                return store.load_config(self.config.networks[name])
        return self._experiment(self.config.training.base).model

    def _check_networks(self) -> None:
        training, given = self.config.training, self.config.networks
        for part in (training.base, training.chat, training.variant, training.sae):
            self._experiment(part)
        start = self._start_config()
        found = {name: store.load_config(path) for name, path in given.items()}
        for name, config in found.items():
            measure.check_bytes(config, f"given: {name}={given[name]}")
        measure.check_bytes(start, "training.base")
        for name, config in found.items():
            if name in VARIANTS and VARIANTS[name].has_head and not config.abstain_head:
                raise InputError(f"given: {name}={given[name]}: expected a network with an abstain head, "
                                 "found none")
            if (there := _shape(config)) != _shape(start):
                raise InputError(f"given: {name}={given[name]}: expected family, d_model, n_layers and "
                                 f"pathways as of the others, {_shape(start)}, found {there}")
        for name in self.variants:
            if VARIANTS[name].needs_router and not isinstance(start, RoutedConfig):
                raise InputError(f"variants: {name} trains or judges the router; {start.family} has none")

    def _trained(self, name: str, seed: int, part: RecipeConfig, changes: Sequence[str]) -> Path:
        """A run's model directory.

        Args:
            changes: keys that the study sets.
        """
        changes = [*part.set, f"seed={seed}", *changes]
        experiment = config_lib.load(ExperimentConfig, part.train, changes)
        run = run_path(self.out / "networks", f"{name}-{seed}", experiment)
        if not RunDirectory(run).summary.is_file():
            self.notify(f"{name}, seed {seed}: {run}")
        return trained(part.train, run, changes)

    def _spliced(self, name: str, seed: int) -> Path:
        head, onto = self.network(SPLICED_FROM, seed), self.network(CHAT, seed)
        manifest = recipe("splice", head=contents(head), onto=contents(onto))

        def work(path: Path) -> None:
            shutil.rmtree(path / "model", ignore_errors=True)  # of an interruption
            splice(head, onto, path / "model")
        return self.stages.make(f"{name}-network-{seed}", manifest, work) / "model"

    def _load(self, path: Path) -> Decoder:
        return store.load(path, self.config.compute)

    def _measure(self, path: Path, name: str, seed: int) -> None:
        config, model = self.config, self._load(self.network(name, seed))
        start = self._load(self.network(CHAT, seed))
        routed = "router" in model.places and "router" in start.places
        reader = UncertaintyReader(model, before=start if routed else None, batch_size=config.batch_size)
        asked_for = [one.prompt for one in self.prompts]
        said = measure.answers(model, asked_for, config.answers)
        held_out = read_pairs(self._file("held_out"))
        run = RunDirectory(self.network(name, seed).parent)
        write_columns(path / CALIBRATION, measure.read(reader, self.calibration, "calibration"))
        write_columns(path / PROMPTS, {
            "prompt": asked_for, "regime": [one.regime for one in self.prompts],
            "answer": said, "right": [measure.is_right(answer, one.answer)
                                      for answer, one in zip(said, self.prompts, strict=True)],
            **measure.read(reader, asked_for, f"{name}-{seed}")})
        write_result(path, {
            **measure.spoken(self.prompts, said),
            "chat_loss": measure.chat_loss(model, held_out, config.batch_size),
            "cost": _cost(run)})

    def _measure_fitted(self, path: Path, name: str, seed: int) -> None:
        """As v4, whose network it is, but for the abstention."""
        start, heads, column = self.measured(CHAT, seed), self.fitted(seed), name.replace("-", "_")
        for file in (PROMPTS, CALIBRATION):
            columns: dict[str, Any] = read_columns(start / file)
            write_columns(path / file, columns | {"abstain_p": read_columns(heads / file)[column]})
        cost = {"steps": None, "tokens": None, "parameters": None, **read_result(heads)["heads"][column]}
        write_result(path, read_result(start) | {"cost": cost})

    def _read(self, path: Path, heads: Path | None) -> evaluate.Measured:
        """A measured network; of v4, what the probes say beside its own signals."""
        columns: list[Columns] = [read_columns(path / file) for file in (PROMPTS, CALIBRATION)]
        if heads is not None:
            for found, file in zip(columns, (PROMPTS, CALIBRATION), strict=True):
                found |= {name: values for name, values in read_columns(heads / file).items()
                          if name.endswith("probe")}
        return evaluate.Measured(columns[0], columns[1], read_result(path))


def _shape(config: RoutedConfig | VanillaConfig) -> tuple[str | int, ...]:
    """What networks have to have in common, to be compared with each other."""
    ways = (*config.pathways, config.n_banks) if isinstance(config, RoutedConfig) else ()
    return config.family, config.d_model, config.n_layers, *ways


def _as_overrides(variant: Variant) -> list[str]:
    """What of a training configuration makes this variant."""
    return [f"finetune.train=[{','.join(variant.trains)}]", f"finetune.cross_entropy_weight={variant.cross_entropy_weight}",
            f"finetune.abstain_weight={variant.abstain_weight}", f"finetune.router_entropy_weight={variant.router_entropy_weight}",
            f"finetune.router_kl_weight={variant.router_kl_weight}", f"chat.abstain_position={variant.abstain_position}",
            f"chat.loss_on={'all' if variant.data == 'chat' else 'answerable'}", "train.export=last"]


def _cost(run: RunDirectory) -> dict[str, Any] | None:
    """What training took, where the network is of a run."""
    if not run.summary.is_file():
        return None
    found = run.read_summary()
    return {name: found.get(name) for name in ("steps", "tokens", "seconds", "parameters",
                                               "trained_parameters")}
