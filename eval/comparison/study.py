"""The stages of a comparison: tune → train → evaluate.

Each run is a run of `tilelli train` in its own directory, named by a hash of everything that the result
depends on. It resumes and logs as any other run does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tilelli_jax.data.corpus import TextSplits, open_corpus
from tilelli_jax.errors import InputError
from tilelli_jax.io.json_text import as_expected
from tilelli_jax.parallel.sharding import make_mesh
from tilelli_jax.train import DIVERGED
from tilelli_jax.training.run import RunDirectory
from tilelli_jax.training.tasks.text import TextTask

from ..conclusions import few_seeds_warning
from ..inputs.networks import TrainingStopped, run_path, train_network
from ..inputs.study import Study
from ..stages import read_result, stage_manifest, write_result
from . import models as model_lib
from .compare import compare
from .config import ComparisonConfig, file_name
from .models import ComparedModel, Size

SUMMARY_KEYS = ("final_valid_loss", "best_valid_loss", "best_step", "steps", "parameters", "tokens",
                "seconds", "device", "git_commit", "versions")


class ComparisonStudy(Study[ComparisonConfig]):
    """One comparison. Attributes and methods train the runs that they need."""

    STAGES = ("train", "evaluate")

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.config.seeds

    @functools.cached_property
    def models(self) -> list[ComparedModel]:
        """The models, the reference first."""
        return model_lib.models(self.config)

    def stage_paths(self, stage: str) -> Iterator[tuple[str, Path]]:
        if stage == "evaluate":
            yield stage, self.evaluation
            return
        for text, by_model in self.runs.items():
            for name, runs in by_model.items():
                for seed, run in zip(self.seeds, runs, strict=True):
                    yield f"{name} on {text}, seed {seed}", self.out / "runs" / run["run"]

    def check(self) -> None:
        """Checks the configuration before any network is trained.

        Raises:
            InputError: see `models.check`; or a text cannot be read or is too short, or the output directory
                cannot be written.
        """
        sizes = self.sizes
        for text in self.config.texts:
            experiment = self.models[0].experiment(text, self.config.seeds[0])
            try:
                TextTask(experiment, make_mesh(experiment.mesh))
            except InputError as error:
                raise error if text in str(error) else InputError(f"texts: {text}: {error}") from None
            self.notify(f"{text}: {len(self.corpora[text].train):,} bytes for training, "
                        f"{len(self.corpora[text].valid):,} for validation")
        for name, size in sizes.items():
            self.notify(f"{name}: {size.parameters:,} parameters")
        for line in few_seeds_warning(len(self.config.seeds), len(sizes) - 1):
            self.notify(f"seeds: {line}")
        self.stages.open()

    @functools.cached_property
    def sizes(self) -> dict[str, Size]:
        """Model → size; see `models.check`."""
        return model_lib.check(self.models, self.config.texts[0], self.config.seeds[0],
                               self.config.tolerance)

    @functools.cached_property
    def corpora(self) -> dict[str, TextSplits]:
        """Text → its train and validation splits."""
        return {text: open_corpus(self.models[0].experiment(text, 0).data)
                for text in self.config.texts}

    def directory(self, model: ComparedModel, text: str, seed: int, rate: float | None) -> Path:
        """Returns the directory of a run, named by a hash of everything that its result depends on."""
        role = "-".join((file_name(model.name), file_name(text), str(seed)))
        return run_path(self.out / "runs", role, model.experiment(text, seed, rate),
                        {"corpus": self.corpora[text].fingerprint()})

    def run(self, model: ComparedModel, text: str, seed: int, rate: float | None) -> dict[str, Any]:
        """Trains a run if it is not finished, and returns its summary.

        Raises:
            TrainingStopped: the run was stopped before its end.
        """
        path = self.directory(model, text, seed, rate)
        if not RunDirectory(path).summary.is_file():
            self.notify(f"{model.name} on {text}, seed {seed}"
                      + ("" if rate is None else f", learning rate {rate:g}") + f": {path}")
        train_network(model.network.train, path, [*model.network.set, *model.overrides(text, seed, rate)])
        run = RunDirectory(path)
        with as_expected(run.summary):
            summary = run.read_summary()
            return {name: summary[name] for name in SUMMARY_KEYS} | {"run": path.name, "rate": rate}

    @functools.cached_property
    def rates(self) -> dict[str, dict[str, Path]]:
        """Text → model → the stage that selects its learning rate; empty if there is no search."""
        if not self.config.tuning.rates:
            return {}
        return {text: {model.name: self._tuned(model, text) for model in self.models}
                for text in self.config.texts}

    @functools.cached_property
    def runs(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Text → model → the summaries of its runs, in the order of the seeds."""
        rates = {text: {name: read_result(path)["chosen"] for name, path in stages.items()}
                 for text, stages in self.rates.items()}
        summaries: dict[str, dict[str, list[dict[str, Any]]]] = {
            text: {model.name: [] for model in self.models} for text in self.config.texts}
        for text in self.config.texts:
            for seed in self.config.seeds:  # alternate the models, so that a slow phase affects all of them
                for model in self.models:
                    summaries[text][model.name].append(
                        self.run(model, text, seed, rates.get(text, {}).get(model.name)))
        return summaries

    @functools.cached_property
    def evaluation(self) -> Path:
        """The directory with the losses and the tests of each text: result.json."""
        manifest = stage_manifest(
            "evaluate", reference_model=self.models[0].name, seeds=list(self.config.seeds),
            runs={text: {name: [run["run"] for run in runs] for name, runs in by_model.items()}
                  for text, by_model in self.runs.items()})

        def work(path: Path) -> None:
            write_result(path, {"texts": {
                text: {"runs": by_model, **compare({name: [run["final_valid_loss"] for run in runs]
                                                    for name, runs in by_model.items()})}
                for text, by_model in self.runs.items()}})
        return self.stages.make("evaluate", manifest, work)

    # ---------------------------------------------------------------------------------------------

    def _tuned(self, model: ComparedModel, text: str) -> Path:
        """Returns the stage with the last loss at each learning rate (null: diverged) and the best rate."""
        options = self.config.tuning
        manifest = stage_manifest("tune", runs={
            f"{rate!r}": self.directory(model, text, options.seed, rate).name for rate in options.rates})

        def work(path: Path) -> None:
            losses = {rate: self._loss(model, text, rate) for rate in options.rates}
            best = min(losses, key=lambda rate: losses[rate])
            if math.isinf(losses[best]):
                tried = ", ".join(f"{rate:g}" for rate in options.rates)
                raise InputError(f"tuning.rates: expected a rate at which {model.name} does not diverge on "
                                 f"{text}, found {tried}; set lower ones")
            write_result(path, {"model": model.name, "text": text, "seed": options.seed,
                                "chosen": best,
                                "losses": {f"{rate:g}": loss for rate, loss in losses.items()}})
        return self.stages.make("tune", manifest, work)

    def _loss(self, model: ComparedModel, text: str, rate: float) -> float:
        """Returns the last validation loss, in nats/byte; infinite if the run diverged."""
        try:
            return self.run(model, text, self.config.tuning.seed, rate)["final_valid_loss"]
        except TrainingStopped as stopped:
            if stopped.status == DIVERGED:
                return math.inf
            raise
