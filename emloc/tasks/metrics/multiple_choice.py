"""Accuracy of multiple choice, whether the answer gives an option's label or its text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from string import ascii_uppercase

# Signs that surround a label or an option's text and are no part of it.
_WRAPPING = " \t\r\n.,;:!?\"'`*_()[]{}"
# Of alphabets that part words by spaces; in others, words are found with none around them.
_ALPHABETIC = r"[0-9A-Za-z\u00C0-\u052F\u1E00-\u1FFF]"
_SEAM = re.compile(
    rf"(?<={_ALPHABETIC})(?=\w)(?!{_ALPHABETIC})|(?<=\w)(?<!{_ALPHABETIC})(?={_ALPHABETIC})"
)
# In place of an option's text: a letter (a rune) that no answer is written with.
_TEXT = "\u16a0"


def score(
    prediction: str, references: Sequence[str], choices: Sequence[str] = ()
) -> dict[str, float]:
    """`accuracy`: 1 if the option that the answer names is the right one.

    References are labels, letters or numbers; choices come in the order of their labels, A, B, ..
    or 1, 2, .., and show them or not. An answer names an option by the first of these that finds
    exactly one:

    1. it is a label: `B`, `b.`, `(B)`, `2`;
    2. it is an option's text: `Skin`, also where that holds a letter or a number (`Hepatitis B`);
    3. numbers: the first integer in it, be there such an option or not (and no further step);
       letters: one that opens it (`B) Skin`, `B: ..`), then one after the word *answer*, then one
       in brackets or after *option* or *choice*;
    4. the text of an option within it, the longest that fits (`liver cyst` is not `liver`);
    5. letters: a capital by itself (`It must be B`).

    The article in `A retina` is no label, and neither is a letter that begins an option's text.
    Naming two options, or none, is wrong. Without choices 2 and 4 find nothing.

    WorldCuisines' authors take a number that is the answer or opens it before a full stop, then an
    answer that is a part of the prompt; PMC-VQA's take the option most like the last character.

    Raises:
        ValueError: there is no reference, or one is no label of these choices.
    """
    if not references:
        raise ValueError("accuracy: there is no reference to compare the answer to")
    right = [_label(reference) for reference in references]
    numbered = right[0].isdecimal()
    options = _options(choices, numbered)
    if choices and (unknown := sorted({*right} - {*options})):
        raise ValueError(f"accuracy: reference {unknown[0]} is none of {', '.join(options)}")
    return {"accuracy": float(_chosen(prediction, options, numbered) in right)}


def _label(reference: str) -> str:
    text = reference.strip()
    if text.isdecimal():
        return _integer(text)
    if len(text) == 1 and text.upper() in ascii_uppercase:
        return text.upper()
    raise ValueError(f"accuracy: reference {reference!r} is no label, a letter or a number")


def _options(choices: Sequence[str], numbered: bool) -> dict[str, str]:
    """Label -> text, without the labels that the prompt shows."""
    count = range(1, len(choices) + 1)
    labels = [str(number) for number in count] if numbered else [*ascii_uppercase[: len(choices)]]
    # "1.5 mm" is no option 1, whereas "A:5 mm" is an option A.
    stop = r"[.:](?!\d)" if numbered else r"[.:]"
    texts = [_composed(choice) for choice in choices]
    shown = [
        re.match(rf"[(\[]?{label}\s*(?:[)\]][.:]?|{stop})\s*", text, re.IGNORECASE)
        for label, text in zip(labels, texts, strict=True)
    ]
    if all(shown):
        texts = [text[match.end() :] for text, match in zip(texts, shown, strict=True) if match]
    return dict(zip(labels, texts, strict=True))


def _chosen(prediction: str, options: Mapping[str, str], numbered: bool) -> str | None:
    for found in _readings(_composed(prediction), options, numbered):
        if len(found) == 1:
            return found.pop()
    return None


def _readings(answer: str, options: Mapping[str, str], numbered: bool) -> Iterator[set[str]]:
    """What each of the steps finds, in their order."""
    bare = answer.strip(_WRAPPING)
    label = _integer(bare) if numbered and bare.isdecimal() else bare.upper()
    yield {label} & ({*options} or {*ascii_uppercase})
    yield {key for key, text in options.items() if text and _plain(text) == _plain(answer)}
    if numbered:
        yield {_integer(number) for number in re.findall(r"\d+", answer)[:1]}
        yield _mentioned(answer, options)[0]
        return
    mentioned, rest = _mentioned(answer, options)
    alone = rf"([A-{max(options, default='Z')}])(?![\w'\u2019-])"
    said = rf"(?!(?-i:a\s+\w)){alone}(?!\s+{_TEXT})"
    yield _letters(rf"\A\W*{alone}\s*(?:[).:\],;\n]|[-\u2013]\s)", rest)
    yield _letters(rf"\banswer(?:\s+(?:is|(?:would|must|should)\s+be))?\W*{said}", rest)
    yield _letters(rf"(?:(?<!\w)[(\[](?=\w[)\]])|\b(?:option|choice)\W*){said}", rest)
    yield mentioned
    article = r"[AI]\s+(?!(?:and|or|is|because)\b)\w"
    yield _letters(rf"(?<![\w'\u2019-])(?-i:(?!{article}){alone})", rest)


def _letters(pattern: str, answer: str) -> set[str]:
    return {letter.upper() for letter in re.findall(pattern, answer, re.IGNORECASE)}


def _mentioned(answer: str, options: Mapping[str, str]) -> tuple[set[str], str]:
    """Labels of the options whose text is in the answer, and the answer without these texts."""
    labels: dict[str, set[str]] = {}
    for label, text in options.items():
        if re.search(r"\w", text):
            labels.setdefault(" ".join(text.lower().split()), set()).add(label)
    # The first alternative that fits is taken, so the longest goes first.
    texts = sorted(labels, key=len, reverse=True)
    found: set[str] = set()

    def note(match: re.Match[str]) -> str:
        assert match.lastindex is not None
        found.update(labels[texts[match.lastindex - 1]])
        return f" {_TEXT} "

    anywhere = "|".join(f"({_pattern(text)})" for text in texts)
    return found, re.sub(anywhere, note, answer, flags=re.IGNORECASE) if texts else answer


def _pattern(text: str) -> str:
    """A regular expression for the text as words of their own, however they are spaced."""
    before = r"(?<!\w)(?<!\d[.,])" if re.match(_ALPHABETIC, text[0]) else ""
    after = r"(?!\w)(?![.,]\d)" if re.match(_ALPHABETIC, text[-1]) else ""
    return before + r"\s+".join(re.escape(word) for word in text.split()) + after


def _composed(text: str) -> str:
    """Full-width and decomposed characters as their ordinary selves, trimmed, scripts parted."""
    return _SEAM.sub(" ", unicodedata.normalize("NFKC", text)).strip()


def _plain(text: str) -> str:
    squeezed = " ".join(text.lower().split())
    return squeezed.strip(_WRAPPING) or squeezed


def _integer(digits: str) -> str:
    """Its decimal digits in ASCII, no leading zeros; `int` refuses what runs on for thousands."""
    return "".join(str(unicodedata.decimal(digit)) for digit in digits).lstrip("0") or "0"
