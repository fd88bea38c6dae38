"""Checkpoints through Orbax: asynchronous, newest and best kept, damaged ones passed over."""

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
from tilelli_jax.files import checksums, find_damage, write_json
from tilelli_jax.json_text import read_json
from tilelli_jax.training.step import TrainState

log = logging.getLogger(__name__)
SEAL = "files.json"


class Restored(NamedTuple):
    """A training state, and the JSON-able notes that were saved with it."""

    state: TrainState
    notes: dict[str, Any]


class Checkpoints:
    """The directory `checkpoints/` of a run: `<step>/state` (arrays) and `<step>/notes` (JSON).

    A checkpoint is written beside its place and renamed when complete: a killed process leaves
    either all of it or nothing that counts. What happens to its files later is seen by the list
    of their sizes and checksums, `<step>/files.json`, before Orbax reads them: at a damaged file
    it fails too, but with thousands of lines from threads that it leaves behind.
    """

    def __init__(self, path: Path, keep: int = 2):
        self.path = path.absolute()
        self._policy = _NewestAndBest(keep)
        self._manager = ocp.CheckpointManager(self.path, options=ocp.CheckpointManagerOptions(
            create=True, cleanup_tmp_directories=True, preservation_policy=self._policy,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal)))
        self._failed = False
        _drop_echoes()

    def save(self, state: TrainState, notes: dict[str, Any]) -> None:
        """Starts saving; returns as soon as the arrays are copied.

        Args:
            notes: anything that JSON can hold, with `step`, and `best_step`, the one to keep.

        Raises:
            InputError: this one, or the one before it, cannot be written. Those that are whole stay.
        """
        self._policy.best_step = notes["best_step"]
        with self._writing():
            self._manager.save(notes["step"], force=True, args=ocp.args.Composite(
                state=ocp.args.StandardSave(_tree(state)), notes=ocp.args.JsonSave(notes)))

    def latest(self, outline: TrainState) -> Restored | None:
        """The newest checkpoint that can be read, or None where there is none.

        Args:
            outline: shapes, types and shardings to restore to; any mesh will do.

        Raises:
            InputError: there are checkpoints and none can be read.
        """
        damaged: list[tuple[int, InputError]] = []
        for step in reversed(self.steps()):
            try:
                restored = self.restore(step, outline)
            except InputError as error:
                damaged.append((step, error))
                continue
            for bad, reason in damaged:
                log.warning("%s; passed over, going on from step %d", reason, step)
                self._set_aside(bad)
            return restored
        if damaged:
            raise InputError(f"{damaged[0][1]}; there is no other that can be read")
        return None

    def restore(self, step: int, outline: TrainState) -> Restored:
        """One checkpoint.

        Raises:
            InputError: it is not there, it is damaged, or it is one of another network.
        """
        if reason := self._damage(step):
            raise InputError(f"{self.path / str(step)}: damaged checkpoint ({reason})")
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_tree(outline)), notes=ocp.args.JsonRestore()))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{self.path / str(step)}: cannot be restored: {reason}") from error
        return Restored(TrainState(**found["state"]), found["notes"])

    def steps(self) -> list[int]:
        """The steps that are kept, in order."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Until what was started is on disk. Raises InputError where it cannot be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the directory. Raises as `wait` does, if nothing has been raised before."""
        reported = self._failed
        try:
            with self._writing():
                self._manager.close()
        except InputError:
            if not reported:
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Orbax and TensorStore raise many kinds, from threads: one line in their place."""
        try:
            yield
        except Exception as error:
            self._failed = True
            reason = " ".join(str(error).split())
            raise InputError(f"{self.path}: a checkpoint cannot be written: {_cause(reason)}") from error

    def _seal(self) -> None:
        """Lists a checkpoint's files; called in one process, just before the renaming.

        Those at its top are left out: Orbax has yet to change them, and needs none of them.
        """
        for folder in self.path.glob("*.orbax-checkpoint-tmp*"):
            files = (path for path in folder.glob("*/**/*") if path.is_file())
            write_json(folder / SEAL, checksums(folder, files))

    def _damage(self, step: int) -> str:
        """What is wrong with the files of a checkpoint, as the first process sees them, or ""."""
        reason = _first_damage(self.path / str(step)) if jax.process_index() == 0 else ""
        if jax.process_count() > 1:
            whole = multihost_utils.broadcast_one_to_all(not reason)
            return "" if whole else reason or "as the first process found"
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


def _drop_echoes() -> None:
    """Of a write that failed, TensorStore's threads print that nobody waits for them any more."""
    before = sys.unraisablehook
    if getattr(before, "drops_echoes", False):
        return

    def hook(what: Any) -> None:
        if what.exc_type is not RuntimeError or str(what.exc_value) != "Event loop is closed":
            before(what)
    hook.drops_echoes = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


def _cause(reason: str) -> str:
    """The file and what the system says, of TensorStore's long sentences."""
    found = re.search(r'local file "([^"]+)".*: ([A-Z][^:]*?) \[os_error_code', reason)
    return f"{found[1]}: {found[2]}" if found else reason[:300]


def _tree(state: TrainState) -> dict[str, Any]:
    """As it is stored: without the memory where nothing is remembered, as all were before there was one."""
    tree = state._asdict()
    return tree if jax.tree.leaves(tree["memory"]) else {k: v for k, v in tree.items() if k != "memory"}


@dataclasses.dataclass
class _NewestAndBest:
    """Which checkpoints Orbax is to keep. Its own BestN forgets all losses at a restart."""

    keep: int
    best_step: int = 0

    def should_preserve(self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *,
                        context: Any) -> list[bool]:
        newest = sorted(checkpoint.step for checkpoint in checkpoints)[-self.keep:]
        return [checkpoint.step in (*newest, self.best_step) for checkpoint in checkpoints]


def _first_damage(folder: Path) -> str:
    if not (folder / SEAL).is_file():
        return "" if folder.is_dir() else "it is not there"  # unlisted: for Orbax to find out
    try:
        return find_damage(folder, read_json(folder / SEAL))
    except (OSError, InputError) as error:
        return f"{SEAL} cannot be read: {error}"
