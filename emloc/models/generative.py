"""Base class of the model families that generate text: length limit and loss of answer tokens."""

from __future__ import annotations

from dataclasses import dataclass

from emloc.errors import ConfigError
from emloc.models.family import ModelFamily
from emloc.models.objectives import Objective
from emloc.models.objectives.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class GenerativeModel(ModelFamily):
    """A family of models that generate the answer as text, token by token."""

    unplanned = None

    max_length: int  # tokens; longer examples are skipped, and their number is logged

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 2:
            raise ConfigError(
                f"model.max_length must be at least 2, got {self.max_length}; "
                "set model.max_length=2048"
            )

    @property
    def objective(self) -> Objective:
        """Train on the cross-entropy of the answer tokens."""
        return Tokens()

    @property
    def length_limit(self) -> int:
        """Maximum length of an example in tokens."""
        return self.max_length
