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
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from math import prod
from typing import Literal

Rule = Literal["strict", "recall"]
ARTICLES = ("a", "an", "the")
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NUMBERS = {**{word: n for n, word in enumerate((
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"))},
    **{word: 10 * n for n, word in enumerate((
        "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"), 2)}, **SCALES}
NEGATIONS = ("not", "isn t", "wasn t", "never", "neither", "nor")
LETTERS = str.maketrans({
    "&": " and ", "ł": "l", "ø": "o", "đ": "d", "æ": "ae", "œ": "oe", "ð": "d", "þ": "th", "♯": "#", "♭": "b",
    **dict.fromkeys("‐‑‒–−˗➖", "-"), "⁄": "/", "∕": "/", "٪": "%", "؉": "‰", "٫": ".", "٬": ",",
    "≦": "≤", "⩽": "≤", "≧": "≥", "⩾": "≥"})
# Accents of Latin, Greek and Cyrillic letters, and the points of Hebrew and Arabic, which most leave out. The
# marks of other scripts make other letters.
ACCENTS = re.compile(r"(?<=[^\W\d_])[\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4"
                     r"\u05c5\u05c7\u064b-\u065f\u0670\u1ab0-\u1aff\u1dc0-\u1dff\ufe20-\ufe2f]+"
                     r"|[\u20d0-\u20ff\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # and how a sign is drawn
# Written with no spaces between words: kana, Han, Thai, Lao, Burmese, Khmer; each with its marks.
_UNSPACED = ("\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e01-\u0e3e\u0e40-\u0e7f\u0e81-\u0eff"
             "\u1000-\u109f\u1780-\u17da\u17dc-\u17ff\U00020000-\U0003ffff")
_MARKS = "".join(mark for mark in map(chr, (*range(0xE01, 0x10A0), *range(0x1780, 0x1800), 0x3099, 0x309A))
                 if unicodedata.category(mark)[0] == "M")
UNSPACED = re.compile(f"[{_UNSPACED}][{_MARKS}]*")
_SUPER, _FRACTIONS, _CIRCLED = "¹²³⁰-ⁿ", "¼-¾⅐-⅟↉", "①-⒛"
# Before compatibility characters become plain ones: what they would run into.
APART = tuple((re.compile(pattern), apart) for pattern, apart in (
    (rf"(?<=\w)(?<![{_SUPER}])(?=[{_SUPER}])", "^"), (r"(?<=\d)(?=[₀-₉])", "_"),
    (rf"(?<=\d)\s?(?=[{_FRACTIONS}])", "+"), (rf"(?<=\d)(?=[{_CIRCLED}])", " "),
    (rf"(?<=[{_FRACTIONS}{_CIRCLED}])", " ")))
_MONEY = "$¢-¥֏؋৲৳฿៛\u20a0-\u20cf"
_NUMBER = r"\d+(?:[.,]\d+)*"
_SCALE = "|".join(SCALES)
_ORDINAL = ("first|second|third|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|"
            "(?:thir|four|fif|six|seven|eigh|nine)teen|hundred|thousand|million|billion|trillion)th")
_WORD_OF_NUMBER = rf"(?:{'|'.join(NUMBERS)})\b"
# One after the other, on text of plain characters. A number has one form: -$0.5, 1+1/2, 5%, ≤5.
REWRITTEN: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), new) for pattern, new in (
        (r"(?![0-9])\d", lambda found: str(unicodedata.decimal(found.group()))),
        (r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*]*)\*{1,3}", r" \2 "), (r"</?[a-z]\w*>", " "),  # markup
        (r"\b(?:[^\W\d_]\.){2,}", lambda found: found.group().replace(".", "")),  # u.s.a.
        (r"\+/?-(?=\.?\d)", "±"), ("<=", "≤"), (">=", "≥"), ("!=", "≠"), (r"(?<![-=])[-=]+>", " "),
        (rf"[—―](?=[{_MONEY}]?\.?\d)", "-"), (r"(?<![\w.])\.(?=\d)", "0."),
        (r"((?<![\d/.])\d{1,3}/\d{1,3}(?![\d/]))|/", lambda found: found[1] or " "),
        (r"(?<![\w/.,+])(\d+) (?=\d{1,3}/)", r"\1+"),
        (r"(?<=\d),(?=\d{3}\b)|(?<=\d) (?=\d{3}\b)", ""),  # 1,000
        (rf"(?<![\w./,+])(\d{{1,9}}(?:[.,]\d{{1,6}})?)((?:[ -]?(?:{_SCALE})\b){{1,2}})",
         lambda found: _times(found[1], found[2])),
        (rf"\b(?!(?<=\d[ -])(?:{_SCALE})\b)({_WORD_OF_NUMBER}(?:[- ](?:and[- ])?{_WORD_OF_NUMBER})*)"
         rf"([- ](?:and[- ])?(?:{_ORDINAL})\b)?",
         lambda found: _in_digits(found[1], found[2] or "")),
        (r"(?<=\d)(?: ?%| ?per ?cent\b| pct\b)", "%"), (rf"(?<!\d)([%‰])({_NUMBER})", r"\2\1"),
        (r"(?<=\d) ‰", "‰"), (rf"([{_MONEY}]) ?(?=-?\d)", r"\1"), (rf"([{_MONEY}])-(?=\d)", r"-\1"),
        (rf"(?<![\w.,{_MONEY}])({_NUMBER}) ?([{_MONEY}])(?!\d)", r"\2\1"),
        (rf"(?<!\d )\b(?:minus|negative) (?=[±√{_MONEY}]*\d)", "-"),
        (rf"([<>≤≥≠±√]) (?=[-±√{_MONEY}]*\d)", r"\1")))
