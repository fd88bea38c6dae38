"""Checks whether an answer matches a gold answer: a strict rule, and the rule of Recall's published labels.

Both rules search the answer for the words of a gold answer, adjacent and in order. Recall's rule makes
mistakes that the strict rule avoids: the beginning of a gold answer counts as right ("Jane" for "Jane
Austen", "I" for "I, Claudius"); articles are removed even from initials ("U.S.A." becomes "u s"); accents,
curly quotes and long dashes are letters; "1,000" is two words and "seven" is not 7; "London or Paris" and
"not Paris" are right if Paris is.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from math import prod
from typing import Literal

Rule = Literal["strict", "published"]
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
# Accents of Latin, Greek and Cyrillic letters, and the points of Hebrew and Arabic, which most writers omit.
# In other scripts a combining mark makes another letter.
ACCENTS = re.compile(r"(?<=[^\W\d_])[\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4"
                     r"\u05c5\u05c7\u064b-\u065f\u0670\u1ab0-\u1aff\u1dc0-\u1dff\ufe20-\ufe2f]+"
                     r"|[\u20d0-\u20ff\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # and sign variants
# Scripts without spaces between words: kana, Han, Thai, Lao, Burmese, Khmer; each letter with its marks.
_UNSPACED = ("\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e01-\u0e3e\u0e40-\u0e7f\u0e81-\u0eff"
             "\u1000-\u109f\u1780-\u17da\u17dc-\u17ff\U00020000-\U0003ffff")
_MARKS = "".join(mark for mark in map(chr, (*range(0xE01, 0x10A0), *range(0x1780, 0x1800), 0x3099, 0x309A))
                 if unicodedata.category(mark)[0] == "M")
UNSPACED = re.compile(f"[{_UNSPACED}][{_MARKS}]*")
_SUPER, _FRACTIONS, _CIRCLED = "¹²³⁰-ⁿ", "¼-¾⅐-⅟↉", "①-⒛"
# Separators to insert before NFKD decomposes compatibility characters: without them 10² would become 102.
SEPARATORS = tuple((re.compile(pattern), separator) for pattern, separator in (
    (rf"(?<=\w)(?<![{_SUPER}])(?=[{_SUPER}])", "^"), (r"(?<=\d)(?=[₀-₉])", "_"),
    (rf"(?<=\d)\s?(?=[{_FRACTIONS}])", "+"), (rf"(?<=\d)(?=[{_CIRCLED}])", " "),
    (rf"(?<=[{_FRACTIONS}{_CIRCLED}])", " ")))
_MONEY = "$¢-¥֏؋৲৳฿៛\u20a0-\u20cf"
_NUMBER = r"\d+(?:[.,]\d+)*"
_SCALE = "|".join(SCALES)
_ORDINAL = ("first|second|third|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|"
            "(?:thir|four|fif|six|seven|eigh|nine)teen|hundred|thousand|million|billion|trillion)th")
_WORD_OF_NUMBER = rf"(?:{'|'.join(NUMBERS)})\b"
# Applied in this order to decomposed text. Afterwards a number has one form: -$0.5, 1+1/2, 5%, ≤5.
REWRITES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), replacement) for pattern, replacement in (
        (r"(?![0-9])\d", lambda match: str(unicodedata.decimal(match.group()))),
        (r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*]*)\*{1,3}", r" \2 "), (r"</?[a-z]\w*>", " "),  # markup
        (r"\b(?:[^\W\d_]\.){2,}", lambda match: match.group().replace(".", "")),  # u.s.a.
        (r"\+/?-(?=\.?\d)", "±"), ("<=", "≤"), (">=", "≥"), ("!=", "≠"), (r"(?<![-=])[-=]+>", " "),
        (rf"[—―](?=[{_MONEY}]?\.?\d)", "-"), (r"(?<![\w.])\.(?=\d)", "0."),
        (r"((?<![\d/.])\d{1,3}/\d{1,3}(?![\d/]))|/", lambda match: match[1] or " "),
        (r"(?<![\w/.,+])(\d+) (?=\d{1,3}/)", r"\1+"),
        (r"(?<=\d),(?=\d{3}\b)|(?<=\d) (?=\d{3}\b)", ""),  # 1,000
        (rf"(?<![\w./,+])(\d{{1,9}}(?:[.,]\d{{1,6}})?)((?:[ -]?(?:{_SCALE})\b){{1,2}})",
         lambda match: _times(match[1], match[2])),
        (rf"\b(?!(?<=\d[ -])(?:{_SCALE})\b)({_WORD_OF_NUMBER}(?:[- ](?:and[- ])?{_WORD_OF_NUMBER})*)"
         rf"([- ](?:and[- ])?(?:{_ORDINAL})\b)?",
         lambda match: _in_digits(match[1], match[2] or "")),
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
NEGATION_WINDOW = 3  # words before a gold answer in which a negation applies to it
REFUSALS = (
    r"(?:i|we) (?:do not|don t|dont) (?:have|know|possess|recall)",
    r"(?:(?:i|we) (?:am|m|are|re) )?(?:not sure|unsure)", r"i (?:am|m) (?:unable|sorry)",
    r"(?:(?:i|we) have )?no idea", r"idk",
    r"(?:i|we) (?:cannot|can t|can not|could not|couldn t) "
    r"(?:answer|determine|find|help|identify|provide|tell|say)",
    r"(?:please )?(?:provide|give|specify|clarify)(?: me)?(?: \w+){0,3} "
    r"(?:context|information|details|which|what)",
    r"(?:i )?(?:need|require) (?:more|additional|further) (?:context|information|details)",
    r"(?:it|this|that) (?:is|s) (?:unknown|not known|unclear|impossible to (?:say|tell|know|determine))",
    r"(?:unknown|unclear|not known)$",
    r"(?:no|not enough|insufficient) (?:information|context)")
# Anywhere in the first sentence. Without articles, since `words` removes them.
REQUESTS = (
    r"(?:is|was|are|were|has|have) not (?:been )?"
    r"(?:specified|provided|mentioned|given|stated|identified|available)",
    r"(?:please|could you|can you|you need to|you would need to) (?:please )?"
    r"(?:provide|specify|clarify|give|tell)",
    r"as ai\b", r"without (?:more|additional|further|any) (?:context|information|details)")
_REQUEST = re.compile(rf"\b(?:{'|'.join(REQUESTS)})\b")
_REFUSAL = re.compile(rf"(?:{'|'.join(REFUSALS)})\b")
_PUBLISHED = str.maketrans(dict.fromkeys(string.punctuation, " "))


def is_match(answer: str, golds: Sequence[str], rule: Rule = "strict") -> bool:
    """Returns whether an answer matches a gold answer. An empty answer or an empty list never matches.

    Raises:
        ValueError: the answer or a gold answer is not a text, or the rule is unknown.
    """
    _check_text("answer", answer)
    if isinstance(golds, str) or not isinstance(golds, Iterable):
        raise ValueError(f"golds: expected a list of texts, found {golds!r:.40}")
    golds = list(golds)
    for gold in golds:
        _check_text("golds", gold)
    if rule not in list(RULES):
        raise ValueError(f"rule: expected {' or '.join(RULES)}, found {rule!r:.40}")
    return RULES[rule](answer, golds)


def is_refusal(answer: str) -> bool:
    """Returns whether an answer abstains or asks for more information: it is neither right nor wrong.

    Searches for English phrases at the beginning of the answer, and for some in its whole first sentence. An
    empty answer is a refusal. Later sentences are not searched: "Paris. I don't know more." is an answer.

    Raises:
        ValueError: the answer is not a text.
    """
    _check_text("answer", answer)
    if not answer.strip():
        return True
    plain = re.sub(r"^(?:sorry|unfortunately|well)\s+", "", " ".join(words(answer)))
    first_sentence = " ".join(words(re.split(r"(?<=[.!?])\s", answer.strip(), maxsplit=1)[0]))
    return _REFUSAL.match(plain) is not None or _REQUEST.search(first_sentence) is not None


# --- The strict rule -------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Returns the normalised words of a text: case and accents folded, initials joined, numbers in digits.

    Signs that change a word's meaning stay with it:
    - with a number: minus (also as a word), ±, √, <, ≤, ≠, currencies and % on either side, exponents,
      fractions and scales: −5, $5 = 5 $, 10² = 10^2, 1½ = 1 1/2, "twenty-one" = 21, 5 million = 5,000,000;
    - after a word: C++, C# = C♯, Disney+; a hyphen, minus or en dash after one or two letters (A-, O−, H⁻: a
      grade, blood group or ion), and a star after one letter (A*). A long dash, and any dash or star after a
      longer word, is punctuation;
    - before a word: .NET.

    A text of signs only is one word. In scripts without spaces every letter with its marks is a word.
    Articles are removed unless nothing else remains. The running time is linear in the text's length.
    """
    bare = "".join(text.split())
    if bare and all(unicodedata.category(letter)[0] in "PSCM" for letter in bare):
        return [bare]
    for pattern, separator in SEPARATORS:
        text = pattern.sub(separator, text)
    text = ACCENTS.sub("", unicodedata.normalize("NFKD", text))
    text = unicodedata.normalize("NFC", text.casefold()).translate(LETTERS)
    text = UNSPACED.sub(r" \g<0> ", text)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = "".join(" " if unicodedata.category(letter)[0] in "PSZC" and not _SIGN.match(letter) else letter
                   for letter in text)
    tokens = [re.sub(r"\^(?=[-+]$)", "", word) for word in WORD.findall(text)]
    return [word for word in tokens if word not in ARTICLES] or tokens


