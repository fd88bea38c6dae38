"""Networks that a study asks: directories that are there, or runs that it makes first."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tilelli_jax import abstain_rule
from tilelli_jax import config as config_lib
from tilelli_jax import train as train_command
from tilelli_jax.config import Section, setting
from tilelli_jax.data.chat_pairs import open_pairs
from tilelli_jax.data.corpus import open_corpus
from tilelli_jax.errors import InputError
from tilelli_jax.files import MAX_BYTES, check_regular, fingerprint
from tilelli_jax.language import CHAT_TEMPLATES, TOKENIZER, TOKENIZER_CONFIG
from tilelli_jax.tensors import read_file
from tilelli_jax.training.experiment import ExperimentConfig
from tilelli_jax.training.run import FREE_KEYS, RunDirectory

from ..stages import key

WHERE = ("chat.source", "chat.valid", "train.init_from")  # paths of what is read
EXPORTED = "train.export"  # free for a run, which is ended anew with it; of its network it decides


@dataclasses.dataclass(frozen=True)
class NetworkConfig(Section):
    """A network that is asked."""

    path: str = setting("", "its directory, ours or of Hugging Face")
    tokenizer: str = setting("", "directory or file of the tokenizer; empty: the network's own")
    train: str = setting("", "in place of path: the training configuration of a network that is made first")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.path) == bool(self.train):
            raise InputError("path: expected a network's directory, or train, how to make one; found " + (
                f"path '{self.path}' and train '{self.train}' (an empty train= takes that away)"
                if self.path else "neither"))


class TrainingStopped(Exception):
    """A run has ended before its end, and has said why; `status` is that of its command."""

    def __init__(self, status: int) -> None:
        super().__init__(f"training ended with status {status}")
        self.status = status


def check(section: NetworkConfig) -> None:
    """Raises InputError where a network's directory, tokenizer or training configuration is not there."""
    if section.train:
        config_lib.read_yaml(section.train)
    elif not Path(section.path).is_dir():
        raise InputError(f"{section.path}: expected the directory of a network, found " + (
            "a file" if Path(section.path).exists() else
            "nothing; one of Hugging Face's hub is fetched first: `hf download NAME --local-dir DIR`, after "
            "`hf auth login` and agreeing to its terms there where it is gated"))
    if section.tokenizer and not Path(section.tokenizer).exists():
        raise InputError(f"{section.tokenizer}: expected a tokenizer, found nothing")


def trained(config: str, run: Path, overrides: Sequence[str] = ()) -> Path:
    """One sitting of `tilelli train`, in this process: the model directory it ends with.

    Raises:
        TrainingStopped: it has not come to its end.
    """
    directory = RunDirectory(run)
    if directory.is_complete():
        return directory.model
    with contextlib.redirect_stdout(sys.stderr):  # the study's own output is its results
        status = train_command.main(["--config", config, f"run_dir={run}", *overrides])
    if status or not directory.summary.is_file():
        # A run that SIGTERM ends has saved itself and ends well; the study that it was part of has not.
        raise TrainingStopped(status or 128 + signal.SIGTERM)
    return directory.model


def run_path(parent: Path, role: str, experiment: ExperimentConfig,
             reads: Mapping[str, str] | None = None) -> Path:
    """`parent/ROLE-KEY`: the run directory of a network that a study trains.

    The key is of all that the network depends on: of the contents of what it reads, not of where that
    stands, and of no setting that a run may change between two sittings.

    Args:
        reads: fingerprints of what it reads; None looks them up.

    Raises:
        InputError: what it reads cannot be read.
    """
    manifest = {name: value for name, value in config_lib.settings(experiment).items()
               if name not in WHERE and (name == EXPORTED or not name.startswith(FREE_KEYS))}
    return parent / f"{role}-{key({'settings': manifest, 'reads': reads or _reads(experiment)})}"


def _reads(experiment: ExperimentConfig) -> dict[str, str]:
    found = {}
    if experiment.train.init_from:
        found["start"] = contents(Path(experiment.train.init_from))
    if experiment.chat is not None:
        return found | {"pairs": open_pairs(experiment.chat).fingerprint()}
    return found | {"corpus": open_corpus(experiment.data).fingerprint()}


class Studied:
    """The network of a section, in a study's directory.

    Args:
        out: of the study.
        role: what it is called where it is trained.
    """

    def __init__(self, section: NetworkConfig, out: Path, role: str = "network") -> None:
        self.section, self._out, self._role = section, out, role

    @functools.cached_property
    def path(self) -> Path:
        """Its directory, after it has been trained if that is what the section says.

        What is trained stands in `out/networks/` (`run_path`): it resumes and tells of itself as any other
        run does.
        """
        if self.section.path:
            return Path(self.section.path)
        experiment = config_lib.load(ExperimentConfig, self.section.train)
        return trained(self.section.train, run_path(self._out / "networks", self._role, experiment))

    @property
    def name(self) -> str:
        """That of its directory; of a model/ in a run, the run's."""
        path = self.path.resolve()
        return path.parent.name if path.name == "model" else path.name

    @functools.cached_property
    def contents(self) -> str:
        """See `contents`."""
        return contents(self.path, self.section.tokenizer)


def contents(path: Path, tokenizer: str = "") -> str:
    """A fingerprint of a model directory's configuration and weights, and of a tokenizer elsewhere.

    A threshold that was chosen for the network makes no other network of it.

    Raises:
        InputError: one of its files cannot be read.
    """
    try:
        files = [file for file in path.iterdir()
                 if file.suffix in (".json", ".safetensors", ".jinja") and file.name != abstain_rule.FILE]
        if tokenizer:
            other = Path(tokenizer)
            beside = other if other.is_dir() else other.parent
            files += [other / TOKENIZER if other.is_dir() else other, *(
                beside / name for name in (TOKENIZER_CONFIG, *CHAT_TEMPLATES) if (beside / name).is_file())]
        for file in files:  # one that says something else than it is might be read for ever
            if file.suffix == ".safetensors":
                read_file(file)
            elif (size := check_regular(file)) > MAX_BYTES:
                raise InputError(f"{file}: cannot be read: expected at most {MAX_BYTES:,} bytes, found "
                                 f"{size:,}")
        return fingerprint(files)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
