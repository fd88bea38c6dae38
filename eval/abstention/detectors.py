"""Tilelli's detectors of refusals, affirmations, loops and broken text in generated answers.

The rules are the published ones, for English answers of about 48 bytes, so that numbers can be compared with
the published numbers. They have false positives: "The Unknown Soldier" has a refusal phrase, and a long text
repeats some three characters five times without a loop. The answer to a factual question is graded by
`eval.matching`.
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


def has_refusal_phrase(answer: str) -> bool:
    """Whether the answer contains a phrase such as "I don't know" anywhere, or is empty."""
    return not answer.strip() or _REFUSAL.search(normalised(answer)) is not None


def is_affirmation(answer: str) -> bool:
    """Whether the answer begins with the word yes, sure, indeed or correct, or contains "that's true"."""
    return _AFFIRMATION.match(normalised(answer)) is not None


def is_loop(answer: str) -> bool:
    """Whether it has at least 15 characters and some 3-character span occurs 5 times, overlaps included."""
    text = answer.strip()
    spans = Counter(text[i:i + LOOP_SPAN] for i in range(len(text) - LOOP_SPAN + 1))
    return len(text) >= LOOP_LENGTH and max(spans.values()) >= LOOP_TIMES


def is_utf8(answer: bytes) -> bool:
    """Whether it is valid UTF-8; an incomplete last character is allowed, as the length limit may cut it."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(answer)
    except UnicodeDecodeError:
        return False
    return True


def distinct(answers: Sequence[str], n: int) -> float:
    """Returns distinct n-grams of words as a fraction of all n-grams (distinct-n, Li et al. 2016).

    NaN if there are no n-grams. The value falls with the number of answers: compare equal numbers only.
    """
    ngrams = [tuple(words[i:i + n]) for words in map(str.split, answers)
              for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


class TextQuality(NamedTuple):
    """Fractions of all answers; distinct_n as in `distinct`."""

    valid_utf8: float
    loops: float
    empty: float
    distinct_1: float
    distinct_2: float


def text_quality(answers: Sequence[bytes]) -> TextQuality:
    """Summarises generated answers; NaN if there are none."""
    texts = [answer.decode(errors="replace") for answer in answers]

    def fraction(flags: Sequence[bool]) -> float:
        return sum(flags) / len(flags) if flags else math.nan
    return TextQuality(fraction([is_utf8(answer) for answer in answers]),
                  fraction([is_loop(text) for text in texts]), fraction([not text.strip() for text in texts]),
                  distinct(texts, 1), distinct(texts, 2))


# ---------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """Returns the text in lower case, with straight quotes and single spaces."""
    return " ".join(text.casefold().replace("’", "'").split())
