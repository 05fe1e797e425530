"""Anchors behind blocks: the hidden states there are put back onto the original's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import nn
from transformers import PreTrainedModel

from emloc.anchors import Anchor
from emloc.anchors.places import Place, spread
from emloc.config.values import Range
from emloc.errors import ConfigError
from emloc.runtime.keys import key_of


@dataclass(frozen=True, kw_only=True)
class Blocks(Anchor):
    """Places behind some of the decoder's blocks, the last block always among them.

    A model with a vision tower has one more place in front of the first block, where the features
    of the emulated tower are replaced by the original's.
    """

    # how many, spread evenly; or the indices of blocks, as in [3,7,11]
    places: Annotated[Any, Range(least=0, usual=8)]

    def __post_init__(self) -> None:
        super().__post_init__()
        indices = [self.places] if isinstance(self.places, int) else self.places
        is_list = isinstance(indices, Sequence) and not isinstance(indices, str)
        least = 1 if isinstance(self.places, int) else 0
        if not is_list or any(type(one) is not int or one < least for one in indices):
            raise ConfigError(
                f"anchor.places={self.places} is neither a number of blocks, at least 1, nor a "
                "list of their indices; set anchor.places=8, or a list as in anchor.places=[3,7,11]"
            )

    @property
    def offsets_key(self) -> dict[str, Any]:
        """Cache key of the offsets."""
        return {**super().offsets_key, "places": key_of(self.places)}

    def find(self, model: PreTrainedModel, decoder_blocks: Sequence[str]) -> list[Place]:
        """Return the places behind blocks; see `Anchor.find`."""
        entry = [Place(decoder_blocks[0], at_input=True)] if _has_other_blocks(model) else []
        return entry + [Place(block) for block in spread(decoder_blocks, self.places)]


def _has_other_blocks(model: PreTrainedModel) -> bool:
    """Whether the model has layers in front of its decoder beside the token embedding."""
    decoder = {id(module) for module in model.get_decoder().modules()}
    ends = {id(model.get_output_embeddings())}
    return any(
        isinstance(module, nn.Linear) and id(module) not in decoder | ends
        for module in model.modules()
    )
