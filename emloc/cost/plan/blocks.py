"""Models with a few decoder blocks on the meta device, on which a training step is traced."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from emloc.cost.plan.trace import ATTENTION
from emloc.models.checkpoint.source import Source
from emloc.models.decoder import Decoder, decoder_of


@dataclass(frozen=True, eq=False)
class DecoderBlocks:
    """Builder of models with only the first decoder blocks of `source`.

    Building the skeleton of a large model takes seconds, so it is built once and parts are copied.
    """

    source: Source

    @cached_property
    def decoder(self) -> Decoder:
        """Facts about the decoder, such as its prefix and vocabulary."""
        return Decoder(self.source)

    @property
    def count(self) -> int:
        """Number of blocks of the complete decoder."""
        return len(self._parts[1])

    def first(self, depth: int) -> PreTrainedModel:
        """Return a new model on the meta device with the first `depth` blocks of the decoder.

        Blocks outside the decoder, such as those of a vision tower, are left out. No layer in them
        is trained, so their activations are freed before the decoder begins.
        """
        shell, blocks = self._parts
        # Copied in one call, so that shared objects such as the configuration are copied once.
        model, first_blocks = copy.deepcopy((shell, blocks[:depth]))
        _decoder_list(model).extend(first_blocks)
        return model

    @cached_property
    def _parts(self) -> tuple[PreTrainedModel, list[nn.Module]]:
        """The model with all of its lists of blocks emptied, and the blocks of the decoder."""
        model = self.source.skeleton()
        model.set_attn_implementation(ATTENTION)
        model = model.to("meta").requires_grad_(False)
        for module in model.modules():
            # Dynamic RoPE reads the positions, which have no values on the meta device. Up to the
            # length that the model was trained on, it equals the default RoPE.
            if getattr(module, "rope_type", None) == "dynamic":
                module.rope_type = "default"
        decoder_list = _decoder_list(model)
        blocks = list(decoder_list)
        del decoder_list[:]
        decoder_modules = set(decoder_of(model).modules())
        for module in list(model.modules()):
            if isinstance(module, nn.ModuleList) and module not in decoder_modules:
                del module[:]
        return model, blocks


def _decoder_list(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of blocks of the model's decoder."""
    return next(
        module for module in decoder_of(model).modules() if isinstance(module, nn.ModuleList)
    )
