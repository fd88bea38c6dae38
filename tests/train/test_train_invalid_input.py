"""Invalid input of the train command: one line that begins with "error: ", status 2, no files written."""

from __future__ import annotations

import re

import pytest

import tilelli_jax
from tests.error_lines import assert_one_line
from tilelli_jax import config as config_lib
from tilelli_jax.loading.store import build
from tilelli_jax.train import main
from tilelli_jax.training import log as log_module
from tilelli_jax.training.config import ExperimentConfig

BAD = {
    "no such source": (["data.source={dir}/nowhere.txt"], ["nowhere.txt: no such file"]),
    "no source": (["data.source="],
                  ["error: data.source: expected a text file, a directory of shards", "found nothing"]),
    "binary source": (["data.source={dir}/zeros.bin"], ["zeros.bin: expected text, found a binary file"]),
    "empty source": (["data.source={dir}/empty.txt"], ["empty.txt: is empty"]),
    "directory without shards": (["data.source={dir}"], ["train.bin"]),
    "source shorter than a sequence": (["data.source={dir}/short.txt"], ["train.seq_len: 16 needs 17 bytes"]),
    "nothing to validate on": (["data.source={dir}/hundred.txt", "data.valid_fraction=0.001"],
                               ["validation split"]),
    "one byte to validate on": (["data.source={dir}/hundred.txt", "data.valid_fraction=0.01"],
                                ["the validation split: expected at least 2 bytes, found 1"]),
    "unknown key": (["train.stepz=5"], ["unknown key 'train.stepz'", "'train.steps'"]),
    "unknown section": (["optimiser.learning_rate=1"], ["'optimiser'", "'optimizer'"]),
    "key in another section": (["train.learning_rate=1"], ["'optimizer.learning_rate'"]),
    "wrong type": (["train.steps=ten"], ["train.steps: expected an integer, found text 'ten'"]),
    "no key": (["train.steps"], ["override 'train.steps': expected key.subkey=value"]),
    "unknown choice": (["optimizer.name=adamv"], ["optimizer.name: expected adamw or muon", "'adamw'"]),
    "out of range": (["optimizer.b2=1.0"], ["optimizer.b2: expected a number"]),
    "empty prompt": (['report.prompts=[""]'], ["report.prompts"]),
    "sequence longer than positions": (["train.seq_len=17"], ["train.seq_len", "model.max_seq_len 16"]),
    "impossible mesh": (["mesh.fsdp=3"], ["mesh: data × fsdp × tensor = -1 × 3 × 1", "8 devices"]),
    "mesh of nothing": (["mesh.data=0"], ["mesh.data, fsdp, tensor"]),
    "batch that cannot be shared": (["train.batch_size=12"],
                                    ["train.batch_size", "the 8 devices", "found 12"]),
    "part that cannot be shared": (["train.accumulate=2"], ["train.accumulate", "found 4"]),
    "validation batch that cannot be shared": (["train.eval_batch_size=4"], ["train.eval_batch_size"]),
    "run_dir below a file": (["run_dir={dir}/short.txt/run"],
                             ["run_dir: ", "short.txt/run cannot be written"]),
    "run_dir a file": (["run_dir={dir}/short.txt"], ["short.txt is a file"]),
    "run_dir not writable": (["run_dir=/proc/run"], ["run_dir: /proc/run cannot be written"]),
    "run_dir in use": (["run_dir={dir}"], ["holds other files"]),
    "init_from nowhere": (["train.init_from={dir}/nowhere"], ["nowhere: expected a model directory"]),
    "init_from no model": (["train.init_from={dir}"], ["not a model directory"]),
    "init_from another network": (["train.init_from={model}", "model.top_k=3"],
                                  ["has top_k 4, and model.top_k is 3"]),
    "init_from another family": (["train.init_from={model}", "model={{family: vanilla, max_seq_len: 16}}"],
                                 ["train.init_from"]),
}


SHARED = ("impossible mesh", "batch that cannot be shared", "part that cannot be shared",
          "validation batch that cannot be shared")  # among eight devices


