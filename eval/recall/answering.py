"""A network's answers, its judgement of them, and the answer text in what it generates."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.generation.answers import Answers, generate_answers
from tilelli_jax.loading.language import LanguageModel
from tilelli_jax.signals.prompts import PromptIds

from .config import AnswersConfig, PromptConfig, SamplesConfig
from .prompting import Prompter

THOUGHT = re.compile(r"<\|channel>thought\n?.*?(?:<channel\|>|$)|<think>.*?(?:</think>|$)", re.DOTALL)
MARKERS = re.compile(r"<\|?/?(?:turn|channel|bos|eos|pad|end_of_turn|start_of_turn|im_end|eot_id|endoftext|s)"
                     r"\|?>")


# Kadavath et al. 2022 (arXiv:2207.05221), and Tian et al. 2023 (arXiv:2305.14975), in other words.
P_TRUE = "Is the answer above correct?\n(A) True\n(B) False\nReply with A or B only."
VERBALISED = "How probable is it that the answer above is correct? Reply with a number from 0 to 100 only."
MAX_NUMBER = 12  # tokens in which a verbalised probability must occur


def answer_ends(language: LanguageModel, config: AnswersConfig, prompt: PromptConfig | None = None
                ) -> tuple[int, ...]:
    """Returns the tokens that end an answer: the network's own, then those of `config.end_tokens`.

    For a byte-level network, a newline replaces `config.end_tokens`. With `stop_at_line_break`, every token
    that contains a line break ends an answer too.

    Args:
        prompt: how the prompts were made; None for a chat.
    """
    tokenizer = language.tokenizer
    texts = ["\n"] if language.model.is_byte_level else config.end_tokens
    configured = [token for token in map(tokenizer.token, texts) if token is not None]
    stop = config.stop_at_line_break
    if stop if stop is not None else prompt is not None and prompt.template != "chat":
        configured += _line_breaks(cast(Hashable, tokenizer), language.model.config.vocab_size)
    return tuple(dict.fromkeys([*getattr(language.model.config, "end_ids", ()), *configured]))


def answer(language: LanguageModel, prompts: Sequence[PromptIds], config: AnswersConfig,
           advance: Callable[[int], object] = lambda n: None, *, prompt: PromptConfig | None = None,
           samples: SamplesConfig | None = None, streams: Sequence[int] | None = None,
           layers: Sequence[int] | None = ()) -> list[Answers]:
    """Decodes the greedy answer of each prompt.

    Args:
        advance: called with the number of prompts of each finished batch.
        prompt: how the prompts were made; see `answer_ends`.
        samples: also draw samples, with the random stream of each prompt in `streams`.
        layers: layers whose residual stream at the answer's last token is recorded; None: all.
    """
    drawn: dict[str, Any] = {} if samples is None else {
        "n_samples": samples.n, "temperature": samples.temperature, "seed": samples.seed, "streams": streams,
        "sample_layers": (int(samples.depth * language.model.config.n_layers),)}
    return generate_answers(language.model, [prompt.ids for prompt in prompts], max_new=config.max_new,
                            end_ids=answer_ends(language, config, prompt), batch_size=config.batch_size,
                            layers=layers, advance=advance, **drawn)


def greedy_ids(language: LanguageModel, prompts: Sequence[PromptIds], config: AnswersConfig
               ) -> list[np.ndarray]:
    """Returns the tokens of the greedy answers without the ones that ended them: int32 `[n]` each."""
    return [answers.greedy.ids for answers in answer(language, prompts, config)]


def p_true_logits(language: LanguageModel, prompter: Prompter, questions: Sequence[str],
                  answers: Sequence[str], config: AnswersConfig,
                  advance: Callable[[int], object] = lambda n: None) -> tuple[np.ndarray, list[int]]:
    """Returns the logits of "A" (true) and "B" (false) after the question whether an answer is correct.

    Returns:
        f32 `[questions, 2]`, and the number of tokens of each prompt.
    """
    pairs = [_choice(prompter, prompter.follow_up(question, answer, P_TRUE), "AB")
             for question, answer in zip(questions, answers, strict=True)]
    columns = {tokens for _, tokens in pairs}
    if len(columns) != 1:
        raise InputError(f"p_true: expected the same tokens of A and B after every prompt, found {columns}")
    generated = generate_answers(language.model, [ids for ids, _ in pairs], max_new=1, layers=(),
                                 batch_size=config.batch_size, logit_ids=columns.pop(), advance=advance)
    return np.stack([answers.next_logits for answers in generated]), [len(ids) for ids, _ in pairs]


def verbalise(language: LanguageModel, prompter: Prompter, questions: Sequence[str], answers: Sequence[str],
              config: AnswersConfig, advance: Callable[[int], object] = lambda n: None
              ) -> tuple[list[str], list[tuple[int, int]]]:
    """Asks the network how probable it is that its answer is correct.

    Returns:
        The replies, and the number of tokens of each prompt and of each reply.
    """
    prompts = [_encode(prompter, prompter.follow_up(question, answer, VERBALISED))
               for question, answer in zip(questions, answers, strict=True)]
    generated = generate_answers(language.model, prompts, max_new=MAX_NUMBER, layers=(),
                                 end_ids=answer_ends(language, config, prompter.config),
                                 batch_size=config.batch_size, advance=advance)
    replies = [answers.greedy for answers in generated]
    return ([language.tokenizer.decode(reply.ids.tolist()) for reply in replies],
            [(len(ids), len(reply.log_probs)) for ids, reply in zip(prompts, replies, strict=True)])


def answer_text(text: str) -> str:
    """Returns the first non-empty line of generated text, without thoughts and turn markers."""
    plain = MARKERS.sub("", THOUGHT.sub("", text))
    return next((line.strip() for line in plain.splitlines() if line.strip()), "")


# ---------------------------------------------------------------------------------------------


def _encode(prompter: Prompter, text: str) -> list[int]:
    """Token ids of a prompt; its last tokens if it is longer than the network's context."""
    ids = prompter.language.tokenizer.encode_with_spans(text, special=prompter.config.template != "chat").ids
    return list(ids if prompter.max_length is None else ids[-prompter.max_length:])


def _choice(prompter: Prompter, text: str, letters: str) -> tuple[list[int], tuple[int, ...]]:
    """Token ids of a prompt up to where the letters that may follow it differ, and their tokens there."""
    space = " " * (prompter.config.template != "chat")
    options = [_encode(prompter, text + space + letter) for letter in letters]
    same = next((i for i, tokens in enumerate(zip(*options, strict=False)) if len(set(tokens)) > 1), None)
    if same is None:
        raise InputError(f"p_true: expected different tokens for {' and '.join(letters)}, found "
                         f"{options[0][-1]} for both")
    return options[0][:same], tuple(ids[same] for ids in options)


@functools.lru_cache(maxsize=8)
def _line_breaks(tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """The tokens that contain a line break."""
    return tuple(token for token in range(vocab_size) if "\n" in tokenizer.decode([token]))
