"""Exact match and token F1 of SQuAD (Rajpurkar et al. 2016, section 6.1), which WebSRC uses."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def score(
    prediction: str, references: Sequence[str], choices: Sequence[str] = ()
) -> dict[str, float]:
    """`em` and `f1`, each against the reference that is best for it.

    Both are about the words that are left in lower case without ASCII punctuation and articles.
    F1 counts a word as often as it is said. Where no word is left on one side, both are 1 if none
    is left on the other, and 0 otherwise.

    lmms-eval's `websrc` has an F1 alone: over *sets* of words and signs, with punctuation as words
    of their own, articles left in, and 0 where a side is empty.

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("em, f1: there is no reference to compare the answer to")
    given = words(prediction)
    wanted = [words(reference) for reference in references]
    return {"em": float(given in wanted), "f1": max(_f1(given, each) for each in wanted)}


def words(text: str) -> list[str]:
    """The words that count, in order."""
    return _ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(first: Sequence[str], second: Sequence[str]) -> float:
    if not first or not second:
        return float(not first and not second)
    shared = (Counter(first) & Counter(second)).total()
    return 2 * shared / (len(first) + len(second))
