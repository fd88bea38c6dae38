"""How questions become prompts, and answers texts again."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from eval.recall.config import AnswersConfig, PromptConfig
from tilelli_jax.decoding import generate_ids
from tilelli_jax.errors import InputError
from tilelli_jax.language import Language
from tilelli_jax.signals.prompts import Prompt
from tilelli_jax.signals.scoring import most_time

STAND_IN = "\ue000"  # for private use: in no template
THOUGHT = re.compile(r"<\|channel>thought\n?.*?(?:<channel\|>|$)|<think>.*?(?:</think>|$)", re.DOTALL)
MARKS = re.compile(r"<\|?/?(?:turn|channel|bos|eos|pad|end_of_turn|start_of_turn|im_end|eot_id|endoftext|s)"
                   r"\|?>")


class Prompter:
    """Puts questions to one network, always in the same way.

    Raises:
        InputError: a chat is wanted, and the network's tokenizer has no template for one.
    """

    def __init__(self, language: Language, config: PromptConfig) -> None:
        if config.template == "chat" and language.chat is None:
            raise InputError("prompt.template: chat: the network's tokenizer has no chat_template; expected "
                             "a text such as 'Q: {question}\\nA:'")
        self.language, self.config = language, config
        self.most = most_time(language.model)
        self.vocab_size = language.model.config.vocab_size
        # Looked for by itself, a short question could be found in what stands before it.
        self._start = self.text(STAND_IN).find(STAND_IN)

    def text(self, question: str, *, thinking: bool = False) -> str:
        """What the network reads."""
        asked = question.strip() + self.config.instruction
        if self.config.template != "chat":
            return self.config.template.replace("{question}", asked)
        assert self.language.chat is not None
        return self.language.chat.ask(asked, thinking=thinking)

    def __call__(self, question: str, where: str = "the question") -> Prompt:
        """Its symbols, and which of them are the question's (the instruction's are not).

        Args:
            where: what it is called where it is refused.

        Raises:
            InputError: it is empty, or longer than the network reads.
        """
        if not question.strip():
            raise InputError(f"{where} is empty")
        text, plain, start = self.text(question), question.strip(), self._start
        if start < 0 or text[start:start + len(plain)] != plain:
            start = text.find(plain)  # -1 where the template changes it: the end of the prompt stands for it
        ids, spans = self.language.tokenizer.place(text)
        inside = [i for i, (first, last) in enumerate(spans)
                  if first < start + len(plain) and last > start >= 0]
        if self.most is not None and len(ids) > self.most:
            raise InputError(f"{where} has {len(ids)} symbols with its prompt, and the network reads "
                             f"{self.most}")
        if ids and max(ids) >= self.vocab_size:
            raise InputError(f"{where}: expected symbols below the network's {self.vocab_size}, found "
                             f"{max(ids)}: is the tokenizer the network's own?")
        return Prompt(ids, inside[0], inside[-1] + 1) if inside else Prompt(ids, 0, 0)


def answer_ends(language: Language, config: AnswersConfig) -> tuple[int, ...]:
    """The symbols that end an answer."""
    known = [language.tokenizer.symbol(text) for text in config.ends] if not language.model.reads_bytes else [
        language.tokenizer.symbol("\n")]
    own = getattr(language.model.config, "end_ids", ())
    return tuple(dict.fromkeys([*own, *(symbol for symbol in known if symbol is not None)]))


def answer(language: Language, prompts: Sequence[Prompt], config: AnswersConfig) -> list[np.ndarray]:
    """The likeliest answer's symbols to each prompt (greedy), without the one that ended it: int32 `[n]`."""
    room = most_time(language.model)
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    new = config.max_new if room is None else max(1, min(config.max_new, room - longest + 1))
    made = generate_ids(language.model, [prompt.ids for prompt in prompts], max_new=new, temperature=0.0,
                        end_ids=answer_ends(language, config), batch_size=config.batch_size)
    return [one.ids for one in made]


def said(text: str) -> str:
    """The first line of an answer that is not empty, without thoughts and the marks of turns."""
    plain = MARKS.sub("", THOUGHT.sub("", text))
    return next((line.strip() for line in plain.splitlines() if line.strip()), "")
