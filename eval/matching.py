"""Is an answer one of the right ones? Two rules: a strict one, and Recall's own for its published labels.

Both look for the words of a right answer, side by side and in order, among the words of what was said. What
Recall's rule gets wrong, and this one does not: a mere beginning of a right answer counts there ("Jane" for
"Jane Austen", "I" for "I, Claudius"); articles go even out of initials ("U.S.A." becomes "u s"); accents,
curly quotes and long dashes are letters; "1,000" is two words and "seven" is not 7; "London or Paris" and
"not Paris" are right where Paris is.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal

Rule = Literal["strict", "recall"]
ARTICLES = ("a", "an", "the")
NUMBERS = {word: str(n) for n, word in enumerate((
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"))}
NEGATIONS = ("not", "isn t", "wasn t", "never", "neither", "nor")
LETTERS = str.maketrans({"&": " and ", "ł": "l", "ø": "o", "đ": "d", "æ": "ae", "œ": "oe", "ð": "d",
                         "þ": "th"})
# Written with no spaces between words: kana, Han, Thai, Lao, Burmese, Khmer.
UNSPACED = re.compile("[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e01-\u0e7f\u0e81-\u0eff"
                      "\u1000-\u109f\u1780-\u17ff\U00020000-\U0003ffff]")
KANA_MARKS = "\u3099\u309a"
# Signs that stay with their word: while all others become spaces, letters for private use stand for them.
STANDS_FOR = dict(zip("-+#$€£¥₹.%", map(chr, range(0xE000, 0xE00A)), strict=True))
KEPT = {".", ",", *STANDS_FOR.values()}
SIGNED = tuple((re.compile(pattern), sign) for pattern, sign in (
    (r"(?<![\w)\]])[-‐-―−](?=[$€£¥₹]?\.?\d)", "-"),  # −5, but not 3-5
    (r"(?<=\b[a-f])[-−](?!\w)", "-"), *((rf"{re.escape(sign)}(?=\.?\d)", sign) for sign in "$€£¥₹"),
    (r"(?<=[\w+])\+(?=\+|(?!\w))", "+"), (r"(?<=\w)#(?!\w)", "#"), (r"(?<![\w.])\.(?=[a-z]{2})", "."),
    (r"(?<=\d)(?: ?%| per ?cent\b| pct\b)", "%")))
SIGNS_BACK = str.maketrans({letter: sign for sign, letter in STANDS_FOR.items()})
NEAR = 3  # words before a right answer in which a negation is about it
REFUSALS = (
    r"i (?:do not|don t|dont) (?:have|know|possess|recall)", r"i (?:am|m) (?:not sure|unsure|unable|sorry)",
    r"i (?:cannot|can t|could not|couldn t) (?:answer|determine|find|identify|provide|tell|say)",
    r"(?:please )?(?:provide|give|specify|clarify)(?: me)?(?: \w+){0,3} "
    r"(?:context|information|details|which|what)",
    r"(?:i )?(?:need|require) (?:more|additional|further) (?:context|information|details)",
    r"(?:it is|it s|this is) (?:unknown|not known|unclear|impossible to (?:say|tell|know|determine))",
    r"(?:unknown|unclear|not known)$",
    r"(?:no|not enough|insufficient) (?:information|context)")
# Anywhere in the first sentence; articles are left out, as they are of all that is compared.
WANTING = (
    r"(?:is|was|are|were|has|have) not (?:been )?"
    r"(?:specified|provided|mentioned|given|stated|identified|available)",
    r"(?:please|could you|can you|you need to|you would need to) (?:please )?"
    r"(?:provide|specify|clarify|give|tell)",
    r"as ai\b", r"without (?:more|additional|further|any) (?:context|information|details)")
_WANTING = re.compile(rf"\b(?:{'|'.join(WANTING)})\b")
_REFUSAL = re.compile(rf"(?:{'|'.join(REFUSALS)})\b")
_PUBLISHED = str.maketrans(dict.fromkeys(string.punctuation, " "))


def is_match(said: str, golds: Sequence[str], rule: Rule = "strict") -> bool:
    """Whether what was said is one of the right answers. Nothing said, or no right answer, is no match."""
    return RULES[rule](said, golds)


def is_refusal(said: str) -> bool:
    """Whether an answer declines to answer, or asks for more: neither right nor wrong.

    Looked for at the beginning of what was said, some turns in all of the first sentence (English).
    """
    plain = re.sub(r"^(?:sorry|unfortunately|well)\s+", "", " ".join(words(said)))
    first = " ".join(words(re.split(r"(?<=[.!?])\s", said.strip(), maxsplit=1)[0]))
    return _REFUSAL.match(plain) is not None or _WANTING.search(first) is not None


# --- The strict rule -------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Words as they are compared: case and accents folded, initials and thousands closed up, digits.

    Signs that make another word of one stay with it (−5, $5, C++, C#, B-, .NET); a text of signs alone is one
    word. Letters of scripts without spaces are words each. Articles are left out where anything else is left.
    """
    bare = "".join(text.split())
    if bare and all(unicodedata.category(letter)[0] in "PSC" for letter in bare):
        return [bare]
    text = unicodedata.normalize("NFKD", text.casefold().translate(LETTERS))
    # Not of kana, whose marks make other letters.
    text = "".join(letter for letter in text if letter in KANA_MARKS or not unicodedata.combining(letter))
    text = UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFC", text))
    for pattern, sign in SIGNED:
        text = pattern.sub(STANDS_FOR[sign], text)
    text = re.sub(r"\b(?:[^\W\d_]\.){2,}", lambda found: found.group().replace(".", ""), text)  # u.s.a.
    text = re.sub(r"(?<=\d),(?=\d{3}\b)|(?<=\d) (?=\d{3}\b)", "", text)  # 1,000
    text = "".join(" " if unicodedata.category(letter)[0] in "PSZC" and letter not in KEPT else letter
                   for letter in text)
    text = re.sub(r"(?<!\d)[.,]|[.,](?!\d)", " ", text)  # but for those inside numbers
    found = [NUMBERS.get(word, word) for word in text.translate(SIGNS_BACK).split()]
    return [word for word in found if word not in ARTICLES] or found


