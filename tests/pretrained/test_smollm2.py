"""SmolLM2-135M-Instruct from a GGUF file: what transformers reads from the same file, it computes as well."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.extras import needs_transformers
from tests.references import STORED, needs
from tests.smollm2 import smollm2_file
from tilelli_jax.generation.decoding import generate_ids
from tilelli_jax.loading.language import Language, open_language
from tilelli_jax.pretrained.gguf import read_gguf

pytestmark = [pytest.mark.exhaustive, needs_transformers, *(
    pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} (extra: test) is not installed")
    for name in ("gguf", "accelerate"))]
TEXT = STORED / "data" / "tinyshakespeare.txt"
N_TOKENS, WINDOW = 20_000, 1024
PROMPTS = (
    "The capital of France is", "Once upon a time, there was a", "def fibonacci(n):\n    ", "2 + 2 =",
    "Water boils at", "import numpy as np\n\nx = np.", "The quick brown fox", "In 1969, Neil Armstrong",
    "Q: What is the largest planet?\nA:", "日本の首都は", "😀😀😀", "To be, or not to be,", "E = mc", "    ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "SELECT * FROM", "Il était une fois",
    "1, 1, 2, 3, 5, 8, 13,", "The mitochondria is the", "Photosynthesis converts")
QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.", "What is 7 times 8?")


@pytest.fixture(scope="module")
def file() -> Path:
    return smollm2_file()


@pytest.fixture(scope="module")
def ours(file: Path) -> Language:
    return open_language(file)


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


def test_logits_are_equal(ours: Language, theirs: Any) -> None:
    import torch
    rows = [ours.encode(prompt) for prompt in PROMPTS]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)  # what follows a row does not change its logits
    for row, tokens in zip(ids, rows, strict=True):
        row[:len(tokens)] = tokens
    logits = np.asarray(jax.jit(ours.model)(jnp.asarray(ids)))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    for i, tokens in enumerate(rows):
        a, b = logits[i, :len(tokens)], expected[i, :len(tokens)]
        assert np.abs(a - b).max() < 1e-4 * np.abs(b).max(), PROMPTS[i]


def test_greedy_answers_are_equal(ours: Language, theirs: Any, their_tokenizer: Any) -> None:
    import torch
    chat = ours.chat_template
    assert chat is not None
    prompts = []
    for question in QUESTIONS:
        text = chat.format_prompt(question)
        assert text == their_tokenizer.apply_chat_template([{"role": "user", "content": question}],
                                                           tokenize=False, add_generation_prompt=True)
        prompts.append(ours.encode(text))
    for prompt, answer in zip(prompts, generate_ids(ours.model, prompts, max_new=32, temperature=0),
                              strict=True):
        with torch.no_grad():
            expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False,
                                       pad_token_id=0)[0, len(prompt):].tolist()
        end = theirs.config.eos_token_id
        if end in expected:
            expected = expected[:expected.index(end)]
        assert answer.ids.tolist() == expected and len(expected) > 5


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


def test_tokens_are_equal(ours: Language, their_tokenizer: Any) -> None:
    for line in lines_of_text():
        ids = ours.encode(line)
        assert ids == their_tokenizer(line, add_special_tokens=False).input_ids, repr(line)
        assert ours.tokenizer.encode_with_spans(line, special=True).ids == their_tokenizer(line).input_ids
        assert ours.tokenizer.decode(ids) == line


@needs(TEXT)
def test_perplexity_is_equal(ours: Language, theirs: Any) -> None:
    import torch
    ids = np.array(ours.encode(TEXT.read_text()[:5 * N_TOKENS])[:N_TOKENS], np.int64)
    assert len(ids) == N_TOKENS
    windows = np.pad(ids, (0, -N_TOKENS % WINDOW)).reshape(-1, WINDOW)
    real = np.arange(windows.size).reshape(windows.shape)[:, 1:] < N_TOKENS
    measure = jax.jit(lambda rows: ours.model.nll(rows)[0])
    nll = np.concatenate([measure(jnp.asarray(row[None])) for row in windows])
    expected = []
    with torch.no_grad():
        for row in torch.from_numpy(windows):
            logits = theirs(row[None]).logits[0, :-1]
            expected.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none").numpy())
    ours_mean, theirs_mean = nll[real].mean(dtype=np.float64), np.stack(expected)[real].mean(dtype=np.float64)
    assert abs(ours_mean - theirs_mean) < 1e-4
    assert 2 < theirs_mean < 6
