"""Every command that writes can be killed anywhere: the same command again ends as if nothing had happened.

Where it may not begin anew it says so, in one line. Studies and trainings are killed again and again, each
time somewhat further on; the others at moments spread over all their operations on files.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tilelli_jax.eval.recall.answering import answer
from tilelli_jax.eval.recall.config import AnswersConfig, PromptConfig
from tilelli_jax.eval.recall.prompting import Prompter

from tests.compiled import READ_ONLY
from tests.kill_points import kill_command_at_every_file_operation, run_and_kill
from tests.restated.random_weights import random_network
from tilelli_jax import config as config_lib
from tilelli_jax import store
from tilelli_jax.__main__ import main
from tilelli_jax.data import stories
from tilelli_jax.language import open_language
from tilelli_jax.models import GPTNeoXConfig, RoutedConfig, VanillaConfig

pytestmark = pytest.mark.exhaustive
PLAIN = RoutedConfig(d_model=16, n_layers=1, max_seq_len=32, n_heads=2, d_head=4, top_k=4, dense_expand=2,
                     pathways=("local", "dense"))
CHANGING = {"seconds", "tokens_per_second", "git_commit", "run", "path", "out", "command"}


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a directory, by its name in it; or a file alone."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*"))
            if file.is_file()}


def clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks and a text."""
    path = tmp_path_factory.mktemp("kills")
    store.save(random_network(PLAIN, 0)[0], path / "plain")
    head = RoutedConfig(**{**vars(PLAIN), "abstain_head": True})
    store.save(random_network(head, 1)[0], path / "head")
    neox = GPTNeoXConfig(vocab_size=60, d_model=16, n_layers=2, n_heads=2, d_hidden=32)
    store.save(random_network(neox, 2)[0], path / "neox")
    for seed in (0, 1):
        store.save(store.build(VanillaConfig(d_model=16, n_layers=2, max_seq_len=64, n_heads=2), seed),
                   path / f"vanilla-{seed}")
    (path / "text.txt").write_bytes(stories.generate(30_000))
    assert main(["convert", str(path / "neox"), str(path / "hf"), "--to", "torch"]) == 0
    return path


@pytest.mark.parametrize(("arguments", "kills"), [
    (["convert", "{place}/hf", "{out}"], 8),
    (["convert", "{place}/plain", "{out}", "--to", "torch"], 4),
    (["splice", "--head", "{place}/head", "--onto", "{place}/plain", "{out}"], 6),
    (["generate", "--model", "{place}/plain", "--prompt", "Once", "--max-new", "4", "--out", "{out}"], 4)],
    ids=["convert", "to torch", "splice", "generate"])
def test_one_product(arguments: list[str], kills: int, place: Path, tmp_path: Path,
                     environment: dict[str, str]) -> None:
    """It is there, whole, or not at all; and nothing else is left once the command has ended."""
    out = tmp_path / "new" / ("out.pt" if "torch" in arguments else "out")
    given = [one.format(place=place, out=out) for one in arguments]
    out.parent.mkdir()
    assert main(given) == 0
    whole = contents(out)

    def prepare() -> None:
        clear(out.parent)
        out.parent.mkdir()

    def look(at: int) -> None:
        if out.exists():
            assert contents(out) == whole
            clear(out)
        assert main(given) == 0
        assert contents(out) == whole and list(out.parent.iterdir()) == [out]

    assert kill_command_at_every_file_operation(
        ["-m", "tilelli_jax", *given], look, prepare=prepare, below=tmp_path, kills=kills,
        environment=environment | READ_ONLY) >= min(kills, 3)


def without_times(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key not in CHANGING}
    return [without_times(one) for one in tree] if isinstance(tree, list) else tree


