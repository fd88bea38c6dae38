"""How questions become prompts."""

from __future__ import annotations

from tilelli_jax.errors import InputError
from tilelli_jax.language import Language
from tilelli_jax.signals.prompts import Prompt
from tilelli_jax.signals.scoring import max_time

from .config import PromptConfig

STAND_IN = "\ue000"  # for private use: in no template


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
        self.most = max_time(language.model)
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
        """Its tokens, and which of them are the question's (the instruction's are not).

        Args:
            where: what it is called where it is refused.

        Raises:
            InputError: it is empty, or longer than the network reads.
        """
        if not question.strip():
            raise InputError(f"{where} is empty")
        for steering in self.language.tokenizer.special:
            if steering in question:
                raise InputError(f"{where} holds {steering}, which steers the network")
        text, plain, start = self.text(question), question.strip(), self._start
        if start < 0 or text[start:start + len(plain)] != plain:
            start = text.find(plain)  # -1 where the template changes it: the end of the prompt stands for it
        ids, spans = self.language.tokenizer.place(text, special=self.config.template != "chat")
        inside = [i for i, (first, last) in enumerate(spans)
                  if first < start + len(plain) and last > start >= 0]
        if not ids:
            raise InputError(f"{where}: expected a prompt with tokens in it, found {text!r:.40}, which "
                             "prompt.template makes of it")
        if self.most is not None and len(ids) > self.most:
            raise InputError(f"{where} has {len(ids)} tokens with its prompt, and the network reads "
                             f"{self.most}")
        if ids and max(ids) >= self.vocab_size:
            raise InputError(f"{where}: expected tokens below the network's {self.vocab_size}, found "
                             f"{max(ids)}: is the tokenizer the network's own?")
        return Prompt(ids, inside[0], inside[-1] + 1) if inside else Prompt(ids, 0, 0)
