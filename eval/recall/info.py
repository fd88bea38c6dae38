"""What the page tells of its network, its sidecar, and the study that they are from."""

from __future__ import annotations

import base64
import html
import os
import resource
import sys
from pathlib import Path

import jax

from tilelli_jax.errors import InputError
from tilelli_jax.signals.crystallisation import band

from ..stages import RESULTS
from ..tables import Row, markdown
from . import report
from .predictor import KnowledgePredictor

MEANING = """
**What P(knows) means.** A question counts as known where this very network, asked in this very way,
answered it rightly: its likeliest answer had a right one in it. P(knows) is how often that is to be
expected, read from one pass of the question alone. It is no claim that an answer is true, none of
another network or another way of asking, and none of questions unlike those that the sidecar was learned
and calibrated on.
"""


def facts(predictor: KnowledgePredictor, model: str, sidecar: str) -> list[Row]:
    """What there is to tell of a network and its sidecar."""
    config, rule = predictor.language.model.config, predictor.rule
    low, high = band(config.n_layers)
    prompt = predictor.prompter.config
    rows = {
        "network": f"`{model}`", "family": config.family,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "type": predictor.language.model.compute.dtype, "layers": config.n_layers, "width": config.d_model,
        "vocabulary": config.vocab_size, "soft cap of the logits": getattr(config, "softcap", 0) or None,
        "middle of the depth": f"layers {low} to {high}, counted from 0",
        "asked as": f"a chat, with `{prompt.instruction!r}`" if prompt.template == "chat" else (
            f"`{prompt.template.replace('{question}', '{question}' + prompt.instruction)!r}`"),
        "sidecar": f"`{sidecar}`", "learned on": rule.network.get("name"),
        "probabilities": rule.calibrator.to_dict()["kind"], "thresholds": _thresholds(predictor)}
    return [{"what": name, "is": value} for name, value in rows.items()]


def memory_told() -> str:
    """What this process has used at most, and what the first device tells of itself."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    told = f"**Memory**: {peak / 2**30:.2f} GiB at most so far"
    there = jax.devices()[0].memory_stats() or {}
    if "bytes_in_use" in there:
        told += f"; on the device {there['bytes_in_use'] / 2**30:.2f} GiB"
        told += f" of {there['bytes_limit'] / 2**30:.2f}" if there.get("bytes_limit") else ""
    return told + "."


def find_study(study: str, sidecar: str) -> str | Path:
    """The directory of results to show, or why there is none.

    Args:
        study: as given; if empty, the directory beside the sidecar where that is of a study.

    Raises:
        InputError: it was given, and has no results of a study of recall.
    """
    path = Path(study) if study else Path(os.path.realpath(sidecar)).parent
    if not (path / RESULTS).is_file():
        if study:
            raise InputError(f"--study: {path / RESULTS}: no such file: expected that of a study")
        return ("There is no study beside this sidecar. `tilelli recall --config FILE` makes "
                "one, and its sidecar; `--study DIR` shows one that lies elsewhere.")
    try:
        found = report.read_results(path)
        tables(found), report.verdicts(found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        said = (str(error) if isinstance(error, InputError) else
                f"{path / RESULTS}: expected what a study of recall has found: "
                f"{type(error).__name__}: {error}")
        if study:
            raise InputError(f"--study: {said}") from None
        return said
    return path


def tables(found: report.Tree) -> list[tuple[str, list[Row]]]:
    """What a study has found: headings and rows. Raises LookupError or TypeError where it is none."""
    every = [("What predicts that it knows?", report.rows(found)), ("Verdicts", report.of_words(found)),
             ("Data sets", report.of_datasets(found)),
             ("Within one data set, and from one to another", report.elsewhere(found)),
             ("From the rarest to the most popular", report.by_popularity(found))]
    return [(title, list(rows)) for title, rows in every if rows]


def conclusions(study: Path) -> str:
    """A study's sentences and tables, as Markdown."""
    found = report.read_results(study)
    texts = [f"### {found.get('name') or study.name}",
             "\n".join(f"- {text}" for text in report.verdicts(found))]
    for title, rows in tables(found):
        texts += [f"#### {title}", markdown(rows)]
    return "\n\n".join(texts)


def pictures(study: Path) -> str:
    """A study's figures as HTML that holds them: its files need not be served to whoever asks for one."""
    found = [f'<figure><img alt="{html.escape(path.stem)}" src="data:image/png;base64,'
             f'{base64.b64encode(path.read_bytes()).decode()}">'
             f"<figcaption>{html.escape(path.stem)}</figcaption></figure>"
             for path in sorted((study / "figures").glob("*.png"))]
    return f'<div class="two">{"".join(found)}</div>' if found else "This study has no figures."


# ---------------------------------------------------------------------------------------------


def _thresholds(predictor: KnowledgePredictor) -> str:
    aim, (green, red) = predictor.rule.aim, predictor.rule.thresholds
    if green is None and red is None:
        return "none: P(knows) is told, and no word"
    told = "; ".join(f"{word} {'–' if at is None else f'{at:.3f}'}" for word, at in (
        ("likely knows from", green), ("likely beyond its knowledge below", red)))
    if "precision" not in aim:
        return told
    promise = ("promised for new questions of the same kind with "
               f"{aim.get('confidence', 0):.0%} confidence"
               if aim.get("guarantee") else "reached on the questions to calibrate on, and not promised")
    return f"{told} (a precision of {aim['precision']:.0%}, {promise})"
