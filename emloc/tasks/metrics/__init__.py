"""Scorers of written answers: one module a metric, each with a function `score`.

They take and return strings and numbers and know no other part of the package. A task names one
by its name, such as `anls`; one of your own by its dotted path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Scorer(Protocol):
    """What every `score` is: numbers in [0, 1] for one answer, by the names of their metrics.

    The mean over all rows is the data set's score. `references` are the answers that are right,
    `choices` what the prompt offers to choose from, as it shows them. A row without a reference,
    or with one that the metric can make nothing of, is a ValueError: whoever reads rows leaves
    them out.
    """

    def __call__(
        self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()
    ) -> dict[str, float]:
        """This one answer's numbers."""
