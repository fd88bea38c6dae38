"""Invalid files, networks and settings of the study, and the shipped configurations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.error_lines import assert_one_line
from tests.eval.abstention.small import ROOT, SHAPE, options, recipe
from tests.eval.running import write
from tests.reference_impl.random_weights import random_network
from tilelli_jax import config as config_lib
from tilelli_jax.eval.abstention.command import main, part_of
from tilelli_jax.eval.abstention.config import AbstentionConfig
from tilelli_jax.eval.abstention.variants import VARIANTS, dependencies
from tilelli_jax.loading import store
from tilelli_jax.models import RoutedConfig, VanillaConfig


@pytest.mark.parametrize(("name", "rows", "message"), [
    ("calibration", [("q", True)] * 30, "expected at least 19 prompts with an answer for target_fpr"),
    ("calibration", [(f"q{i}", i < 18) for i in range(40)], "expected at least 19 prompts with an answer"),
    ("calibration", [(f"q{i}" * (1 + 149 * (i == 7)), True) for i in range(30)],
     "line 8: prompt: takes 315 bytes as a turn"),
    ("held_out", [("", True)] * 3, "own.jsonl, line 1: expected a prompt and a response for held_out"),
    ("held_out", [(f"q{i}", True) for i in range(50)], "expected at least 20 prompts with an answer and 20"),
    ("answerability", [(f"q{i}", i < 45) for i in range(50)],
     "expected at least 20 prompts with an answer and 20")])
def test_unsuitable_data_files(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str,
                               rows: list[tuple[str, bool]], message: str) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(
        {"prompt": prompt, "response": "a", "answerable": known} if prompt else {"text": "bare"}) + "\n"
        for prompt, known in rows))
    tree = options(tmp_path / "out", prompts=str(place / "prompts.jsonl"), seeds=[0])
    tree["pairs"]["files"] = {name: str(own)}
    assert main(["--config", write(tmp_path / "own.yaml", tree), "--stage", "data"]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "out").exists()


def test_a_windows_file_is_stored_with_unix_line_ends(place: Path, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(json.dumps({"prompt": f"q{i}", "response": "a", "answerable": i % 2 == 0}) + "\n"
                   for i in range(50))
    (tmp_path / "own.jsonl").write_text(text, encoding="utf-16", newline="\r\n")
    tree = options(tmp_path / "out", prompts=str(place / "prompts.jsonl"), seeds=[0])
    tree["pairs"]["files"] = {"calibration": str(tmp_path / "own.jsonl")}
    assert main(["--config", write(tmp_path / "own.yaml", tree), "--stage", "data"]) == 0
    data = Path(capsys.readouterr().out.split()[-1])
    assert (data / "calibration.jsonl").read_bytes() == text.encode()


def test_directory_of_the_report_on_a_part(place: Path) -> None:
    """A report on a part of the study does not replace the report on the whole study."""
    file = write(place / "whole.yaml", options(place / "out"))
    whole = config_lib.load(AbstentionConfig, file)

    def part(*overrides: str) -> str:
        return part_of(whole, config_lib.load(AbstentionConfig, file, overrides))
    assert part() == part("out=elsewhere") == part("name=else") == part("seeds=[0,1]") == ""
    assert part("variants=[v4,v9]") == "parts/v4+v9" and part("seeds=[0]") == "parts/seeds-0"
    other_network = part("networks.v4.path=a", "seeds=[0]")
    assert re.fullmatch(r"parts/seeds-0-[0-9a-f]{6}", other_network)
    assert len({other_network, part("networks.v4.path=b", "seeds=[0]"), part("prompts=mine.jsonl"),
                part("prompts=mine.jsonl", "seeds=[0]"), part("seeds=[0]")}) == 5


def test_dependencies() -> None:
    assert dependencies(("splice",)) == ("v4", "v7", "splice") and dependencies(("v9",)) == ("v4", "v9")
    assert dependencies(("mean-pool-head",)) == ("v4", "mean-pool-head")
    assert dependencies(tuple(VARIANTS)) == tuple(VARIANTS)


@pytest.mark.parametrize(("changes", "message"), [
    ({"variants": ["v10"]}, "variants: expected some of v4, v5"),
    ({"variants": []}, "variants: expected at least one of v4"),
    ({"seeds": [0, 0]}, "seeds: expected at least one integer"),
    ({"networks": {"v4": {}}, "seeds": [0]}, "networks.v4.path: expected a network's directory, or train"),
    ({"networks": {"mean-pool-head": {"path": "x"}}, "seeds": [0]},
     "networks: expected some of base, v4, v5, v6, v7, v8a, v8b, splice, v9, router-kl, found "
     "'mean-pool-head'"),
    ({"networks": {"v4": {"train": "sft-demo"}}, "seeds": [0]},
     "networks.v4.train: expected only path, because the key training sets how networks are trained; found "
     "'sft-demo'"),
    ({"networks": {"v4": {"path": "x", "tokenizer": "y"}}, "seeds": [0]},
     "networks.v4.tokenizer: expected only path, because the key training sets"),
    ({"networks": {"v4": {"path": "x"}}, "seeds": [0, 1]},
     "seeds: expected one seed, because v4 is one given network"),
    ({"networks": {"v7": {"path": "x"}}, "seeds": [0, 1]},
     "seeds: expected one seed, because v7 is one given network"),
    ({"networks": {"v4": {"pth": "x"}}, "seeds": [0]},
     "unknown key 'networks.v4.pth' (did you mean 'networks.v4.path'?)"),
    ({"pairs": {"files": {"chats": "x"}}},
     "unknown key 'pairs.files.chats' (did you mean 'pairs.files.chat'?)"),
    ({"pairs": {"files": {"chat": "/nowhere.jsonl"}}}, "/nowhere.jsonl"),
    ({"networks": {"v4": {"path": "/nowhere"}}, "seeds": [0]}, "/nowhere: expected a model directory"),
    ({"prompts": "/nowhere.jsonl"}, "/nowhere.jsonl"),
    ({"answers": {"max_new": 200}}, "prompts: "),
    ({"training": {"base": {"train": "nothing.yaml"}}}, "nothing.yaml: no such file"),
    ({"training": {"base": {"train": "", "set": ["train.steps=3"]}}},
     "training.base.path: expected a network's directory, or train with a training configuration, found "
     "neither"),
    ({"training": {"base": {"set": ["train.stps=3"]}}},
     "training.base: overrides: unknown key 'train.stps' (did you mean 'train.steps'?)"),
    ({"training": {"base": {"path": "x"}}}, "training.base.path: expected a network's directory, or train "
     "with a training configuration, found path 'x' and train 'abstention-base'"),
    ({"training": {"base": {"path": "x", "train": ""}}},
     "training.base.path: expected only train and set, because existing networks are under the key networks; "
     "found 'x'"),
    ({"networks": {"v4": {"path": "x", "set": ["train.steps=3"]}}, "seeds": [0]},
     "networks.v4.set: expected none without train, found ['train.steps=3']"),
    ({"training": {"base": recipe("base") | {"set": ["model.d_modell=3"]}}}, "d_modell"),
])
def test_invalid_settings(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                          changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tree = options(tmp_path / "out", prompts=str(place / "prompts.jsonl")) | changes
    assert main(["--config", write(tmp_path / "bad.yaml", tree)]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "out").exists()


def test_unsuitable_networks_and_prompts(place: Path, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """A missing router, head or regime, and networks of different shapes."""
    store.save(random_network(VanillaConfig(**SHAPE), 0)[0], tmp_path / "vanilla")
    store.save(random_network(RoutedConfig(**SHAPE, pathways=("local",)), 0)[0], tmp_path / "routed")
    store.save(random_network(VanillaConfig(**SHAPE, abstain_head=True), 0)[0], tmp_path / "headed")
    wide = RoutedConfig(**SHAPE, pathways=("local", "dense"), abstain_head=True)
    tokens = RoutedConfig(**SHAPE, pathways=("local",), vocab_size=100)
    store.save(random_network(wide, 0)[0], tmp_path / "wide")
    store.save(random_network(tokens, 0)[0], tmp_path / "tokens")
    lines = (place / "prompts.jsonl").read_text().splitlines()
    (tmp_path / "less.jsonl").write_text("\n".join(line for line in lines if "ood_style" not in line))
    def given(**directories: str) -> dict[str, Any]:
        return {"seeds": [0], "networks": {name: {"path": str(tmp_path / directory)}
                                           for name, directory in directories.items()}}
    for changes, message in (
            ({**given(v4="vanilla"), "variants": ["v5"]},
             "variants: v5 requires a router, which family vanilla lacks"),
            ({**given(v7="routed"), "variants": ["splice"]},
             f"networks.v7: {tmp_path / 'routed'}: expected a network with an abstain head, found none"),
            (given(base="routed", v9="headed"),
             f"networks.v9: {tmp_path / 'headed'}: expected the family, d_model, n_layers and pathways of "
             "the other networks, ('routed', 16, 2, 'local', 1), found ('vanilla', 16, 2)"),
            (given(base="routed", v9="wide"), "found ('routed', 16, 2, 'local', 'dense', 1)"),
            (given(base="tokens"), f"networks.base: {tmp_path / 'tokens'}: expected a byte-level network, "
                                   "routed or vanilla"),
            ({"prompts": str(tmp_path / "less.jsonl")}, "found none of ood_style")):
        tree = options(tmp_path / "out", prompts=str(place / "prompts.jsonl")) | changes
        assert main(["--config", write(tmp_path / "bad.yaml", tree)]) == 2
        assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "out").exists()


def test_shipped_configurations() -> None:
    demo, full = (config_lib.load(AbstentionConfig, ROOT / f"configs/abstention{name}.yaml")
                  for name in ("-demo", ""))
    assert len(demo.seeds) == 1 and len(full.seeds) >= 5
    assert demo.variants == full.variants == tuple(VARIANTS)
