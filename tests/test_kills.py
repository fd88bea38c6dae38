"""Every command that writes can be killed at any time: the same command again gives the uninterrupted result.

If it cannot start again it prints a one-line error. Studies and training runs are killed repeatedly, each
time later; the other commands at moments spread over all their file operations.
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

from tests.compiled import READ_ONLY
from tests.kill_points import kill_command_at_every_file_operation, run_and_kill
from tests.reference_impl.random_weights import random_network
from tilelli_jax import config as config_lib
from tilelli_jax.__main__ import main
from tilelli_jax.data.synthetic import stories
from tilelli_jax.eval.recall.answering import greedy_ids
from tilelli_jax.eval.recall.config import AnswersConfig, PromptConfig
from tilelli_jax.eval.recall.prompting import Prompter
from tilelli_jax.loading import store
from tilelli_jax.loading.language import load_with_tokenizer
from tilelli_jax.models import GPTNeoXConfig, RoutedConfig, VanillaConfig

pytestmark = pytest.mark.exhaustive
PLAIN = RoutedConfig(d_model=16, n_layers=1, max_seq_len=32, n_heads=2, d_head=4, top_k=4, dense_expand=2,
                     pathways=("local", "dense"))
CHANGING = {"seconds", "tokens_per_second", "git_commit", "run", "path", "out", "command"}


def contents(path: Path) -> dict[str, bytes]:
    """Returns the files of a directory by relative path; for a file, the file itself under ""."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*"))
            if file.is_file()}


def exported(run: Path) -> dict[str, bytes]:
    """Returns the files of a run's model; the card's command does not name the run."""
    return {name: content.replace(str(run).encode(), b"RUN")
            for name, content in contents(run / "model").items()}


def clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with networks and a text."""
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
def test_a_command_with_one_output(arguments: list[str], kills: int, place: Path, tmp_path: Path,
                                   environment: dict[str, str]) -> None:
    """The output is complete or missing, and nothing else remains after the command has ended."""
    out = tmp_path / "new" / ("out.pt" if "torch" in arguments else "out")
    command = [argument.format(place=place, out=out) for argument in arguments]
    out.parent.mkdir()
    assert main(command) == 0
    expected = contents(out)

    def prepare() -> None:
        clear(out.parent)
        out.parent.mkdir()

    def check(at: int) -> None:
        if out.exists():
            assert contents(out) == expected
            clear(out)
        assert main(command) == 0
        assert contents(out) == expected and list(out.parent.iterdir()) == [out]

    assert kill_command_at_every_file_operation(
        ["-m", "tilelli_jax", *command], check, prepare=prepare, below=tmp_path, kills=kills,
        environment=environment | READ_ONLY) >= min(kills, 3)


def without_times(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key not in CHANGING}
    return [without_times(item) for item in tree] if isinstance(tree, list) else tree


def config(path: Path, tree: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def kill_again_and_again(command: list[str], kills: int, most: int, below: Path,
                         environment: dict[str, str]) -> None:
    """Kills the command `kills` times, each time at a random moment after a new start.

    Args:
        most: maximum number of file operations before the first kill; later kills may come later.
    """
    rng = random.Random(0)
    for i in range(kills):
        status, report, _ = run_and_kill(["-m", "tilelli_jax", *command], rng.randint(1, most * (i + 2) // 2),
                                         below, environment | READ_ONLY)
        assert status in (0, -signal.SIGKILL), report
        assert status or i > kills // 2, "killed too late"


def test_training(place: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """Killed from before the first file on, and also while writing the first checkpoints."""
    command = ["train", "--config", config(tmp_path / "tiny.yaml", {
        "model": {"family": "routed", "d_model": 16, "n_layers": 1, "max_seq_len": 16, "n_heads": 2,
                  "d_head": 4, "pathways": ["local", "dense"], "dense_expand": 2},
        "data": {"source": str(place / "text.txt")}, "optimizer": {"learning_rate": 1e-2},
        "train": {"steps": 12, "batch_size": 8, "seq_len": 16, "log_every": 1, "eval_every": 4,
                  "eval_batch_size": 8, "eval_bytes": 500, "checkpoint_every": 3}})]
    whole, once, again = (tmp_path / name / "run" for name in ("whole", "once", "again"))  # the card's title
    assert main([*command, f"run_dir={whole}"]) == 0

    def check(at: int) -> None:
        assert main([*command, f"run_dir={once}"]) == 0
        assert exported(once) == exported(whole)

    assert kill_command_at_every_file_operation(
        ["-m", "tilelli_jax", *command, f"run_dir={once}"], check, prepare=lambda: clear(once), below=once,
        kills=14, environment=environment | READ_ONLY) >= 12
    kill_again_and_again([*command, f"run_dir={again}"], 6, 40, again, environment)
    assert main([*command, f"run_dir={again}"]) == 0
    assert exported(again) == exported(whole)
    summaries = [without_times(json.loads((path / "summary.json").read_text()))
                 for path in (whole, again)]
    assert summaries[0] == summaries[1]


def recall_config(place: Path, out: Path) -> dict[str, Any]:
    """Every second question's correct answer is the network's own answer."""
    prompt = PromptConfig(template="{question} ?", instruction="")
    answers = AnswersConfig(max_new=8, batch_size=20)
    rng, language = random.Random(0), load_with_tokenizer(place / "vanilla-0")
    questions = [" ".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(120)]
    answer_texts = [language.tokenizer.decode(ids.tolist()) for ids in greedy_ids(
        language, list(map(Prompter(language, prompt), questions)), answers)]
    rows = [{"id": str(i), "question": question, "answers": ["nothing" if i % 2 else right]}
            for i, (question, right) in enumerate(zip(questions, answer_texts, strict=True))]
    (place / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"out": str(out), "network": {"path": str(place / "vanilla-0")},
            "prompt": config_lib.to_dict(prompt), "answers": config_lib.to_dict(answers),
            "questions": {"sources": [str(place / "questions.jsonl")], "items": 120},
            "signals": {"shard_items": 20, "batch_size": 20, "noise_samples": 1},
            "fit": {"seeds": [0], "sidecar": {"epochs": 3, "d_hidden": 8}, "c_values": [0.1], "jobs": 1},
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
            "models": {"ternary": {"train": routed, "set": ["model.quantizer=ternary"]},
                       "full": {"train": routed}},
            "texts": [str(place / "text.txt")]}


@pytest.mark.parametrize(("name", "options"), [
    ("recall", recall_config), ("difficulty", difficulty_config), ("compare", comparison_config)])
def test_a_study(name: str,
                 options: Callable[[Path, Path], dict[str, Any]], place: Path, tmp_path: Path,
                 environment: dict[str, str]) -> None:
    uninterrupted, out = tmp_path / "whole", tmp_path / "out"
    assert main([name, "--config", config(tmp_path / "whole.yaml", options(place, uninterrupted))]) == 0
    command = [name, "--config", config(tmp_path / "tiny.yaml", options(place, out))]
    kill_again_and_again(command, 7, 25, out, environment)
    assert main(command) == 0
    results = [without_times(json.loads((path / "results.json").read_text().replace(str(path), "out")))
               for path in (uninterrupted, out)]
    results[0]["name"] = results[1]["name"]
    assert results[0] == results[1]
    assert not list(out.rglob(".*")), "killed processes leave no hidden files"
