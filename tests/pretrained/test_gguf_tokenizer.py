"""Tokenizers of GGUF files: their ids are those of the tokenizers that they were made from."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.error_lines import assert_one_line
from tests.gguf_files import write_gguf
from tests.models.test_llama import LLAMA
from tests.reference_impl.random_weights import random_network
from tilelli_jax.convert.command import main as convert
from tilelli_jax.errors import InputError
from tilelli_jax.loading.language import HuggingFaceTokenizer, load_with_tokenizer
from tilelli_jax.pretrained.gguf_tokenizer import TOKENIZER, TOKENIZER_CONFIG, tokenizer_files

pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

LINES = (
    "The quick brown fox jumps over the lazy dog; it's 12345 times quicker than I'll ever be, isn't it?",
    "def f(x: int) -> list[int]:\n    return [i ** 2 for i in range(x)]  # 3.14e-10\n\n\n",
    "    four spaces,\ttabs\t\t and    runs   of  spaces     ", "  two", "", " ", "     ", "\n", "\r\n \n",
    "日本語のテキストと中文字符、한국어", "emoji 😀👩‍👩‍👧 🏳️‍🌈 ✅!", "naïve café, Ünïcödé, e\u0301 a\u030a",
    "ALL CAPS, camelCase, snake_case, kebab-case/path/to//file\n//next", "IT'S THEIR'RE'VE 'LL",
    "١٢٣ Ⅷ ½ 1234567890 0.5", "русский текст и ελληνικά", "\u00a0nbsp\u200bzero", "a▁b ▁▁ c",
    "<|im_start|>user\nWho are you?<|im_end|>\n<think> hm</think> <|im_start|>", "no <|im_ start|> special",
    "zzqqx and zzqqx")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = [part for line in LINES[:-1] for part in re.split(r"<\|\w+\|>|</?think>", line)] * 2
WHOLE = "Ġzzqqx"  # a token that no merge makes
# The patterns of these networks' tokenizer.json.
PATTERNS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
              r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
              r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"}
Metadata = dict[str, Any]
KEY = "tokenizer.ggml."


def byte_level(pre: str) -> tuple[Metadata, Any]:
    """A trained tokenizer, as metadata and as itself. `WHOLE` is in its vocabulary only."""
    tokenizer = Tokenizer(models.BPE())
    # Trained without words: then each way of cutting texts gives other tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    if pre in PATTERNS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(PATTERNS[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tree = json.loads(tokenizer.to_str())
    vocab = tree["model"]["vocab"]
    for token in (WHOLE, "<think>"):
        vocab[token] = len(vocab)
    tree["model"]["ignore_merges"] = pre in ("llama-bpe", "tekken")
    reference = Tokenizer.from_str(json.dumps(tree))
    reference.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    metadata = {
        "model": "gpt2", "pre": pre, "tokens": sorted(vocab, key=vocab.get),
        "token_type": [3] * len(SPECIAL) + [1] * (len(vocab) - len(SPECIAL) - 1) + [4],
        "merges": [" ".join(merge) for merge in tree["model"]["merges"]],
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": 2}
    return {KEY + key: value for key, value in metadata.items()}, reference


def sentencepiece(gemma: bool) -> tuple[Metadata, Callable[[str], list[int]]]:
    """A vocabulary of pieces, bytes and special tokens as metadata, and a plain tokenizer of it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=450, show_progress=False))
    tree = json.loads(trained.to_str())["model"]
    merged = list(dict.fromkeys("".join(merge) for merge in tree["merges"]))
    letters = [token for token in tree["vocab"] if len(token) == 1]
    special = ["<pad>", "<eos>", "<bos>", "<unk>"] if gemma else ["<unk>", "<s>", "</s>"]
    kinds = [3, 3, 3, 2] if gemma else [2, 3, 3]
    runs = ["\n\n", "  ", "   "] if gemma else ["<think>"]
    tokens = [*special, *runs, *(f"<0x{i:02X}>" for i in range(256)), *merged, *letters]
    kinds += [4] * len(runs) + [6] * 256 + [1] * (len(merged) + len(letters))
    rng = np.random.default_rng(0)
    # Gemma's scores are not in the order of its merges.
    scores = rng.standard_normal(len(tokens)) if gemma else -np.arange(len(tokens))
    ids = {token: special.index(name) for token, name in zip(("bos", "eos", "unknown"), (
        ("<bos>", "<eos>", "<unk>") if gemma else ("<s>", "</s>", "<unk>")), strict=True)}
    metadata = {"model": "llama", "pre": "default", "tokens": tokens, "token_type": kinds,
                "scores": [float(score) for score in scores], "add_space_prefix": not gemma,
                **{f"{name}_token_id": token_id for name, token_id in ids.items()}}
    spelled = {token.replace(" ", "▁"): i for i, token in enumerate(tokens)}
    whole = [*special, *(["\n\n"] if gemma else ["<think>"])]

    def encode(text: str) -> list[int]:
        found = min((place, token) for token in [*whole, ""] if (
            place := text.find(token) if token else len(text)) >= 0)
        if found[1]:
            before, after = text[:found[0]], text[found[0] + len(found[1]):]
            return [*encode(before), spelled[found[1]], *encode(after)]
        symbols = list(("" if gemma or not text else "▁") + text.replace(" ", "▁"))
        while pairs := [(spelled[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols))
                        if a + b in spelled]:
            best = min(pairs)[1]
            symbols[best:best + 2] = ["".join(symbols[best:best + 2])]
        return [token for symbol in symbols for token in (
            [spelled[symbol]] if symbol in spelled else
            [spelled[f"<0x{byte:02X}>"] for byte in symbol.encode()])]

    return {KEY + key: value for key, value in metadata.items()}, encode


