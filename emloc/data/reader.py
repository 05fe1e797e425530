"""Readers: encode the examples of a data set for a model family, and collate them to batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from emloc.data.collate import EncodedRow, collate
from emloc.data.examples import Example, Examples
from emloc.data.prompts import EncodedExample, encode, frame_of
from emloc.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenCheckpoint:
    """The parts of a checkpoint that a reader needs."""

    folder: Path
    open_tokenizer: Callable[[], PreTrainedTokenizerBase]
    config: PretrainedConfig
    dtype: torch.dtype

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, opened at its first use, as image models have none."""
        return self.open_tokenizer()


class Reader(Protocol):
    """Encodes and collates examples for a model; all stages share one reader."""

    def encode(self, example: Example) -> EncodedRow:
        """Encode an example for the model family; images are not decoded yet.

        Raises:
            ConfigError: the example cannot be read; the message names the example.
        """

    def collate(self, batch: Sequence[Any], *, answers_only: bool = True) -> dict[str, Tensor]:
        """Collate encoded rows to keyword arguments of the model's forward.

        With `answers_only`, the batch also contains the training targets for the family's
        objective, and the model may skip outputs that the loss does not need.

        Raises:
            ConfigError: an image cannot be decoded; the message names the example.
        """


class TokenReader(Reader, Protocol):
    """A reader for models that generate text."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with a padding token and the chat template of this model."""

    def encode(self, example: Example) -> EncodedExample:
        """Encode prompt, answer and end token as token ids, with image tokens in the prompt."""


def stop_ids(generation_config: GenerationConfig | None, reader: TokenReader) -> list[int]:
    """Ids of all tokens that end a generated answer.

    These are the end tokens of the model's generation settings, the tokenizer's end token, and the
    token that ends a turn of the chat template.
    """
    named = None if generation_config is None else generation_config.eos_token_id
    ids = [] if named is None else named if isinstance(named, list) else [named]
    tokenizer = reader.tokenizer
    end_token = getattr(reader, "end_token", None) or frame_of(tokenizer).end_token
    own = [tokenizer.convert_tokens_to_ids(end_token), tokenizer.eos_token_id]
    return sorted({*ids, *(token_id for token_id in own if token_id is not None)})


class ReaderSettings(Protocol):
    """Settings of a reader; part of a model's configuration."""

    @property
    def key(self) -> list[Any]:
        """Cache key of everything that decides how examples are read; empty for plain text."""

    def reader(self, checkpoint: OpenCheckpoint) -> Reader:
        """Open the reader of a checkpoint.

        Raises:
            ConfigError: the checkpoint does not fit this reader.
        """


@dataclass(frozen=True)
class TextReader:
    """Reader for models that read only text."""

    tokenizer: PreTrainedTokenizerBase

    def encode(self, example: Example) -> EncodedExample:
        """Encode prompt, answer and end token as token ids.

        Raises:
            ConfigError: the example has images.
        """
        if example.images:
            raise ConfigError(
                f"{example.id}: this model reads no images; set model to a model for images, "
                "such as internvl2_5_8b, or task to a task without images"
            )
        return encode(self.tokenizer, example)

    def collate(
        self, batch: Sequence[EncodedExample], *, answers_only: bool = True
    ) -> dict[str, Tensor]:
        """Collate the rows' token ids to a padded batch."""
        return collate(batch, self.tokenizer.pad_token_id, answers_only=answers_only)


@dataclass(frozen=True)
class TextReaderSettings:
    """Settings of the reader for plain text, which are none."""

    @property
    def key(self) -> list[Any]:
        """An empty list, as the reader for plain text has no settings."""
        return []

    def reader(self, checkpoint: OpenCheckpoint) -> Reader:
        """Open the reader with the checkpoint's tokenizer."""
        return TextReader(checkpoint.tokenizer)


def training_collate(reader: Reader) -> Callable[[list[Any]], Any]:
    """Return the function that collates the batches of a training.

    A reader of images has one of its own, which returns before the images are decoded.
    """
    return getattr(reader, "collate_ahead", reader.collate)


def encode_all(reader: Reader, examples: Examples, max_length: int | None) -> list[Any]:
    """Encode the examples; examples longer than `max_length` are skipped with a warning.

    Raises:
        ConfigError: an example cannot be read, or all examples are too long.
    """
    encoded = [reader.encode(example) for example in examples]
    if max_length is None:
        return encoded
    short_rows = [row for row in encoded if row.length <= max_length]
    if len(short_rows) < len(encoded):
        log.warning(
            "%s: left out %d of %d examples longer than %d tokens (model.max_length)",
            examples.name,
            len(encoded) - len(short_rows),
            len(encoded),
            max_length,
        )
    if not short_rows:
        raise ConfigError(
            f"{examples.name}: no example within {max_length} tokens; set model.max_length"
        )
    return short_rows


def batches(
    reader: Reader,
    encoded: Sequence[EncodedRow],
    groups: Iterable[Sequence[int]],
    *,
    answers_only: bool,
) -> list[dict[str, Tensor]]:
    """Collate the rows to batches; each group has the indices of the rows of a batch."""
    return [
        reader.collate([encoded[index] for index in group], answers_only=answers_only)
        for group in groups
    ]