_SIGNS = f"-+#.,%‰±∓√∛∜<>≤≥≠^_/*)\\]{_MONEY}"
_W = rf"[^{_SIGNS}\s]"
_SIGN = re.compile(f"[{_SIGNS}]")
WORD = re.compile(rf"""
    (?: [<>≤≥≠](?=[-±∓√∛∜{_MONEY}]*\d) | (?<!{_W})(?<![)\]%‰])-(?=[±∓√∛∜{_MONEY}]*\d)  # −5, but not 3-5
      | [±∓√∛∜](?={_W}) | [{_MONEY}](?=\d) | (?<!{_W})(?<!\.)\.(?=[a-z]{{2}}) )*
    (?: [^\W\d_]{{1,2}}\d?-(?!{_W}) | [^\W\d_]\*(?![\w*]) | [a-g]\#{_W}*  # O-, A*, C#m
      | {_W}+(?: (?<=\d)[.,/+_√](?=\d){_W}+ | (?<=[a-z])[{_MONEY}](?=\d){_W}+
               | \^[-+]?{_W}* )*(?: \++(?!{_W}) | \#(?!{_W}) | [%‰] )? )
    | (?<={_W})[<>≤≥≠](?={_W}) | (?<={_W}\ )[<>≤≥≠](?=\ {_W})""", re.VERBOSE)
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
    """Whether what was said is one of the right answers. Nothing said, or no right answer, is no match.

    Raises:
        ValueError: what was said or a right answer is no text, or there is no such rule.
    """
    _check_text("said", said)
    if isinstance(golds, str) or not isinstance(golds, Iterable):
        raise ValueError(f"golds: expected a list of texts, found {golds!r:.40}")
    golds = list(golds)
    for gold in golds:
        _check_text("golds", gold)
    if rule not in list(RULES):
        raise ValueError(f"rule: expected {' or '.join(RULES)}, found {rule!r:.40}")
    return RULES[rule](said, golds)