def built(metadata: Mapping[str, Any], architecture: str = "llama") -> HuggingFaceTokenizer:
    files = tokenizer_files({"general.architecture": architecture, **metadata}, "a.gguf")
    return HuggingFaceTokenizer.from_json(files[TOKENIZER].decode(), "a.gguf")


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "tekken", "gpt-2"])
def test_byte_level_tokenizers(pre: str) -> None:
    metadata, reference = byte_level(pre)
    tokenizer = built(metadata)
    for line in (*LINES, "\n".join(LINES)):
        ids = reference.encode(line, add_special_tokens=False).ids
        assert tokenizer.encode(line) == ids, line
        assert pre == "qwen2" or tokenizer.decode(ids) == line
    begins = [1] if pre in ("llama-bpe", "tekken") else []
    assert tokenizer.encode_with_spans("a", special=True).ids == begins + tokenizer.encode("a")
    assert (tokenizer.token(WHOLE) in tokenizer.encode(" zzqqx")) == bool(begins)
    assert tokenizer.special == SPECIAL
    assert tokenizer.encode("<think>") == [tokenizer.token("<think>")]


def test_patterns_and_digits_matter() -> None:
    """Without this, the comparison above could not fail."""
    ids = {pre: built(byte_level("smollm")[0] | {"tokenizer.ggml.pre": pre}) for pre in (
        "smollm", "llama-bpe", "qwen2", "tekken", "gpt-2")}
    encoded = {pre: tuple(tuple(tokenizer.encode(line)) for line in LINES) for pre, tokenizer in ids.items()}
    assert len(set(encoded.values())) == len(encoded)


@pytest.mark.parametrize("gemma", [False, True])
def test_sentencepiece_tokenizers(gemma: bool) -> None:
    metadata, encode = sentencepiece(gemma)
    tokenizer = built(metadata, "gemma3" if gemma else "llama")
    lines = [*LINES, "<bos>one<eos> two" if gemma else "<s>one</s> two<think>three", "∑ and 🦙"]
    for line in lines:
        assert tokenizer.encode(line) == encode(line), line
        if not (gemma or "<s>" in line or "<think>" in line or "▁" in line):
            assert tokenizer.decode(tokenizer.encode(line)) == line
    begin = metadata["tokenizer.ggml.bos_token_id"]
    assert tokenizer.encode_with_spans("one", special=True).ids == [begin, *encode("one")]


