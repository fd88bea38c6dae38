"""Can a network learn to say that it does not know? Variants of one network, their signals and their cost.

    tilelli abstention --config NAME [--variants v4,v9] [--seeds 0,1] [--stage data|train|measure|all]
                       [key=value …]
    tilelli abstention calibrate --model DIR --on FILE [--signal abstain_p] [--fpr 0.05] [--template TEXT]

A stage runs the stages before it and reuses finished results: the same command again resumes the study.
`all` ends with a report.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tilelli_jax import config as config_lib
from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.cli.tables import table
from tilelli_jax.generation.abstain_rule import FILE, TEMPLATE
from tilelli_jax.signals.names import DRIFT, HEAD, SIGNALS, describe

from ..document import without_markup
from ..inputs.study import quiet_logs, study_command
from ..stages import key
from . import report, threshold
from .config import AbstentionConfig
from .published_claims import answer_v9
from .study import AbstentionStudy

PROG = "tilelli abstention"


@command
def main(argv: Sequence[str]) -> int:
    return study_command(
        argv, AbstentionStudy, AbstentionConfig, write_report, prog=PROG, doc=__doc__,
        shipped="abstention-demo", example="training.variant.set=[train.steps=50]", prepare=_choose_part,
        shortcuts={
            "--variants": ("V,…", "variants=[{}]", "variants to run; short for variants=[V,…]"),
            "--seeds": ("N,…", "seeds=[{}]", "seeds to run; short for seeds=[N,…]")})


def write_report(study: AbstentionStudy, name: str, provenance: Mapping[str, Any]) -> str:
    """Runs the study and writes its report. Returns the summary to print."""
    results = report.write(study, study.report_dir, name, provenance)
    answers = "\n".join(without_markup(text) for text in answer_v9(results))
    return f"\n{table(report.summary(results), right=(1, 2, 3, 4, 5))}\n\n{answers}\n"


def _choose_part(study: AbstentionStudy, file: str) -> None:
    study.part = part_of(config_lib.load(AbstentionConfig, file), study.config)


def part_of(file_config: AbstentionConfig, config: AbstentionConfig) -> str:
    """Returns the directory of the report where `config` differs from its file; "" where it does not.

    The name lists the selected variants and seeds, and a hash of all other changes:
    `parts/v4+v9-seeds-0+1-3f09c2`.
    """
    changes = config_lib.differences(file_config, config)
    words = ["+".join(config.variants)] if changes.pop("variants", None) else []
    words += ["seeds-" + "+".join(map(str, config.seeds))] if changes.pop("seeds", None) else []
    others = {name: new for name, (_, new) in changes.items() if name not in ("out", "name")}
    words += [key(others)[:6]] if others else []
    return f"parts/{'-'.join(words)}" if words else ""


@command
def calibrate(argv: Sequence[str]) -> int:
    """`tilelli abstention calibrate`: chooses a model's threshold, for `chat` and `generate --abstain`."""
    quiet_logs()
    parser = ArgumentParser(prog=f"{PROG} calibrate", description=(
        "Chooses the threshold of a signal beyond which a model abstains, from prompts that have an answer,\n"
        "and writes DIR/abstain.json for `tilelli chat --abstain` and `tilelli generate --abstain`."),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["signals, where the network has them, higher or lower if the answer is not known:",
                          *(f"  {describe(name)}" for name in SIGNALS if name != DRIFT)]))
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model directory")
    parser.add_argument("--on", type=Path, required=True, metavar="FILE",
                        help="calibration split: JSON lines with a prompt; the model must not have been "
                             "trained on them")
    parser.add_argument("--signal", default=HEAD, help="signal to compare with the threshold [%(default)s]")
    parser.add_argument("--fpr", type=float, default=0.05, metavar="X",
                        help="target false-positive rate: fraction of answerable prompts on which the model "
                             "may abstain [%(default)s]")
    parser.add_argument("--template", default=TEMPLATE, metavar="TEXT",
                        help="answer that the model gives when it abstains [%(default)s]")
    options = parser.parse_args(argv)
    prompts = threshold.read_prompts(options.on)
    if repeats := len(prompts.texts) - len({text for text, _ in prompts.texts}):
        print(f"note: {repeats} of {len(prompts.texts)} prompts are repeats of others: the expected rate "
              "holds for new prompts with the same repetition", file=sys.stderr)
    if prompts.left_out:
        print(f"note: {prompts.left_out} prompts without an answer left out: the false-positive rate counts "
              "answerable prompts only", file=sys.stderr)
    rule = threshold.make(options.model, prompts.texts, options.signal, options.fpr, options.template)
    print(f"{threshold.format_rule(rule)}\n{options.model / FILE}")
    return 0
