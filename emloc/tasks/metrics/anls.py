"""ANLS, the metric of DocVQA and InfographicVQA (Biten et al. 2019, equation 1)."""

from __future__ import annotations

from collections.abc import Sequence

# Similarity below which an answer is wrong, and no longer a misspelt correct answer.
THRESHOLD = 0.5


def score(
    prediction: str, references: Sequence[str], choices: Sequence[str] = ()
) -> dict[str, float]:
    """`anls`: 1 - NL for the closest reference, or 0 if this is less than 0.5.

    NL is the edit distance of answer and reference, divided by the length of the longer text. Both
    are compared in lower case, trimmed and with single spaces. Two empty texts are equal.

    An answer at exactly one half scores 0.5. Equation 1 gives 0, but the official script of the
    DocVQA and InfographicVQA challenges gives 0.5, and published scores come from this script. The
    script, like lmms-eval, divides by the length before spaces are removed, so that an answer with
    spaces around it scores higher there.

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("anls: there is no reference to compare the answer to")
    answer = _normalise(prediction)
    distance = min(_normalised_distance(answer, _normalise(reference)) for reference in references)
    similarity = 1 - distance
    return {"anls": similarity if similarity >= THRESHOLD else 0.0}


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: minimum number of inserted, deleted and replaced characters."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        above, row = row, [i]
        for j, right in enumerate(second, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (left != right)))
    return row[-1]


def _normalise(text: str) -> str:
    """The text in lower case, trimmed and with single spaces."""
    return " ".join(text.lower().split())


def _normalised_distance(first: str, second: str) -> float:
    """Edit distance divided by the length of the longer text, in [0, 1]."""
    longer = max(len(first), len(second))
    return edit_distance(first, second) / longer if longer else 0.0
