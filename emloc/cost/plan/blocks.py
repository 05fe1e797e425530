"""A model of a few decoder blocks and no numbers, for a training step to be traced on."""

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
    """A model whose decoder blocks can be had one by one.

    A skeleton of a large model takes seconds to build: it is built once, and parts of it copied.
    """

    source: Source

    @cached_property
    def decoder(self) -> Decoder:
        """What the source says of its decoder."""
        return Decoder(self.source)

    @property
    def count(self) -> int:
        """Blocks of the whole decoder."""
        return len(self._parts[1])

    def first(self, depth: int) -> PreTrainedModel:
        """A model of its own on the meta device, with the first `depth` blocks of the decoder.

        Blocks outside the decoder, as of a vision tower, are left out: nothing in them is trained,
        so that all they hold is gone when the decoder begins.
        """
        shell, blocks = self._parts
        # In one go, or what they share, as the configuration, would be copied for each.
        model, own = copy.deepcopy((shell, blocks[:depth]))
        _decoder_list(model).extend(own)
        return model

    @cached_property
    def _parts(self) -> tuple[PreTrainedModel, list[nn.Module]]:
        """The model with all its lists of blocks empty, and the blocks of the decoder."""
        model = self.source.skeleton()
        model.set_attn_implementation(ATTENTION)
        model = model.to("meta").requires_grad_(False)
        for module in model.modules():
            # It would compare the length with one it knows, and here positions have no numbers.
            # Up to the length that the model was trained on it does nothing else than this.
            if getattr(module, "rope_type", None) == "dynamic":
                module.rope_type = "default"
        own = _decoder_list(model)
        blocks = list(own)
        del own[:]
        decoder = set(decoder_of(model).modules())
        for module in list(model.modules()):
            if isinstance(module, nn.ModuleList) and module not in decoder:
                del module[:]
        return model, blocks


def _decoder_list(model: PreTrainedModel) -> nn.ModuleList:
    return next(
        module for module in decoder_of(model).modules() if isinstance(module, nn.ModuleList)
    )
