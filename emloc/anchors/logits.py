"""Anchors at the logits: one place, in front of the output head, at answer tokens only.

The offset is the difference of the hidden states behind the final norm. The head is linear, so it
turns the offset into the difference of the logits, which takes far more memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from emloc.anchors import Anchor
from emloc.anchors.places import Place
from emloc.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Logits(Anchor):
    """One place at the input of the output head, with an offset for each answer token."""

    def find(self, model: PreTrainedModel, decoder_blocks: Sequence[str]) -> list[Place]:
        """Return the place in front of the head; see `Anchor.find`.

        Raises:
            ConfigError: the head is no linear layer, or the model caps its logits.
        """
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ConfigError(
                "anchor=logits: the model has no linear output head to put an offset in front of; "
                "set anchor=blocks"
            )
        caps = {
            name: value
            for name, value in model.config.get_text_config().to_dict().items()
            if "logit" in name and "cap" in name and value
        }
        for name, value in caps.items():
            raise ConfigError(
                f"anchor=logits: the model caps its logits ({name}={value}), so an offset in front "
                "of the head is no offset of the logits; set anchor=blocks"
            )
        name = next(name for name, module in model.named_modules() if module is head)
        return [Place(name, at_input=True, predicting_only=True)]
