"""Base class of the model families that generate text: length limit and loss of answer tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from emloc.config.values import Range
from emloc.models.family import ModelFamily
from emloc.models.objectives import Objective
from emloc.models.objectives.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class GenerativeModel(ModelFamily):
    """A family of models that generate the answer as text, token by token."""

    unplanned = None

    # tokens; longer examples are skipped, and their number is logged
    max_length: Annotated[int, Range(least=2, usual=2048)]

    @property
    def objective(self) -> Objective:
        """Train on the cross-entropy of the answer tokens."""
        return Tokens()

    @property
    def length_limit(self) -> int:
        """Maximum length of an example in tokens."""
        return self.max_length
