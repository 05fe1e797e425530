"""What all families that write text share: a longest text, and the loss of answer tokens."""

from __future__ import annotations

from dataclasses import dataclass

from emloc.errors import ConfigError
from emloc.models.family import ModelFamily
from emloc.models.objectives import Objective
from emloc.models.objectives.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class GenerativeModel(ModelFamily):
    """A model that reads tokens and writes the answer, token by token."""

    unplanned = None

    max_length: int  # tokens; a longer example is left out and counted

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 2:
            raise ConfigError(
                f"model.max_length must be at least 2, got {self.max_length}; "
                "set model.max_length=2048"
            )

    @property
    def objective(self) -> Objective:
        """Cross-entropy of the answer's tokens."""
        return Tokens()

    @property
    def longest(self) -> int:
        """Tokens of an example, at most."""
        return self.max_length
