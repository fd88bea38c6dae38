"""The tables of docs/errors.md are true: each line's message is the error that this input causes."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml

from tests.reference_impl.random_weights import random_network
from tilelli_jax import config as config_lib
from tilelli_jax.commands.data import main as prepare
from tilelli_jax.config import load
from tilelli_jax.data.chat_pairs import ChatConfig, open_pairs, read_pairs
from tilelli_jax.data.config import DataConfig
from tilelli_jax.data.corpus import open_corpus
from tilelli_jax.data.reading import check_batches
from tilelli_jax.data.shards import read_shards
from tilelli_jax.data.text_files import text_chunks
from tilelli_jax.errors import InputError
from tilelli_jax.eval.difficulty.series import read_series
from tilelli_jax.eval.inputs.rows import read_rows
from tilelli_jax.eval.stages import Stages
from tilelli_jax.io import json_text, yaml_text
from tilelli_jax.io.files import lock, new_directory, read_bytes
from tilelli_jax.loading import store
from tilelli_jax.loading.language import load as load_network
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.training import budget
from tilelli_jax.training.config import ExperimentConfig, TrainConfig
from tilelli_jax.training.run import RunDirectory

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?P<input>.+?) \| `(?P<message>.+)` \|$")
SMALL = VanillaConfig(d_model=8, n_layers=1, max_seq_len=6, n_heads=2, dense_expand=2)
ROWS = {found["input"].replace("`", ""): found["message"]
        for line in (ROOT / "docs/errors.md").read_text().splitlines() if (found := ROW.match(line))}
Provoke = Callable[[Path], Any]


def said(name: str, content: str | bytes, read: Provoke) -> Provoke:
    """Reads a file of this content."""
    def provoke(path: Path) -> Any:
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return read(path / name)
    return provoke


def made(make: Provoke, name: str = "prompts.txt") -> Provoke:
    """Reads what is made there."""
    def provoke(path: Path) -> Any:
        make(path / name)
        return read_bytes(path / name)
    return provoke


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def shards(change: Provoke) -> Provoke:
    def provoke(path: Path) -> Any:
        (path / "t.txt").write_text("one\n\ntwo\n\n" * 50)
        assert prepare(["--source", str(path / "t.txt"), "--out", str(path / "shards")]) == 0
        change(path / "shards")
        return read_shards(path / "shards")
    return provoke


def of_run(change: Provoke) -> Provoke:
    """A run is begun, something is changed, and the run is taken up with another seed."""
    def provoke(path: Path) -> Any:
        run, config = RunDirectory(path / "run"), ExperimentConfig(run_dir=str(path / "run"))
        run.open(config, force_resume=False, write=True)
        change(path / "run")
        again = RunDirectory(path / "run")
        again.lock()
        return again.open(ExperimentConfig(run_dir=str(path / "run"), seed=1), force_resume=False, write=True)
    return provoke


def with_budget(path: Path) -> Any:
    run = RunDirectory(path / "run")
    run.open(ExperimentConfig(run_dir=str(path / "run")), force_resume=False, write=True)
    (path / "run" / "checkpoints" / "20").mkdir(parents=True)
    return run.open(ExperimentConfig(run_dir=str(path / "run"), train=TrainConfig(minutes=5.0)),
                    force_resume=True, write=True)


def too_short(path: Path) -> Any:
    costs = budget.StepTimes(20.0, 0.0, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "measure_step_times", lambda task, training, seconds, check: check(costs))
        anything: Any = None
        return budget.decide_steps(anything, anything, TrainConfig(minutes=0.1), time.monotonic())


def without_decision(path: Path) -> Any:
    (path / "run" / "checkpoints" / "20").mkdir(parents=True)
    return RunDirectory(path / "run").read_steps()


def somebody_elses(path: Path) -> None:
    (path / "config.yaml").unlink()
    (path / "novel.txt").touch()


def model(change: Provoke) -> Provoke:
    def provoke(path: Path) -> Any:
        store.save(random_network(SMALL, 0)[0], path / "model")
        change(path / "model")
        return store.load(path / "model")
    return provoke


def cut(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:len(content) // 2])


def hugging_face(**changes: Any) -> Provoke:
    """Reads a Hugging Face directory whose config.json says something else."""
    def provoke(path: Path) -> Any:
        config = GPTNeoXConfig(vocab_size=20, d_model=8, n_layers=1, n_heads=2, d_hidden=16)
        random_network(config, 0)[0].save_pretrained(path / "hf")
        tree = json.loads((path / "hf/config.json").read_text())
        (path / "hf/config.json").write_text(json.dumps({**tree, **changes}))
        return load_network(path / "hf")
    return provoke


def pointer(path: Path) -> Any:
    (path / "hf").mkdir()
    (path / "hf/config.json").write_text(POINTER)
    return load_network(path / "hf")


def whole_numbers(path: Path) -> None:
    found = safetensors.numpy.load_file(path / "model.safetensors")
    name = "blocks.0.norm1.bias"
    safetensors.numpy.save_file({**found, name: found[name].astype(np.int64)}, path / "model.safetensors")


def prepared(name: str, content: str | bytes, *options: str) -> Provoke:
    """Shards are made of a file of this content."""
    def provoke(path: Path) -> Any:
        arguments = ["--source", str(path / name), "--out", str(path / "out"), *options]
        return prepare.__wrapped__(arguments)  # type: ignore[attr-defined]
    return said(name, content, lambda path: provoke(path.parent))


def pipe(path: Path) -> Any:
    os.mkfifo(path / "pipe.txt")
    return open_corpus(DataConfig(source=str(path / "pipe.txt")))


def evil(path: Path) -> Any:
    torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    from tilelli_jax.convert.source import open_source

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("true",)
    torch.save({"weight": Evil()}, path / "evil.pt")
    return open_source(path / "evil.pt")


def stage(path: Path) -> Any:
    def work(one: Path) -> None:
        (one / "part").write_text("x")
    found = Stages(path / "stages").make("sae", {"a": 1}, work)
    (found / "part").write_text("y")
    return Stages(path / "stages").make("sae", {"a": 1}, work)


def out_is_there(path: Path) -> None:
    (path / "out").write_text("mine")
    with new_directory(path / "out"):
        pass


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
BOMB = "\n".join(["x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]",
                  *(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 9))])
PROVOKE: dict[str, Provoke] = {
    "a missing file": made(lambda path: None),
    "a directory where a file is expected": made(Path.mkdir),
    "a pipe, a device or a socket": made(os.mkfifo),
    "a file of more than 512 MiB that is read whole": made(sparse),
    "invalid JSON": said("config.json", "{", json_text.read_json),
    "JSON or YAML of more than 100 levels": said("config.json", "[" * 200 + "]" * 200, json_text.read_json),
    "a lone surrogate in a text": said(
        "config.json", '{"a": "\\ud800"}', json_text.read_json),
    "JSON that is not an object where one is expected": said("config.json", "[]", json_text.read_json),
    "invalid YAML, or YAML with a duplicate key": said("run.yaml", "seed: 1\nseed: 2\n", yaml_text.read),
    "a YAML value that does not match its tag": said("run.yaml", "seed: !!bool maybe", yaml_text.read),
    "YAML whose aliases expand to a huge size": said("run.yaml", BOMB, yaml_text.read),
    "an unknown key in a configuration": said("run.yaml", yaml.safe_dump({"train": {"step": 1}}),
                                            lambda path: load(ExperimentConfig, path)),
    "a text whose byte-order mark does not match its bytes": said(
        "text.txt", b"\xff\xfe" + b"\x00\xd8" * 9, lambda path: list(text_chunks(path))),
    "text that is compressed (gzip, zip, zstd, xz, bzip2, lz4, 7-Zip)": prepared(
        "text.txt.gz", gzip.compress(b"some text")),
    "a binary file instead of text: more than 1 % zero bytes; or more than 10 % not UTF-8 and 1 % control "
    "characters": prepared("program", b"\x7fELF\0\0\0\0" * 99),
    "no text in a configuration that requires one": lambda path: open_corpus(
        load(ExperimentConfig, "quick").data),
    "a pipe or a device instead of a text file": pipe,
    "a lone surrogate in JSON lines of text": prepared("text.jsonl", '{"text": "a"}\n{"text": "\\ud800 a"}'),
    "a row whose text is not text": prepared("text.jsonl", '{"text": 5}'),
    "too little text for both parts": prepared("text.txt", "x"),
    "pairs that are longer than a row": said(
        "chat.jsonl", "".join(f'{{"prompt": "{n * "a"}", "response": "b"}}\n' for n in (1, 22)),
        lambda path: open_pairs(ChatConfig(source=str(path)), 30)),
    "a conversation in which user and assistant do not alternate": said(
        "chat.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}',
        read_pairs),
    "a conversation that does not end with a reply": said(
        "chat.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', read_pairs),
    "--column where only text files are read": prepared("text.txt", "some text", "--column", "nope"),
    "a batch that memory cannot hold": lambda path: check_batches(1 << 50, 1, 65, 1),
    "shards without their meta.json, or from two versions": shards(
        lambda path: (path / "meta.json").unlink()),
    "train.bin of another size than meta.json states": shards(
        lambda path: (path / "train.bin").write_bytes(b"few")),
    "another configuration in the directory of a run": of_run(lambda path: None),
    "another time budget for a run that has started": with_budget,
    "a time budget that is 0 or not a number": lambda path: config_lib.from_dict(
        ExperimentConfig, {"train": {"minutes": math.nan}}),
    "a time budget whose number of updates is lost": without_decision,
    "a time budget that is too short": too_short,
    "not a run directory": of_run(somebody_elses),
    "a run in use by another process": of_run(lambda path: lock(path, wait=False)),
    "not a model directory": model(lambda path: (path / "config.json").unlink()),
    "truncated weights": model(cut),
    "weights that do not fit the configuration": model(lambda path: safetensors.numpy.save_file(
        {"other": np.zeros(3, np.float32)}, path / "model.safetensors")),
    "a git-lfs pointer": model(lambda path: (path / "model.safetensors").write_text(POINTER)),
    "a git-lfs pointer for a file of JSON, a tokenizer or a text": pointer,
    "weights that are not floating-point numbers": model(whole_numbers),
    "an id outside the vocabulary": hugging_face(eos_token_id=10**9),
    "weights quantised by another library": hugging_face(
        quantization_config={"quant_method": "bitsandbytes"}),
    "a rotation of base 0": hugging_face(rope_parameters={"rope_theta": 0}),
    "a rotary scaling that GPT-NeoX does not support": hugging_face(
        rope_scaling={"type": "longrope", "factor": 2.0}),
    "a truncated GGUF file": said("model.gguf", b"GGUF\x03\0\0\0" + bytes(15), load_network),
    "another file with the name of a GGUF file": said("model.gguf", b"PK\x03\x04", load_network),
    "a network that does not exist": made(lambda path: load_network(path / "misspelt"), "runs"),
    "a .pt file that contains code": evil,
    "an output that already exists": out_is_there,
    "an unsupported format": said("q.xlsx", "PK", read_rows),
    "a line that is not JSON": said("q.jsonl", '{"a": 1}\n{', read_rows),
    "no rows": said("q.jsonl", "", read_rows),
    "a row of too few cells": said("q.csv", "a,b\n1,2\n3\n", read_rows),
    "a missing column": said("q.csv", "x,y\n1,2\n", lambda path: read_series(path, "OT")),
    "a cell that is not a finite number": said(
        "q.csv", "x,y\n1,2\n1,three\n", lambda path: read_series(path, "y")),
    "an invalid parquet file": said("q.parquet", "PAR1", read_rows),
    "a changed file of a stage": stage}


def test_every_line_is_provoked() -> None:
    assert ROWS.keys() == PROVOKE.keys()


@pytest.mark.parametrize("given", PROVOKE)
def test_the_message_is_the_documented_one(given: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as rejected:
        PROVOKE[given](tmp_path)
    message = str(rejected.value).replace(f"{tmp_path}/", "")
    expected = ".*".join(map(re.escape, ROWS[given].split("…")))
    assert re.fullmatch(expected, message), message