@pytest.fixture(scope="module")
def model(tiny_file, tmp_path_factory):
    """The directory of an untrained model."""
    path = tmp_path_factory.mktemp("model") / "model"
    tilelli_jax.save(build(config_lib.load(ExperimentConfig, tiny_file).model, 0), path)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with some files, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("empty", 0), ("short", 10), ("hundred", 100)):
        (tmp_path / f"{name}.txt").write_bytes(b"a" * size)
    (tmp_path / "zeros.bin").write_bytes(b"ELF\0" * 100)
    return tmp_path


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=pytest.mark.eight_devices) if case in SHARED else case for case in BAD])
def test_bad_input(case, model, tiny_file, place, capsys):
    overrides, parts = BAD[case]
    overrides = [override.format(dir=place, model=model) for override in overrides]
    before = sorted(place.rglob("*"))
    assert main(["--config", str(tiny_file), f"run_dir={place / 'run'}", *overrides]) == 2
    out, err = capsys.readouterr()
    assert_one_line(err, *parts)
    assert out == "" and sorted(place.rglob("*")) == before


def test_incomplete_shards(tiny_file, place, capsys):
    (place / "shards").mkdir()
    for name in ("train.bin", "valid.bin"):  # no meta.json, which is written last
        (place / "shards" / name).write_bytes(b"a" * 100)
    assert main(["--config", str(tiny_file), "data.source=shards", "run_dir=run"]) == 2
    assert_one_line(capsys.readouterr().err, "shards: expected train.bin, valid.bin and meta.json; ",
                    "meta.json is missing", "tilelli data --source … --out shards --force")
    assert not (place / "run").exists()


@pytest.mark.parametrize(("text", "parts"), [
    (None, ["tiny.yml: no such file", "'tiny.yaml'"]),
    ("train: [", ["not YAML", "line 1"]), ("- 1", ["expected keys with values, found a list"]),
    ("train: 5", ["train: expected keys with values, found an integer"]),
    ("modle: {}", ["unknown key 'modle'", "'model'"]),
    ("model: {family: routd}",
     ["model.family: expected one of routed, vanilla, sae, found 'routd'", "'routed'"])])
def test_bad_configuration_file(text, parts, place, capsys):
    (place / "tiny.yaml").write_text("{}")
    if text is not None:
        (place / "tiny.yml").write_text(text)
    before = sorted(place.rglob("*"))
    assert main(["--config", "tiny.yml"]) == 2
    assert_one_line(capsys.readouterr().err, "tiny.yml", *parts)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(("overrides", "message"), [
    (["model.d_model=1000000"], "model: its parameters and optimiser take"),
    (["train.steps=99999999999"], "train.steps: expected an integer ≥ 1 and ≤ 2147483647"),
    (["--resume"], "--resume: run does not exist; without --resume a run begins there")])
def test_unavailable_resources(tiny_file, place, capsys, overrides, message):
    before = sorted(place.rglob("*"))
    assert main(["--config", str(tiny_file), "run_dir=run", *overrides]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert sorted(place.rglob("*")) == before


def test_a_missing_extra_is_noticed_before_anything_is_written(tiny_file, place, capsys, monkeypatch):
    monkeypatch.setattr(log_module.importlib.util, "find_spec", lambda name: None)
    before = sorted(place.rglob("*"))
    assert main(["--config", str(tiny_file), "run_dir=run", "log.wandb_project=mine"]) == 2
    assert_one_line(capsys.readouterr().err, "log.wandb_project", "'tilelli_jax[wandb]'")
    assert sorted(place.rglob("*")) == before


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for key in ("run_dir", "model.d_model", "data.source", "optimizer.learning_rate", "train.steps",
                "mesh.fsdp", "compute.remat", "log.tensorboard", "report.prompts", "[1000]",
                "number of updates"):
        assert key in out
    first, _, every = out.partition("\nall keys, with their defaults:\n")
    assert re.findall(r"^  ([a-z_.]+)  ", first.partition("keys that most runs set:\n")[2], re.MULTILINE) == [
        "data.source", "train.minutes", "train.steps", "run_dir", "model.family", "model.d_model",
        "model.n_layers", "model.quantizer", "optimizer.learning_rate", "train.batch_size"]
    assert re.search(r"model.family +routed \| vanilla \| sae \[routed\]\n", first)
    assert "  data.source" in every and "  mesh.fsdp" in every


def test_the_shipped_configuration_for_your_own_text_needs_it(place, capsys):
    """Also where a file of a likely name is there."""
    (place / "mine.txt").write_text("Once upon a time. " * 1000)
    before = sorted(place.rglob("*"))
    assert main(["--config", "quick"]) == 2
    assert_one_line(capsys.readouterr().err, "error: data.source: expected a text file", "found nothing")
    assert sorted(place.rglob("*")) == before
