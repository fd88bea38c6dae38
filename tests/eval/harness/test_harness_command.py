"""`tilelli eval`, and lm_eval's own command line with the model `tilelli`, on tasks written here."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.error_lines import assert_one_line
from tests.reference_impl.random_weights import random_network
from tilelli_jax.__main__ import main
from tilelli_jax.loading import store
from tilelli_jax.models.vanilla import VanillaConfig

ROOT = Path(__file__).parents[3]
VANILLA = VanillaConfig(d_model=24, n_layers=1, max_seq_len=48, n_heads=3, dense_expand=2)
DOCUMENTS: list[dict[str, Any]] = [
    {"question": f"{words}?", "choices": [" one", " another"], "answer": i % 2}
    for i, words in enumerate(("cat and dog", "sun and moon", "hot and cold", "up and down"))]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
TASKS = {
    "choices": 'output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n'
               'metric_list: [{metric: acc}]\n',
    "text": 'output_type: loglikelihood_rolling\ndoc_to_target: "{{question}}"\n'
            'metric_list: [{metric: bits_per_byte}]\n',
    "words": 'output_type: generate_until\ndoc_to_target: "{{choices[answer]}}"\n'
             'generation_kwargs: {until: ["\\n"], max_gen_toks: 5}\nmetric_list: [{metric: exact_match}]\n',
}


def test_lm_eval_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert main(["eval", "--model", "x", "--tasks", "y", "--out", str(tmp_path / "out")]) == 2
    assert_one_line(capsys.readouterr().err,
                    "error: tilelli eval needs lm_eval: pip install 'tilelli_jax[lm-eval]'\n")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with `model/` and `tasks/`; lm_eval reads no tasks but these."""
    pytest.importorskip("lm_eval", reason="lm_eval (extra: lm-eval) is not installed here")
    import datasets
    from lm_eval.tasks import manager
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "none/manager.py"))  # its own take 10 s to list
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    store.save(random_network(VANILLA, 0)[0], tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    rows = tmp_path / "tasks/rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    for name, text in TASKS.items():
        (tmp_path / f"tasks/{name}.yaml").write_text(f"task: {name}\n{COMMON.format(rows=rows)}{text}")
    return tmp_path


def log_likelihoods(model: Any, pairs: list[tuple[str, str]]) -> list[float]:
    """Of ASCII continuations, after their contexts."""
    ids = np.zeros((len(pairs), 32), int)
    for row, pair in zip(ids, pairs, strict=True):
        text = "".join(pair).encode()
        row[:len(text)] = list(text)
    nll = np.asarray(jax.jit(lambda ids: model.nll(ids)[0])(ids))
    return [-float(row[len(context) - 1:len(context + continuation) - 1].sum())
            for row, (context, continuation) in zip(nll, pairs, strict=True)]


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", "model", "--include-path", "tasks", "--tasks", "choices,te*,words",
                 "--out", "a/b"]) == 0
    shown = capsys.readouterr().out
    results = json.loads((folder / "a/b/results.json").read_text())
    assert results["results"].keys() == {"choices", "text", "words"}
    model = store.load(folder / "model")
    scores = log_likelihoods(model, [
        *[(row["question"], choice) for row in DOCUMENTS for choice in row["choices"]],
        *[("\0", row["question"]) for row in DOCUMENTS]])
    is_right = np.reshape(scores[:8], (4, 2)).argmax(axis=1) == [row["answer"] for row in DOCUMENTS]
    assert results["results"]["choices"]["acc,none"] == is_right.mean()
    total, n_bytes = sum(scores[8:]), sum(len(row["question"]) for row in DOCUMENTS)
    assert results["results"]["text"]["bits_per_byte,none"] == pytest.approx(
        -total / n_bytes / np.log(2), abs=1e-5)  # float32 sums
    assert results["config"]["model"] == "tilelli" and results["config"]["model_dtype"] == "float32"
    assert results["how_to_reproduce"]["command"].startswith("tilelli eval --model model")
    assert "samples" not in results
    assert f"{results['results']['choices']['acc,none']:.4f}" in shown and "bits_per_byte" in shown
    assert [path.name for path in (folder / "a/b").iterdir()] == ["results.json"]


def test_lm_evals_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    from tilelli_jax.eval.harness.__main__ import main as harness
    monkeypatch.setattr(sys, "argv", [])
    assert harness(["--model", "tilelli", "--model_args", "path=model,max_length=40", "--tasks", "choices",
                    "--include_path", "tasks", "--limit", "2", "--batch_size", "2"]) == 0
    assert "tilelli ({'path': 'model', 'max_length': 40})" in capsys.readouterr().out


def test_the_lines_of_the_docs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/evaluate.md").read_text("utf-8")
    task, = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (folder / "tasks/opposites.yaml").write_text(task)
    (folder / "tasks/opposites.jsonl").write_text(json.dumps(
        {"word": "hot", "choices": [" cold", " warm"], "answer": 0}) + "\n")
    (folder / "runs/mine").mkdir(parents=True)
    (folder / "model").rename(folder / "runs/mine/model")
    lines, = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(lines, {})
    cold, warm = log_likelihoods(store.load(folder / "runs/mine/model"),
                                 [("The opposite of hot is", text) for text in (" cold", " warm")])
    assert capsys.readouterr().out == f"{float(cold > warm)}\n"


@pytest.mark.parametrize(("changed", "message"), [
    (["--tasks", "choicse"], "--tasks: choicse: no such task, did you mean choices?"),
    (["--tasks", ","], "--tasks: expected names of tasks, found ','"),
    (["--tasks", "broken"], "--tasks: broken: cannot be loaded: "),
    (["--limit", "0"], "--limit: expected an integer ≥ 1, found 0"),
    (["--num-fewshot", "-1"], "--num-fewshot: expected an integer ≥ 0, found -1"),
    (["--include-path", "nowhere"], "--include-path: nowhere: no such directory"),
    (["--out", "tasks/rows.jsonl"], "rows.jsonl: expected a directory, found a file"),
    (["--model", "nothing"], "nothing: no such file or directory"),
    (["--batch-size", "0"], "batch_size: expected an integer ≥ 1, found 0"),
    (["--max-length", "50"], "max_length: expected an integer ≥ 1 and ≤ 48, the network's, found 50"),
    (["--chat"], "model: expected a chat template, found none")])
def test_errors(changed: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder / "tasks/choices.yaml").read_text()
    text = text.replace("choices", "broken", 1).replace("rows.jsonl", "no")
    (folder / "tasks/broken.yaml").write_text(text)
    arguments = ["--model", "model", "--include-path", "tasks", "--tasks", "choices", "--out", "out"]
    assert main(["eval", *arguments, *changed]) == 2
    assert_one_line(capsys.readouterr().err.splitlines(keepends=True)[-1], message)
    assert not (folder / "out").exists()
