"""The Python lines of docs/difficulty.md and docs/patching.md run as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.reference_impl.random_weights import random_network
from tilelli_jax.data.activations import open_activations
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.loading import store
from tilelli_jax.models.vanilla import VanillaConfig

DOCS = Path(__file__).parents[3] / "docs"
D, LATENTS = 16, 48


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what the lines name: my-network and my-sae."""
    store.save(random_network(VanillaConfig(d_model=D, n_layers=2, max_seq_len=128, n_heads=2), 0)[0],
               tmp_path / "my-network")
    store.save(store.build(SAEConfig(d_model=D, n_latents=LATENTS, k=6), 0), tmp_path / "my-sae")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_network_is_probed_and_patched(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *_ = blocks("patching.md")
    assert len([line for line in first.splitlines() if line and "import" not in line]) <= 11
    names: dict[str, Any] = {}
    exec(first, names)
    codes, latent = names["codes"], names["latent"]
    active = np.asarray(codes.latents)[np.asarray(codes.values) > 0]
    assert latent in active, "it is active in the prompt"
    printed = capsys.readouterr().out
    assert names["ablated"] != names["reconstructed"] != names["natural"]
    assert f"without latent {latent} {names['ablated']:.4f}\nits effect: " in printed


@pytest.mark.exhaustive
def test_effects_with_controls(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = blocks("patching.md")
    names: dict[str, Any] = {}
    exec(first, names)
    exec(second, names)
    latent = names["latent"]
    effects, printed = names["effects"], capsys.readouterr().out
    assert len(names["controls"][latent]) == 3 and set(effects.controls) == set(names["controls"][latent])
    table = np.asarray(names["table"], float)
    changed = np.flatnonzero(table[:, 2] != table[:, 1])
    assert effects.chosen[latent].items_changed == len(changed) > 0
    change = table[:, 2].mean() - table[:, 1].mean()
    sentence = re.search(rf"without latent {latent} the NLL changes by ([+−]\d\.\d{{4}}) \[.*\] nats per "
                         rf"token \(p .*\), in {len(changed)} of 100 questions\n", printed)
    assert sentence and float(sentence[1].replace("−", "-")) == pytest.approx(change, abs=1e-4)
    assert "of 3 controls have as large a mean change" in printed
    exec(third, names)
    stored = open_activations("activations")
    assert stored.d_model == D and len(stored) == sum(len(ids) - 1 for ids in names["token_ids"] if ids)


@pytest.mark.exhaustive
def test_a_latent_that_is_never_active_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, _ = blocks("patching.md")
    sae = store.load("my-sae")
    kernel, bias = np.array(sae.encoder.kernel[...]), np.array(sae.encoder.bias[...])
    kernel[:, 7], bias[7] = 0, -1e6  # latent 7 is never among the k largest
    sae.encoder.kernel[...], sae.encoder.bias[...] = kernel, bias
    store.save(sae, Path("my-sae"))
    names: dict[str, Any] = {}
    lines = [f"latent = 7  # {line}" if line.startswith("latent = ") else line for line in first.splitlines()]
    exec("\n".join(lines), names)
    assert capsys.readouterr().out.endswith("\nnever active in this prompt\n")
    exec(second, names)
    assert "\nlatent 7 is never active in these prompts\n" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_the_evaluation_layer(capsys: pytest.CaptureFixture[str]) -> None:
    block, = blocks("difficulty.md")
    exec(block, {})
    printed = capsys.readouterr().out
    assert "P5_sae_only" in printed and "P3_cheap_sae − P2_cheap_raw Interval(" in printed
