"""ANLS, the metric of DocVQA and InfographicVQA (Biten et al. 2019, equation 1)."""

from __future__ import annotations

from collections.abc import Sequence

# From here on an answer counts as another one, not as the right one misread.
THRESHOLD = 0.5


def score(
    prediction: str, references: Sequence[str], choices: Sequence[str] = ()
) -> dict[str, float]:
    """`anls`: 1 - NL against the closest reference, or 0 where NL is 0.5 or more.

    NL is the edit distance over the length of the longer of the two, both in lower case, trimmed
    and with single spaces. Two empty strings are equal.

    lmms-eval divides by the length before spaces are removed, and at exactly 0.5 still gives 0.5.

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("anls: there is no reference to compare the answer to")
    answer = _plain(prediction)
    distance = min(_normalised_distance(answer, _plain(reference)) for reference in references)
    return {"anls": 1 - distance if distance < THRESHOLD else 0.0}


def edit_distance(first: str, second: str) -> int:
    """Fewest insertions, deletions and substitutions of a character between the two."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        above, row = row, [i]
        for j, right in enumerate(second, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (left != right)))
    return row[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _normalised_distance(first: str, second: str) -> float:
    longer = max(len(first), len(second))
    return edit_distance(first, second) / longer if longer else 0.0
