"""The stages of a comparison: tune → train → evaluate.

Each run is one of `tilelli train`, with a directory of its own that is named by what the
run is made of: it resumes, and tells of itself, as any other does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tilelli_jax.data.corpus import Splits, open_corpus
from tilelli_jax.errors import InputError
from tilelli_jax.json_text import as_expected
from tilelli_jax.sharding import make_mesh
from tilelli_jax.train import DIVERGED
from tilelli_jax.training.run import RunDirectory
from tilelli_jax.training.text import text_task

from ..inputs.networks import TrainingStopped, run_path, trained
from ..stages import Stages, read_result, recipe, write_result
from . import models as model_lib
from .compare import compare
from .config import ComparisonConfig, file_name
from .models import ComparedModel, Size

TOLD = ("final_valid_loss", "best_valid_loss", "best_step", "steps", "parameters", "tokens", "seconds",
        "device", "git_commit", "versions")


class Study:
    """One configuration. Runs are made when first asked for.

    Args:
        tell: called with a line for what is being made.
    """

    def __init__(self, config: ComparisonConfig, out: Path,
                 notify: Callable[[str], None] = lambda line: None) -> None:
        self.config, self.out, self.notify = config, out, notify
        self.stages = Stages(out / "stages", notify)
        self.models = model_lib.models(config)

    def check(self) -> None:
        """What can be known before anything is trained.

        Raises:
            InputError: see `models.check`; or a text cannot be read or is too short, or the output
                directory cannot be written.
        """
        sizes = self.sizes
        for text in self.config.texts:
            experiment = self.models[0].experiment(text, self.config.seeds[0])
            try:
                text_task(experiment, make_mesh(experiment.mesh))
            except InputError as error:
                raise error if text in str(error) else InputError(f"texts: {text}: {error}") from None
            self.notify(f"{text}: {len(self.corpora[text].train):,} bytes to learn from, "
                      f"{len(self.corpora[text].valid):,} to validate on")
        for name, size in sizes.items():
            self.notify(f"{name}: {size.parameters:,} parameters")
        self.stages.open()

    @functools.cached_property
    def sizes(self) -> dict[str, Size]:
        """By model; see `models.check`."""
        return model_lib.check(self.models, self.config.texts[0], self.config.seeds[0],
                                   self.config.tolerance)

    @functools.cached_property
    def corpora(self) -> dict[str, Splits]:
        """By text."""
        return {text: open_corpus(self.models[0].experiment(text, 0).data)
                for text in self.config.texts}

    def directory(self, model: ComparedModel, text: str, seed: int, rate: float | None) -> Path:
        """Of a run, named by all that its result depends on."""
        role = "-".join((file_name(model.name), file_name(text), str(seed)))
        return run_path(self.out / "runs", role, model.experiment(text, seed, rate),
                        {"corpus": self.corpora[text].fingerprint()})

    def run(self, model: ComparedModel, text: str, seed: int, rate: float | None) -> dict[str, Any]:
        """What a run has come to: its summary, after it has been made if need be.

        Raises:
            TrainingStopped: it has not come to its end.
        """
        path = self.directory(model, text, seed, rate)
        if not RunDirectory(path).summary.is_file():
            self.notify(f"{model.name} on {text}, seed {seed}"
                      + ("" if rate is None else f", learning rate {rate:g}") + f": {path}")
        trained(model.config, path, model.overrides(text, seed, rate))
        run = RunDirectory(path)
        with as_expected(run.summary):
            summary = run.read_summary()
            return {name: summary[name] for name in TOLD} | {"run": path.name, "rate": rate}

    @functools.cached_property
    def rates(self) -> dict[str, dict[str, Path]]:
        """Text → model → the stage in which its learning rate was chosen; empty where none is."""
        if not self.config.tuning.rates:
            return {}
        return {text: {one.name: self._tuned(one, text) for one in self.models}
                for text in self.config.texts}

    @functools.cached_property
    def runs(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Text → model → what its runs came to, in the order of the seeds."""
        chosen = {text: {name: read_result(path)["chosen"] for name, path in found.items()}
                  for text, found in self.rates.items()}
        found: dict[str, dict[str, list[dict[str, Any]]]] = {
            text: {one.name: [] for one in self.models} for text in self.config.texts}
        for text in self.config.texts:
            for seed in self.config.seeds:  # in turn, so that a slow spell of the machine meets them all
                for one in self.models:
                    found[text][one.name].append(
                        self.run(one, text, seed, chosen.get(text, {}).get(one.name)))
        return found

    @functools.cached_property
    def evaluation(self) -> Path:
        """Of each text, the losses and what sets the models apart."""
        manifest = recipe("evaluate", reference=self.models[0].name, seeds=list(self.config.seeds),
                         runs={text: {name: [run["run"] for run in runs] for name, runs in found.items()}
                               for text, found in self.runs.items()})

        def work(path: Path) -> None:
            write_result(path, {"texts": {
                text: {"runs": found, **compare({name: [run["final_valid_loss"] for run in runs]
                                                 for name, runs in found.items()})}
                for text, found in self.runs.items()}})
        return self.stages.make("evaluate", manifest, work)

    # ---------------------------------------------------------------------------------------------

    def _tuned(self, one: ComparedModel, text: str) -> Path:
        """result.json: the last loss at each learning rate, null where it diverged; the best rate."""
        options = self.config.tuning
        manifest = recipe("tune", runs={f"{rate!r}": self.directory(one, text, options.seed, rate).name
                                       for rate in options.rates})

        def work(path: Path) -> None:
            losses = {rate: self._loss(one, text, rate) for rate in options.rates}
            best = min(losses, key=lambda rate: losses[rate])
            if math.isinf(losses[best]):
                tried = ", ".join(f"{rate:g}" for rate in options.rates)
                raise InputError(f"tuning.rates: {one.name} diverges on {text} at each of {tried}; "
                                 "expected lower ones")
            write_result(path, {"model": one.name, "text": text, "seed": options.seed,
                                "chosen": best,
                                "losses": {f"{rate:g}": loss for rate, loss in losses.items()}})
        return self.stages.make("tune", manifest, work)

    def _loss(self, one: ComparedModel, text: str, rate: float) -> float:
        """The last validation loss, nats/byte; infinite where the run diverged."""
        try:
            return self.run(one, text, self.config.tuning.seed, rate)["final_valid_loss"]
        except TrainingStopped as stopped:
            if stopped.status == DIVERGED:
                return math.inf
            raise
