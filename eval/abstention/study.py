"""The stages of a study of abstention: each reads what stands on disk, and leaves its result there.

    data → networks of every seed (base → v4 → the others) → measured, fitted → evaluate
What each is made of is its key (eval/stages.py). Networks that are trained are runs of
`python -m tilelli_jax.train` in out/networks/: they resume, and tell of themselves, as any other does.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.abstention import evaluate, fitted, measure, prompts
from eval.abstention.config import AbstentionConfig, RecipeConfig
from eval.abstention.measure import Columns
from eval.abstention.variants import BASE, CHAT, SPLICED_FROM, VARIANTS, Variant, needed
from eval.inputs.networks import contents, trained
from eval.stages import Stages, key, once, read_result, recipe, without, write_result
from eval.tables import read_columns, write_columns
from tilelli_jax import config as config_lib
from tilelli_jax import store
from tilelli_jax.data import village
from tilelli_jax.data.chat_pairs import ChatConfig, open_pairs, read_pairs
from tilelli_jax.data.turns import answered, asked
from tilelli_jax.data.village import files as village_files
from tilelli_jax.errors import InputError
from tilelli_jax.files import write_atomically
from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.signals.uncertainty import UncertaintyReader
from tilelli_jax.splice import splice
from tilelli_jax.training.experiment import ExperimentConfig
from tilelli_jax.training.run import RunDirectory

PROMPTS, CALIBRATION = "prompts.parquet", "calibration.parquet"  # of a measured network: a row for each


class Study:
    """One configuration. Directories of results are made when first asked for.

    Args:
        tell: called with a line for what is being made.
    """

    def __init__(self, config: AbstentionConfig, out: Path,
                 tell: Callable[[str], None] = lambda line: None) -> None:
        self.config, self.out, self.tell = config, out, tell
        self.stages = Stages(out / "stages", tell)
        self.variants = needed(config.variants)

    def check(self) -> None:
        """What can be known before anything is trained.

        Raises:
            InputError: prompts, training configurations or given networks are not there or do not fit, or
                the output directory cannot be written.
        """
        self._check_networks()
        measure.check_lengths([one.prompt for one in self.prompts], self._start_config(),
                              self.config.answers.max_new)
        try:
            self.stages.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out: {self.out}: cannot be written: {error.strerror}") from None

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
                             f"for {self.world.seed}: python -m tilelli_jax.data --source village-prompts "
                             "makes them")
        return found

    @functools.cached_property
    def data(self) -> Path:
        """JSON lines for each kind of `variants.Data`, none too long to train on, and calibration.jsonl."""
        options = config_lib.to_dict(self.config.pairs)
        sizes = [self._experiment(part).train.seq_len
                 for part in (self.config.training.chat, self.config.training.variant)]
        made_of = recipe("data", village=[self.world.seed, len(self.world.people)], longest=min(sizes),
                         options=options)
        return self.stages.make("data", made_of, functools.partial(self._write_data, longest=min(sizes)))

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
            return self._trained(name, seed, self.config.training.base, [f"data.shuffle_seed={seed}"])
        variant = VARIANTS[name]
        if variant.kind == "fitted":
            return self.network(variant.start, seed)
        if variant.kind == "spliced":
            return self._spliced(name, seed)
        part = self.config.training.chat if name == CHAT else self.config.training.variant
        start = self.network(variant.start, seed)
        return self._trained(
            name, seed, part, [f"chat.shuffle_seed={seed}", *_as_overrides(variant)],
            {"start": contents(start), "data": self.data.name},
            [f"chat.source={self.data / variant.data}.jsonl", f"train.init_from={start}"])

    @once
    def measured(self, name: str, seed: int) -> Path:
        """What a variant of a seed shows of every prompt, and answers: PROMPTS, CALIBRATION, result.json."""
        variant, config = VARIANTS[name], self.config
        path, start = self.network(name, seed), self.network(CHAT, seed)
        made_of = recipe(
            "measured", name=name, network=contents(path), start=contents(start), prompts=self._asked,
            data=self.data.name, answers=without(config_lib.to_dict(config.answers), "batch_size"),
            compute=config.compute.dtype,
            fitted=self.fitted(seed).name if variant.kind == "fitted" else None)
        work = self._measure_fitted if variant.kind == "fitted" else self._measure
        return self.stages.make(f"{name}-{seed}", made_of, lambda at: work(at, name, seed))

    @once
    def fitted(self, seed: int) -> Path:
        """What heads and probes on v4 say: PROMPTS, CALIBRATION, result.json, and the autoencoder."""
        options = self.config.fitted
        made_of = recipe("fitted", network=contents(self.network(CHAT, seed)), prompts=self._asked,
                         data=self.data.name, options=without(config_lib.to_dict(options), "jobs"),
                         sae=self._recipe(self.config.training.sae), seed=seed)

        def work(path: Path) -> None:
            learned = [(pair.prompt, pair.answerable) for pair in read_pairs(self.data / "semantic.jsonl")]
            found = fitted.fit(path, self._load(self.network(CHAT, seed)), learned[:options.prompts],
                               [[one.prompt for one in self.prompts], self.calibration], options,
                               self.config.training.sae, seed, self.config.batch_size)
            for file, scores in zip((PROMPTS, CALIBRATION), found.scores, strict=True):
                write_columns(path / file, scores)
            write_result(path, found.about)
        return self.stages.make(f"fitted-{seed}", made_of, work)

    @functools.cached_property
    def calibration(self) -> list[str]:
        """Answerable prompts that nothing is learned from."""
        return [pair.prompt for pair in read_pairs(self.data / "calibration.jsonl")]

    @functools.cached_property
    def evaluation(self) -> Path:
        """The tables of the report."""
        config = self.config
        made = {name: {seed: self.measured(name, seed) for seed in config.seeds} for name in self.variants}
        of_fitted = {seed: self.fitted(seed) for seed in config.seeds} if self.has_fitted else {}
        made_of = recipe("evaluate", measured={name: [path.name for path in some.values()]
                                               for name, some in made.items()},
                         fitted=[path.name for path in of_fitted.values()], target_fpr=config.target_fpr,
                         replicates=config.replicates, seed=config.seed)

        def work(path: Path) -> None:
            found = {name: [self._read(at, of_fitted.get(seed) if name == CHAT else None)
                            for seed, at in some.items()] for name, some in made.items()}
            write_result(path, evaluate.evaluate([one.regime for one in self.prompts], found, config))
        return self.stages.make("evaluate", made_of, work)

    # ---------------------------------------------------------------------------------------------

    @property
    def has_fitted(self) -> bool:
        """Whether heads and probes are fitted."""
        return any(VARIANTS[name].kind == "fitted" for name in self.variants)

    @functools.cached_property
    def _asked(self) -> str:
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16]

    def _experiment(self, part: RecipeConfig) -> ExperimentConfig:
        return config_lib.load(ExperimentConfig, part.train, part.set)

    def _recipe(self, part: RecipeConfig) -> dict[str, Any]:
        return config_lib.parse_overrides(part.set, config_lib.read_yaml(part.train))

    def _start_config(self) -> Any:
        """Of the network that the variants begin with: of one that is there, or of the one to be made."""
        for name in (CHAT, BASE):
            if name in self.config.networks:
                return store.load_config(self.config.networks[name])
        return self._experiment(self.config.training.base).model

    def _check_networks(self) -> None:
        given = self.config.networks
        for part in (self.config.training.base, self.config.training.chat, self.config.training.variant):
            self._experiment(part)
        config_lib.load(ExperimentConfig, self.config.training.sae.train)
        start = self._start_config()
        if not isinstance(start, RoutedConfig | VanillaConfig):
            raise InputError(f"given: expected networks that read bytes, routed or vanilla, found family "
                             f"{start.family}")
        for name, path in given.items():
            found = store.load_config(path)
            if name in VARIANTS and VARIANTS[name].abstain and not getattr(found, "abstain_head", False):
                raise InputError(f"given: {name}={path}: expected a network with an abstain head, found none")
        routed = isinstance(start, RoutedConfig)
        for name in self.variants:
            if VARIANTS[name].needs_router and not routed and name not in given:
                raise InputError(f"variants: {name} trains or judges the router; {start.family} has none")

    def _trained(self, name: str, seed: int, part: RecipeConfig, changes: Sequence[str],
                 read: dict[str, str] | None = None, paths: Sequence[str] = ()) -> Path:
        """A run's model directory; the run's is named by all that it depends on.

        Args:
            changes: keys that the study sets.
            read: fingerprints of what the run reads, and `paths`, the keys that say where that is.
        """
        changes = [*part.set, f"seed={seed}", *changes]
        made_by = key({"recipe": config_lib.read_yaml(part.train), "changes": changes, "read": read or {}})
        run = self.out / "networks" / f"{name}-{seed}-{made_by}"
        if not RunDirectory(run).summary.is_file():
            self.tell(f"{name}, seed {seed}: {run}")
        return trained(part.train, run, [*changes, *paths])

    def _spliced(self, name: str, seed: int) -> Path:
        head, onto = self.network(SPLICED_FROM, seed), self.network(CHAT, seed)
        made_of = recipe("splice", head=contents(head), onto=contents(onto))
        path = self.stages.make(f"{name}-network-{seed}", made_of,
                                lambda at: splice(head, onto, at / "model"))
        return path / "model"

    def _load(self, path: Path) -> Decoder:
        return store.load(path, self.config.compute)

    def _write_data(self, path: Path, longest: int) -> None:
        options, world = self.config.pairs, self.world

        def fits(prompt: str, response: str) -> bool:
            return len((asked(prompt) + answered(response)).encode()) - 1 <= longest

        def chat(seed: int, kinds: Sequence[str]) -> bytes:
            drawn = village.chat(world, 2 * options.pairs, seed, options.unanswerable, kinds)
            found = [pair for pair in drawn if fits(pair.prompt, pair.response)]
            return village_files.of_chat(found[:options.pairs])
        for name, content in (
                ("chat", chat(2 * options.seed, village.SEMANTIC)),
                ("semantic", chat(2 * options.seed + 1, village.SEMANTIC)),
                ("answers", chat(2 * options.seed, ("garbled", "mismatched"))),
                ("bare", village_files.of_bare(village.bare(world, options.pairs, options.seed,
                                                            options.unanswerable))),
                ("calibration", village_files.of_calibration(
                    village.calibration(world, options.calibration, options.seed)))):
            write_atomically(path / f"{name}.jsonl", content)

    def _measure(self, path: Path, name: str, seed: int) -> None:
        config, model = self.config, self._load(self.network(name, seed))
        start = self._load(self.network(CHAT, seed))
        routed = "router" in model.places and "router" in start.places
        reader = UncertaintyReader(model, before=start if routed else None, batch_size=config.batch_size)
        asked_for = [one.prompt for one in self.prompts]
        said = measure.answers(model, asked_for, config.answers)
        held_out = open_pairs(ChatConfig(source=f"{self.data / 'chat'}.jsonl")).valid
        seq_len = self._experiment(config.training.chat).train.seq_len
        run = RunDirectory(self.network(name, seed).parent)
        write_columns(path / CALIBRATION, measure.read(reader, self.calibration, "calibration"))
        write_columns(path / PROMPTS, {
            "prompt": asked_for, "regime": [one.regime for one in self.prompts],
            "answer": said, "right": [measure.is_right(answer, one.answer)
                                      for answer, one in zip(said, self.prompts, strict=True)],
            **measure.read(reader, asked_for, f"{name}-{seed}")})
        write_result(path, {
            **measure.spoken(self.prompts, said),
            "chat_loss": measure.chat_loss(model, held_out, seq_len, config.batch_size),
            "cost": _cost(run)})

    def _measure_fitted(self, path: Path, name: str, seed: int) -> None:
        """As v4, whose network it is, but for the abstention."""
        start, heads, column = self.measured(CHAT, seed), self.fitted(seed), name.replace("-", "_")
        for file in (PROMPTS, CALIBRATION):
            columns: dict[str, Any] = read_columns(start / file)
            write_columns(path / file, columns | {"abstain_p": read_columns(heads / file)[column]})
        found = read_result(start)
        write_result(path, found | {"cost": None})

    def _read(self, path: Path, heads: Path | None) -> evaluate.Measured:
        """A measured network; of v4, what the probes say beside its own signals."""
        columns: list[Columns] = [read_columns(path / file) for file in (PROMPTS, CALIBRATION)]
        if heads is not None:
            for found, file in zip(columns, (PROMPTS, CALIBRATION), strict=True):
                found |= {name: values for name, values in read_columns(heads / file).items()
                          if name.endswith("probe")}
        return evaluate.Measured(columns[0], columns[1], read_result(path))


def _as_overrides(variant: Variant) -> list[str]:
    """What of a training configuration makes this variant."""
    return [f"finetune.train=[{','.join(variant.trains)}]", f"finetune.cross_entropy={variant.cross_entropy}",
            f"finetune.abstain={variant.abstain}", f"finetune.metacognition={variant.metacognition}",
            f"finetune.tether={variant.tether}", f"chat.judge={variant.judge}",
            f"chat.imitate={'all' if variant.data == 'chat' else 'answerable'}", "train.export=last"]


def _cost(run: RunDirectory) -> dict[str, Any] | None:
    """What training took, where the network is of a run."""
    if not run.summary.is_file():
        return None
    found = run.read_summary()
    return {name: found.get(name) for name in ("steps", "tokens", "seconds", "parameters",
                                               "trained_parameters")}
