"""What the page shows about its network, its sidecar and their study."""

from __future__ import annotations

import base64
import html
import os
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from tilelli_jax.errors import InputError
from tilelli_jax.signals.crystallisation import band

from ...document import keep_intervals
from ...stages import RESULTS
from ...tables import Row, markdown
from .. import report, report_rows, sentences
from ..predictor import KnowledgePredictor

MEANING = """
**What P(knows) means.** A question counts as known if this network, with this prompt, answered it
correctly: its greedy answer contained a correct one. P(knows) is the predicted probability of that, from
one forward pass of the prompt. It does not claim that an answer is true. It does not apply to another
network, to another prompt, or to questions unlike those that the sidecar was trained and calibrated on.
"""
CAPTION = re.compile(r"^!\[(.*)\]\(figures/([^()]+)\.png\)$", re.MULTILINE)  # of a figure, in report.md


def facts(predictor: KnowledgePredictor, model: str, sidecar: str) -> list[Row]:
    """Returns a table of the network and its sidecar."""
    config, rule = predictor.language.model.config, predictor.rule
    low, high = band(config.n_layers)
    prompt = predictor.prompter.config
    rows = {
        "network": f"`{model}`", "family": config.family,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "data type": predictor.language.model.compute.dtype, "layers": config.n_layers,
        "width": config.d_model, "vocabulary": config.vocab_size,
        "logit soft cap": getattr(config, "softcap", 0) or None,
        "middle layers": f"layers {low} to {high}, counted from 0",
        "prompt": f"chat template, question followed by `{prompt.instruction!r}`"
        if prompt.template == "chat" else (
            f"`{prompt.template.replace('{question}', '{question}' + prompt.instruction)!r}`"),
        "sidecar": f"`{sidecar}`", "trained on": rule.network.get("name"),
        "calibration": rule.calibrator.to_dict()["kind"], "thresholds": _thresholds(predictor)}
    return [{"property": name, "value": value} for name, value in rows.items()]


def memory_text() -> str:
    """Returns the peak memory of this process and, if known, the memory in use on the first device."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    text = f"**Memory**: peak {peak / 2**30:.2f} GiB"
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_in_use" in stats:
        text += f"; on the device {stats['bytes_in_use'] / 2**30:.2f} GiB"
        text += f" of {stats['bytes_limit'] / 2**30:.2f}" if stats.get("bytes_limit") else ""
    return text + "."


def find_study(study: str, sidecar: str) -> str | Path:
    """Returns the study directory to show, or a text that says why there is none.

    Args:
        study: the option's value; "" uses the sidecar's parent directory if it holds a study.

    Raises:
        InputError: the option was given, and the directory has no results of a recall study.
    """
    path = Path(study) if study else Path(os.path.realpath(sidecar)).parent
    if not (path / RESULTS).is_file():
        if study:
            raise InputError(f"--study: {path / RESULTS}: expected results of a study, found no such file")
        return ("The sidecar's parent directory holds no study. `tilelli recall --config FILE` runs one and "
                "writes its sidecar; `--study DIR` shows a study in another directory.")
    try:
        results = report.read_results(path)
        tables(results), sentences.conclusions(results)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = (str(error) if isinstance(error, InputError) else
                  f"{path / RESULTS}: expected the results of a recall study, found "
                  f"{type(error).__name__}: {error}")
        if study:
            raise InputError(f"--study: {reason}") from None
        return reason
    return path


def example_question(study: str | Path) -> str:
    """Returns a question of the study, or another where there is no study."""
    examples = report.read_results(study)["examples"] if isinstance(study, Path) else []
    return examples[0]["question"] if examples else "Who wrote Emma?"


def tables(results: report.Tree) -> list[tuple[str, list[Row]]]:
    """Returns a study's tables with their headings. Raises LookupError or TypeError for other trees."""
    every = [("Methods", report_rows.comparison_rows(results)),
             ("Verdicts", report_rows.verdict_rows(results)),
             ("Data sets", report_rows.dataset_rows(results)),
             ("Within and across data sets", report_rows.transfer_rows(results)),
             (f"By popularity ({report_rows.DASH})", report_rows.popularity_rows(results))]
    return [(title, list(rows)) for title, rows in every if rows]


def study_markdown(study: Path) -> str:
    """Returns a study's conclusions and tables as Markdown."""
    results = report.read_results(study)
    texts = [f"### {results.get('name') or study.name}",
             "\n".join(f"- {text}" for text in sentences.conclusions(results))]
    for title, rows in tables(results):
        texts += [f"#### {title}", _table(rows)]
    return "\n\n".join(texts)


def metrics_markdown(study: Path) -> str:
    """Returns the table of all metrics of each method as Markdown."""
    return _table(report_rows.method_rows(report.read_results(study)))


def study_figures(study: Path) -> str:
    """Returns a study's figures with the report's captions, as HTML that embeds the images.

    Embedded images need no route of the server that reads files of the study.
    """
    captions = _captions(study)
    stems = {path.stem: path for path in sorted((study / "figures").glob("*.png"))}
    order = [*(stem for stem in captions if stem in stems), *(stem for stem in stems if stem not in captions)]
    figures = []
    for stem in order:
        caption = html.escape(captions.get(stem, f"The figure {stem.replace('-', ' ')} of this study."))
        image = base64.b64encode(stems[stem].read_bytes()).decode()
        figures.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{image}">'
                       f"<figcaption>{caption}</figcaption></figure>")
    return f'<div class="two">{"".join(figures)}</div>' if figures else "This study has no figures."


# ---------------------------------------------------------------------------------------------


def _table(rows: Sequence[Row]) -> str:
    """Returns rows as Markdown in which lines break after the underscores of names, not inside intervals."""
    return re.sub(r"(?<=\w)_(?=\w)", "_<wbr>", keep_intervals(markdown(rows)))


def _captions(study: Path) -> dict[str, str]:
    """Returns figure name → caption in the order of report.md; empty if there is no report."""
    try:
        text = (study / "report.md").read_text("utf-8", errors="replace")
    except OSError:
        return {}
    return {name: caption for caption, name in CAPTION.findall(text)}


def _thresholds(predictor: KnowledgePredictor) -> str:
    aim, (knows_from, unknown_below) = predictor.rule.aim, predictor.rule.thresholds
    if knows_from is None and unknown_below is None:
        return "none: only P(knows) is reported, no verdict"
    text = "; ".join(f"{verdict} {'–' if threshold is None else f'{threshold:.3f}'}"
                     for verdict, threshold in (("likely knows from", knows_from),
                                                ("likely beyond its knowledge below", unknown_below)))
    if "precision" not in aim:
        return text
    scope = (f"guaranteed for new questions of the same kind with {aim.get('confidence', 0):.0%} confidence"
             if aim.get("guarantee") else "reached on the calibration questions, not guaranteed for new ones")
    return f"{text} (precision {aim['precision']:.0%}, {scope})"
