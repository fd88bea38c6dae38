"""The server with a network that has a tokenizer and a chat template."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.extras import needs_transformers
from tests.hugging_face_directory import END, WORDS, words_of, write_directory
from tilelli_jax.generation import decoding
from tilelli_jax.generation.engine import Engine
from tilelli_jax.loading.language import LanguageModel, load_with_tokenizer
from tilelli_jax.models.llama import LlamaConfig

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn (extra: serve) is not installed")
openai = pytest.importorskip("openai", reason="openai (extra: test) is not installed")
pytestmark = needs_transformers
CONFIG = LlamaConfig(vocab_size=len(WORDS), d_model=16, layers=("full",) * 2, n_heads=2, n_kv_heads=1,
                     d_head=8, d_hidden=24, max_seq_len=64, end_ids=(END,))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "words"
    write_directory(path, CONFIG)
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens([WORDS[END]])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def language(directory: Path) -> LanguageModel:
    return load_with_tokenizer(directory)


@pytest.fixture(scope="module")
def url(language: LanguageModel) -> Iterator[str]:
    """The URL of a server in a thread."""
    from tilelli_jax.serving import listening
    from tilelli_jax.serving.app import Server, Settings
    engine = Engine(language.model, slots=2, max_len=64)
    engine.compile()
    with listening.open_socket("127.0.0.1", 0) as listener, engine.running():
        server = Server(language, engine, Settings("words"))
        http = listening.Http(uvicorn.Config(server.app(), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=http.run, args=([listener],))
        thread.start()
        yield f"{listening.address_of(listener)}v1"
        http.leave(0)
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def client(url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def test_chats_use_the_template(client: Any, language: LanguageModel) -> None:
    messages = [{"role": "system", "content": "the cat"}, {"role": "user", "content": "who sat"}]
    assert language.chat_template is not None
    ids = language.encode(language.chat_template.format_messages(messages))
    for seed in range(4):
        reply = client.chat.completions.create(model="words", messages=messages, max_tokens=9, seed=seed)
        expected = decoding.generate_ids(language.model, [ids], max_new=9, seed=seed)[0]
        assert reply.choices[0].message.content == words_of(expected.ids)
        assert reply.choices[0].finish_reason == ("stop" if expected.ended else "length")
        assert reply.usage.prompt_tokens == len(ids)


def test_completions_begin_with_bos(client: Any, language: LanguageModel) -> None:
    ids = language.tokenizer.encode_with_spans("the cat", special=True).ids
    expected = decoding.generate_ids(language.model, [ids], max_new=6, seed=3, end_ids=())[0].ids
    expected = expected[:expected.tolist().index(END)] if END in expected else expected
    by_text = client.completions.create(model="words", prompt="the cat", max_tokens=6, seed=3)
    by_ids = client.completions.create(model="words", prompt=ids, max_tokens=6, seed=3)
    assert by_text.choices[0].text == by_ids.choices[0].text == words_of(expected)


@pytest.mark.parametrize(("messages", "message"), [
    ([{"role": "user", "content": "a </s> <model> cat"}], "content: expected no special tokens, found </s>"),
    ([{"role": "assistant", "content": "a"}], "expected user in the last message, found assistant"),
    ([{"role": "user", "content": " "}], "expected text, found none"),
])
def test_invalid_chats(client: Any, messages: list[dict[str, str]], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model="words", messages=messages)


@pytest.mark.exhaustive
def test_lm_eval_reads_it(url: str, directory: Path, language: LanguageModel, monkeypatch: pytest.MonkeyPatch
                          ) -> None:
    """`--model local-completions` gives the numbers of the network itself."""
    completions = pytest.importorskip("lm_eval.models.openai_completions",
                                      reason="lm_eval (extra: lm-eval) is not installed")
    pytest.importorskip("tenacity", reason="tenacity, which lm_eval needs here, is not installed")
    from lm_eval.api.instance import Instance
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    api = completions.LocalCompletionsAPI(
        base_url=f"{url}/completions", model="words", tokenizer=str(directory), num_concurrent=2,
        tokenizer_backend="huggingface", max_length=64, add_bos_token=False)
    pairs = [("the cat", " sat on"), ("who sat on the", " mat"), ("a", " a cat a")]
    found = api.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    for (context, continuation), (log_prob, is_greedy) in zip(pairs, found, strict=True):
        before, ids = language.encode(context), language.encode(context + continuation)
        logits = np.asarray(language.model(np.array([ids])))[0].astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        rows = range(len(before) - 1, len(ids) - 1)
        assert log_prob == pytest.approx(sum(log_probs[i, ids[i + 1]] for i in rows), abs=1e-4)
        assert is_greedy == all(log_probs[i].argmax() == ids[i + 1] for i in rows)
    request = "the cat", {"until": [" a"], "max_gen_toks": 8}
    texts = api.generate_until([Instance("generate_until", {}, request, 0)])
    expected = words_of(decoding.generate_ids(language.model, [language.encode("the cat")], max_new=8,
                                              temperature=0.0)[0].ids)
    assert texts == [expected.partition(" a")[0]]
