"""Runs every benchmark on a tiny network; the timings are not meaningful."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import (
    compile_time,
    decode,
    extraction,
    ladder,
    measure,
    panel,
    pretrained,
    recall,
    resampling,
    sae,
    serve,
    smollm2,
    train_step,
)
from tests.extras import needs_torch, needs_transformers
from tests.hugging_face_directory import WORDS, write_directory
from tests.reference_impl.random_weights import random_network
from tilelli_jax.loading import store
from tilelli_jax.models import ModelConfig
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.llama import LlamaConfig
from tilelli_jax.models.vanilla import VanillaConfig

# PyTorch issues this warning when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def small_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> ModelConfig:
        return VanillaConfig(d_model=16, n_layers=1, max_seq_len=32, n_heads=2, dense_expand=2,
                             quantizer="ternary" if "ternary" in name else "none")

    monkeypatch.setattr(train_step, "BATCH", 8)
    monkeypatch.setattr(train_step, "TIME", 16)
    for module in (train_step, decode, compile_time):
        monkeypatch.setattr(module, "load", load)
    for module in (train_step, decode):
        monkeypatch.setattr(module, "peak_memory", lambda *_: 1.0)  # would start another process
    for name, value in (("PROMPT", 4), ("FEW", 2), ("MANY", 6), ("UNCACHED_BYTES", 1)):
        monkeypatch.setattr(decode, name, value)
    monkeypatch.setattr(compile_time, "CASES", {  # fewer unrolled blocks, since each is compiled separately
        ("scanned", 8): True, ("scanned", 32): True, ("unrolled", 2): False})
    monkeypatch.setattr(decode, "copy_limit", lambda: 1e9)
    monkeypatch.setattr(train_step, "matmul_limit", lambda: 1e9)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


@needs_torch
@pytest.mark.parametrize("name", ["Lite", pytest.param("Lite ternary", marks=pytest.mark.exhaustive)])
def test_train_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compile", lambda forward: forward)  # needs a C++ compiler and minutes
    with measure.tee(tmp_path / "table.txt") as print_line:
        train_step.compare([name], 1, print_line)
    lines = lines_of(tmp_path / "table.txt")
    ternary = name == "Lite ternary"
    assert [line.removeprefix(name).split()[0] for line in lines if line.startswith(f"{name} ")] == [
        "scanned", *(["scanned,"] if ternary else []), "unrolled", "written", "eager", "compiled"]
    assert lines[-1].startswith("Lite, ternary step / fp32 step: ") == ternary


@needs_torch
def test_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compile", lambda model: model)
    with measure.tee(tmp_path / "table.txt") as print_line:
        decode.compare(["Lite"], 1, print_line)
    head, _, row = lines_of(tmp_path / "table.txt")[-3:]
    assert head.startswith("network") and row.startswith("Lite")


@needs_transformers
@pytest.mark.exhaustive
def test_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides agree, and the table has every part."""
    for name, value in (("QUESTIONS", 4), ("TIME", 24), ("NEW", 3), ("SAMPLES", 2), ("BATCH", 2),
                        ("JUDGED", 30)):
        monkeypatch.setattr(panel, name, value)
    with measure.tee(tmp_path / "table.txt") as print_line:
        panel.compare(*llama_directories(tmp_path), 1, print_line, lambda side, part: 1.0)
    assert [line.split()[0] for line in lines_of(tmp_path / "table.txt")[2:]] == [
        "prompt", "answer", "judgement", "samples"]


def llama_directories(path: Path) -> tuple[Path, Path]:
    """A small network as a model directory and as a Hugging Face directory."""
    config = LlamaConfig(vocab_size=97, d_model=16, layers=("full",) * 3, n_heads=2, n_kv_heads=1, d_head=8,
                         d_hidden=24, max_seq_len=64)
    model = random_network(config, 0)[0]
    store.save(model, path / "ours")
    model.save_pretrained(path / "theirs")
    return path / "ours", path / "theirs"


@needs_transformers
@pytest.mark.exhaustive
def test_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TIME", 8), ("PROMPT", 4), ("FEW", 2), ("MANY", 5), ("BATCHES", (1, 2))):
        monkeypatch.setattr(smollm2, name, value)
    directories = llama_directories(tmp_path)
    with measure.tee(tmp_path / "table.txt") as print_line:
        smollm2.compare("bfloat16", *directories, 1, print_line)
        smollm2.memory(directories[0], print_line)
    heads = [line.split("  ")[0] for line in lines_of(tmp_path / "table.txt")]
    assert heads.count("ours") == 3 and heads.count("transformers, eager") == 3
    assert {"forward, 2 × 8, bfloat16", "greedy decoding, batch 2, bfloat16", "memory"} <= set(heads)


@needs_torch
@needs_transformers
def test_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CLIENTS", (1, 2)), ("REQUESTS", 1), ("NEW", 3), ("SLOTS", 2), ("MAX_LEN", 64)):
        monkeypatch.setattr(serve, name, value)
    directory = tmp_path / "network"
    write_directory(directory, LlamaConfig(
        vocab_size=len(WORDS), d_model=16, layers=("full",) * 2, n_heads=2, n_kv_heads=1, d_head=8,
        d_hidden=24, max_seq_len=64, end_ids=()))
    monkeypatch.setattr(serve, "QUESTION", "who sat on the mat")
    with serve.served(directory) as url:
        rows = [serve.under_load(url, clients, 1) for clients in serve.CLIENTS]
    assert [row[0] for row in rows] == ["1", "2"] and all(float(row[2]) > 0 for row in rows)
    assert serve.transformers_rate(directory, 1) > 0
    with measure.tee(tmp_path / "table.txt") as print_line:
        serve.first_tokens(directory, 1, print_line)
    assert [line.split("  ")[0] for line in lines_of(tmp_path / "table.txt")][2:] == [
        "nothing", "final stream (layer probe)", "logit lens (sidecar)"]