def matches(said: str, golds: Sequence[str]) -> bool:
    """A right answer's words in order, not denied, not one of several offered; a refusal is no match."""
    spoken = words(said)
    if any(spoken and spoken == words(gold) for gold in golds):
        return True  # however it sounds: "Unknown", "I Don't Know How She Does It"
    if is_refusal(said):
        return False
    offered = "or" in spoken
    for gold in golds:
        wanted = words(gold)
        at = _position(wanted, spoken)
        if at is None or (offered and "or" not in wanted):
            continue
        before = " ".join(spoken[max(0, at - NEAR):at]).replace("not until", "")
        if not any(f" {word} " in f" {before} " for word in NEGATIONS):
            return True
    return False


# --- Recall's ----------------------------------------------------------------------------------


def recall_words(text: str) -> list[str]:
    """Lower case, ASCII punctuation as spaces, without a, an, the."""
    return [word for word in text.lower().translate(_PUBLISHED).split() if word not in ARTICLES]


def recall_matches(said: str, golds: Sequence[str]) -> bool:
    """A right answer's words in order; or what was said is the beginning of a longer right answer."""
    spoken = recall_words(said)
    if not spoken:
        return False
    for gold in golds:
        wanted = recall_words(gold)
        if wanted and (_position(wanted, spoken) is not None or wanted[:len(spoken)] == spoken):
            return True
    return False


def _position(wanted: Sequence[str], spoken: Sequence[str]) -> int | None:
    """Where `wanted` begins in `spoken`, or None."""
    if not wanted:
        return None
    n = len(wanted)
    return next((i for i in range(len(spoken) - n + 1) if spoken[i:i + n] == wanted), None)


RULES: dict[Rule, Callable[[str, Sequence[str]], bool]] = {"strict": matches, "recall": recall_matches}
