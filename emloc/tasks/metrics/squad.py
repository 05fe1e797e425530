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
    """`em` (exact match) and `f1` (F1 of the words), each for the reference with the best value.

    Both compare words in lower case, without ASCII punctuation and articles. F1 counts repeated
    words. If answer or reference has no words, both scores are 1 if neither has words, else 0.

    lmms-eval's `websrc` differs: it has no exact match, and its F1 compares *sets* of words, keeps
    articles, counts punctuation as words, and is 0 if answer or reference is empty.

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("em, f1: there is no reference to compare the answer to")
    answer = words(prediction)
    expected = [words(reference) for reference in references]
    return {"em": float(answer in expected), "f1": max(_f1(answer, item) for item in expected)}


def words(text: str) -> list[str]:
    """Words of the text in order, in lower case, without punctuation and articles."""
    return _ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(first: Sequence[str], second: Sequence[str]) -> float:
    """F1 of two lists of words, with repetitions; 1 if both are empty."""
    if not first or not second:
        return float(not first and not second)
    shared = (Counter(first) & Counter(second)).total()
    return 2 * shared / (len(first) + len(second))
