"""Exact match: right or wrong, without a rule of its own to forgive anything but case."""

from __future__ import annotations

from collections.abc import Sequence


def score(
    prediction: str, references: Sequence[str], choices: Sequence[str] = ()
) -> dict[str, float]:
    """`accuracy`: 1 if the trimmed answer is one of the references, whatever the case.

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("accuracy: there is no reference to compare the answer to")
    right = {reference.strip().casefold() for reference in references}
    return {"accuracy": float(prediction.strip().casefold() in right)}
