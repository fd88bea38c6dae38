"""Checkpoints: which are kept, how damaged ones are handled, and restoring to another mesh."""

from __future__ import annotations

import json
import logging
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tilelli_jax.errors import InputError
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh
from tilelli_jax.training import checkpoint
from tilelli_jax.training.checkpoint import SEAL, Checkpoints
from tilelli_jax.training.step import TrainState


def state_of(step, sizes=(1, 1, 1)):
    """A state whose numbers identify its step, with its matrix sharded over `fsdp`."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:int(np.prod(sizes))])
    whole, parts = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("fsdp", "tensor")))
    matrix = np.arange(256, dtype=np.float32).reshape(16, 16) + step
    return jax.device_put(
        TrainState(jnp.int32(step), {"kernel": matrix}, ({"kernel": -matrix}, ()), jnp.uint32([step, 1])),
        TrainState(whole, {"kernel": parts}, ({"kernel": parts}, ()), whole))


def outline_of(state):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


OUTLINE = outline_of(state_of(0))


@pytest.fixture
def open_at(tmp_path):
    """Opens the checkpoints in a directory, and closes them at the end."""
    opened = []

    def open_at(path=tmp_path / "checkpoints", keep=2):
        opened.append(Checkpoints(path, keep))
        return opened[-1]
    yield open_at
    for checkpoints in opened:
        checkpoints.close()


def save(checkpoints, *steps, best=1):
    for step in steps:
        checkpoints.save(state_of(step), {"step": step, "best_step": min(best, step), "data": {"at": step}})
    checkpoints.wait()


def folders(checkpoints):
    return sorted(path.name for path in checkpoints.path.iterdir())


def assert_is(restored, step):
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(step))
    assert restored.notes["step"] == step and restored.notes["data"] == {"at": step}


def test_a_saved_state_is_restored(open_at):
    save(open_at(), 7)
    restored = open_at().latest(OUTLINE)
    assert_is(restored, 7)
    assert isinstance(restored.state, TrainState)
    assert restored.state.params["kernel"].sharding == OUTLINE.params["kernel"].sharding


def test_nothing_to_restore(open_at):
    assert open_at().latest(OUTLINE) is None


def test_newest_and_best_are_kept(open_at):
    checkpoints = open_at(keep=2)
    save(checkpoints, 1, 2, 3, 4, 5, best=2)
    assert checkpoints.steps() == [2, 4, 5] and folders(checkpoints) == ["2", "4", "5"]
    save(checkpoints, 6, best=6)  # the old best is removed
    assert folders(checkpoints) == ["5", "6"]


def test_the_best_is_kept_after_a_restart(open_at):
    save(open_at(keep=1), 1, 2, 3, best=2)
    again = open_at(keep=1)
    assert_is(again.latest(OUTLINE), 3)
    save(again, 4, 5, best=2)
    assert again.steps() == [2, 5]
    assert_is(again.restore(2, OUTLINE), 2)


def largest(path):
    """The largest of a checkpoint's files that Orbax reads: an array's data."""
    return max((path / "state" / "d").iterdir(), key=lambda file: file.stat().st_size)


def truncated(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "data truncated": lambda path: truncated(largest(path)),
    "data empty": lambda path: largest(path).write_bytes(b""),
    "data zeroed": lambda path: largest(path).write_bytes(bytes(largest(path).stat().st_size)),
    "data missing": lambda path: largest(path).unlink(),
    "a bit flipped": lambda path: flipped(largest(path)),
    "metadata truncated": lambda path: truncated(path / "state" / "_METADATA"),
    "notes truncated": lambda path: truncated(path / "notes" / "metadata"),
    "notes missing": lambda path: shutil.rmtree(path / "notes"),
    "arrays missing": lambda path: shutil.rmtree(path / "state"),
    "list truncated": lambda path: truncated(path / SEAL),
    "list no list": lambda path: (path / SEAL).write_text("[]"),
    "all missing": lambda path: [shutil.rmtree(path), path.mkdir()],
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A directory with checkpoints of steps 1 and 2, to be copied."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("two") / "checkpoints")
    save(checkpoints, 1, 2)
    checkpoints.close()
    return checkpoints.path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped(two_checkpoints, tmp_path, open_at, caplog, capfd, damage):
    path = tmp_path / "copy"
    shutil.copytree(two_checkpoints, path)
    DAMAGES[damage](path / "2")
    checkpoints = open_at(path)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING, logger="tilelli_jax"):
        assert_is(checkpoints.latest(OUTLINE), 1)
    warning, = (record for record in caplog.records if record.name.startswith("tilelli_jax"))
    reason = "cannot be restored" if damage == "all missing" else r"damaged checkpoint \(.*\)"
    assert re.fullmatch(f"{path}/2: {reason}.*; skipped, continuing from step 1", warning.getMessage())
    assert "Traceback" not in capfd.readouterr().err  # Orbax did not read it
    assert checkpoints.steps() == [1] and "damaged-2" in folders(checkpoints)
    save(checkpoints, 2)
    assert_is(open_at(path).latest(OUTLINE), 2)


def test_several_damaged_checkpoints_and_one_damaged_twice(open_at, caplog):
    checkpoints = open_at(keep=3)
    save(checkpoints, 1, 2, 3)
    for _ in range(2):
        for step in (2, 3):
            truncated(largest(checkpoints.path / str(step)))
        checkpoints = open_at(keep=3)
        assert_is(checkpoints.latest(OUTLINE), 1)
        assert folders(checkpoints) == ["1", "damaged-2", "damaged-3"]
        save(checkpoints, 2, 3)
    assert len([record for record in caplog.records if "skipped" in record.message]) == 4


def test_all_damaged(open_at):
    checkpoints = open_at()
    save(checkpoints, 1, 2)
    for step in (1, 2):
        truncated(largest(checkpoints.path / str(step)))
    message = r"2: damaged checkpoint \(state/d/.*no other checkpoint is readable"
    with pytest.raises(InputError, match=message):
        open_at().latest(OUTLINE)
    assert folders(checkpoints) == ["1", "2"]  # kept for inspection


def test_the_list_names_every_array_file(two_checkpoints):
    listed = json.loads((two_checkpoints / "2" / SEAL).read_text())
    found = {str(path.relative_to(two_checkpoints / "2")) for item in ("state", "notes")
             for path in (two_checkpoints / "2" / item).rglob("*") if path.is_file()}
    assert set(listed) == found and any(name.startswith("state/d/") for name in found)


def test_a_checkpoint_without_a_file_list_is_not_checked(two_checkpoints, tmp_path, open_at):
    path = tmp_path / "copy"
    shutil.copytree(two_checkpoints, path)
    (path / "2" / SEAL).unlink()
    assert_is(open_at(path).latest(OUTLINE), 2)


def test_an_incomplete_checkpoint_is_ignored(two_checkpoints, tmp_path, open_at):
    path = tmp_path / "copy"
    shutil.copytree(two_checkpoints, path)
    shutil.copytree(path / "2", path / "3.orbax-checkpoint-tmp")
    checkpoints = open_at(path)
    assert_is(checkpoints.latest(OUTLINE), 2)
    save(checkpoints, 3)
    assert folders(checkpoints) == ["1", "2", "3"]


@pytest.mark.eight_devices
@pytest.mark.parametrize(("before", "after"), [((1, 1, 1), (1, 4, 2)), ((2, 2, 2), (1, 8, 1)),
                                               ((1, 8, 1), (1, 1, 1))])
def test_another_mesh(open_at, before, after):
    checkpoints = open_at()
    checkpoints.save(state_of(3, before), {"step": 3, "best_step": 3})
    checkpoints.wait()
    expected = state_of(3, after)
    restored = open_at().latest(outline_of(expected)).state
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert restored.params["kernel"].sharding == expected.params["kernel"].sharding


def test_a_checkpoint_of_another_network(two_checkpoints, tmp_path, open_at):
    path = tmp_path / "copy"
    shutil.copytree(two_checkpoints, path)
    other = OUTLINE._replace(params={"another": OUTLINE.params["kernel"]})
    with pytest.raises(InputError, match="2: cannot be restored"):
        open_at(path).latest(other)
    assert_is(open_at(path).latest(OUTLINE), 2)  # it was not treated as damaged


def test_an_empty_memory_is_not_stored():
    state = TrainState(jnp.int32(1), {"kernel": jnp.ones(2)}, (), jnp.uint32([0, 1]))
    assert list(checkpoint._tree(state)) == ["step", "params", "opt_state", "key"]
    assert list(checkpoint._tree(state._replace(loss_state={"silent": jnp.zeros(2)})))[-1] == "loss_state"