def test_the_space_before_a_text_can_be_left_out() -> None:
    metadata = sentencepiece(False)[0]
    with_space, without = built(metadata), built(metadata | {"tokenizer.ggml.add_space_prefix": False})
    assert without.encode("one") != with_space.encode("one")
    assert without.encode(" one") == with_space.encode("one")
    assert without.decode(without.encode(" one")) == " one"


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_beginning_and_end_are_added_as_the_file_says(bos: bool, eos: bool) -> None:
    for metadata in (byte_level("llama-bpe")[0], sentencepiece(False)[0]):
        tokenizer = built(metadata | {f"{KEY}add_bos_token": bos, f"{KEY}add_eos_token": eos})
        ids, begin, end = tokenizer.encode("one"), 1, 2
        assert tokenizer.encode_with_spans("one", special=True).ids == [begin] * bos + ids + [end] * eos


def test_no_tokens_are_added_to_the_vocabulary() -> None:
    """The network has no rows for them."""
    metadata, _ = byte_level("llama-bpe")
    tokens = ["<|begin|>", "<|end|>", "<|other|>", *metadata["tokenizer.ggml.tokens"][3:]]
    tokenizer = built(metadata | {"tokenizer.ggml.tokens": tokens})
    for text in ("<|endoftext|>", "<s></s><unk>"):
        assert max(tokenizer.encode(text)) < len(tokens)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with a row for each token."""
    path = tmp_path_factory.mktemp("directory")
    random_network(replace(LLAMA, vocab_size=720), 0)[0].save_pretrained(path)
    return path


TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}>{% endif %}")


def test_chat_template_and_special_tokens(directory: Path, tmp_path: Path) -> None:
    """They reach the network's language, also after a conversion."""
    metadata, reference = byte_level("smollm")
    path = write_gguf(tmp_path / "a.gguf", directory, tokenizer=metadata | {
        "tokenizer.chat_template": TEMPLATE})
    assert convert([str(path), str(tmp_path / "out")]) == 0
    for source in (path, tmp_path / "out"):
        language = load_with_tokenizer(source)
        assert language.encode(LINES[0]) == reference.encode(LINES[0], add_special_tokens=False).ids
        chat = language.chat_template
        assert chat is not None and chat.template == TEMPLATE
        assert chat.special == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
                                "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    assert language.model.config.end_ids == (2, 7, 0) and language.model.config.bos_id == 1


def test_converted_tokenizers_are_read_by_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers (extra: hf) is not installed")
    metadata, encode = sentencepiece(False)
    files = tokenizer_files({"general.architecture": "llama", **metadata}, "a.gguf")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for line in LINES:
        assert theirs(line).input_ids == [1, *encode(line)], line
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token) == ("<s>", "</s>", "<unk>")