def config(path: Path, tree: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def kill_again_and_again(given: list[str], kills: int, most: int, below: Path,
                         environment: dict[str, str]) -> None:
    """Kills the command so often, each time a while after it was started again.

    Args:
        most: operations on files that a first run may make; later ones may make more.
    """
    rng = random.Random(0)
    for i in range(kills):
        status, report, _ = run_and_kill(["-m", "tilelli_jax", *given], rng.randint(1, most * (i + 2) // 2),
                                         below, environment | READ_ONLY)
        assert status in (0, -signal.SIGKILL), report
        assert status or i > kills // 2, "killed too late"


def test_training(place: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """From before its first file is written: its first checkpoints are among what is killed."""
    given = ["train", "--config", config(tmp_path / "tiny.yaml", {
        "model": {"family": "routed", "d_model": 16, "n_layers": 1, "max_seq_len": 16, "n_heads": 2,
                  "d_head": 4, "pathways": ["local", "dense"], "dense_expand": 2},
        "data": {"source": str(place / "text.txt")}, "optimizer": {"learning_rate": 1e-2},
        "train": {"steps": 12, "batch_size": 8, "seq_len": 16, "log_every": 1, "eval_every": 4,
                  "eval_batch_size": 8, "eval_bytes": 500, "checkpoint_every": 3}})]
    assert main([*given, f"run_dir={tmp_path / 'whole'}"]) == 0
    once, again = tmp_path / "once", tmp_path / "again"

    def look(at: int) -> None:
        assert main([*given, f"run_dir={once}"]) == 0
        assert contents(once / "model") == contents(tmp_path / "whole" / "model")

    assert kill_command_at_every_file_operation(
        ["-m", "tilelli_jax", *given, f"run_dir={once}"], look, prepare=lambda: clear(once), below=once,
        kills=14, environment=environment | READ_ONLY) >= 12
    kill_again_and_again([*given, f"run_dir={again}"], 6, 40, again, environment)
    assert main([*given, f"run_dir={again}"]) == 0
    assert contents(again / "model") == contents(tmp_path / "whole" / "model")
    summaries = [without_times(json.loads((path / "summary.json").read_text()))
                 for path in (tmp_path / "whole", again)]
    assert summaries[0] == summaries[1]


def recall_config(place: Path, out: Path) -> dict[str, Any]:
    """Of every other question the right answer is what the network says."""
    prompt = PromptConfig(template="{question} ?", instruction="")
    answers = AnswersConfig(max_new=8, batch_size=20)
    rng, language = random.Random(0), open_language(place / "vanilla-0")
    asked = [" ".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(120)]
    said = [language.tokenizer.decode(ids.tolist()) for ids in answer(
        language, list(map(Prompter(language, prompt), asked)), answers)]
    rows = [{"id": str(i), "question": question, "answers": ["nothing" if i % 2 else right]}
            for i, (question, right) in enumerate(zip(asked, said, strict=True))]
    (place / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"out": str(out), "network": {"path": str(place / "vanilla-0")},
            "prompt": config_lib.to_dict(prompt), "answers": config_lib.to_dict(answers),
            "questions": {"sources": [str(place / "questions.jsonl")], "items": 120},
            "signals": {"shard_items": 20, "batch_size": 20, "noise_samples": 1},
            "fit": {"seeds": [0], "sidecar": {"epochs": 3, "d_hidden": 8}, "strengths": [0.1], "jobs": 1},
            "replicates": 100, "split": {"test": 0.3}}


def difficulty_config(place: Path, out: Path) -> dict[str, Any]:
    sae = {"model": {"family": "sae", "d_model": 16, "n_latents": 48, "k": 6},
           "activations": {"source": "activations"},
           "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5, "weight_decay": 0},
           "train": {"steps": 40, "batch_size": 256, "eval_batch_size": 256, "eval_every": 40,
                     "checkpoint_every": 10}}
    return {"out": str(out), "seed": 1,
            "data": {"family": "text", "source": str(place / "text.txt"), "items": 240, "prompt": 40,
                     "ending": 6},
            "network": {"path": str(place / "vanilla-0")}, "large_model": {"path": str(place / "vanilla-1")},
            "extract": {"layers": [1], "shard_items": 60},
            "sae": {"train": config(place / "sae.yaml", sae), "min_steps": 20, "max_dead": 0.9,
                    "min_explained": 0.1},
            "probe": {"replicates": 400, "folds": 3, "jobs": 1}, "causal": {"items": 20, "controls": 1}}


def comparison_config(place: Path, out: Path) -> dict[str, Any]:
    routed = config(place / "routed.yaml", {
        "model": {"family": "routed", "d_model": 16, "n_layers": 1, "max_seq_len": 16, "pathways": ["dense"],
                  "dense_expand": 2},
        "data": {"source": str(place / "text.txt")},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "train": {"steps": 8, "batch_size": 8, "seq_len": 16, "log_every": 8, "eval_every": 8,
                  "eval_batch_size": 8, "eval_bytes": 100, "checkpoint_every": 4}})
    return {"out": str(out), "reference": "full", "seeds": [0, 1],
            "models": [["ternary", routed, "model.quantizer=ternary"], ["full", routed]],
            "texts": [str(place / "text.txt")]}


@pytest.mark.parametrize(("name", "options"), [
    ("recall", recall_config), ("difficulty", difficulty_config), ("compare", comparison_config)])
def test_a_study(name: str,
                 options: Callable[[Path, Path], dict[str, Any]], place: Path, tmp_path: Path,
                 environment: dict[str, str]) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([name, "--config", config(tmp_path / "whole.yaml", options(place, whole))]) == 0
    given = [name, "--config", config(tmp_path / "tiny.yaml", options(place, out))]
    kill_again_and_again(given, 7, 25, out, environment)
    assert main(given) == 0
    results = [without_times(json.loads((path / "results.json").read_text().replace(str(path), "out")))
               for path in (whole, out)]
    results[0]["name"] = results[1]["name"]
    assert results[0] == results[1]
    assert not list(out.rglob(".*")), "nothing is left of what was killed"
