"""The networks of a study: existing model directories, or networks that the study trains first."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tilelli_jax import config as config_lib
from tilelli_jax import train as train_command
from tilelli_jax.config import Section, setting
from tilelli_jax.data.chat_pairs import open_pairs
from tilelli_jax.data.corpus import open_corpus
from tilelli_jax.errors import InputError
from tilelli_jax.generation import abstain_rule
from tilelli_jax.io.files import MAX_BYTES, check_regular, fingerprint
from tilelli_jax.io.tensors import read_file
from tilelli_jax.loading.language import CHAT_TEMPLATES, TOKENIZER, TOKENIZER_CONFIG
from tilelli_jax.training.experiment import ExperimentConfig
from tilelli_jax.training.run import FREE_KEYS, RunDirectory

from ..stages import key

PATH_KEYS = ("chat.source", "chat.valid", "train.init_from")  # settings that are paths of inputs
EXPORT_KEY = "train.export"  # a run may change it on resuming, but it decides which network is exported


@dataclasses.dataclass(frozen=True)
class NetworkConfig(Section):
    """A network: an existing model directory, or one to train."""

    path: str = setting("", "model directory, of this project or of Hugging Face")
    tokenizer: str = setting(
        "", "directory or file of the tokenizer; empty: the tokenizer in the model directory")
    train: str = setting(
        "", "training configuration, file or name; the study trains this network first. Instead of path")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.path) == bool(self.train):
            found = (f"path '{self.path}' and train '{self.train}' (train= with no value removes it)"
                     if self.path else "neither")
            raise InputError("path: expected a network's directory, or train with a training configuration, "
                             f"found {found}")


class TrainingStopped(Exception):
    """A training run stopped early and reported why; `status` is the exit status of its command."""

    def __init__(self, status: int) -> None:
        super().__init__(f"training ended with status {status}")
        self.status = status


def check(section: NetworkConfig) -> None:
    """Raises InputError if a network's directory, tokenizer or training configuration does not exist."""
    if section.train:
        config_lib.read_yaml(section.train)
    elif not Path(section.path).is_dir():
        raise InputError(f"{section.path}: expected the directory of a network, found " + (
            "a file" if Path(section.path).exists() else
            "nothing; download a model of the Hugging Face hub with `hf download NAME --local-dir DIR` (for "
            "a gated model, run `hf auth login` and accept its terms first)"))
    if section.tokenizer and not Path(section.tokenizer).exists():
        raise InputError(f"{section.tokenizer}: expected a tokenizer, found nothing")


def trained(config: str, run: Path, overrides: Sequence[str] = ()) -> Path:
    """Runs or resumes `tilelli train` in this process, and returns the model directory of the finished run.

    Args:
        config: training configuration, file or name.
        run: run directory.

    Raises:
        TrainingStopped: the run stopped before its last update.
    """
    directory = RunDirectory(run)
    if directory.is_complete():
        return directory.model
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the study's results
        status = train_command.main(["--config", config, f"run_dir={run}", *overrides])
    if status or not directory.summary.is_file():
        # A run that receives SIGTERM saves its state and returns status 0, but the study is not finished.
        raise TrainingStopped(status or 128 + signal.SIGTERM)
    return directory.model


def run_path(parent: Path, role: str, experiment: ExperimentConfig,
             reads: Mapping[str, str] | None = None) -> Path:
    """Returns `parent/ROLE-KEY`, the run directory of a network that a study trains.

    The key is a hash of everything that the network depends on: the settings, and the contents (not the
    paths) of the inputs. Settings that a run may change when it resumes do not count.

    Args:
        reads: fingerprints of the inputs; None computes them.

    Raises:
        InputError: an input cannot be read.
    """
    manifest = {name: value for name, value in config_lib.settings(experiment).items()
                if name not in PATH_KEYS and (name == EXPORT_KEY or not name.startswith(FREE_KEYS))}
    return parent / f"{role}-{key({'settings': manifest, 'reads': reads or _reads(experiment)})}"


def _reads(experiment: ExperimentConfig) -> dict[str, str]:
    fingerprints = {}
    if experiment.train.init_from:
        fingerprints["start"] = contents(Path(experiment.train.init_from))
    if experiment.chat is not None:
        return fingerprints | {"pairs": open_pairs(experiment.chat).fingerprint()}
    return fingerprints | {"corpus": open_corpus(experiment.data).fingerprint()}


class StudyNetwork:
    """The network of a configuration section; trains it at first access if the section says so.

    Args:
        out: the study's output directory.
        role: first part of the name of the run directory.
    """

    def __init__(self, section: NetworkConfig, out: Path, role: str = "network") -> None:
        self.section, self._out, self._role = section, out, role

    @functools.cached_property
    def path(self) -> Path:
        """The model directory; trains the network first if the section says so.

        The run directory is in `out/networks/` (see `run_path`). It resumes and logs like any other run.
        """
        if self.section.path:
            return Path(self.section.path)
        experiment = config_lib.load(ExperimentConfig, self.section.train)
        return trained(self.section.train, run_path(self._out / "networks", self._role, experiment))

    @property
    def name(self) -> str:
        """The name of the model directory; for the model/ of a run, the name of the run directory."""
        path = self.path.resolve()
        return path.parent.name if path.name == "model" else path.name

    @functools.cached_property
    def contents(self) -> str:
        """The fingerprint of the network, see the function `contents`."""
        return contents(self.path, self.section.tokenizer)


def contents(path: Path, tokenizer: str = "") -> str:
    """Returns a fingerprint of a model directory's configuration and weights, and of a separate tokenizer.

    A stored abstention threshold does not change the fingerprint.

    Args:
        tokenizer: directory or file of a tokenizer outside the model directory; empty: none.

    Raises:
        InputError: a file cannot be read.
    """
    try:
        files = [file for file in path.iterdir()
                 if file.suffix in (".json", ".safetensors", ".jinja") and file.name != abstain_rule.FILE]
        if tokenizer:
            separate = Path(tokenizer)
            directory = separate if separate.is_dir() else separate.parent
            files += [separate / TOKENIZER if separate.is_dir() else separate, *(
                directory / name for name in (TOKENIZER_CONFIG, *CHAT_TEMPLATES)
                if (directory / name).is_file())]
        for file in files:  # checks headers and sizes first: hashing a corrupt sparse file could take hours
            if file.suffix == ".safetensors":
                read_file(file)
            elif (size := check_regular(file)) > MAX_BYTES:
                raise InputError(f"{file}: cannot be read: expected at most {MAX_BYTES:,} bytes, found "
                                 f"{size:,}")
        return fingerprint(files)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
