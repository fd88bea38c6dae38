"""Who can say that it does not know? Variants of one network, what they signal, and what it costs them.

    tilelli abstention --config FILE [--variants v4,v9] [--seeds 0,1] [--stage data|train|measure|all]
                       [key=value …]
    tilelli abstention calibrate --model DIR --on FILE [--signal abstain_p] [--fpr 0.05] [--template TEXT]

A stage makes what it needs of those before it, and takes what is there: the same command again goes on
where it stopped. `all` ends with a report.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tilelli_jax import config as config_lib
from tilelli_jax.abstain_rule import FILE, TEMPLATE
from tilelli_jax.errors import ArgumentParser, command
from tilelli_jax.signals.names import HEAD
from tilelli_jax.tables import table

from ..inputs.commands import carry_out, how_made, quiet_logs
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
    given = {"variants": options.variants, "seeds": options.seeds}
    chosen = [f"{name}=[{value}]" for name, value in given.items() if value is not None]
    config = config_lib.load(AbstentionConfig, options.config, [*options.overrides, *chosen])
    name = config.name or Path(options.config).stem
    study = Study(config, Path(config.out or Path("runs", Path(options.config).stem)), print_to_stderr)
    study.check()
    said = shlex.join([*PROG.split(), *argv])
    whole = config_lib.load(AbstentionConfig, options.config)
    return carry_out(lambda: run(study, options.stage, name, said, part_of(whole, config)))


def run(study: Study, stage: str, name: str, said: str, part: str = "") -> int:
    """One stage, or all of them and the report.

    Args:
        part: of the study: its report has a directory of its own, and leaves that of the whole as it is.
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
    found = report.write(study, out, name, how_made(said, study.config.seeds))
    print(f"\n{table(report.summary(found), right=(1, 2, 3, 4, 5))}\n")
    print("\n".join(text.replace("**", "") for text in answer_v9(found)))
    print(f"\nreport: {out / 'report.html'} (and report.md)")
    return 0


def part_of(whole: AbstentionConfig, config: AbstentionConfig) -> str:
    """Where the report of what is not the whole of a configuration file belongs; "" for the whole.

    It is called after the variants and seeds that were chosen, and a key of what else is another:
    `parts/v4+v9-seeds-0+1-3f09c2`.
    """
    changed = config_lib.differences(whole, config)
    chosen = ["+".join(config.variants)] if changed.pop("variants", None) else []
    chosen += ["seeds-" + "+".join(map(str, config.seeds))] if changed.pop("seeds", None) else []
    others = {name: new for name, (_, new) in changed.items() if name not in ("out", "name")}
    chosen += [key(others)[:6]] if others else []
    return f"parts/{'-'.join(chosen)}" if chosen else ""


@command
def calibrate(argv: Sequence[str]) -> int:
    """`tilelli abstention calibrate`: chooses a model's threshold, for `chat` and `generate --abstain`."""
    quiet_logs()
    parser = ArgumentParser(prog=f"{PROG} calibrate", description=(
        "Chooses from which value of a signal a model is to abstain, by prompts that it can answer, and "
        "writes DIR/abstain.json for `tilelli chat --abstain` and `tilelli generate --abstain`."))
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the network")
    parser.add_argument("--on", type=Path, required=True, metavar="FILE",
                        help="JSON lines with a prompt; nothing was learned from them")
    parser.add_argument("--signal", default=HEAD, help="what is compared with the threshold [%(default)s]")
    parser.add_argument("--fpr", type=float, default=0.05, metavar="X",
                        help="share of prompts that can be answered which may be declined [%(default)s]")
    parser.add_argument("--template", default=TEMPLATE, metavar="TEXT",
                        help="what the network says then [%(default)s]")
    options = parser.parse_args(argv)
    prompts = threshold.read_prompts(options.on)
    if again := len(prompts.texts) - len({text for text, _ in prompts.texts}):
        print(f"note: {again} of {len(prompts.texts)} prompts have been there before: what is foreseen is of "
              "prompts drawn as these were", file=sys.stderr)
    if prompts.left_out:
        print(f"note: {prompts.left_out} without an answer left out: the rate is of those that have one",
              file=sys.stderr)
    made = threshold.make(options.model, prompts.texts, options.signal, options.fpr, options.template)
    print(f"{threshold.told(made)}\n{options.model / FILE}")
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = config_lib.command_line(PROG, __doc__, AbstentionConfig, "abstention-demo",
                                     "training.variant.set=[train.steps=50]")
    parser.add_argument("--stage", choices=STAGES, default="all", help="[%(default)s]")
    parser.add_argument("--variants", metavar="V,…", help="variants=[V,…]")
    parser.add_argument("--seeds", metavar="N,…", help="seeds=[N,…]")
    return parser.parse_intermixed_args(argv)
