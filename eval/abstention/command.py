"""Can a network learn to say that it does not know? Variants of one network, their signals and their cost.

    tilelli abstention --config NAME [--variants v4,v9] [--seeds 0,1] [--stage data|train|measure|all]
                       [key=value …]
    tilelli abstention calibrate --model DIR --on FILE [--signal abstain_p] [--fpr 0.05] [--template TEXT]

A stage runs the stages before it and reuses finished results: the same command again resumes the study.
`all` ends with a report.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tilelli_jax import config as config_lib
from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.cli.tables import table
from tilelli_jax.generation.abstain_rule import FILE, TEMPLATE
from tilelli_jax.signals.names import HEAD

from ..inputs.commands import provenance_rows, quiet_logs, run_study
from ..stages import key, print_to_stderr
from . import report, threshold
from .config import AbstentionConfig
from .statements import answer_v9
from .study import Study

STAGES = ("data", "train", "measure", "all")
PROG = "tilelli abstention"


@command
def main(argv: Sequence[str]) -> int:
    quiet_logs()
    options = _options(argv)
    selections = {"variants": options.variants, "seeds": options.seeds}
    overrides = [f"{name}=[{value}]" for name, value in selections.items() if value is not None]
    config = config_lib.load(AbstentionConfig, options.config, [*options.overrides, *overrides])
    name = config.name or Path(options.config).stem
    study = Study(config, Path(config.out or Path("runs", Path(options.config).stem)), print_to_stderr)
    study.check()
    command_line = shlex.join([*PROG.split(), *argv])
    file_config = config_lib.load(AbstentionConfig, options.config)
    return run_study(lambda: run(study, options.stage, name, command_line, part_of(file_config, config)),
                     command_line)


def run(study: Study, stage: str, name: str, command_line: str, part: str = "") -> int:
    """Runs one stage, or all stages and the report.

    Args:
        command_line: the command, for the report.
        part: subdirectory for the report on a part of the study, which leaves the report on the whole study
            as it is; "" for the whole study.
    """
    if stage == "data":
        print(f"data: {study.data}")
        return 0
    if stage != "all":
        for seed in study.config.seeds:
            for variant in study.variants:
                path = (study.network if stage == "train" else study.measured)(variant, seed)
                print(f"{variant}, seed {seed}: {path}")
        return 0
    out = study.out / part
    results = report.write(study, out, name, provenance_rows(command_line, study.config.seeds))
    print(f"\n{table(report.summary(results), right=(1, 2, 3, 4, 5))}\n")
    print("\n".join(text.replace("**", "") for text in answer_v9(results)))
    print(f"\nreport: {out / 'report.html'} (and report.md)")
    return 0


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
        "Chooses the threshold of a signal beyond which a model abstains, from prompts that have an answer, "
        "and writes DIR/abstain.json for `tilelli chat --abstain` and `tilelli generate --abstain`."))
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


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = config_lib.command_line(PROG, __doc__, AbstentionConfig, "abstention-demo",
                                     "training.variant.set=[train.steps=50]")
    parser.add_argument("--stage", choices=STAGES, default="all", help="last stage to run [%(default)s]")
    parser.add_argument("--variants", metavar="V,…", help="variants to run; short for variants=[V,…]")
    parser.add_argument("--seeds", metavar="N,…", help="seeds to run; short for seeds=[N,…]")
    return parser.parse_intermixed_args(argv)
