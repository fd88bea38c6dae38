"""Networks are loaded from model directories, Hugging Face directories, GGUF files and the hub's cache."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilelli_jax
from tests.error_lines import assert_one_line
from tests.gguf_files import write_gguf
from tests.hugging_face_directory import TEMPLATE, write_directory
from tests.models.test_llama import LLAMA
from tests.reference_impl.comparison import assert_same_weights
from tilelli_jax.errors import InputError
from tilelli_jax.loading import store
from tilelli_jax.loading.fingerprint import network_fingerprint
from tilelli_jax.loading.language import load_with_tokenizer
from tilelli_jax.loading.sources import FILES, OTHER_FILES, local_path

COMMIT = "0123456789" * 4
ID = "some-owner/Some.Network-1B"
# A vocabulary of letters, as of a GGUF file.
LETTERS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b"],
           "tokenizer.ggml.tokens": [*(f"<{i}>" for i in range(8)), *"abcdefghijklmnopqrstuvwxyz", "ab"]}


def raises_error(call: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert_one_line(f"error: {caught.value}\n", *parts)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A Hugging Face directory with a tokenizer, and its network."""
    path = tmp_path_factory.mktemp("network")
    return path, write_directory(path, LLAMA)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which is offline."""
    constants = pytest.importorskip("huggingface_hub.constants",
                                    reason="huggingface_hub (extra: hf) is not installed")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_into_cache(hub: Path, source: Path) -> Path:
    """Puts a directory into the cache as the hub's library does: links to contents by their hash."""
    entry = hub / f"models--{ID.replace('/', '--')}"
    snapshot = entry / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    for i, file in enumerate(source.iterdir()):
        shutil.copy(file, entry / "blobs" / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_every_source_gives_the_same_network(network: tuple[Path, Any], hub: Path, tmp_path: Path) -> None:
    directory, expected = network
    store.save(expected, tmp_path / "ours")
    shutil.copy(directory / "tokenizer.json", tmp_path / "ours")
    file = write_gguf(tmp_path / "network.gguf", directory, tokenizer=LETTERS)
    put_into_cache(hub, directory)
    for source in (directory, str(directory), tmp_path / "ours", file, str(file), ID):
        for model in (tilelli_jax.load(source), load_with_tokenizer(source).model):
            assert model.config == LLAMA
            assert_same_weights(model, expected)
    for source in (directory, tmp_path / "ours", ID):
        assert load_with_tokenizer(source).encode("a cat sat") == [4, 5, 6]
    chat = load_with_tokenizer(ID).chat_template
    assert chat is not None and (chat.template, chat.special) == (TEMPLATE, {"bos_token": "<s>"})
    assert load_with_tokenizer(file).encode("cab") == [10, 34]


def test_files_without_the_suffix_are_recognised(network: tuple[Path, Any], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "network.gguf", network[0]).rename(tmp_path / "sha256-0123")
    assert tilelli_jax.load(file).config == LLAMA


def test_a_hub_id_is_looked_up_in_the_cache_first(network: tuple[Path, Any], hub: Path, monkeypatch:
                                                   pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = put_into_cache(hub, network[0])
    assert local_path(ID).samefile(snapshot)
    (tmp_path / ID).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_path(ID) == Path(ID)  # a local directory of this name takes precedence


def test_what_is_downloaded(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights once, and only those at the top level."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **options: asked.update(options, name=name) or "/somewhere")
    assert local_path(ID) == Path("/somewhere") and asked["name"] == ID
    files = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt",
             "model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja",
             "consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "README.md",
             "onnx/config.json", "model.Q4_0.gguf"]
    assert list(filter_repo_objects(files, allow_patterns=asked["allow_patterns"],
                                    ignore_patterns=asked["ignore_patterns"])) == files[:8]
    assert (asked["allow_patterns"], asked["ignore_patterns"]) == (list(FILES), list(OTHER_FILES))


def test_offline(hub: Path) -> None:
    raises_error(lambda: tilelli_jax.load(ID), f"{ID}: no such file or directory, not in the Hugging Face "
                 "cache, and the hub cannot be reached")
    raises_error(lambda: load_with_tokenizer("owner/a..b"),
                 "owner/a..b: no such file or directory, nor an id of the Hugging Face hub: ")


@pytest.mark.parametrize(("error", "message"), [
    ("GatedRepoError", "is gated: accept its terms on its page of the Hugging Face hub, then run `hf auth "
     "login`"),
    ("RepositoryNotFoundError", "no such file or directory, and no Hugging Face repository that you can "
     "access"),
    ("LocalEntryNotFoundError", "the hub cannot be reached (LocalEntryNotFoundError)")])
def test_refusals_of_the_hub(error: str, message: str, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors
    kind = getattr(errors, error)

    def refuse(*_: Any, **__: Any) -> str:
        raise kind.__new__(kind)  # without the response that its constructor requires

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for call in (tilelli_jax.load, load_with_tokenizer, network_fingerprint):
        raises_error(lambda call=call: call(ID), f"{ID}: ", message)


def test_the_hub_package_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    raises_error(lambda: tilelli_jax.load(ID), f"{ID}: no such file or directory; the Hugging Face hub needs "
                 "huggingface_hub: pip install 'tilelli_jax[hf]'")


def test_the_hub_is_not_asked_for_local_paths(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
                                              ) -> None:
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "broken").symlink_to("nowhere")
    for path in ("runs/misspelt", "misspelt", "./a/b", "../a/b", "/a/b", "a/b/c", "a/b/", "run/model.gguf",
                 "~/models", "", "a b/c"):
        raises_error(lambda path=path: tilelli_jax.load(path), f"{path}: no such file or directory")
    assert local_path("broken") == Path("broken")  # and reading it fails
    raises_error(lambda: tilelli_jax.load("broken"), "broken")


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, content in (("a.gguf", b"text"), ("a.pt", b"PK\x03\x04"), ("a.safetensors", bytes(16))):
        (tmp_path / name).write_bytes(content)
        raises_error(lambda name=name: tilelli_jax.load(tmp_path / name), str(tmp_path / name))


def test_fingerprint_of_a_file(network: tuple[Path, Any], tmp_path: Path) -> None:
    """It depends on all bytes, on the tokenizer, and not on the directory."""
    directory = network[0]
    file = write_gguf(tmp_path / "network.gguf", directory, tokenizer=LETTERS)
    (tmp_path / "other").mkdir()
    first = network_fingerprint(file)
    copy = Path(shutil.copy(file, tmp_path / "other" / "network.gguf"))
    assert network_fingerprint(copy) == first == network_fingerprint(file)
    with_tokenizer = network_fingerprint(file, str(directory))
    assert with_tokenizer != first
    content = bytearray(copy.read_bytes())
    content[np.random.default_rng(0).integers(len(content))] ^= 1
    copy.write_bytes(content)
    assert network_fingerprint(copy) != first
    raises_error(lambda: network_fingerprint(tmp_path / "none.gguf"), "none.gguf: no such file or directory")
