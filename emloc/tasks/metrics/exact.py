"""Exact match of the answer with a reference, except for case and surrounding spaces."""

from __future__ import annotations

from collections.abc import Sequence


def score(
    prediction: str, references: Sequence[str], choices: Sequence[str] = ()
) -> dict[str, float]:
    """`accuracy`: 1 if the trimmed answer equals a reference, with case ignored, else 0.

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("accuracy: there is no reference to compare the answer to")
    right = {reference.strip().casefold() for reference in references}
    return {"accuracy": float(prediction.strip().casefold() in right)}
