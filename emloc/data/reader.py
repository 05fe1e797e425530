"""How a model family reads an example: text as tokens, images as pixels, targets as it learns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from emloc.data.collate import EncodedRow, by_length, collate
from emloc.data.examples import Example, Examples
from emloc.data.prompts import EncodedExample, encode
from emloc.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenCheckpoint:
    """What of an open checkpoint a reader needs."""

    folder: Path
    open_tokenizer: Callable[[], PreTrainedTokenizerBase]
    config: PretrainedConfig
    dtype: torch.dtype

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's, opened when a reader first asks for it: a model of images has none."""
        return self.open_tokenizer()


class Reader(Protocol):
    """Examples as a model takes them; calibration, training, loss and generation use this one."""

    def encode(self, example: Example) -> EncodedRow:
        """The example as the model family takes it; nothing large is decoded yet.

        Raises:
            ConfigError: the example cannot be read; names it.
        """

    def collate(self, batch: Sequence[Any], *, answers_only: bool = True) -> dict[str, Tensor]:
        """A batch of rows of `encode`, as keyword arguments of the model's forward.

        With `answers_only` there are also the targets, as the family's objective takes them, and
        the model may leave out what the loss does not read.

        Raises:
            ConfigError: an image cannot be decoded; names the example.
        """


class TokenReader(Reader, Protocol):
    """What reads examples for a model that writes text."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """With a padding token, and its chat template as this model is talked to."""

    def encode(self, example: Example) -> EncodedExample:
        """Tokens of prompt, answer and end token, the places of images among them."""


class ReaderSettings(Protocol):
    """The settings of a reader, which the model's configuration holds."""

    @property
    def key(self) -> list[Any]:
        """What a stage that reads examples depends on; empty for text alone."""

    def reader(self, opened: OpenCheckpoint) -> Reader:
        """The reader of that checkpoint.

        Raises:
            ConfigError: the checkpoint is of another kind.
        """


@dataclass(frozen=True)
class TextReader:
    """Text alone."""

    tokenizer: PreTrainedTokenizerBase

    def encode(self, example: Example) -> EncodedExample:
        """See Reader."""
        if example.images:
            raise ConfigError(
                f"{example.id}: this model reads no images; set model to one that does, "
                "internvl2_5_8b for one, or task to one without"
            )
        return encode(self.tokenizer, example)

    def collate(
        self, batch: Sequence[EncodedExample], *, answers_only: bool = True
    ) -> dict[str, Tensor]:
        """See Reader."""
        return collate(batch, self.tokenizer.pad_token_id, answers_only=answers_only)


@dataclass(frozen=True)
class TextReaderSettings:
    """Text alone, which needs no settings."""

    @property
    def key(self) -> list[Any]:
        """See Reading."""
        return []

    def reader(self, opened: OpenCheckpoint) -> Reader:
        """See Reading."""
        return TextReader(opened.tokenizer)


def encode_all(reader: Reader, examples: Examples, max_length: int | None) -> list[Any]:
    """The examples as rows; those longer than `max_length` are left out, and their number logged.

    Raises:
        ConfigError: one cannot be read, or none is left.
    """
    encoded = [reader.encode(example) for example in examples]
    if max_length is None:
        return encoded
    kept = [one for one in encoded if one.length <= max_length]
    if len(kept) < len(encoded):
        log.warning(
            "%s: left out %d of %d examples longer than %d tokens (model.max_length)",
            examples.name,
            len(encoded) - len(kept),
            len(encoded),
            max_length,
        )
    if not kept:
        raise ConfigError(
            f"{examples.name}: no example within {max_length} tokens; set model.max_length"
        )
    return kept


def batches(
    reader: Reader, encoded: Sequence[EncodedRow], size: int, *, answers_only: bool
) -> list[dict[str, Tensor]]:
    """All of `encoded` in batches of similar length; order not kept."""
    return [
        reader.collate([encoded[index] for index in group], answers_only=answers_only)
        for group in by_length(encoded, size)
    ]
