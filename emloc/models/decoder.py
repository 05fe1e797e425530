"""The language decoder of a generative model, its token embedding and vocabulary size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from emloc.models.checkpoint.source import Source


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The submodel that processes tokens: the model without vision tower and output head."""
    decoder: nn.Module = model.get_decoder()
    return decoder


def decoder_prefix(model: PreTrainedModel) -> str:
    """Return the common prefix of the names of the decoder's modules; empty if it is the model."""
    decoder = decoder_of(model)
    name = next(name for name, module in model.named_modules() if module is decoder)
    return f"{name}." if name else ""


@dataclass(frozen=True, eq=False)
class Decoder:
    """Facts about the language decoder of a source, computed at their first use."""

    source: Source

    @cached_property
    def prefix(self) -> str:
        """Common prefix of the names of the decoder's modules, such as `model.language_model.`."""
        return decoder_prefix(self.source.meta_model)

    @property
    def vocabulary(self) -> int:
        """Number of tokens in the vocabulary."""
        return int(self.source.meta_model.get_input_embeddings().weight.shape[0])

    @cached_property
    def untied_embedding(self) -> str | None:
        """Name of the token embedding's parameter; None if the output head shares the weight."""
        model = self.source.meta_model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if type(embedding) is not nn.Embedding:
            return None
        if head is not None and head.weight is embedding.weight:
            return None
        return next(name for name, p in model.named_parameters() if p is embedding.weight)
