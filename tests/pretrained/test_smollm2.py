"""SmolLM2-135M-Instruct from a GGUF file, compared with transformers on the same file."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import compiled
from tests.extras import needs_transformers
from tests.references import STORED, needs
from tests.smollm2 import smollm2_file
from tilelli_jax.cli import program_cache
from tilelli_jax.generation.decoding import generate_ids
from tilelli_jax.loading.language import LanguageModel, load_with_tokenizer
from tilelli_jax.pretrained.gguf import read_gguf

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(1800), needs_transformers, *(
    pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} (extra: test) is missing")
    for name in ("gguf", "accelerate"))]
TEXT = STORED / "data" / "tinyshakespeare.txt"
N_TOKENS, WINDOW, N_NEW = 20_000, 1024, 32
PROMPTS = (
    "The capital of France is", "Once upon a time, there was a", "def fibonacci(n):\n    ", "2 + 2 =",
    "Water boils at", "import numpy as np\n\nx = np.", "The quick brown fox", "In 1969, Neil Armstrong",
    "Q: What is the largest planet?\nA:", "日本の首都は", "😀😀😀", "To be, or not to be,", "E = mc", "    ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "SELECT * FROM", "Il était une fois",
    "1, 1, 2, 3, 5, 8, 13,", "The mitochondria is the", "Photosynthesis converts")
QUESTIONS = (
    "What is the capital of France?", "Write one sentence about the sea.", "What is 7 times 8?",
    "Who wrote Emma?", "Name three colours.", "Write a haiku about autumn.", "What does HTTP stand for?",
    "Translate 'good morning' into French.", "Why is the sky blue?", "List the planets of the solar system.",
    "Write a Python function that adds two numbers.", "What is the opposite of hot?", "Tell me a joke.",
    "How many legs does a spider have?", "Who painted the Mona Lisa?", "What is photosynthesis?",
    "Summarise the story of Romeo and Juliet.", "What is the boiling point of water?",
    "日本の首都はどこですか？",
    "Give me a recipe for pancakes.")


@pytest.fixture(scope="module")
def file() -> Path:
    return smollm2_file()


@pytest.fixture(scope="module")
def ours(file: Path) -> LanguageModel:
    return load_with_tokenizer(file)


def compute(file: str, out: str, text: str) -> None:
    """Writes our results: logits of the prompts, answers, and the NLL of a text if it exists."""
    language = load_with_tokenizer(file)
    model = language.model
    graph, weights = nnx.split(model)  # weights as constants would be compiled into the programs
    logits = jax.jit(lambda weights, ids: nnx.merge(graph, weights)(ids))
    results = {"logits": logits(weights, jnp.asarray(padded(language)[0]))}
    prompts = [language.encode(language.chat_template.format_prompt(question)) for question in QUESTIONS]
    for i, answer in enumerate(generate_ids(model, prompts, max_new=N_NEW, temperature=0)):
        results[f"answer{i}"] = answer.ids
    if Path(text).exists():
        measure = jax.jit(lambda weights, ids: nnx.merge(graph, weights).nll(ids)[0])
        results["nll"] = np.concatenate([measure(weights, jnp.asarray(row[None]))
                                         for row in windows(language, text)])
    np.savez(out, **{name: np.asarray(array) for name, array in results.items()})


def padded(language: LanguageModel) -> tuple[np.ndarray, list[int]]:
    """The prompts, and their lengths; what follows a prompt does not change its logits."""
    rows = [language.encode(prompt) for prompt in PROMPTS]
    lengths = [len(row) for row in rows]
    return np.array([row + [0] * (max(lengths) - len(row)) for row in rows]), lengths


def windows(language: LanguageModel, text: str | Path) -> np.ndarray:
    ids = language.encode(Path(text).read_text()[:5 * N_TOKENS])[:N_TOKENS]
    assert len(ids) == N_TOKENS
    return np.pad(ids, (0, -N_TOKENS % WINDOW)).reshape(-1, WINDOW)


@pytest.fixture(scope="module")
def results(file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What `compute` writes, in a process with XLA's full optimisation: here, decoding would take minutes."""
    out = tmp_path_factory.mktemp("results") / "results.npz"
    flags = " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split()
                     if flag.partition("=")[0] not in compiled.QUICK)
    cache = program_cache.root("tests") / program_cache.fingerprint(flags)
    script = ("from tests.pretrained.test_smollm2 import compute; "
              f"compute({str(file)!r}, {str(out)!r}, {str(TEXT)!r})")
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=True,
                   env=os.environ | {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(cache)})
    with np.load(out) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def theirs(file: Path) -> Iterator[Any]:
    """transformers' network, in float32."""
    import torch
    import transformers
    with torch.no_grad():
        yield transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def their_tokenizer(file: Path) -> Any:
    import transformers
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_every_tensor_is_equal(file: Path, theirs: Any) -> None:
    expected = theirs.state_dict()
    read = read_gguf(file)
    assert set(expected) - set(read.tensors) <= {"lm_head.weight"}  # tied
    assert set(read.formats.values()) == {"Q4_1", "Q8_0", "F32"}
    for name, tensor in read.tensors.items():
        array = expected[name].numpy()
        np.testing.assert_allclose(tensor.read(), array, rtol=2e-7, atol=1e-7 * np.abs(array).max(),
                                   err_msg=name)


