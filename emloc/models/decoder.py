"""The language decoder of a model that writes text, and the vocabulary at both its ends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from emloc.models.checkpoint.source import Source


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part that reads the tokens of a text.

    Beside a vision tower the language decoder; else the model without its head.
    """
    decoder: nn.Module = model.get_decoder()
    return decoder


@dataclass(frozen=True, eq=False)
class Decoder:
    """What a source says of its decoder; looked up once."""

    source: Source

    @cached_property
    def prefix(self) -> str:
        """What the names of all its modules begin with."""
        decoder = decoder_of(self.source.bare)
        named = self.source.bare.named_modules()
        name = next(name for name, one in named if one is decoder)
        return f"{name}." if name else ""

    @property
    def vocabulary(self) -> int:
        """Number of tokens the model knows."""
        return int(self.source.bare.get_input_embeddings().weight.shape[0])

    @cached_property
    def lone_embedding(self) -> str | None:
        """The parameter of the token embedding; None where the output matrix shares it."""
        model = self.source.bare
        own, head = model.get_input_embeddings(), model.get_output_embeddings()
        if type(own) is not nn.Embedding or (head is not None and head.weight is own.weight):
            return None
        return next(name for name, one in model.named_parameters() if one is own.weight)
