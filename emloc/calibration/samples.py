"""Calibration samples: choose rows of the task and turn them into batches."""

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

# Samples per forward pass: a constant, as the batch size changes second moments only by rounding.
BATCH = 8


@dataclass(frozen=True)
class Samples:
    """Examples that an emulator is built from; examples above `max_length` tokens are skipped."""

    examples: Examples
    max_length: int | None  # None: no limit

    @property
    def key(self) -> list[Any]:
        """Cache key of the samples."""
        return [self.examples.key, self.max_length]

    @property
    def ids(self) -> list[str]:
        """Ids of the examples in their data set."""
        return [example.id for example in self.examples]

    def batches(self, source: Source) -> Sequence[Batch]:
        """Batches of prompts with their answers, as keyword arguments of the model's forward."""
        return self._batches(source, answers_only=False)

    def training_batches(self, source: Source) -> Sequence[Batch]:
        """Batches of prompts with their answers and training targets (`labels` of text models)."""
        return self._batches(source, answers_only=True)

    def _batches(self, source: Source, *, answers_only: bool) -> Sequence[Batch]:
        """Encode the examples with the model's reader and collate them to batches."""
        reader = source.reader()
        encoded = encode_all(reader, self.examples, self.max_length)
        return batches(reader, encoded, BATCH, answers_only=answers_only)


def choose_examples(pool: Examples, count: int, seed: int) -> Examples:
    """Draw `count` examples from the pool at random, without replacement.

    Raises:
        ConfigError: the pool has fewer examples.
    """
    if count > len(pool):
        raise ConfigError(
            f"calibration.samples={count}: {pool.name} has only {len(pool)} rows to choose from; "
            f"set calibration.samples={len(pool)} or less"
        )
    return pool.pick(random.Random(seed).sample(range(len(pool)), count))
