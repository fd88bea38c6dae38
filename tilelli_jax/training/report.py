"""The report at the end of a run: the loss table, the loss figure and sampled continuations."""

from __future__ import annotations

import dataclasses
import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilelli_jax.cli.tables import table
from tilelli_jax.config import Section, setting
from tilelli_jax.data.turns import model_turn, user_turn
from tilelli_jax.errors import InputError
from tilelli_jax.generation.decoding import generate
from tilelli_jax.io.files import write_atomically
from tilelli_jax.loading.model_card import CardInfo
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.training.loss import LossUnit

if TYPE_CHECKING:
    from tilelli_jax.training.config import ExperimentConfig
    from tilelli_jax.training.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class ReportConfig(Section):
    """Baselines and samples in the report at the end of the run."""

    trigram: bool = setting(False, "compare with a byte-trigram baseline fitted to the training split")
    reference: float | None = setting(
        None, "validation loss of a reference model to compare with, in nats per byte; null: no reference")
    reference_name: str = setting("", "label of the reference in table and figure; empty: reference")
    prompts: tuple[str, ...] = setting((), "prompts that the report continues; empty: none")
    sample_bytes: int = setting(200, "length of each continuation, in bytes", min=0)
    temperature: float = setting(0.8, "sampling temperature of the continuations; 0: greedy", min=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.prompts:
            raise InputError("prompts: expected text in every prompt, found an empty one")


def losses_table(summary: dict[str, Any], config: ReportConfig, loss_unit: LossUnit) -> str:
    """Returns the table of the run's validation losses and its baselines."""
    def row(name: str, loss: float) -> tuple[str, ...]:
        return (name, f"{loss:.4f}", *(f"{other:.4f}" for other in loss_unit.columns(loss).values()))
    rows = [("validation loss", loss_unit.name, *([loss_unit.other] if loss_unit.other else [])),
            row(f"this run, best (step {summary['best_step']})", summary["best_valid_loss"]),
            row(f"this run, last (step {summary['steps']})", summary["final_valid_loss"])]
    return table([*rows, *(row(name, loss) for name, loss in baselines(summary, config).items())])


def card_info(name: str, config: ExperimentConfig, task: Task, summary: dict[str, Any],
              command: str) -> CardInfo:
    """Returns what the model card says about the run `name`."""
    losses = {f"validation loss, best (update {summary['best_step']:,})": summary["best_valid_loss"],
              f"validation loss, last (update {summary['steps']:,})": summary["final_valid_loss"],
              **baselines(summary, config.report)}
    hub = re.match(r"hf:([^#@:]+)", task.source)
    start = f"Trained from {config.train.init_from}. " if config.train.init_from else ""
    turns = user_turn("{message}") + model_turn("{answer}") if config.chat is not None else ""
    return CardInfo(
        name=name, data=[f"source: {task.source}", f"size: {task.size}", f"fingerprint: {task.fingerprint}"],
        datasets=[hub[1]] if hub else [], losses=losses, unit=task.loss_unit.name, command=command,
        turns=turns, made_from=f"{start}The weights are those after update {summary['exported_step']:,}.")


def baselines(summary: dict[str, Any], config: ReportConfig) -> dict[str, float]:
    """Returns the validation losses of the baselines, by name."""
    losses = {}
    if config.reference is not None:
        losses[config.reference_name or "reference"] = config.reference
    if summary.get("trigram_valid_loss") is not None:
        losses["byte trigrams"] = summary["trigram_valid_loss"]
    return losses


def plot_losses(rows: Sequence[dict[str, Any]], path: Path, title: str, baselines: dict[str, float],
                loss_unit: LossUnit) -> None:
    """Plots training and validation loss over updates, with a line per baseline.

    The axis ends at the largest loss after the first twentieth of the updates, in which the training loss
    falls steeply from log 256; an arrow with the largest loss marks a curve that begins above it.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    valid = [(row["step"], row["valid_loss"]) for row in rows if row.get("valid_loss") is not None]
    if train:
        axes.plot(*zip(*train, strict=True), color="0.65", linewidth=1, label="training",
                  linestyle="-" if len(train) > 1 else "", marker="" if len(train) > 1 else "o")
    if valid:
        axes.plot(*zip(*valid, strict=True), color="tab:blue", marker="o", markersize=4, label="validation",
                  linestyle="-" if len(valid) > 1 else "")
    for (name, loss), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
        axes.axhline(loss, color="0.2", linestyle=style, linewidth=1, label=_plain(f"{name} {loss:.3f}"))
    if train:
        shown = [*(loss for step, loss in train if step >= train[-1][0] / 20), *(loss for _, loss in valid),
                 *baselines.values()]
        margin = 0.05 * (max(shown) - min(shown)) + 1e-3
        low, high = min(shown) - margin, max(shown) + margin
        axes.set_ylim(low, high)
        highest, at = max((loss, step) for step, loss in train)
        if highest > high:
            axes.plot(at, high, color="0.45", marker="^", markersize=7, linestyle="", clip_on=False,
                      label=f"training, above the axis: {highest:.2f} at update {at:,}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("update")
    axes.set_ylabel(f"loss [{loss_unit.name}]")
    if loss_unit.other:
        to_other: Callable[[Any], Any] = lambda loss: loss / loss_unit.size  # noqa: E731
        from_other: Callable[[Any], Any] = lambda loss: loss * loss_unit.size  # noqa: E731
        other = axes.secondary_yaxis("right", functions=(to_other, from_other))
        other.set_ylabel(loss_unit.other)
    axes.set_title(_plain(title), fontsize=10)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    pyplot.close(figure)
    write_atomically(path, content.getvalue())


def _plain(text: str) -> str:
    """Escapes text so that matplotlib does not read it as a formula."""
    return text.replace("$", r"\$")


def continuations(model: Decoder, config: ReportConfig, seed: int) -> str:
    """Returns the configured prompts, each with the model's continuation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sliding-window warning is not useful here
        samples = generate(model, list(config.prompts), max_new=config.sample_bytes,
                           temperature=config.temperature, seed=seed)
    return "\n\n".join(f"[{i}] {prompt}|{sample.text}" for i, (prompt, sample) in
                       enumerate(zip(config.prompts, samples, strict=True), 1))
