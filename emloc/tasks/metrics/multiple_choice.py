"""Accuracy of multiple-choice answers that contain an option's label or its text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from string import ascii_uppercase

# Characters that may surround a label or an option's text and are ignored there.
_WRAPPING = " \t\r\n.,;:!?\"'`*_()[]{}"
# Characters of scripts that separate words by spaces. In other scripts, a word may directly follow
# another one.
_ALPHABETIC = r"[0-9A-Za-z\u00C0-\u052F\u1E00-\u1FFF]"
# Position between a character of such a script and one of another script.
_SCRIPT_BOUNDARY = re.compile(
    rf"(?<={_ALPHABETIC})(?=\w)(?!{_ALPHABETIC})|(?<=\w)(?<!{_ALPHABETIC})(?={_ALPHABETIC})"
)
# Placeholder for an option's text: a letter (a rune) that does not occur in answers.
_TEXT = "\u16a0"


def score(
    prediction: str, references: Sequence[str], choices: Sequence[str] = ()
) -> dict[str, float]:
    """`accuracy`: 1 if the answer names the correct option, else 0.

    References are labels: letters or numbers. Choices are in the order of their labels A, B, ... or
    1, 2, ..., and may begin with the labels. The following steps are tried in order, and the first
    step that finds exactly one option decides:

    1. The answer is a label: `B`, `b.`, `(B)`, `2`.
    2. The answer is an option's text: `Skin`, even one with a letter or a number (`Hepatitis B`).
    3. For numbers: the first integer in the answer, even if there is no such option. No further
       step follows. For letters: a letter at the start of the answer (`B) Skin`, `B: ..`), then one
       after the word *answer*, then one in brackets or after *option* or *choice*.
    4. The text of an option within the answer; the longest match counts (`liver cyst` is not
       `liver`).
    5. For letters: a single capital letter (`It must be B`).

    The article in `A retina` is no label, and neither is a letter at the start of an option's text.
    An answer that names two options or none is wrong. Without choices, steps 2 and 4 find nothing.

    The authors' rules differ. WorldCuisines accepts a number that is the whole answer or precedes a
    full stop at its start, then an answer that is a part of the prompt. PMC-VQA selects the option
    that is most similar to the last character.

    Raises:
        ValueError: there is no reference, or a reference is no label of the choices.
    """
    if not references:
        raise ValueError("accuracy: there is no reference to compare the answer to")
    correct = [_label(reference) for reference in references]
    numbered = correct[0].isdecimal()
    options = _options(choices, numbered)
    if choices and (unknown := sorted({*correct} - {*options})):
        raise ValueError(f"accuracy: reference {unknown[0]} is none of {', '.join(options)}")
    return {"accuracy": float(_named_option(prediction, options, numbered) in correct)}


def _label(reference: str) -> str:
    """The label in a reference: an integer, or one capital letter.

    Raises:
        ValueError: the reference is neither a letter nor a number.
    """
    text = reference.strip()
    if text.isdecimal():
        return _integer(text)
    if len(text) == 1 and text.upper() in ascii_uppercase:
        return text.upper()
    raise ValueError(f"accuracy: reference {reference!r} is no label, a letter or a number")


def _options(choices: Sequence[str], numbered: bool) -> dict[str, str]:
    """Label -> text of the option; labels at the start of all choices are removed."""
    numbers = range(1, len(choices) + 1)
    labels = [str(number) for number in numbers] if numbered else [*ascii_uppercase[: len(choices)]]
    # "1.5 mm" is not the label 1 with a text, whereas "A:5 mm" is the label A with "5 mm".
    stop = r"[.:](?!\d)" if numbered else r"[.:]"
    texts = [_normalise_characters(choice) for choice in choices]
    label_matches = [
        re.match(rf"[(\[]?{label}\s*(?:[)\]][.:]?|{stop})\s*", text, re.IGNORECASE)
        for label, text in zip(labels, texts, strict=True)
    ]
    if all(label_matches):
        texts = [
            text[match.end() :] for text, match in zip(texts, label_matches, strict=True) if match
        ]
    return dict(zip(labels, texts, strict=True))


def _named_option(prediction: str, options: Mapping[str, str], numbered: bool) -> str | None:
    """Label of the option that the answer names; None if it names no option or several."""
    for labels in _step_results(_normalise_characters(prediction), options, numbered):
        if len(labels) == 1:
            return labels.pop()
    return None


def _step_results(answer: str, options: Mapping[str, str], numbered: bool) -> Iterator[set[str]]:
    """Yield the labels that each step of `score` finds in the answer, in the order of the steps."""
    bare = answer.strip(_WRAPPING)
    label = _integer(bare) if numbered and bare.isdecimal() else bare.upper()
    yield {label} & ({*options} or {*ascii_uppercase})
    yield {key for key, text in options.items() if text and _plain(text) == _plain(answer)}
    if numbered:
        yield {_integer(number) for number in re.findall(r"\d+", answer)[:1]}
        yield _mentioned(answer, options)[0]
        return
    mentioned, rest = _mentioned(answer, options)
    letter = rf"([A-{max(options, default='Z')}])(?![\w'\u2019-])"
    # A label, unless it is the article "a" or an option's text follows.
    named_letter = rf"(?!(?-i:a\s+\w)){letter}(?!\s+{_TEXT})"
    yield _letters(rf"\A\W*{letter}\s*(?:[).:\],;\n]|[-\u2013]\s)", rest)
    yield _letters(rf"\banswer(?:\s+(?:is|(?:would|must|should)\s+be))?\W*{named_letter}", rest)
    yield _letters(rf"(?:(?<!\w)[(\[](?=\w[)\]])|\b(?:option|choice)\W*){named_letter}", rest)
    yield mentioned
    article = r"[AI]\s+(?!(?:and|or|is|because)\b)\w"
    yield _letters(rf"(?<![\w'\u2019-])(?-i:(?!{article}){letter})", rest)


def _letters(pattern: str, answer: str) -> set[str]:
    """Capital letters of the pattern's matches in the answer."""
    return {letter.upper() for letter in re.findall(pattern, answer, re.IGNORECASE)}


