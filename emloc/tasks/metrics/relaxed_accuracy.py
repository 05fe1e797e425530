"""Relaxed accuracy, the metric of ChartQA (Masry et al. 2022, section 5.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

TOLERANCE = 0.05  # of the right number


def score(
    prediction: str, references: Sequence[str], choices: Sequence[str] = ()
) -> dict[str, float]:
    """`relaxed_accuracy`: 1 if a number is within 5% of the right one, or a text is the right one.

    A trailing % divides by 100, so 62 is not 62%, while 0.62 is. Where one of the two is no finite
    number, or the right one is 0, they are compared as text, whatever the case: a thousands
    separator or a unit makes a text of a number. With several references the best one counts.

    This is lmms-eval's rule, but for the spaces around an answer, which are trimmed here. lm-eval's
    `chartqa` cuts the answer out of a longer text, drops commas, dollar signs and end punctuation
    first, and takes a percentage for a plain number where only one of the two has the sign.

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("relaxed_accuracy: there is no reference to compare the answer to")
    right = any(_right(prediction.strip(), reference.strip()) for reference in references)
    return {"relaxed_accuracy": float(right)}


def _right(prediction: str, target: str) -> bool:
    given, wanted = _number(prediction), _number(target)
    if given is None or not wanted:
        return prediction.lower() == target.lower()
    return abs(given - wanted) / abs(wanted) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        return None
    # "nan" and "infinity" are words of a chart before they are numbers.
    if not math.isfinite(value):
        return None
    return value / 100 if text.endswith("%") else value