def is_refusal(said: str) -> bool:
    """Whether an answer declines to answer, or asks for more: neither right nor wrong.

    Looked for at the beginning of what was said, some turns in all of the first sentence (English).

    Raises:
        ValueError: it is no text.
    """
    _check_text("said", said)
    plain = re.sub(r"^(?:sorry|unfortunately|well)\s+", "", " ".join(words(said)))
    first = " ".join(words(re.split(r"(?<=[.!?])\s", said.strip(), maxsplit=1)[0]))
    return _REFUSAL.match(plain) is not None or _WANTING.search(first) is not None


# --- The strict rule -------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Words as they are compared: case and accents folded, initials closed up, numbers in digits.

    Signs that make another word of one stay with it. Beside a number: minus (also as a word), ±, √, <, ≤, ≠,
    currencies and % on either side, exponents, fractions and scales: −5, $5 = 5 $, 10² = 10^2, 1½ = 1 1/2,
    "twenty-one" = 21, 5 million = 5,000,000. Behind a word: C++, C# = C♯, Disney+; a hyphen, minus or en dash
    of one or two letters (A-, O−, H⁻), as a grade, blood group or ion is written, and a star of one (A*); a
    long dash, and what is behind a longer word, is punctuation. In front: .NET. A text of signs alone is one
    word. Letters of scripts without spaces are words each, with their marks. Articles are left out where
    anything else is left. The time taken is linear in the text's length.
    """
    bare = "".join(text.split())
    if bare and all(unicodedata.category(letter)[0] in "PSCM" for letter in bare):
        return [bare]
    for pattern, apart in APART:
        text = pattern.sub(apart, text)
    text = ACCENTS.sub("", unicodedata.normalize("NFKD", text))
    text = unicodedata.normalize("NFC", text.casefold()).translate(LETTERS)
    text = UNSPACED.sub(r" \g<0> ", text)
    for rewritten, new in REWRITTEN:
        text = rewritten.sub(new, text)
    text = "".join(" " if unicodedata.category(letter)[0] in "PSZC" and not _SIGN.match(letter) else letter
                   for letter in text)
    found = [re.sub(r"\^(?=[-+]$)", "", word) for word in WORD.findall(text)]
    return [word for word in found if word not in ARTICLES] or found


def _in_digits(text: str, ordinal: str) -> str:
    """Number words side by side: "twenty-one" is 21, "two hundred and five" 205, "one two" 1 2.

    "Twenty" of "twenty-first" is no number; "one" of "one second" is.
    """
    if ordinal and NUMBERS[re.split("[- ]", text)[-1]] >= 20:
        return text + ordinal
    numbers: list[list[tuple[str, int]]] = [[]]  # of the terms of each: what is before it, and its value
    for before, word in re.findall(r"([- ](?:and[- ])?|)([a-z]+)", text):
        terms, value, factors = numbers[-1], NUMBERS[word], 0
        while word in SCALES and terms and terms[-1][1] < value:
            before, factor = terms.pop()
            factors += factor
        value *= factors or 1
        last = terms[-1][1] if terms else 0
        units = last in range(20, 100, 10) and 0 < value < 10 and "and" not in before
        if terms and not (value < last and (last >= 100 or units)):
            numbers.append([])
        numbers[-1].append((before, value))
    return "".join([*(f"{terms[0][0].replace('-', ' ')}{sum(value for _, value in terms)}"
                      for terms in numbers), ordinal])


def _times(number: str, scales: str) -> str:
    """Digits of "1.5 million", "5 hundred thousand"."""
    times = prod(SCALES[scale] for scale in re.findall("[a-z]+", scales))
    return f"{(Decimal(number.replace(',', '.')) * times).normalize():f}"


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
    text = f" {' '.join(spoken)} "
    at = text.find(f" {' '.join(wanted)} ") if wanted else -1
    return None if at < 0 else text.count(" ", 0, at)


def _check_text(name: str, given: object) -> None:
    if not isinstance(given, str):
        raise ValueError(f"{name}: expected text, found {given!r:.40}")


RULES: dict[Rule, Callable[[str, Sequence[str]], bool]] = {"strict": matches, "recall": recall_matches}
