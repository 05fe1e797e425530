"""Scorers of generated answers: one module per metric, each with a function `score`.

Scorers work on strings and depend on no other part of the package. A task selects a scorer of this
package by its name, such as `anls`, and a scorer of yours by its dotted path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Scorer(Protocol):
    """Function that scores one answer: metric -> number in [0, 1].

    The score of a data set is the mean over its rows.

    Args:
        prediction: the generated answer.
        references: the correct answers.
        choices: options of a multiple-choice question, as the prompt shows them.

    Raises:
        ValueError: there is no reference, or the metric cannot use it. Tasks skip such rows.
    """

    def __call__(
        self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()
    ) -> dict[str, float]:
        """Score one answer."""
