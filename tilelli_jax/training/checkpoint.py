"""Checkpoints written with Orbax: saves asynchronously, keeps the newest and the best, skips damaged ones."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from tilelli_jax.errors import InputError
from tilelli_jax.io.files import checksums, find_damage, write_json
from tilelli_jax.io.json_text import read_json
from tilelli_jax.training.step import TrainState

log = logging.getLogger(__name__)
SEAL = "files.json"


class Restored(NamedTuple):
    """A training state, and the JSON-able notes that were saved with it."""

    state: TrainState
    notes: dict[str, Any]


class Checkpoints:
    """The directory `checkpoints/` of a run: `<step>/state` (arrays) and `<step>/notes` (JSON).

    A checkpoint is written to a temporary directory and renamed when complete, so a killed process leaves a
    complete checkpoint or an ignored directory. `<step>/files.json` lists each file's size and checksum; they
    are checked before Orbax reads the files, because Orbax reports a damaged file with thousands of lines
    from background threads.
    """

    def __init__(self, path: Path, keep: int = 2):
        self.path = path.absolute()
        self._policy = _NewestAndBest(keep)
        self._manager = ocp.CheckpointManager(self.path, options=ocp.CheckpointManagerOptions(
            create=True, cleanup_tmp_directories=True, preservation_policy=self._policy,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal)))
        self._failed = False
        _silence_event_loop_errors()

    def save(self, state: TrainState, notes: dict[str, Any]) -> None:
        """Starts saving, and returns once the arrays are copied.

        Args:
            notes: JSON values, with `step` and with `best_step`, the checkpoint to keep.

        Raises:
            InputError: this checkpoint or the previous one cannot be written. Complete ones stay.
        """
        self._policy.best_step = notes["best_step"]
        with self._writing():
            self._manager.save(notes["step"], force=True, args=ocp.args.Composite(
                state=ocp.args.StandardSave(_tree(state)), notes=ocp.args.JsonSave(notes)))

    def latest(self, abstract_state: TrainState) -> Restored | None:
        """Returns the newest readable checkpoint, or None if there is no checkpoint.

        Args:
            abstract_state: shapes, types and shardings to restore to, on any mesh.

        Raises:
            InputError: there are checkpoints, but none is readable.
        """
        damaged: list[tuple[int, InputError]] = []
        for step in reversed(self.steps()):
            try:
                restored = self.restore(step, abstract_state)
            except InputError as error:
                damaged.append((step, error))
                continue
            for bad, reason in damaged:
                log.warning("%s; skipped, continuing from step %d", reason, step)
                self._set_aside(bad)
            return restored
        if damaged:
            raise InputError(f"{damaged[0][1]}; no other checkpoint is readable")
        return None

    def restore(self, step: int, abstract_state: TrainState) -> Restored:
        """Returns the checkpoint of a step.

        Raises:
            InputError: it is missing, damaged, or of another network.
        """
        if reason := self._damage(step):
            raise InputError(f"{self.path / str(step)}: damaged checkpoint ({reason})")
        try:
            items = self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_tree(abstract_state)), notes=ocp.args.JsonRestore()))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{self.path / str(step)}: cannot be restored: {reason}") from error
        return Restored(TrainState(**items["state"]), items["notes"])

    def steps(self) -> list[int]:
        """Returns the saved steps, ascending."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Waits until started saves are on disk. Raises InputError if one cannot be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves and closes the directory. Raises like `wait`, unless an error was raised before."""
        reported = self._failed
        try:
            with self._writing():
                self._manager.close()
        except InputError:
            if not reported:
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the many exceptions of Orbax and TensorStore into a one-line InputError."""
        try:
            yield
        except Exception as error:
            self._failed = True
            reason = " ".join(str(error).split())
            raise InputError(f"{self.path}: a checkpoint cannot be written: {_cause(reason)}") from error

    def _seal(self) -> None:
        """Writes a checkpoint's file list; called in one process, just before the rename.

        Files at the top level are left out: Orbax still changes them, and does not need them to restore.
        """
        for folder in self.path.glob("*.orbax-checkpoint-tmp*"):
            files = (path for path in folder.glob("*/**/*") if path.is_file())
            write_json(folder / SEAL, checksums(folder, files))

    def _damage(self, step: int) -> str:
        """Returns what is wrong with a checkpoint's files, as the first process sees them; "" if nothing."""
        reason = _first_damage(self.path / str(step)) if jax.process_index() == 0 else ""
        if jax.process_count() > 1:
            intact = multihost_utils.broadcast_one_to_all(not reason)
            return "" if intact else reason or "as the first process found"
        return reason

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, so that its step can be saved again."""
        if jax.process_index() == 0:
            target = self.path / f"damaged-{step}"
            shutil.rmtree(target, ignore_errors=True)
            (self.path / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside checkpoint {step}")
        self._manager.reload()


# ---------------------------------------------------------------------------------------------


def _silence_event_loop_errors() -> None:
    """Hides "Event loop is closed" errors, which TensorStore's threads print after a failed write."""
    before = sys.unraisablehook
    if getattr(before, "silences_event_loop", False):
        return

    def hook(error: Any) -> None:
        if error.exc_type is not RuntimeError or str(error.exc_value) != "Event loop is closed":
            before(error)
    hook.silences_event_loop = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


def _cause(reason: str) -> str:
    """Extracts the file and the system's error from TensorStore's long message."""
    match = re.search(r'local file "([^"]+)".*: ([A-Z][^:]*?) \[os_error_code', reason)
    return f"{match[1]}: {match[2]}" if match else reason[:300]


def _tree(state: TrainState) -> dict[str, Any]:
    """Returns the tree to store: without `loss_state` if that is empty, the layout of earlier versions."""
    tree = state._asdict()
    return tree if jax.tree.leaves(tree["loss_state"]) else {k: v for k, v in tree.items()
                                                             if k != "loss_state"}


@dataclasses.dataclass
class _NewestAndBest:
    """Tells Orbax which checkpoints to keep. Orbax's own BestN forgets all losses at a restart."""

    keep: int
    best_step: int = 0

    def should_preserve(self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *,
                        context: Any) -> list[bool]:
        newest = sorted(checkpoint.step for checkpoint in checkpoints)[-self.keep:]
        return [checkpoint.step in (*newest, self.best_step) for checkpoint in checkpoints]


def _first_damage(folder: Path) -> str:
    if not (folder / SEAL).is_file():
        return "" if folder.is_dir() else "it does not exist"  # without a list Orbax itself finds damage
    try:
        return find_damage(folder, read_json(folder / SEAL))
    except (OSError, InputError) as error:
        return f"{SEAL} cannot be read: {error}"
