"""The calibration samples: which rows, and how they become batches."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emloc.calibration.blockwise import Batch
from emloc.data.examples import Examples
from emloc.data.reader import batches, encode_all
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source

log = logging.getLogger(__name__)

# Samples of one forward pass. A constant: the sums do not depend on it beyond rounding.
BATCH = 8


@dataclass(frozen=True)
class Samples:
    """The examples an emulator is built from, and the length above which one is left out."""

    examples: Examples
    max_length: int | None  # None: no example is too long

    @property
    def key(self) -> list[Any]:
        """What a stage that reads these samples depends on."""
        return [self.examples.key, self.max_length]

    @property
    def ids(self) -> list[str]:
        """The rows' names in their data set."""
        return [example.id for example in self.examples]

    def batches(self, source: Source) -> Sequence[Batch]:
        """The samples, answers included, as keyword arguments of the model's forward."""
        return self._batches(source, answers_only=False)

    def learnt(self, source: Source) -> Sequence[Batch]:
        """The same with the targets, as they are trained on."""
        return self._batches(source, answers_only=True)

    def _batches(self, source: Source, *, answers_only: bool) -> Sequence[Batch]:
        reader = source.reader()
        encoded = encode_all(reader, self.examples, self.max_length)
        return batches(reader, encoded, BATCH, answers_only=answers_only)


def choose(pool: Examples, count: int, seed: int) -> Examples:
    """`count` rows of the pool, drawn without replacement.

    Raises:
        ConfigError: the pool is smaller.
    """
    if count > len(pool):
        raise ConfigError(
            f"calibration.samples={count}: {pool.name} has only {len(pool)} rows to choose from; "
            f"set calibration.samples={len(pool)} or less"
        )
    return pool.pick(random.Random(seed).sample(range(len(pool)), count))