def _mentioned(answer: str, options: Mapping[str, str]) -> tuple[set[str], str]:
    """Labels of the options whose text occurs in the answer, and the answer with placeholders.

    A placeholder replaces each occurrence of an option's text.
    """
    labels: dict[str, set[str]] = {}
    for label, text in options.items():
        if re.search(r"\w", text):
            labels.setdefault(" ".join(text.lower().split()), set()).add(label)
    # A regular expression matches the first alternative that fits, so the longest text comes first.
    texts = sorted(labels, key=len, reverse=True)
    mentioned: set[str] = set()

    def replace_text(match: re.Match[str]) -> str:
        """Note the option of a matched text and return the placeholder."""
        assert match.lastindex is not None
        mentioned.update(labels[texts[match.lastindex - 1]])
        return f" {_TEXT} "

    any_text = "|".join(f"({_pattern(text)})" for text in texts)
    rest = re.sub(any_text, replace_text, answer, flags=re.IGNORECASE) if texts else answer
    return mentioned, rest


def _pattern(text: str) -> str:
    """Regular expression that matches the text as whole words with any white space in between."""
    before = r"(?<!\w)(?<!\d[.,])" if re.match(_ALPHABETIC, text[0]) else ""
    after = r"(?!\w)(?![.,]\d)" if re.match(_ALPHABETIC, text[-1]) else ""
    return before + r"\s+".join(re.escape(word) for word in text.split()) + after


def _normalise_characters(text: str) -> str:
    """The text in Unicode form NFKC, trimmed, with a space between words of different scripts."""
    return _SCRIPT_BOUNDARY.sub(" ", unicodedata.normalize("NFKC", text)).strip()


def _plain(text: str) -> str:
    """The text in lower case with single spaces, without surrounding punctuation."""
    squeezed = " ".join(text.lower().split())
    return squeezed.strip(_WRAPPING) or squeezed


def _integer(digits: str) -> str:
    """An integer in ASCII digits without leading zeros; `int` would refuse very long ones."""
    return "".join(str(unicodedata.decimal(digit)) for digit in digits).lstrip("0") or "0"