def test_logits_are_equal(ours: LanguageModel, theirs: Any, results: dict[str, np.ndarray]) -> None:
    import torch
    ids, lengths = padded(ours)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    for i, length in enumerate(lengths):
        a, b = results["logits"][i, :length], expected[i, :length]
        assert np.abs(a - b).max() < 1e-4 * np.abs(b).max(), PROMPTS[i]


def test_greedy_answers_are_equal(ours: LanguageModel, theirs: Any, their_tokenizer: Any,
                                  results: dict[str, np.ndarray]) -> None:
    import torch
    chat, end = ours.chat_template, theirs.config.eos_token_id
    assert chat is not None and ours.model.config.end_ids == (end, 0)  # <|endoftext|>
    for i, question in enumerate(QUESTIONS):
        text = chat.format_prompt(question)
        assert text == their_tokenizer.apply_chat_template([{"role": "user", "content": question}],
                                                           tokenize=False, add_generation_prompt=True)
        prompt = ours.encode(text)
        with torch.no_grad():
            expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=N_NEW, do_sample=False,
                                       pad_token_id=0)[0, len(prompt):].tolist()
        if end in expected:
            expected = expected[:expected.index(end)]
        assert results[f"answer{i}"].tolist() == expected and len(expected) > 0


def lines_of_text() -> list[str]:
    """1,000 lines of English, code, emoji, CJK, digits, runs of spaces and special tokens."""
    rng = np.random.default_rng(0)
    english = (Path(__file__).parents[2] / "LICENSE").read_text().splitlines()
    code = Path(__file__).read_text().splitlines()
    emoji = [chr(code_point) for code_point in range(0x1F300, 0x1F650)]
    chinese = [chr(code_point) for code_point in range(0x4E00, 0x5200)]
    korean = [chr(code_point) for code_point in range(0xAC00, 0xAE00)]
    other = [chr(code_point) for code_point in range(0xA0, 0x600) if chr(code_point).isprintable()]
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>", "<empty_output>", "<|im_ end|>"]

    def some(choices: list[str], n: int) -> list[str]:
        return [choices[i] for i in rng.integers(len(choices), size=n)]

    lines = [*some([line for line in english if line.strip()], 200), *some(code, 200)]
    for letters in (emoji, chinese, korean, other):
        lines += ["".join(some([*letters, " "], int(rng.integers(1, 20)))) for _ in range(100)]
    for _ in range(100):
        lines.append("".join(f"{word}{' ' * int(rng.integers(0, 9))}" for word in some(english, 3)))
        parts = some(special, 3), some([*english, "", "\n", "\t\t ", "3.14159", "2024-12-31", "١٢٣"], 3)
        lines.append("".join(a + b for a, b in zip(*parts, strict=True)))
    assert len(lines) == 1000
    return lines


def test_tokens_are_equal(ours: LanguageModel, their_tokenizer: Any) -> None:
    """transformers does not know that SmolLM2 cuts off each digit; this is set as in its tokenizer.json."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    lines = lines_of_text()
    plain = [line for line in lines if not any(map(str.isnumeric, line))]
    assert len(plain) > 500
    for line in plain:
        assert ours.encode(line) == their_tokenizer(line, add_special_tokens=False).input_ids, repr(line)
    their_tokenizer.backend_tokenizer.pre_tokenizer = Sequence([
        Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    for line in lines:
        ids = ours.encode(line)
        assert ids == their_tokenizer(line, add_special_tokens=False).input_ids, repr(line)
        assert ours.tokenizer.encode_with_spans(line, special=True).ids == their_tokenizer(line).input_ids
        assert ours.tokenizer.decode(ids) == line


@needs(TEXT)
def test_perplexity_is_equal(ours: LanguageModel, theirs: Any, results: dict[str, np.ndarray]) -> None:
    import torch
    rows = windows(ours, TEXT)
    real = np.arange(rows.size).reshape(rows.shape)[:, 1:] < N_TOKENS
    nll = []
    with torch.no_grad():
        for row in torch.from_numpy(rows):
            logits = theirs(row[None]).logits[0, :-1]
            nll.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none").numpy())
    expected = np.stack(nll)[real].mean(dtype=np.float64)
    assert abs(results["nll"][real].mean(dtype=np.float64) - expected) < 1e-4
    assert 2 < expected < 6
