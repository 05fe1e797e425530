"""Relaxed accuracy, the metric of ChartQA (Masry et al. 2022, section 5.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

TOLERANCE = 0.05  # allowed error relative to the correct number


def score(
    prediction: str, references: Sequence[str], choices: Sequence[str] = ()
) -> dict[str, float]:
    """`relaxed_accuracy`: 1 if a number is within 5% of a reference, or a text equals it, else 0.

    A number with a trailing % is divided by 100, so that 62 differs from 62%, but 0.62 equals it.
    Answer and reference are compared as text, with case ignored, if one of them is no finite number
    or the reference is 0. A number with a thousands separator or a unit is a text. With several
    references the best one counts.

    Exactly 5% is right where the float of the relative error is no more than that of 0.05: 105 for
    100, but not 2.1 for 2, since 2.1 - 2 is a little more than 0.1. The rule is that of lmms-eval,
    except that spaces around the answer are removed here, and of several % signs only one.
    lm-eval's `chartqa` differs: it extracts the answer from a longer text, removes commas, dollar
    signs and final punctuation, and ignores a % sign that only one of the two has.

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("relaxed_accuracy: there is no reference to compare the answer to")
    correct = any(_is_correct(prediction.strip(), reference.strip()) for reference in references)
    return {"relaxed_accuracy": float(correct)}


def _is_correct(prediction: str, reference: str) -> bool:
    """Whether the prediction matches one reference, as a number or as a text."""
    predicted, expected = _number(prediction), _number(reference)
    if predicted is None or not expected:
        return prediction.lower() == reference.lower()
    return abs(predicted - expected) / abs(expected) <= TOLERANCE


def _number(text: str) -> float | None:
    """The text as a number, with % as 1/100; None if it is no finite number."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        return None
    # In the answer to a question about a chart, "nan" and "infinity" are words.
    if not math.isfinite(value):
        return None
    return value / 100 if text.endswith("%") else value