def _in_digits(text: str, ordinal: str) -> str:
    """Converts adjacent number words: "twenty-one" to 21, "two hundred and five" to 205, "one two" to 1 2.

    "Twenty" in "twenty-first" is not a number; "one" in "one second" is.
    """
    if ordinal and NUMBERS[re.split("[- ]", text)[-1]] >= 20:
        return text + ordinal
    numbers: list[list[tuple[str, int]]] = [[]]  # terms of each number: (separator before it, value)
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
    """Returns a number times its scales, in digits: "1.5" and "million", "5" and "hundred thousand"."""
    factor = prod(SCALES[scale] for scale in re.findall("[a-z]+", scales))
    return f"{(Decimal(number.replace(',', '.')) * factor).normalize():f}"


def matches(answer: str, golds: Sequence[str]) -> bool:
    """Returns whether the answer contains a gold answer's words in order, neither negated nor one of several.

    A refusal never matches, nor does an answer that offers alternatives ("London or Paris").
    """
    answer_words = words(answer)
    if any(answer_words and answer_words == words(gold) for gold in golds):
        return True  # even if it reads like a refusal: "Unknown", "I Don't Know How She Does It"
    if is_refusal(answer):
        return False
    has_alternatives = "or" in answer_words
    for gold in golds:
        gold_words = words(gold)
        start = _position(gold_words, answer_words)
        if start is None or (has_alternatives and "or" not in gold_words):
            continue
        before = " ".join(answer_words[max(0, start - NEGATION_WINDOW):start]).replace("not until", "")
        if not any(f" {word} " in f" {before} " for word in NEGATIONS):
            return True
    return False


# --- Recall's published rule -------------------------------------------------------------------


def recall_words(text: str) -> list[str]:
    """Returns lower-case words: ASCII punctuation replaced by spaces, a, an and the removed."""
    return [word for word in text.lower().translate(_PUBLISHED).split() if word not in ARTICLES]


def recall_matches(answer: str, golds: Sequence[str]) -> bool:
    """Returns whether the answer contains a gold answer's words in order, or is the beginning of one."""
    answer_words = recall_words(answer)
    if not answer_words:
        return False
    for gold in golds:
        gold_words = recall_words(gold)
        if gold_words and (_position(gold_words, answer_words) is not None
                           or gold_words[:len(answer_words)] == answer_words):
            return True
    return False


def _position(part: Sequence[str], sequence: Sequence[str]) -> int | None:
    """Returns the index at which `part` begins in `sequence`, or None."""
    text = f" {' '.join(sequence)} "
    offset = text.find(f" {' '.join(part)} ") if part else -1
    return None if offset < 0 else text.count(" ", 0, offset)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, found {value!r:.40}")


RULES: dict[Rule, Callable[[str, Sequence[str]], bool]] = {"strict": matches, "published": recall_matches}
