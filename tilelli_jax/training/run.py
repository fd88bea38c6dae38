"""The run directory: the files of a run, and the checks that decide whether it can resume.

    runs/<name>/config.yaml     every key, resolved; comments at the end list later changes and their steps
                metrics.jsonl   a JSON object per logged step
                checkpoints/    the state to resume from
                model/          config.json and model.safetensors
                budget.json     with train.minutes, the number of updates that fit
                summary.json    final losses, sizes, times and provenance; written last
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
from tilelli_jax.errors import InputError
from tilelli_jax.io import files
from tilelli_jax.io.files import write_atomically, write_json
from tilelli_jax.io.json_text import read_json
from tilelli_jax.training.config import ExperimentConfig

# Keys that may change between the sessions of one run: they do not change the result.
FREE_KEYS = ("run_dir", "mesh.", "compute.scan_layers", "compute.remat", "compute.host_tables",
             "log.", "report.", "data.prefetch", "data.cache_dir", "chat.prefetch", "train.log_every",
             "train.keep", "train.export", "train.checkpoint_every")
# Of these, keys that make a complete run write its model, figure and summary again, without training.
ENDING_KEYS = ("report.", "train.export")
# Keys that determine the checkpoints' contents: a run cannot resume with other values.
FIXED_KEYS = ("model.", "optimizer.name", "finetune.trainable", "finetune.router_kl_weight")
LISTED = 5  # changed keys that an error lists
FROM_STEP = "from step"  # prefix of the comments that record changed settings
# Keys that a valid summary has.
SUMMARY_KEYS = {"best_valid_loss", "final_valid_loss", "best_step", "steps", "tokens", "seconds"}


class RunDirectory:
    """The paths of a run's files, and its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.budget = path / "budget.json"
        self.summary = path / "summary.json"
        self.figure = path / "loss.png"
        self._lock: int | None = None
        self._writes = False  # whether this process writes the files
        self._unrecorded: tuple[ExperimentConfig, dict[str, tuple[Any, Any]]] | None = None

    @property
    def name(self) -> str:
        """The name of the directory, also if the path is `.` or a symbolic link."""
        return os.path.basename(os.path.realpath(self.path))

    @property
    def _exported(self) -> list[Path]:
        """The files of model/."""
        return [self.model / name for name in ("config.json", "model.safetensors")]

    def lock(self) -> None:
        """Locks the directory until `close`, if it exists and the system supports locks.

        Raises:
            InputError: another process holds the lock.
        """
        if self._lock is None and self.path.is_dir():
            try:
                self._lock = files.lock(self.path, wait=False)
            except BlockingIOError:
                raise InputError(f"run_dir: {self.path} is in use by another process") from None
            except OSError as error:
                raise InputError(f"run_dir: {self.path} cannot be read: {error.strerror}") from None

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def open(self, config: ExperimentConfig, *, force_resume: bool, write: bool) -> bool:
        """Creates the directory or resumes the run in it; returns whether that run is complete.

        Args:
            force_resume: resume even if settings of the run have changed.
            write: whether this process writes files (one process of several does).

        Raises:
            InputError: it holds other files or a run with other settings, or cannot be written.
        """
        self._writes = write
        try:
            if not self.config.exists():
                if force_resume and not self.path.exists():
                    raise InputError(f"--resume: {self.path} does not exist; "
                                     f"without --resume a run begins there")
                if write:
                    self._create(config)
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
                if ending:  # first: a kill must not leave the old summary with the new settings
                    self.summary.unlink(missing_ok=True)
                self._write(config)
            return False
        except OSError as error:
            raise InputError(f"run_dir: {self.path} cannot be written: {error.strerror or error}") from None

    def check_updates(self, done: int, steps: int) -> None:
        """Raises InputError if settings changed but no updates are left to run with them."""
        if self._unrecorded is not None and steps <= done:
            raise InputError(f"train.steps: {self.path} has run {done} updates already; expected more, "
                             f"to run with the new settings, found {steps}")

    def record(self, from_step: int) -> None:
        """Records changed settings in config.yaml, once updates have run with them; call before each save.

        config.yaml gets the new values and a comment with the change and its first step. The old summary is
        removed first, so that it is never read as the changed run's.
        """
        if self._unrecorded is None or not self._writes:
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
        """Writes config.yaml with its existing comments on changes and `line`."""
        history = [comment for comment in self.config.read_text(encoding="utf-8").splitlines(keepends=True)
                   if comment.startswith(f"# {FROM_STEP} ")] if self.config.exists() else []
        write_atomically(self.config, (config_lib.dump(config) + "".join(history) + line).encode())

    def is_complete(self) -> bool:
        """Whether model and summary exist and the summary is valid; a damaged summary is written again."""
        try:
            return (all(path.is_file() for path in self._exported)
                    and all(isinstance(self.read_summary().get(key), int | float) for key in SUMMARY_KEYS))
        except (OSError, ValueError, AttributeError):
            return False

    def has_checkpoints(self) -> bool:
        return bool(self._saved())

    def _saved(self) -> list[Path]:
        """Returns the checkpoint directories."""
        return [path for path in self.checkpoints.iterdir()
                if path.name.isdigit()] if self.checkpoints.is_dir() else []

    def _check_kinds(self) -> None:
        """Raises InputError if a path of the run is not of its kind, file or directory."""
        for path in (self.config, self.metrics, self.budget, self.summary, self.figure, *self._exported):
            if os.path.lexists(path) and not path.is_file():
                raise InputError(f"run_dir: {path}: expected a regular file")
        for path in (self.checkpoints, *self._saved(), self.model):
            if os.path.lexists(path) and not path.is_dir():
                raise InputError(f"run_dir: {path}: expected a directory")

    def _create(self, config: ExperimentConfig) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"run_dir: {self.path} is a file; expected a directory")
        left = files.leftovers(self.path, [self.config.name]) if self.path.exists() else []
        if self.path.exists() and set(self.path.iterdir()) != set(left):
            raise InputError(f"run_dir: {self.path} holds other files and no config.yaml; "
                             f"choose an empty or new directory")
        self.path.mkdir(parents=True, exist_ok=True)
        for path in left:  # from a process killed at its start
            path.unlink(missing_ok=True)
        self._write(config)

    def _changes(self, differences: dict[str, tuple[Any, Any]], force_resume: bool) -> bool:
        """Whether keys that affect the result have changed. Raises InputError if that is not allowed."""
        changed = {key: values for key, values in differences.items() if not key.startswith(FREE_KEYS)}
        if not self.budget.exists() and not self.has_checkpoints():  # nothing was decided or trained
            before, _ = changed.pop("train.minutes", (None, None))
            if before is not None:
                changed.pop("train.steps", None)
        fixed = [key for key in changed if key.startswith(FIXED_KEYS)]
        # The budget has been spent on the number of updates in budget.json. It can only be lifted.
        fixed += [key for key in ("train.minutes",) if changed.get(key, (None, None))[1] is not None]
        if fixed or (changed and not force_resume):
            keys = list(dict.fromkeys([*fixed, *changed]))
            listed = [f"{key} was {old} and is now {new}" for key in keys[:LISTED]
                      for old, new in [changed[key]]]
            more = f", and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
            raise InputError(
                f"run_dir: {self.path} holds a run with other settings: {', '.join(listed)}{more}; choose "
                "another run_dir"
                + (", and train.init_from to start from this run's model" if fixed
                   else ", or --resume to continue with the new ones"))
        return bool(changed)

    def read_steps(self) -> int | None:
        """Returns the number of updates that fit the time budget; None if that is not decided.

        Raises:
            InputError: the file is damaged, or missing although updates have been saved.
        """
        if not self.budget.exists():
            if self.has_checkpoints():
                raise InputError(f"run_dir: {self.budget} is missing; --resume with train.minutes=null "
                                 "continues to train.steps")
            return None
        steps = read_json(self.budget).get("steps")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise InputError(f"{self.budget}: steps: expected an integer ≥ 1, found {steps!r}")
        return steps

    def write_steps(self, steps: int, updates_per_second: float) -> None:
        """Stores the number of updates that fit the time budget."""
        write_json(self.budget, {"steps": steps, "updates_per_second": round(updates_per_second, 4)})

    def read_summary(self) -> dict[str, Any]:
        """Returns summary.json of a complete run. Raises InputError if it cannot be read."""
        return read_json(self.summary)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.summary, summary)


def provenance(seed: int) -> dict[str, Any]:
    """Returns the provenance of a result: seed, commit, versions and machine."""
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
    """Returns the commit of the running code, with a + if the tree has changes; None outside git."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, check=True, timeout=10,
                              capture_output=True, text=True).stdout.strip()
    try:
        if Path(git("rev-parse", "--show-toplevel")) != Path(__file__).resolve().parents[2]:
            return None  # installed inside another project's checkout
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
