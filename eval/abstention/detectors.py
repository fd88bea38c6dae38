"""What an answer looks like: a refusal, an affirmation, a loop, broken text. Stated rules, no judgement.

They are those that the published study names, for English answers of some 48 bytes, and err as such
rules do: "The Unknown Soldier" is a refusal, and a longer text has some three characters five times
without any loop. `eval.matching.is_refusal` has another aim: whether an answer to a question of facts
begins by declining.
"""

from __future__ import annotations

import codecs
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

LOOP_LENGTH, LOOP_SPAN, LOOP_TIMES = 15, 3, 5
_REFUSAL = re.compile(
    r"\b(?:i (?:don't|do not) know|not sure|no idea|(?:can't|cannot|can not) (?:help|answer|tell)"
    r"|unknown|unclear|(?:don't|do not) have|idk)\b")
_AFFIRMATION = re.compile(r"\W*(?:yes|sure|indeed|correct)\b|.*\bthat(?:'s| is) true\b", re.DOTALL)


def is_refusal(answer: str) -> bool:
    """Whether one of the phrases of not knowing occurs anywhere, or nothing is said at all."""
    return not answer.strip() or _REFUSAL.search(plain(answer)) is not None


def is_affirmation(answer: str) -> bool:
    """Whether it begins with yes, sure, indeed or correct, as words; or has "that's true" in it."""
    return _AFFIRMATION.match(plain(answer)) is not None


def is_loop(answer: str) -> bool:
    """Whether it has 15 characters or more, and some three in a row occur five times, overlaps too."""
    text = answer.strip()
    spans = Counter(text[i:i + LOOP_SPAN] for i in range(len(text) - LOOP_SPAN + 1))
    return len(text) >= LOOP_LENGTH and max(spans.values()) >= LOOP_TIMES


def is_utf8(answer: bytes) -> bool:
    """Whether it is UTF-8; a character that the end cuts off is no fault of it."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(answer)
    except UnicodeDecodeError:
        return False
    return True


def distinct(answers: Sequence[str], n: int) -> float:
    """Different runs of n words as a share of all, over all answers (distinct-n, Li et al. 2016).

    1 where none comes twice; NaN where there are none. It falls as answers grow in number: compare equal
    numbers only.
    """
    runs = [tuple(words[i:i + n]) for words in map(str.split, answers)
            for i in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else math.nan


class Health(NamedTuple):
    """Shares, over all answers."""

    valid_utf8: float
    loops: float
    empty: float
    distinct_1: float
    distinct_2: float


def health(answers: Sequence[bytes]) -> Health:
    """How sound generated text is; NaN where there is none."""
    texts = [answer.decode(errors="replace") for answer in answers]

    def share(found: Sequence[bool]) -> float:
        return sum(found) / len(found) if found else math.nan
    return Health(share([is_utf8(answer) for answer in answers]),
                  share([is_loop(text) for text in texts]), share([not text.strip() for text in texts]),
                  distinct(texts, 1), distinct(texts, 2))


# ---------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Lower case, straight quotes, single spaces."""
    return " ".join(text.casefold().replace("’", "'").split())
