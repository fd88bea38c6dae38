"""Missing and invalid files of fm-difficulty-probe: skipped rungs, and errors of one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.error_lines import assert_one_line
from tests.eval.difficulty.synthetic_release import (
    ITEMS,
    WIDTH,
    Tree,
    make,
    read,
    run,
    write_activations,
    write_autoencoder,
    write_table,
)
from tilelli_jax.eval.difficulty.published.command import main
from tilelli_jax.io.tensors import in_memory, write_file


def test_rungs_without_files_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "llm")
    assert run(tmp_path, "sae_ckpt.mid=null", "cascade=null") == 0
    result = json.loads((tmp_path / "out/probe_results.json").read_text())
    assert list(result["probes"]) == ["P1_cheap", "P2_cheap_raw", "P4_raw_only"]
    assert list(result["deltas"]) == ["P2_cheap_raw-P1_cheap"]
    assert not (tmp_path / "out/cascade_results.json").exists()
    assert "sae_ckpt.mid: none; the rungs that need it are skipped" in capsys.readouterr().err


def without(name: str) -> Callable[[Path, Tree], None]:
    return lambda root, columns: write_table(
        root / "m.parquet", {key: values for key, values in columns.items() if key != name})


def with_column(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[Path, Tree], None]:
    return lambda root, columns: write_table(
        root / "m.parquet", columns | {name: change(np.asarray(columns[name]).tolist())})


def at(row: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda cells: [value if i == row else cell for i, cell in enumerate(cells)]


def missing_expensive_row(root: Path, columns: Tree) -> None:
    table = read(root / "dear.parquet")
    remaining = table["window_id"] != 250
    write_table(root / "dear.parquet", {name: values[remaining] for name, values in table.items()})


def contradictory_expensive_rows(root: Path, columns: Tree) -> None:
    table = read(root / "dear.parquet")
    write_table(root / "dear.parquet", {"window_id": [*table["window_id"].tolist(), 250, 250],
                                        "difficulty": [*table["difficulty"].tolist(), 0, 1]})


def torch_file(root: Path, columns: Tree) -> None:
    (root / "sae_topk_3.pt").write_bytes(b"PK")


def incomplete_losses(root: Path, columns: Tree) -> None:
    (root / "theirs").mkdir()
    write_table(root / "theirs/causal_ablation_all.parquet", {"window_id": [1, 2], "m_natural": [1.0, 2.0]})


def losses_without_latent_number(root: Path, columns: Tree) -> None:
    (root / "theirs").mkdir()
    write_table(root / "theirs/causal_ablation_all.parquet", {
        name: [1.0, 2.0] for name in ("m_natural", "m_recon", "m_ablate_3", "m_ablate_x")})


def nothing(root: Path, columns: Tree) -> None:
    pass


LLM: list[tuple[Callable[[Path, Tree], None], str, str]] = [
    (nothing, "metadata=none.parquet",
     "metadata: ROOT/none.parquet: no such file; paths are relative to --root"),
    (nothing, "metadata=", "release.yaml: metadata: expected a file, found nothing"),
    (nothing, "metadata=release.yaml", "ROOT/release.yaml: "),
    (nothing, "layer=late", "activations.late: ROOT/b.safetensors: no such file"),
    (nothing, "layer=early", "overrides: layer: expected mid or late, found text 'early'"),
    (nothing, "seed=x", "overrides: seed: expected an integer, found text 'x'"),
    (nothing, "metadat=x", "overrides: unknown key 'metadat' (did you mean 'metadata'?)"),
    (nothing, "causal=x", "overrides: unknown key 'causal'"),
    (nothing, "cascade.expensive_metadata=x", "cascade.expensive_metadata: ROOT/x: no such file"),
    (nothing, "cascade.score_cols=[P6]", "cascade.score_cols: expected some of P1_cheap, "),
    (nothing, "cascade.cost_cheap=6", "cascade.cost_expensive: expected more than cost_cheap 6, found 5"),
    (nothing, "activations.mid=null cascade.score_cols=[P4_raw_only]",
     "cascade.score_cols: expected some of P1_cheap, found P4_raw_only, which needs activations"),
    (without("prompt"), "", "m.parquet: expected the column 'prompt', found window_id, split"),
    (without("difficulty"), "", "m.parquet: expected the column 'difficulty'"),
    (without("split"), "", "m.parquet: expected the column 'split'"),
    (with_column("split", lambda cells: ["train"] * ITEMS), "", "m.parquet: the test split is empty"),
    (with_column("split", lambda cells: ["test"] * ITEMS), "", "m.parquet: the train split is empty"),
    (with_column("difficulty", lambda cells: [*cells[:48], *[1] * 22]), "",
     "m.parquet: the test split has one class only: all its 22 items are hard"),
    (with_column("difficulty", lambda cells: [*[0] * 45, *cells[45:]]), "",
     "m.parquet: the train split has one class only: all its 45 items are easy"),
    (with_column("difficulty", lambda cells: [1, *[0] * 44, *cells[45:]]), "",
     "release.yaml: expected at least two hard and two easy train items, found 1 and 44"),
    (with_column("difficulty", at(5, 2)), "", "m.parquet: row 6: difficulty: expected 0 or 1"),
    (with_column("window_id", lambda cells: [1e19, *map(float, cells[1:])]), "",
     "m.parquet: row 1: window_id: expected an integer"),
    (with_column("difficulty", at(5, None)), "", "m.parquet: row 6: difficulty: expected an integer"),
    (with_column("prompt", at(6, None)), "", "m.parquet: row 7: prompt: expected text"),
    (with_column("seq_len", at(6, 0)), "", "m.parquet: row 7: seq_len: expected at least 1"),
    (with_column("prompt_perplexity", at(9, float("inf"))), "",
     "m.parquet: row 10: prompt_perplexity: expected a finite number"),
    (lambda root, columns: write_table(root / "m.parquet", {name: [] for name in columns}), "",
     "m.parquet: expected rows, found none"),
    (lambda root, columns: write_activations(root, items=69), "",
     "a.safetensors: expected 70 items, one per row of the metadata, found 69"),
    (lambda root, columns: write_activations(root, bad_value=np.inf), "",
     "a.safetensors: item 7: expected finite numbers only"),
    (lambda root, columns: write_file(root / "a.safetensors", {"x": in_memory(np.zeros(3, np.float16))}), "",
     "a.safetensors: expected the tensor 'encoder_embeddings', found x"),
    (lambda root, columns: write_file(root / "a.safetensors", {
        "encoder_embeddings": in_memory(np.zeros((70, WIDTH), np.float16))}), "",
     "encoder_embeddings: expected float16 or float32 [items, positions, d], found float16 [70, 6]"),
    (lambda root, columns: write_autoencoder(root, d_model=5), "",
     "sae: expected an autoencoder of width 6, the width of the activations, found 5"),
    (lambda root, columns: write_autoencoder(root, k=4), "",
     "sae: expected topk with k 3, from ROOT/release.yaml, found topk with k 4"),
    (nothing, "sae_ckpt.mid=none",
     "sae_ckpt.mid: ROOT/none: no such directory; random weights never replace"),
    (torch_file, "sae_ckpt.mid=sae_topk_3.pt",
     "ROOT/sae_topk_3.pt: expected a model directory, found a PyTorch file; convert it with `tilelli convert "
     "ROOT/sae_topk_3.pt ROOT/sae_topk_3 --set k=3`, then add sae_ckpt.mid=sae_topk_3"),
    (missing_expensive_row, "",
     "dear.parquet: expected a row for every test item, found none of window_id 250"),
    (contradictory_expensive_rows, "",
     "dear.parquet: window_id 250: expected one difficulty, found two different ones"),
    (losses_without_latent_number, "",
     "causal_ablation_all.parquet: expected columns …_natural, …_recon and …"),
    (incomplete_losses, "", "causal_ablation_all.parquet: expected columns …_natural, …_recon"),
    (lambda root, columns: (root / "out").write_text(""), "",
     "--out: ROOT/out: expected a directory, found a file"),
]


TSFM: list[tuple[Callable[[Path, Tree], None], str, str]] = [
    (nothing, "series_csv=https://example.org/s.csv",
     "series_csv: expected a local file, found https://example.org/s.csv; download it, then add "
     "series_csv=FILE"),
    (nothing, "series_csv=", "series_csv: expected a file, found nothing"),
    (nothing, "target_col=HULL", "s.csv: expected the column 'HULL'; the columns here are date, OT"),
    (nothing, "context_length=90",
     "m.parquet: row 70: start_ts: expected the row of the series at which a window of 90 values starts"),
    (with_column("start_ts", at(3, -1)), "", "m.parquet: row 4: start_ts: expected the row of the series"),
    (without("crps_norm"), "", "m.parquet: expected the column 'crps_norm'"),
    (with_column("crps_raw", at(2, float("nan"))), "",
     "m.parquet: row 3: crps_raw: expected a finite number"),
    (lambda root, columns: (root / "s.csv").write_text("date,OT\n" + "d,1.0\n" * 500), "",
     "m.parquet: row 1: expected a window with finite statistics, found one with constant values"),
    (with_column("crps_norm", lambda cells: [*np.arange(45.0), *np.arange(25.0) + 30]), "",
     "release.yaml: fold 0 of 3 of the 45 train items has a single class in a part"),
]


@pytest.mark.parametrize(("modality", "change", "override", "message"), [
    (modality, *case) for modality, cases in (("llm", LLM), ("tsfm", TSFM)) for case in cases])
def test_invalid_input(modality: str, change: Callable[[Path, Tree], None], override: str, message: str,
                  tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, columns = make(tmp_path, modality)
    change(tmp_path, columns)
    assert run(tmp_path, *override.split()) == 2
    assert_one_line(capsys.readouterr().err, message.replace("ROOT", str(tmp_path)))
    assert not (tmp_path / "out").is_dir()


def test_a_directory_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "llm")
    (tmp_path / "file").write_text("")
    arguments = ["--config", str(tmp_path / "release.yaml"), "--root", str(tmp_path), "activations.mid=null"]
    assert main([*arguments, "--out", str(tmp_path / "file/out")]) == 2
    assert f"{tmp_path}/file/out: cannot be written" in capsys.readouterr().err
