"""Fuzz targets of recall: configurations, questions, networks, sidecars, stages, results."""

from __future__ import annotations

import contextlib
import io
import json
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.eval.recall.small import PROMPT, sidecar_of_chance
from tests.fuzz.networks import save
from tests.fuzz.running import Target
from tests.reference_impl.random_weights import random_network
from tilelli_jax.eval.recall import verdicts
from tilelli_jax.eval.recall.answering import greedy_ids
from tilelli_jax.eval.recall.command import app, predict
from tilelli_jax.eval.recall.command import main as recall
from tilelli_jax.eval.recall.config import AnswersConfig, PromptConfig
from tilelli_jax.eval.recall.prompting import Prompter
from tilelli_jax.eval.recall.verdicts import VerdictRule
from tilelli_jax.eval.tables import write_columns
from tilelli_jax.loading.fingerprint import network_fingerprint
from tilelli_jax.loading.language import load_with_tokenizer
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.vanilla import VanillaConfig

OUT = "out out/*"
NO_MODEL = "nowhere: not a model directory"  # error on an empty directory, which the study opens last
N = 80  # questions
WORDS = [f"w{i}" for i in range(20)]
LANGUAGE = GPTNeoXConfig(vocab_size=len(WORDS) + 3, d_model=8, n_layers=4, n_heads=2, d_hidden=8)
BYTES = VanillaConfig(d_model=8, n_layers=4, max_seq_len=64, n_heads=2, dense_expand=1)
STUDY = {"out": "out", "network": {"path": "network"}, "questions": {"sources": ["rows.jsonl"], "items": N},
         "prompt": {"template": "ask {question} ?", "instruction": ""},
         "signals": {"shard_items": 30, "batch_size": 16, "dtype": "float32"},
         "answers": {"max_new": 1, "batch_size": 16}, "replicates": 100,
         "fit": {"seeds": [0], "sidecar": {"epochs": 1, "d_hidden": 4}, "c_values": [0.1], "jobs": 1},
         "split": {"test": 0.3, "calibrate": 0.2, "validate": 0.2}}


def write_yaml(name: str, tree: dict[str, Any]) -> None:
    Path(name).write_text(yaml.safe_dump(tree))


def write_lines(name: str, rows: list[Any]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_silently(main: Callable[[list[str]], int], *argv: str) -> None:
    """Runs a study without printing its progress."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert main(list(argv)) == 0, err.getvalue()


def _question_rows(answers: list[str]) -> list[dict[str, Any]]:
    """Questions; for every second one, the given answer is among the correct answers."""
    rng = np.random.default_rng(0)
    return [{"id": f"q{i}", "question": " ".join(rng.choice(WORDS, 4)), "group": f"e{i // 4}",
             "answers": [answer if i % 2 else "nothing", "it"], "popularity": float(rng.integers(0, 100))}
            for i, answer in enumerate(answers)]


def _make_questions() -> None:
    """The same questions in every format, and an empty directory in place of the network."""
    rows = _question_rows(["word"] * N)
    write_lines("rows.jsonl", rows)
    Path("rows.json").write_text(json.dumps(rows))
    for name, separator in (("rows.csv", ","), ("rows.tsv", "\t")):
        cells = [("id", "question", "answers", "popularity"), *(
            (row["id"], row["question"], row["answers"][0], row["popularity"]) for row in rows)]
        Path(name).write_text("".join(separator.join(map(str, line)) + "\n" for line in cells))
    write_columns(Path("rows.parquet"), {name: [row[name] for row in rows] for name in rows[0]})
    answers = [{"Value": "it", "Aliases": row["answers"], "NormalizedAliases": row["answers"]}
               for row in rows]
    Path("trivia.json").write_text(json.dumps({"Data": [
        {"Question": row["question"], "QuestionId": row["id"], "Answer": answer}
        for row, answer in zip(rows, answers, strict=True)]}))
    Path("nowhere").mkdir()
    write_yaml("recall.yaml", STUDY | {"network": {"path": "nowhere"}})


def _make_network(path: Path) -> None:
    """A Hugging Face directory with a tokenizer and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    random_network(LANGUAGE, 0)[0].save_pretrained(path)
    words = {word: i for i, word in enumerate(["[UNK]", "ask", "?", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}ask {{ m['content'] }}{% endfor %}"
    settings = {"chat_template": template, "bos_token": "[UNK]"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def _make_sidecars() -> None:
    """Networks with sidecars, and a file of questions."""
    write_lines("asked.jsonl", [{"question": "w1 w2"}, {"question": "w3"}])
    _make_network(Path("network"))
    save(BYTES, Path("bytes"))
    for name, prompt in (("network", PromptConfig(template="chat", instruction="")), ("bytes", PROMPT)):
        verdicts.write(sidecar_of_chance(Path(f"{name}-sidecar")), VerdictRule(
            knows_from=0.7, unknown_below=0.3, aim={"precision": 0.85, "guarantee": False, "confidence": 0.9},
            network={"name": name, "fingerprint": network_fingerprint(Path(name)), "n_layers": 4},
            prompt=prompt))


def _make_study() -> None:
    _make_network(Path("network"))
    language = load_with_tokenizer("network")
    prompter = Prompter(language, PromptConfig("ask {question} ?", ""))
    prompts = [prompter(row["question"]) for row in _question_rows([""] * N)]
    answer_ids = greedy_ids(language, prompts, AnswersConfig(max_new=1, batch_size=16))
    write_lines("rows.jsonl", _question_rows([language.tokenizer.decode(ids.tolist()) for ids in answer_ids]))
    write_yaml("recall.yaml", STUDY)
    run_silently(recall, "--config", "recall.yaml")


def _page_on_used_port(argv: list[str]) -> int:
    """Starts the page on a port in use, which fails after the study has been read."""
    with socket.create_server(("127.0.0.1", 0)) as used_port:
        return app([*argv, "--port", str(used_port.getsockname()[1])])


QUESTIONS = partial(Target, make=_make_questions, main=recall, writes=OUT, prints_progress=True,
                    expected_error=NO_MODEL)
TARGETS = (
    QUESTIONS("recall, configuration", argv="--config recall.yaml out=out", mutated="recall.yaml", inputs=40),
    *(QUESTIONS(f"recall, {name}", argv=f"--config recall.yaml questions.sources=[{name}]", mutated=name,
                inputs=n)
      for name, n in (("rows.jsonl", 25), ("rows.json", 15), ("rows.csv", 25), ("rows.tsv", 10),
                      ("rows.parquet", 30), ("trivia.json", 15))),
    Target("recall, network", _make_sidecars, predict,
           "--any-network --model network --sidecar network-sidecar w1", "network network/*", 60),
    Target("recall, sidecar", _make_sidecars, predict, "--model bytes --sidecar bytes-sidecar w1",
           "bytes-sidecar bytes-sidecar/*", 40),
    Target("recall, asked", _make_sidecars, predict,
           "--model bytes --sidecar bytes-sidecar --questions asked.jsonl --out out.jsonl",
           "asked.jsonl", 20),
    Target("recall, stages", _make_study, recall, "--config recall.yaml --stage evaluate",
           "out/stages/**/*", 80, OUT, prints_progress=True),
    Target("recall, page", _make_study, _page_on_used_port, "--model nowhere --sidecar nowhere --study out",
           "out/results.json", 30, expected_error="--host, --port: "))
