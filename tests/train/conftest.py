"""Runs that several test files share: one complete, one stopped half-way."""

from __future__ import annotations

import contextlib
import io
import shutil

import pytest
import yaml

from tilelli_jax.train import main
from tilelli_jax.training import loop


@pytest.fixture(scope="session")
def tiny(tiny):
    """Uses two pathways instead of three, because every run traces its step again."""
    return tiny | {"model": tiny["model"] | {"pathways": ["local", "dense"]}}


@pytest.fixture(scope="session")
def tiny_file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    return path


@pytest.fixture(scope="session")
def finished(tiny_file, tmp_path_factory):
    """A complete run: its directory and what it printed."""
    run_dir = tmp_path_factory.mktemp("finished") / "demo"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = main(["--config", str(tiny_file), f"run_dir={run_dir}", "report.trigram=true",
                       "report.reference=0.5", "report.reference_name=a rival, of old",
                       'report.prompts=["Once", "The "]', "report.sample_bytes=5"])
    assert status == 0
    return run_dir, out.getvalue()


@pytest.fixture(scope="session")
def half_way(tiny_file, tmp_path_factory):
    """The directory of a run that was asked to stop after step 7."""
    run_dir = tmp_path_factory.mktemp("half way") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "should_stop", lambda step: step == 7)
        assert main(["--config", str(tiny_file), f"run_dir={run_dir}"]) == 0
    return run_dir


@pytest.fixture
def resumable(half_way, tiny_file, tmp_path):
    """A copy of the half-way run's directory, and the command that resumes it."""
    run_dir = tmp_path / "run"
    shutil.copytree(half_way, run_dir)
    return run_dir, ["--config", str(tiny_file), f"run_dir={run_dir}"]