def raises_error(call: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert_one_line(f"error: {caught.value}\n", *parts)


def test_files_without_a_tokenizer(directory: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", directory)
    raises_error(lambda: load_with_tokenizer(path),
                 f"{path}: expected a tokenizer in its metadata, found none")
    files = tokenizer_files({"general.architecture": "llama", **byte_level("smollm")[0]}, "a.gguf")
    (tmp_path / TOKENIZER).write_bytes(files[TOKENIZER])
    assert load_with_tokenizer(path, tmp_path / TOKENIZER).encode("a")
    assert json.loads(files[TOKENIZER_CONFIG])["bos_token"] == "<|im_start|>"


MISTAKES: dict[str, tuple[Metadata, str]] = {
    "kind": ({f"{KEY}model": "bert"}, f"{KEY}model: expected gpt2 or llama, found 'bert'"),
    "pre-tokenizer": ({f"{KEY}pre": "chatglm-bpe"}, "found 'chatglm-bpe'"),
    "no pre-tokenizer": ({f"{KEY}pre": None}, f"expected the key {KEY}pre, which old files lack"),
    "no merges": ({f"{KEY}merges": None}, f"expected the key {KEY}merges"),
    "merges of others": ({f"{KEY}merges": ["a b", "ab zzqq"]}, "its tokenizer cannot be built"),
    "merges of one": ({f"{KEY}merges": ["ab"]}, "its tokenizer cannot be built"),
    "tokens": ({f"{KEY}tokens": [1, 2, 3]}, "its tokenizer cannot be built"),
    "special": ({f"{KEY}bos_token_id": 10_000}, "its tokenizer cannot be built"),
    "scores": ({f"{KEY}model": "llama", f"{KEY}scores": [0.0]}, f"{KEY}scores: expected 702 scores, found 1"),
    "no scores": ({f"{KEY}model": "llama"}, f"its tokenizer cannot be built: KeyError: '{KEY}scores'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    metadata = {key: value for key, value in (byte_level("smollm")[0] | changes).items() if value is not None}
    raises_error(lambda: built(metadata), "a.gguf: ", message)


def test_mistakes_leave_nothing_behind(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                       ) -> None:
    path = write_gguf(tmp_path / "a.gguf", directory, tokenizer=byte_level("smollm")[0] | {f"{KEY}pre": "x"})
    capsys.readouterr()
    assert convert([str(path), str(tmp_path / "out")]) == 2
    assert_one_line(capsys.readouterr().err, str(path), f"{KEY}pre: expected one of", "found 'x'")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gguf"]


def test_another_tokenizer_replaces_the_file_s(directory: Path, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "a.gguf", directory, tokenizer=byte_level("smollm")[0] | {f"{KEY}pre": "x"})
    files = tokenizer_files({"general.architecture": "llama", **byte_level("qwen2")[0]}, "a.gguf")
    other = tmp_path / "other"
    other.mkdir()
    for name, content in files.items():
        (other / name).write_bytes(content)
    for named, out in ((other, "one"), (other / TOKENIZER, "two")):
        assert convert([str(path), str(tmp_path / out), "--tokenizer", str(named)]) == 0
        assert {name: (tmp_path / out / name).read_bytes() for name in files} == files
        assert load_with_tokenizer(tmp_path / out).encode("a")
    capsys.readouterr()
    assert convert(["--inspect", str(path)]) == 0
    found = capsys.readouterr().out
    assert f"its tokenizer cannot be converted (--tokenizer names another): {path}: {KEY}pre: " in found
    for named in (tmp_path, other / TOKENIZER_CONFIG, tmp_path / "missing"):
        assert convert([str(path), str(tmp_path / "three"), "--tokenizer", str(named)]) == 2
        assert_one_line(capsys.readouterr().err, f"--tokenizer: expected {TOKENIZER} or a directory",
                        str(named))
    assert not (tmp_path / "three").exists()


def test_control_tokens_that_end_a_turn_need_no_key(directory: Path, tmp_path: Path) -> None:
    """convert_hf_to_gguf.py writes no eot for Gemma. A token that only has such a name is text."""
    metadata, _ = byte_level("llama-bpe")
    tokens = ["<|endoftext|>", "<end_of_turn>", "<|im_end|>", *metadata[f"{KEY}tokens"][3:]]
    tokens[-2], kinds = "<|eot_id|>", list(metadata[f"{KEY}token_type"])
    assert kinds[-2] == 1
    path = write_gguf(tmp_path / "a.gguf", directory, tokenizer=metadata | {
        f"{KEY}tokens": tokens, f"{KEY}eos_token_id": 2, f"{KEY}eot_token_id": None,
        f"{KEY}unknown_token_id": None})
    assert load_with_tokenizer(path).model.config.end_ids == (2, 0, 1)


def test_missing_packages(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "a.gguf", directory, tokenizer=byte_level("smollm")[0] | {
        "tokenizer.chat_template": TEMPLATE})
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "tokenizers", None)
        raises_error(lambda: load_with_tokenizer(path),
                     f"{path}: reading the tokenizer needs tokenizers: pip install 'tilelli_jax[hf]'")
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.utils.chat_template_utils", None)
    language = load_with_tokenizer(path)  # only the chat template needs transformers
    assert language.encode("a") and language.chat_template is not None
    raises_error(lambda: language.chat_template.format_prompt("Who?"),
                 f"{path}: rendering the chat template needs transformers")
