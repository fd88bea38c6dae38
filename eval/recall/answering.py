"""What a network answers, and the text of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tilelli_jax.decoding import generate_ids
from tilelli_jax.language import Language
from tilelli_jax.signals.prompts import Prompt
from tilelli_jax.signals.scoring import max_time

from .config import AnswersConfig

THOUGHT = re.compile(r"<\|channel>thought\n?.*?(?:<channel\|>|$)|<think>.*?(?:</think>|$)", re.DOTALL)
MARKS = re.compile(r"<\|?/?(?:turn|channel|bos|eos|pad|end_of_turn|start_of_turn|im_end|eot_id|endoftext|s)"
                   r"\|?>")


def answer_ends(language: Language, config: AnswersConfig) -> tuple[int, ...]:
    """The tokens that end an answer."""
    known = [language.tokenizer.token(text) for text in config.ends] if not language.model.reads_bytes else [
        language.tokenizer.token("\n")]
    own = getattr(language.model.config, "end_ids", ())
    return tuple(dict.fromkeys([*own, *(token for token in known if token is not None)]))


def answer(language: Language, prompts: Sequence[Prompt], config: AnswersConfig) -> list[np.ndarray]:
    """The likeliest answer's tokens to each prompt (greedy), without the one that ended it: int32 `[n]`."""
    most, ends = max_time(language.model), answer_ends(language, config)
    room = [config.max_new if most is None else max(1, min(config.max_new, most - len(prompt.ids) + 1))
            for prompt in prompts]
    found: dict[int, np.ndarray] = {}
    for new in sorted(set(room)):  # a long prompt shortens no other's answer
        rows = [i for i, own in enumerate(room) if own == new]
        made = generate_ids(language.model, [prompts[i].ids for i in rows], max_new=new, temperature=0.0,
                            end_ids=ends, batch_size=config.batch_size)
        found |= {i: one.ids for i, one in zip(rows, made, strict=True)}
    return [found[i] for i in range(len(prompts))]


def said(text: str) -> str:
    """The first line of an answer that is not empty, without thoughts and the marks of turns."""
    plain = MARKS.sub("", THOUGHT.sub("", text))
    return next((line.strip() for line in plain.splitlines() if line.strip()), "")
