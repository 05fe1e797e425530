"""Calibration samples: choose rows of the task and turn them into batches."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from emloc.calibration.batch_size import batch_tokens, group_by_tokens
from emloc.calibration.blockwise import Batch
from emloc.data.collate import EncodedRow, group_by_length
from emloc.data.examples import Examples
from emloc.data.prompts import EncodedExample
from emloc.data.reader import batches, encode_all
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source

log = logging.getLogger(__name__)

# Samples per forward pass; the batch size changes second moments only by rounding.
BATCH = 8
CPU = torch.device("cpu")


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

    def batches(self, source: Source, device: torch.device = CPU) -> Sequence[Batch]:
        """Batches of prompts with their answers, as keyword arguments of the model's forward.

        On a GPU, batches of texts have as many tokens as the device computes at once.
        """
        return self._batches(source, device, answers_only=False)

    def training_batches(self, source: Source) -> Sequence[Batch]:
        """Batches of prompts with their answers and training targets (`labels` of text models)."""
        return self._batches(source, CPU, answers_only=True)

    def _batches(
        self, source: Source, device: torch.device, *, answers_only: bool
    ) -> Sequence[Batch]:
        """Encode the examples with the model's reader and collate them to batches."""
        reader = source.reader()
        encoded = encode_all(reader, self.examples, self.max_length)
        groups = group_by_length(encoded, BATCH)
        # The tiles of images are many more tokens, in a vision tower, than the row has.
        if device.type == "cuda" and all(map(_is_text, encoded)):
            tokens = batch_tokens(source.config.get_text_config().hidden_size, device)
            groups = group_by_tokens([row.length for row in encoded], tokens, least=BATCH)
        return batches(reader, encoded, groups, answers_only=answers_only)


def _is_text(row: EncodedRow) -> bool:
    """Whether the row consists of tokens, and of no image."""
    return isinstance(row, EncodedExample) and not row.images


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
