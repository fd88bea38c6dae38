"""The networks of a study: existing model directories, or networks that the study trains first."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
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
from tilelli_jax.loading.fingerprint import network_fingerprint
from tilelli_jax.loading.sources import local_path
from tilelli_jax.pretrained.gguf_file import is_gguf
from tilelli_jax.training.config import ExperimentConfig
from tilelli_jax.training.run import FREE_KEYS, RunDirectory

from ..stages import key

PATH_KEYS = ("chat.source", "chat.valid", "train.init_from")  # settings that are paths of inputs
EXPORT_KEY = "train.export"  # a run may change it on resuming, but it decides which network is exported


@dataclasses.dataclass(frozen=True)
class NetworkConfig(Section):
    """A network: an existing model directory, or one to train."""

    path: str = setting(
        "", "model directory, Hugging Face directory, GGUF file, or id of the Hugging Face hub")
    train: str = setting(
        "", "training configuration, file or name; the study trains this network first. Instead of path")
    set: tuple[str, ...] = setting(
        (), "with train: key=value overrides of that configuration, e.g. [train.steps=50]")
    tokenizer: str = setting(
        "", "directory or file of the tokenizer; empty: the tokenizer in the model directory")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.path) == bool(self.train):
            found = (f"path '{self.path}' and train '{self.train}' (train= with no value removes it)"
                     if self.path else "neither")
            raise InputError("path: expected a network's directory, or train with a training configuration, "
                             f"found {found}")
        if self.set and not self.train:
            raise InputError(f"set: expected none without train, found {list(self.set)}")

    def require(self, *names: str, key: str, reason: str) -> None:
        """Raises InputError if the section, at `key`, sets other keys than `names`."""
        for field in dataclasses.fields(self):
            if field.name not in names and (value := getattr(self, field.name)):
                raise InputError(f"{key}.{field.name}: expected only {' and '.join(names)}, because "
                                 f"{reason}; found {value!r}")

    def experiment(self, overrides: Sequence[str] = ()) -> ExperimentConfig:
        """Returns the configuration of the training run.

        Args:
            overrides: settings of the study, which take precedence over those of the section.

        Raises:
            InputError: the training configuration does not exist or is not valid.
        """
        return config_lib.load(ExperimentConfig, self.train, [*self.set, *overrides])


class TrainingStopped(Exception):
    """A training run stopped early and reported why; `status` is the exit status of its command."""

    def __init__(self, status: int) -> None:
        super().__init__(f"training ended with status {status}")
        self.status = status


def check(section: NetworkConfig, name: str) -> None:
    """Checks a section before any work.

    Args:
        name: the key of the section.

    Raises:
        InputError: the network, tokenizer or training configuration does not exist, or the training
            configuration is not valid.
    """
    if section.train:
        try:
            section.experiment()
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    else:
        check_source(section.path, f"{name}.path")
    check_tokenizer(section.tokenizer, f"{name}.tokenizer")


def check_source(path: str | Path, key: str) -> None:
    """Raises InputError, which names the key or option, if a network does not exist; see `load` for paths."""
    if "*" in str(path) and not os.path.lexists(path):  # the shell passes a pattern without a match as it is
        raise InputError(f"{key}: {path}: no such directory; has the study finished?")
    try:
        local = local_path(path)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    if not local.is_dir() and not is_gguf(local):
        raise InputError(f"{key}: {path}: expected the directory of a network or a GGUF file, found another "
                         "file")


def check_tokenizer(path: str | Path, key: str) -> None:
    """Raises InputError, which names the key or option, if a tokenizer is given and does not exist."""
    if path and not Path(path).exists():
        raise InputError(f"{key}: {path}: expected a tokenizer, found nothing")


def train_network(config: str, run: Path, overrides: Sequence[str] = ()) -> Path:
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
        fingerprints["start"] = network_fingerprint(Path(experiment.train.init_from))
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
        """The local path of the network; trains it first if the section says so.

        The run directory is in `out/networks/` (see `run_path`). It resumes and logs like any other run.
        """
        if self.section.path:
            return local_path(self.section.path)
        section = self.section
        run = run_path(self._out / "networks", self._role, section.experiment())
        return train_network(section.train, run, section.set)

    @property
    def name(self) -> str:
        """The id on the Hugging Face hub, or the name of the directory or file.

        For the model/ of a run it is the name of the run directory.
        """
        if self.section.path and not os.path.lexists(self.section.path):
            return self.section.path
        path = self.path.resolve()
        return path.parent.name if path.name == "model" else path.name

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `network_fingerprint`."""
        return network_fingerprint(self.path, self.section.tokenizer)
