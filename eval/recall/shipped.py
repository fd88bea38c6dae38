"""Finished studies that come with the package: their sidecars, scores, and numbers of the questions.

    shipped/NAME/
        sidecar/               the sidecar with its thresholds and probes, for `tilelli recall predict`
        scores.parquet         every method's score and P(knows) of each question
        questions.parquet      label, split, group, data set, popularity and category of each question
        features.safetensors   the sidecar's features, float16
        study.json             configuration, what was selected, and costs
The texts of the questions are not included.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.io.files import write_atomically
from tilelli_jax.io.json_text import read_json
from tilelli_jax.io.tensors import in_memory, read_file, write_file
from tilelli_jax.loading.fingerprint import network_fingerprint
from tilelli_jax.pretrained.gguf import read_gguf

from ..estimators.table import QuestionTable
from ..inputs import networks
from ..tables import json_with_nulls, read_columns, write_columns
from . import evaluate, report, scores, verdicts
from .study import SIDECAR, RecallStudy

SHIPPED = "shipped"
ROOT = Path(__file__).parent / SHIPPED
QUESTIONS, FEATURES, STUDY = "questions.parquet", "features.safetensors", "study.json"
LABELS = ("known", "refused", "split", "group", "dataset", "popularity", "category")
ARRAYS = ("by_layer", "prompt_features", "entropies")
COLLECTED = ("name", "config", "fit", "stages", "verdict", "thresholds", "warnings", "costs",
             "verbalised_without_number")


def names() -> list[str]:
    """Returns the names of the shipped studies."""
    return sorted(path.parent.name for path in ROOT.glob(f"*/{STUDY}"))


def find_sidecar(sidecar: str | Path, model: Path, tokenizer: str = "") -> Path:
    """Returns the directory of a sidecar.

    Args:
        sidecar: a directory, or the name of a shipped study; "" or "shipped": that of a study of this
            network, preferably one whose prompts are chats, as questions usually are.

    Raises:
        InputError: the network or the sidecar does not exist, or no sidecar is shipped for the network.
    """
    if str(sidecar) in ("", SHIPPED):
        return _sidecar_of(model, tokenizer)
    if not Path(sidecar).exists():
        if str(sidecar) in names():
            return ROOT / sidecar / SIDECAR
        raise InputError(f"--sidecar: {sidecar}: expected a sidecar, found nothing; a finished `tilelli "
                         f"recall` study writes OUT/sidecar; shipped are {', '.join(names()) or 'none'}")
    return Path(sidecar)


def _sidecar_of(model: Path, tokenizer: str) -> Path:
    networks.check_source(model, "--model")
    fingerprint = network_fingerprint(model, tokenizer)
    rules = {path: verdicts.read(path) for path in (ROOT / name / SIDECAR for name in names())}
    of_network = [path for path, rule in rules.items() if rule.network.get("fingerprint") == fingerprint]
    if not of_network:
        if model.is_file():
            read_gguf(model)  # raises InputError if it is damaged
        raise InputError("--sidecar: expected the directory of a sidecar, because none is shipped for "
                         f"{model}; shipped are those of {', '.join(names()) or 'no network'}")
    return min(of_network, key=lambda path: rules[path].prompt.template != "chat")  # the first of equals


def export(study: RecallStudy, results: Mapping[str, Any], out: Path) -> None:
    """Writes a finished study as a shipped one.

    Args:
        results: what `report.write` returned.
    """
    out.mkdir(parents=True, exist_ok=True)
    table = study.table
    shutil.copytree(study.out / SIDECAR, out / SIDECAR, dirs_exist_ok=True)
    shutil.copyfile(study.fitted / scores.FILE, out / scores.FILE)
    write_columns(out / QUESTIONS, {name: getattr(table, name).tolist() for name in LABELS})
    write_file(out / FEATURES, {name: in_memory(getattr(table, name).astype(np.float16)) for name in ARRAYS})
    write_atomically(out / STUDY, json_with_nulls({name: results[name] for name in COLLECTED}))


def read_table(path: Path) -> QuestionTable:
    """Returns the table of a shipped study; texts and answers are empty."""
    columns = read_columns(path / QUESTIONS)
    features: dict[str, Any] = {name: tensor.read().astype(np.float32)
                                for name, tensor in read_file(path / FEATURES).items()}
    n = len(columns["known"])
    empty = np.full(n, "")
    return QuestionTable(
        **features, known=columns["known"].astype(np.int64), refused=columns["refused"].astype(bool),
        split=columns["split"].astype(str), group=columns["group"], text=empty, answer=empty,
        dataset=columns["dataset"].astype(str), popularity=columns["popularity"].astype(float),
        category=columns["category"].astype(str), answers=[[] for _ in range(n)])


def check_name(name: str) -> str:
    """Returns the name; for "" that of the only shipped study. Raises InputError if there is none of it."""
    available = names()
    if not name and len(available) == 1:
        return available[0]
    if name not in available:
        raise InputError(f"--shipped: expected one of {', '.join(available) or 'none'}, found {name!r:.40}")
    return name


def write_report(name: str, out: Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluates a shipped study (see `check_name`) again and writes its report; returns the results."""
    path = ROOT / name
    study = read_json(path / STUDY)
    rule = verdicts.read(path / SIDECAR)
    evaluation = evaluate.evaluate(read_table(path), scores.read(path), study["fit"]["selected_run"], rule,
                                   study["config"]["replicates"], study["config"]["seed"],
                                   study["config"]["primary"])
    return report.write({**study, **evaluation}, out, provenance)