def test_compile_time(tmp_path: Path) -> None:
    with measure.tee(tmp_path / "table.txt") as print_line:
        compile_time.compare(1, print_line)
    assert lines_of(tmp_path / "table.txt")[-1].startswith("32 blocks / 8 blocks, scanned: ")


@needs_torch
def test_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BATCH", 2), ("TIME", 8), ("PROMPT", 4), ("FEW", 2), ("MANY", 5), ("COPIES", 1)):
        monkeypatch.setattr(pretrained, name, value)
    monkeypatch.setattr(pretrained, "CONFIG", GPTNeoXConfig(vocab_size=64, d_model=16, n_layers=2, n_heads=2,
                                                            d_hidden=32, max_seq_len=64))
    with measure.tee(tmp_path / "table.txt") as print_line:
        pretrained.compare(1, print_line, tmp_path)
        pretrained.convert(1, print_line, tmp_path)
    heads = [line.split("  ")[0] for line in lines_of(tmp_path / "table.txt")]
    assert heads[1] == "forward, 2 × 8" and "ours" in heads and "convert back" in heads


def test_output_is_written_only_with_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with measure.tee(None) as print_line:
        print_line("text")
    assert capsys.readouterr().out == "text\n" and not list(tmp_path.iterdir())


def test_resampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ITEMS", 50), ("REPLICATES", 8), ("PERMUTATIONS", 9)):
        monkeypatch.setattr(resampling, name, value)
    with measure.tee(tmp_path / "table.txt") as print_line:
        resampling.compare(1, print_line)
    lines = lines_of(tmp_path / "table.txt")[2:]
    assert [line.split(",")[0] for line in lines] == ["bootstrap", "permutation"]


def test_ladder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ROWS", 60), ("STREAM", 16), ("LATENTS", 20), ("ACTIVE", 2)):
        monkeypatch.setattr(ladder, name, value)
    with measure.tee(tmp_path / "table.txt") as print_line:
        ladder.compare(True, print_line)
    lines = lines_of(tmp_path / "table.txt")[2:]
    assert [line[:2] for line in lines] == ["P1", "P2", "P3", "P3", "P4", "P5", "P5"]


@needs_torch
def test_sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WIDTH", 16), ("LATENTS", 32), ("ACTIVE", 2), ("BATCH", 8), ("WIDE", 48)):
        monkeypatch.setattr(sae, name, value)
    with measure.tee(tmp_path / "table.txt") as print_line:
        sae.compare(1, print_line)
    rows = [line[:7] for line in lines_of(tmp_path / "table.txt") if line.startswith(("ours", "PyTorch"))]
    assert rows == ["ours, c", "ours, b", "PyTorch", "ours   ", "PyTorch", "ours   ", "PyTorch"]


@needs_torch
def test_extraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LAYER", 1), ("MAX_PROMPT", 20), ("MEAN", 15), ("SD", 5), ("MIN_PROMPT", 4)):
        monkeypatch.setattr(extraction, name, value)
    monkeypatch.setattr(extraction, "CONFIG", GPTNeoXConfig(vocab_size=64, d_model=16, n_layers=2, n_heads=2,
                                                            d_hidden=32, max_seq_len=64))
    with measure.tee(tmp_path / "table.txt") as print_line:
        extraction.compare(1, 5, print_line)
    rows = [line.partition("  ")[0] for line in lines_of(tmp_path / "table.txt")[3:]]
    assert rows[0] == "ours" and "fm-difficulty-probe's loop, sdpa attention, 1 thread" in rows


@needs_torch
def test_extraction_check_detects_differences() -> None:
    features = extraction.Extracted(np.ones(2), np.ones(2), np.ones((2, 3), np.float16))
    extraction.check(features, features)
    for name in features._fields:
        with pytest.raises(AssertionError):
            changed = getattr(features, name) + np.float16(0.02)
            extraction.check(features, features._replace(**{name: changed}))


@needs_torch
def test_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "peak_memory", lambda *_: 1.0)  # would start another process
    monkeypatch.setattr(recall, "BATCH", 2)
    with measure.tee(tmp_path / "table.txt") as print_line:
        recall.compare(recall.QUICK, 1, print_line)
        recall.on_gpu(recall.QUICK, (1, 2), 1, print_line)
    lines = lines_of(tmp_path / "table.txt")
    assert [line.partition("  ")[0] for line in lines[3:6]] == [
        "Recall's method", "ours, one prompt", "ours, 2 prompts at once"]
    assert [line.partition("  ")[0] for line in lines[-2:]] == ["1 at once", "2 at once"]


@needs_torch
def test_recall_check_detects_differences() -> None:
    features = recall.Features(np.ones((1, 2, 12)), np.ones((1, 10)), np.ones((1, 2)), np.ones(1))
    recall.check(features, features)
    for name in features._fields:
        with pytest.raises(AssertionError):
            recall.check(features, features._replace(**{name: getattr(features, name) + 0.01}))
