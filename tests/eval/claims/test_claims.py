"""The four claims: each check against brute force, and the command on networks with known answers."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from scipy.stats import binom

from tests.error_lines import assert_one_line
from tests.reference_impl.memorised_text import reciter
from tests.reference_impl.random_weights import random_network
from tilelli_jax import config as config_lib
from tilelli_jax.data.synthetic.village import REGIMES
from tilelli_jax.data.turns import STOP, user_turn
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.eval.claims import check
from tilelli_jax.eval.claims.command import PUBLISHED, TOLERANCE, main
from tilelli_jax.eval.claims.config import ArchitectureConfig, ClaimsConfig, CrossRegimeConfig
from tilelli_jax.eval.claims.measurements import Answer, Measurements
from tilelli_jax.eval.stats import Interval
from tilelli_jax.loading import store
from tilelli_jax.models import RoutedConfig
from tilelli_jax.signals.names import BLOCK, SIGNALS, direction

TINY = RoutedConfig(d_model=16, n_layers=2, max_seq_len=96, n_heads=2, d_head=8, top_k=4, dense_expand=2)
LITE = ("local", "sparse", "dense")
SHORT, LONG = 10, 40  # prompt lengths, in bytes, on which the reciter abstains and answers


# --- The checks ------------------------------------------------------------------------------


def test_parameters_have_a_relative_tolerance_and_other_keys_must_be_equal() -> None:
    claimed = ArchitectureConfig("routed", LITE, 256, 8, 256, 10_000)
    for parameters, holds in ((9_500, True), (9_499, False), (10_500, True), (10_501, False)):
        lines = check.architecture(dataclasses.replace(claimed, parameters=parameters), claimed, 0.05)
        assert [line.holds for line in lines] == [True] * 5 + [holds]
    other = ArchitectureConfig("vanilla", (), 255, 9, 300, 10_000)
    assert [line.holds for line in check.architecture(other, claimed, 0.9)] == [False] * 5 + [True]
    line = check.architecture(other, claimed, 0.05)[1]
    assert (line.expected, line.measured) == ("local, sparse, dense", "none")
    unclaimed = check.architecture(other, ArchitectureConfig(), 0.05)
    assert [(line.expected, line.holds) for line in unclaimed] == [(None, None)] * 6
    swapped = dataclasses.replace(claimed, pathways=("sparse", "local", "dense"))
    assert not check.architecture(swapped, claimed, 0.05)[1].holds, "the order of the pathways matters"


@pytest.mark.parametrize(("claimed", "measured", "holds"), [
    (0.54, 0.59, True), (0.54, 0.5901, False), (0.54, 0.49, True), (0.54, 0.4899, False),
    ((0.51, 0.55), 0.46, True), ((0.51, 0.55), 0.60, True), ((0.51, 0.55), 0.53, True),
    ((0.51, 0.55), 0.4599, False), ((0.51, 0.55), 0.6001, False)])
def test_auroc_has_an_absolute_tolerance(claimed: Any, measured: float, holds: bool) -> None:
    auroc = Interval(measured, 0.3, 0.7)
    line, = check.cross_regime({"lens_margin": auroc}, CrossRegimeConfig(lens_margin=claimed), 0.05)
    assert line.holds is holds and line.interval == auroc


def test_absent_and_unclaimed_signals() -> None:
    claimed = CrossRegimeConfig(router_conf=0.5, router_entropy_b=(0.5, 0.6))
    measured = {"lens_entropy": Interval(0.5, 0.4, 0.6), "router_entropy_b0": Interval(0.5, 0.4, 0.6)}
    lines = {line.quantity: line for line in check.cross_regime(measured, claimed, 0.05)}
    assert lines["lens_entropy"].holds is None and lines["lens_entropy"].expected is None
    assert lines["router_entropy_b0"].holds is True
    for name in ("router_conf", "router_entropy_b1"):
        assert lines[name].measured is None and lines[name].holds is False
    assert len(lines) == 4 and check.failing([*lines.values()]) == ["cross-regime AUROC"]


@pytest.mark.parametrize(("claimed", "n", "tolerance"), [
    (7, 20, "0.05"), (9, 10, "0.05"), (9, 10, "0.1"), (0, 20, "0.05"), (20, 20, "0.1"), (3, 7, "0"),
    (29, 60, "0.05"), (5, 9, "0.3")])
def test_counts_of_answers(claimed: int, n: int, tolerance: str) -> None:
    for count in range(n + 1):
        flags = [True] * count + [False] * (n - count)
        line = check.answers("c", "q", flags, claimed, float(tolerance))
        assert line.holds == (abs(count - claimed) <= Fraction(tolerance) * n)
        assert line.measured == f"{count} of {n}"
        interval = line.interval
        assert interval is not None and interval.point == count / n
        # At its limits, a count as large, or as small, has probability 2.5 %.
        assert interval.low == 0 if not count else np.isclose(binom.sf(count - 1, n, interval.low), 0.025)
        assert interval.high == 1 if count == n else np.isclose(binom.cdf(count, n, interval.high), 0.025)
        at_least = check.answers("c", "q", flags, claimed, float(tolerance), at_least=True)
        assert at_least.holds == (claimed - count <= Fraction(tolerance) * n)
    assert check.answers("c", "q", [True], None, 0.05).holds is None


def test_format_of_expected_counts() -> None:
    assert check.answers("c", "q", [True] * 20, 7, 0.05).expected == "7 of 20 (6 … 8)"
    assert check.answers("c", "q", [True] * 10, 9, 0.05, at_least=True).expected == "at least 9 of 10"
    loose = check.answers("c", "q", [True] * 10, 9, 0.1, at_least=True)
    assert loose.expected == "at least 9 of 10 (8 … 10)"
    assert check.answers("c", "q", [True] * 10, 4, 0.05).expected == "4 of 10"


# --- Claims ----------------------------------------------------------------------------------


def test_the_published_claims() -> None:
    claims = config_lib.load(ClaimsConfig, PUBLISHED)
    assert config_lib.find(PUBLISHED).is_file() and TOLERANCE == 0.05
    assert claims.architecture == ArchitectureConfig("routed", LITE, 256, 8, 256, 10_179_072)
    ranges = claims.cross_regime.ranges
    assert ranges.pop("max_softmax_mean") == (0.54, 0.54)
    assert set(ranges.values()) == {(0.51, 0.55)} and len(ranges) == 4
    assert (claims.held_out.at_least, claims.held_out.prompts) == (9, 10)
    assert (claims.false_inability.refused, claims.false_inability.prompts) == (7, 20)
    assert claims.answers.max_new == 48
    deployed = dataclasses.replace(claims.architecture, parameters=10_117_632)
    assert all(line.holds for line in check.architecture(deployed, claims.architecture, TOLERANCE))


def test_every_signal_with_a_direction_can_be_claimed() -> None:
    names = {field.name for field in dataclasses.fields(CrossRegimeConfig)}
    assert names == {name for name in SIGNALS if direction(name)} | {BLOCK}


# --- The command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds prompts.jsonl, claims.yaml and the models `tiny`, `other` (other weights) and `reciter`."""
    path = tmp_path_factory.mktemp("claims")
    sizes = {"ood_topic": [SHORT, SHORT, LONG, SHORT], "neo_false_inability": [LONG, SHORT, LONG, LONG]}
    rows = [{"prompt": f"{regime[:6]} {i}".ljust(size, "?"), "regime": regime} for regime in REGIMES
            for i, size in enumerate(sizes.get(regime, [SHORT, LONG, 20, 25]))]
    (path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, seed in (("tiny", 0), ("other", 1)):
        store.save(random_network(TINY, seed)[0], path / name)
    refusal = " Sorry, I don't know."
    text = bytearray(b"x" * 128)
    start = len(user_turn("?" * SHORT))
    text[start:start + len(refusal + STOP)] = (refusal + STOP).encode()
    store.save(reciter(bytes(text)), path / "reciter")
    claims(path / "claims.yaml", {})
    return path


def claims(path: Path, tree: dict[str, Any], templates: tuple[str, ...] = ()) -> str:
    """Writes a claims file for few prompts, updated section by section with `tree`; returns its path."""
    contents: dict[str, Any] = {"held_out": {"prompts": 4, "templates": list(templates)},
                                "false_inability": {"prompts": 4}, "answers": {"max_new": 32}}
    for name, section in tree.items():
        contents[name] = contents.get(name, {}) | section if isinstance(section, dict) else section
    path.write_text(yaml.safe_dump(contents))
    return str(path)


def arguments(where: Path, model: str, expect: str | Path = "claims.yaml", *more: str) -> list[str]:
    return ["--model", str(where / model), "--expect", str(where / expect),
            "--prompts", str(where / "prompts.jsonl"), *more]


def lines_of(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(line["claim"], line["quantity"]): line for line in json.loads(path.read_text())["claims"]}


def test_written_claims_hold_for_the_same_network_and_fail_for_another(
        where: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, out = tmp_path / "expected.yaml", tmp_path / "out.json"
    outputs = ("--write-expected", str(expected), "--out", str(out))
    assert main(arguments(where, "tiny", "claims.yaml", *outputs)) == 0
    assert "every claim holds" in capsys.readouterr().out
    written = config_lib.load(ClaimsConfig, expected)
    arrays = load_file(where / "tiny" / "model.safetensors")
    size = sum(array.size for array in arrays.values())
    assert written.architecture == ArchitectureConfig("routed", LITE, 16, 2, 256, size)
    assert (written.held_out.prompts, written.answers.max_new) == (4, 32)
    assert str(where / "tiny") in written.source
    lines = lines_of(out)
    made = json.loads(out.read_text())["how_to_reproduce"]
    assert made["command"].startswith("tilelli claims --model ") and str(expected) in made["command"]
    assert set(made) == {"command", "configuration", "commit", "device", "machine", "versions"}
    assert lines[check.ARCHITECTURE, "parameters"]["measured"] == f"{size:,}"
    # The AUROC of one signal, recomputed from the model's probabilities.
    model, rows = store.load(where / "tiny"), [*map(json.loads, (where / "prompts.jsonl").open())]
    texts = [user_turn(row["prompt"]).encode() for row in rows]
    ids = np.stack([np.frombuffer(text.ljust(64, b"\0"), np.uint8) for text in texts]).astype(np.int32)
    probabilities = np.asarray(jax.jit(lambda ids: jax.nn.softmax(model(ids)))(ids))
    known, unknown = [], []
    for row, text, probability in zip(rows, texts, probabilities, strict=True):
        softmax = probability[:len(text)].max(-1).mean()
        (known if row["regime"] == "in_domain" else unknown).append(softmax)
    auroc = np.mean([(a > b) + (a == b) / 2 for a in known for b in unknown])
    assert np.isclose(lines[check.CROSS_REGIME, "max_softmax_mean"]["interval"]["point"], auroc)
    assert lines[check.CROSS_REGIME, "max_softmax_mean"]["expected"] == f"{auroc:.3f} ± 0.05"
    assert (check.CROSS_REGIME, "abstain_p") not in lines and written.cross_regime.abstain_p is None
    assert len(written.cross_regime.router_entropy_b) == 2

    # The measurements are reproducible to the last digit.
    assert main(arguments(where, "tiny", expected, "--tolerance", "0")) == 0
    assert " NO" not in capsys.readouterr().out
    assert main(arguments(where, "other", expected, "--out", str(out))) == 1
    printed = capsys.readouterr()
    assert "failed: cross-regime AUROC" in printed.out and not printed.err
    tree = json.loads(out.read_text())
    assert tree["holds"] is False and tree["tolerance"] == 0.05
    assert all(line["holds"] for name, line in lines_of(out).items() if name[0] == check.ARCHITECTURE)
    assert [len(answers) for answers in tree["answers"].values()] == [4, 4]


def test_refusals_are_counted_and_absent_signals_fail(
        where: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reciter, a transformer, abstains on prompts of one length and answers all others."""
    out = tmp_path / "out.json"
    tree: dict[str, Any] = {
        "held_out": {"at_least": 3, "template_at_least": 3}, "false_inability": {"refused": 1},
        "architecture": {"family": "routed", "pathways": ["local"]},
        "cross_regime": {"router_entropy": 0.5}}
    expect = claims(tmp_path / "claims.yaml", tree, ("i don't know", "SORRY,  I don’t"))
    assert main(arguments(where, "reciter", expect, "--out", str(out))) == 1
    lines = lines_of(out)
    for name, count in (((check.HELD_OUT, "refused"), 3), ((check.HELD_OUT, "by template"), 3),
                        ((check.FALSE_INABILITY, "refused"), 1)):
        assert lines[name]["holds"] is True and lines[name]["measured"] == f"{count} of 4"
    assert lines[check.ARCHITECTURE, "family"]["measured"] == "vanilla"
    assert lines[check.ARCHITECTURE, "pathways"]["measured"] == "none"
    assert lines[check.CROSS_REGIME, "router_entropy"]["measured"] is None
    printed = capsys.readouterr().out
    assert "failed: architecture, cross-regime AUROC\n" in printed
    assert "absent" in printed and "at least 3 of 4" in printed
    answers = json.loads(out.read_text())["answers"]
    assert [answer["refused"] for answer in answers["held_out"]] == [True, True, False, True]
    assert answers["held_out"][0]["answer"] == "Sorry, I don't know."
    assert set(answers["held_out"][2]["answer"]) == {"x"}

    # The user's own prompts and another template; the written claims hold.
    mine, expected = tmp_path / "mine.jsonl", tmp_path / "expected.yaml"
    mine.write_text("\n".join(json.dumps({"prompt": f"mine {i}".ljust(size, "?"), "regime": "ood_topic"})
                              for i, size in enumerate((SHORT, LONG, SHORT, SHORT, SHORT))))
    tree = {"held_out": {"file": str(mine), "at_least": 4}, "false_inability": {"refused": 3}}
    expect = claims(tmp_path / "claims.yaml", tree, ("I don't know",))
    outputs = ("--write-expected", str(expected), "--out", str(out))
    assert main(arguments(where, "reciter", expect, *outputs)) == 0
    held_out = json.loads(out.read_text())["answers"]["held_out"]
    assert [answer["prompt"][:6] for answer in held_out] == ["mine 0", "mine 1", "mine 2", "mine 3"]
    written = config_lib.load(ClaimsConfig, expected)
    assert written.held_out.at_least == 3 and written.held_out.template_at_least == 0
    assert written.false_inability.refused == 1 and written.architecture.pathways == ()
    assert written.cross_regime.router_entropy is None and written.held_out.file == str(mine)
    checked = check.check(Measurements(written.architecture, {}, [Answer("", "", True, False)] * 4, [
        Answer("", "", refused, False) for refused in (True, True, True, False)]), written, 0.05)
    assert check.failing(checked) == [check.CROSS_REGIME, check.FALSE_INABILITY]


# --- Invalid input ---------------------------------------------------------------------------


@pytest.mark.parametrize(("tree", "message"), [
    ({"architecture": {"blocks": 8}}, "unknown key 'architecture.blocks'"),
    ({"architecture": {"parameters": 0}}, "architecture.parameters: expected an integer ≥ 1"),
    ({"architecture": {"n_layers": "eight"}}, "architecture.n_layers: expected an integer or"),
    ({"cross_regime": {"router_confidence": 0.5}}, "did you mean 'cross_regime.router_conf'?"),
    ({"cross_regime": {"router_conf": 1.5}}, "cross_regime.router_conf: expected an AUROC from 0 to 1"),
    ({"cross_regime": {"router_conf": [0.6, 0.5]}}, "from 0 to 1, or [min, max], found [0.6, 0.5]"),
    ({"cross_regime": {"router_conf": [0.5]}}, "cross_regime.router_conf: expected an AUROC"),
    ({"cross_regime": {"router_entropy_b": [0.5, 2]}}, "cross_regime.router_entropy_b1: expected an"),
    ({"cross_regime": {"router_conf": ".nan"}}, "cross_regime.router_conf: expected a number or a list"),
    ({"held_out": {"at_least": 5}}, "held_out.at_least: expected at most 4, the number of prompts"),
    ({"held_out": {"template_at_least": 1}}, "held_out.template_at_least: expected templates to be set"),
    ({"held_out": {"templates": [" "]}}, "held_out.templates: expected non-empty texts"),
    ({"held_out": {"prompts": 5}}, "expected 5 prompts of ood_topic (held_out.prompts), found 4"),
    ({"held_out": {"file": "none.jsonl"}}, "none.jsonl: no such file"),
    ({"false_inability": {"refused": -1}}, "false_inability.refused: expected an integer ≥ 0"),
    ({"answers": {"max_new": 60}}, "takes 115 bytes with its answer, and the network reads 96"),
    ({"answers": {"max_new": 0}}, "answers.max_new: expected an integer ≥ 1"),
    ({"source": 3}, "source: expected text, found an integer 3")])
def test_invalid_claims_files(where: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                              tree: dict[str, Any], message: str) -> None:
    out = tmp_path / "out.json"
    expect = claims(tmp_path / "claims.yaml", tree)
    assert main(arguments(where, "tiny", expect, "--out", str(out))) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not out.exists()


def test_invalid_arguments(where: Path, tmp_path: Path,
                           capsys: pytest.CaptureFixture[str]) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps({"prompt": f"{regime} {i}", "regime": regime})
                             for regime in REGIMES[:-1] for i in range(4)))
    (tmp_path / "neo.jsonl").write_text('{"prompt": "a", "regime": "gibberish"}')
    other_regime = claims(tmp_path / "other.yaml", {"held_out": {"file": str(tmp_path / "neo.jsonl")}})
    store.save(store.build(SAEConfig(d_model=4, n_latents=8, k=2)), tmp_path / "sae")
    store.save(random_network(dataclasses.replace(TINY, vocab_size=100), 0)[0], tmp_path / "small")
    arrays = {name: np.full_like(array, 3e38) for name, array in random_network(TINY, 0)[1].items()}
    store.save(store.from_arrays(TINY, arrays), tmp_path / "broken")
    (tmp_path / "broken.yaml").write_text("held_out: [")
    (tmp_path / "prompts.jsonl").write_bytes((where / "prompts.jsonl").read_bytes())
    expect = where / "claims.yaml"
    for argv, message in (
            (arguments(where, "tiny", tmp_path / "none.yaml"), "none.yaml: no such file"),
            (arguments(where, "tiny", tmp_path / "broken.yaml"), "broken.yaml: not YAML"),
            (arguments(where, "none"), "none: expected a model directory (config.json and"),
            (arguments(tmp_path, "sae", expect),
             "sae: expected a byte-level network, routed or vanilla, found family sae"),
            (arguments(tmp_path, "small", expect),
             "small: expected a byte-level network, routed or vanilla, found family routed of"),
            (arguments(tmp_path, "broken", expect),
             "broken: max_softmax_last: expected numbers, found NaN for the prompt 'in_dom 0"),
            (arguments(where, "tiny", expect, "--prompts", str(few)),
             "few.jsonl: expected prompts of 7 regimes, found none of gibberish"),
            (arguments(where, "tiny", other_regime),
             "neo.jsonl: expected prompts of 1 regime, found none of"),
            (arguments(where, "tiny", expect, "--tolerance", "1"),
             "--tolerance: expected a number ≥ 0 and < 1, found 1.0"),
            (arguments(where, "tiny", expect, "--tolerance", "nan"), "--tolerance: expected a number"),
            (arguments(where, "tiny", expect, "--tolerance", "5%"), "--tolerance: invalid float value"),
            (arguments(where, "tiny", expect, "--out", str(tmp_path)), "expected a file, found a directory"),
            (arguments(where, "tiny", expect, "--write-expected", str(tmp_path / "no" / "a.yaml")),
             "a.yaml cannot be written: No such file or directory"),
            (arguments(where, "tiny", expect, "--out", "a", "--write-expected", "b/../a"),
             "--out: expected another file than --write-expected, found a for both"),
            (["--expect", "a"], "the following arguments are required: --model")):
        assert main(argv) == 2, argv
        assert_one_line(capsys.readouterr().err, message)
