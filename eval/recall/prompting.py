"""Turns questions into prompts."""

from __future__ import annotations

from collections.abc import Sequence

from tilelli_jax.errors import InputError
from tilelli_jax.loading.language import LanguageModel
from tilelli_jax.signals.batching import max_time
from tilelli_jax.signals.prompts import PromptIds

from .config import PromptConfig

PLACEHOLDER = "\ue000"  # a private-use character, which no template contains


class Prompter:
    """Builds the prompts of one network from one template.

    Args:
        examples: questions with answers that stand before each question (few-shot prompting).

    Raises:
        InputError: the template is "chat" and the network's tokenizer has no chat template.
    """

    def __init__(self, language: LanguageModel, config: PromptConfig,
                 examples: Sequence[tuple[str, str]] = ()) -> None:
        if config.template == "chat" and language.chat_template is None:
            raise InputError("prompt.template: chat: expected a chat_template in the network's tokenizer, "
                             "found none; use a text such as 'Q: {question}\\nA:'")
        self.language, self.config, self.examples = language, config, examples
        self.max_length = max_time(language.model)
        self.vocab_size = language.model.config.vocab_size
        # Searching for the question itself could find it earlier, in the template.
        self._start = self.text(PLACEHOLDER).find(PLACEHOLDER)

    def text(self, question: str, *, thinking: bool = False) -> str:
        """Returns the prompt as text."""
        return self._joined(self._content(question), thinking=thinking)

    def question_in(self, text: str) -> str | None:
        """Returns the question of a prompt; None if the text is no prompt of this template."""
        before, _, after = self.text(PLACEHOLDER).partition(PLACEHOLDER)
        if len(text) > len(before) + len(after) and text.startswith(before) and text.endswith(after):
            question = text[len(before):len(text) - len(after)]
            return question if self.text(question) == text else None
        return None

    def follow_up(self, question: str, answer: str, request: str) -> str:
        """Returns the prompt that asks about an answer to the question, with the same examples before it.

        In a chat the request is the user's second turn; otherwise "Reply:" stands after it.
        """
        if self.config.template != "chat":
            answered = self._with_answer(self._content(question), answer)
            return self.config.separator.join([*self._before(), answered, f"{request}\nReply:"])
        return self._chat([{"role": "user", "content": self._content(question)},
                           {"role": "assistant", "content": answer}, {"role": "user", "content": request}],
                          thinking=False)

    def _content(self, question: str) -> str:
        return question.strip() + self.config.instruction

    def _joined(self, content: str, *, thinking: bool) -> str:
        if self.config.template == "chat":
            return self._chat([{"role": "user", "content": content}], thinking=thinking)
        prompt = self.config.template.replace("{question}", content)
        return self.config.separator.join([*self._before(), prompt])

    def _before(self) -> list[str]:
        """The texts before a question: the system prompt and the examples."""
        return [*([self.config.system] if self.config.system else []),
                *(self._with_answer(self._content(question), answer) for question, answer in self.examples)]

    def _with_answer(self, content: str, answer: str) -> str:
        prompt = self.config.template.replace("{question}", content)
        return prompt + " " * (not prompt[-1:].isspace()) + answer

    def _chat(self, turns: Sequence[dict[str, str]], *, thinking: bool) -> str:
        assert self.language.chat_template is not None
        before = [{"role": "system", "content": self.config.system}] if self.config.system else []
        for question, answer in self.examples:
            before += [{"role": "user", "content": self._content(question)},
                       {"role": "assistant", "content": answer}]
        return self.language.chat_template.format_messages([*before, *turns], thinking=thinking)

    def __call__(self, question: str, where: str = "the question") -> PromptIds:
        """Returns the prompt's tokens and the range of the question's tokens, without the instruction's.

        Args:
            where: names the question in errors.

        Raises:
            InputError: the question is empty or contains a special token, or the prompt has no tokens, is too
                long, or has tokens outside the network's vocabulary.
        """
        if not question.strip():
            raise InputError(f"{where}: expected text, found an empty question")
        for special in self.language.tokenizer.special:
            if special in question:
                raise InputError(f"{where}: expected no special tokens, found {special}")
        text, plain, start = self.text(question), question.strip(), self._start
        if start < 0 or text[start:start + len(plain)] != plain:
            start = text.rfind(plain)  # -1 if the template alters the question: then the range is empty
        ids, spans = self.language.tokenizer.encode_with_spans(text, special=self.config.template != "chat")
        inside = [i for i, (first, last) in enumerate(spans)
                  if first < start + len(plain) and last > start >= 0]
        if not ids:
            raise InputError(f"{where}: expected a prompt with tokens, found {text!r:.40} from "
                             "prompt.template")
        if self.max_length is not None and len(ids) > self.max_length:
            raise InputError(f"{where}: expected at most {self.max_length} tokens with its prompt, the "
                             f"network's maximum, found {len(ids)}")
        if ids and max(ids) >= self.vocab_size:
            raise InputError(f"{where}: expected tokens below {self.vocab_size}, the network's "
                             f"vocabulary size, found {max(ids)}: the tokenizer may be another network's")
        return PromptIds(ids, inside[0], inside[-1] + 1) if inside else PromptIds(ids, 0, 0)
