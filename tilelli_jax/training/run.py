"""The run directory: what a run writes, and whether one that stands there can go on.

    runs/<name>/config.yaml     every key, resolved; in comments beneath, what was changed from which step on
                metrics.jsonl   a JSON object per logged step
                checkpoints/    what resuming needs
                model/          config.json and model.safetensors
                summary.json    how it ended
                loss.png        training and validation loss
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from tilelli_jax import config as config_lib
from tilelli_jax import files
from tilelli_jax.errors import InputError
from tilelli_jax.files import write_atomically, write_json
from tilelli_jax.json_text import read_json
from tilelli_jax.training.experiment import ExperimentConfig

# Keys that may change between the sittings of one run: they change where and how, not what.
FREE_KEYS = ("run_dir", "mesh.", "compute.scan_layers", "compute.remat", "compute.host_tables",
             "log.", "report.", "data.prefetch", "data.cache_dir", "chat.prefetch", "train.log_every",
             "train.keep", "train.export", "train.checkpoint_every")
# Of these, keys that a complete run is ended anew with: its model, figure and summary, not its training.
ENDING_KEYS = ("report.", "train.export")
# Keys that make the checkpoints what they are: no run can go on with other ones.
FIXED_KEYS = ("model.", "optimizer.name", "finetune.train", "finetune.router_kl_weight")
FROM_STEP = "from step"  # how a comment begins that says what was changed
# What a summary has to hold for the end of a run to be told from it.
TOLD = {"best_valid_loss", "final_valid_loss", "best_step", "steps", "tokens", "seconds"}


class RunDirectory:
    """The paths of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.summary = path / "summary.json"
        self.figure = path / "loss.png"
        self._lock: int | None = None
        self._unrecorded: tuple[ExperimentConfig, dict[str, tuple[Any, Any]]] | None = None

    @property
    def name(self) -> str:
        """That of its directory, also where the path is `.` or a link."""
        return os.path.basename(os.path.realpath(self.path))

    @property
    def _exported(self) -> list[Path]:
        """The files of model/."""
        return [self.model / name for name in ("config.json", "model.safetensors")]

    def lock(self) -> None:
        """Keeps other processes out until `close`, where there is a directory and the system can.

        Raises:
            InputError: another process has it.
        """
        if self._lock is None and self.path.is_dir():
            try:
                self._lock = files.lock(self.path, wait=False)
            except BlockingIOError:
                raise InputError(f"run_dir: {self.path} is in use by another process") from None
            except OSError as error:
                raise InputError(f"run_dir: {self.path} cannot be read: {error.strerror}") from None

    def close(self) -> None:
        """Lets others have it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def open(self, config: ExperimentConfig, *, force_resume: bool, write: bool) -> bool:
        """Makes the directory or takes up the run in it; says whether that run is complete.

        Args:
            force_resume: go on even though keys of the run have changed.
            write: whether this process writes (one of several does).

        Raises:
            InputError: it holds something else, another run, or cannot be written.
        """
        try:
            if not self.config.exists():
                if force_resume and not self.path.exists():
                    raise InputError(f"--resume: {self.path} does not exist; "
                                     f"without --resume a run begins there")
                if write:
                    self._make(config)
                return False
            self._check_kinds()
            before = config_lib.load(ExperimentConfig, self.config)
            differences = config_lib.differences(before, config)
            changed = self._changes(differences, force_resume)
            ending = any(key.startswith(ENDING_KEYS) for key in differences)
            if not (changed or ending) and self.is_complete():
                return True
            if changed:
                self._unrecorded = config, differences
            elif write:
                if ending:  # first, lest the old end be taken for the new one
                    self.summary.unlink(missing_ok=True)
                self._write(config)
            return False
        except OSError as error:
            raise InputError(f"run_dir: {self.path} cannot be written: {error.strerror or error}") from None

    def check_updates(self, done: int, steps: int) -> None:
        """Raises InputError where settings were changed, and no update is left to run with them."""
        if self._unrecorded is not None and steps <= done:
            raise InputError(f"train.steps: {self.path} has made {done} updates; expected more of them, "
                             f"to be made with the new settings, found {steps}")

    def record(self, from_step: int) -> None:
        """Writes down changed settings, which updates have now run with, and from which step on.

        config.yaml then has the new ones, and beneath them, in a comment, what was changed when. The summary
        of the run before goes first, lest it be taken for that of the changed run.
        """
        if self._unrecorded is None:
            return
        config, differences = self._unrecorded
        changes = ", ".join(f"{key}: {new} (before: {old})" for key, (old, new) in differences.items()
                            if not key.startswith(FREE_KEYS))
        try:
            self.summary.unlink(missing_ok=True)
            self._write(config, f"# {FROM_STEP} {from_step}: {' '.join(changes.split())}\n")
        except OSError as error:
            raise InputError(f"run_dir: {self.config} cannot be written: {error.strerror or error}") from None
        self._unrecorded = None

    def _write(self, config: ExperimentConfig, line: str = "") -> None:
        """config.yaml, with the comments on changes that it has, and one more."""
        history = [one for one in self.config.read_text(encoding="utf-8").splitlines(keepends=True)
                   if one.startswith(f"# {FROM_STEP} ")] if self.config.exists() else []
        write_atomically(self.config, (config_lib.dump(config) + "".join(history) + line).encode())

    def is_complete(self) -> bool:
        """Whether model and summary are there; a damaged summary will be written anew."""
        try:
            return (all(path.is_file() for path in self._exported)
                    and all(isinstance(value, int | float) for value in map(self.read_summary().get, TOLD)))
        except (OSError, ValueError, AttributeError):
            return False

    def has_checkpoints(self) -> bool:
        return bool(self._saved())

    def _saved(self) -> list[Path]:
        """The checkpoints, by their names."""
        return [path for path in self.checkpoints.iterdir()
                if path.name.isdigit()] if self.checkpoints.is_dir() else []

    def _check_kinds(self) -> None:
        """Raises InputError where what is in the place of a file or directory of the run is none."""
        for path in (self.config, self.metrics, self.summary, self.figure, *self._exported):
            if os.path.lexists(path) and not path.is_file():
                raise InputError(f"run_dir: {path}: expected a regular file")
        for path in (self.checkpoints, *self._saved(), self.model):
            if os.path.lexists(path) and not path.is_dir():
                raise InputError(f"run_dir: {path}: expected a directory")

    def _make(self, config: ExperimentConfig) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"run_dir: {self.path} is a file; expected a directory")
        left = files.leftovers(self.path, [self.config.name]) if self.path.exists() else []
        if self.path.exists() and set(self.path.iterdir()) != set(left):
            raise InputError(f"run_dir: {self.path} holds other files and no config.yaml; "
                             f"choose an empty or new directory")
        self.path.mkdir(parents=True, exist_ok=True)
        for path in left:  # of a process that was killed at its start
            path.unlink(missing_ok=True)
        self._write(config)

    def _changes(self, differences: dict[str, tuple[Any, Any]], force_resume: bool) -> bool:
        """Whether keys that matter have changed since the run's last sitting."""
        changed = {key: values for key, values in differences.items() if not key.startswith(FREE_KEYS)}
        fixed = [key for key in changed if key.startswith(FIXED_KEYS)]
        if fixed or (changed and not force_resume):
            key = (fixed or list(changed))[0]
            old, new = changed[key]
            raise InputError(
                f"run_dir: {self.path} holds a run with other settings: {key} was {old} and is now {new}"
                f"{' (and more)' if len(changed) > 1 else ''}; choose another run_dir"
                + (", and train.init_from to start from this run's model" if fixed
                   else ", or --resume to go on with the new ones"))
        return bool(changed)

    def read_summary(self) -> dict[str, Any]:
        """summary.json of a complete run. Raises InputError where it cannot be read."""
        return read_json(self.summary)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.summary, summary)


def provenance(seed: int) -> dict[str, Any]:
    """What made a result: seed, commit, versions and machine."""
    import jax
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "seed": seed,
        "git_commit": _git_commit(),
        "versions": {"python": platform.python_version(),
                     "tilelli_jax": _version("tilelli_jax"),
                     **{name: _version(name) for name in packages}},
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "cpus": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the code that runs, with a + where the tree differs from it; None outside git."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, check=True, timeout=10,
                              capture_output=True, text=True).stdout.strip()
    try:
        if Path(git("rev-parse", "--show-toplevel")) != Path(__file__).resolve().parents[2]:
            return None  # installed somewhere inside another project's checkout
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
