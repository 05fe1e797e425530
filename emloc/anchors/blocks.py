"""Anchors behind blocks: the hidden states there are put back onto the original's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import nn
from transformers import PreTrainedModel

from emloc.anchors import Anchor
from emloc.anchors.places import USUAL_PLACES, Place, require_places, spread, usual_places
from emloc.config.values import Range
from emloc.runtime.keys import key_of


@dataclass(frozen=True, kw_only=True)
class Blocks(Anchor):
    """Places behind some of the decoder's blocks, the last block always among them.

    A model with a vision tower has one more place in front of the first block, where the features
    of the emulated tower are replaced by the original's.
    """

    # how many, spread evenly, or the indices of blocks, as in [3,7,11]; null: 8, or all of fewer
    places: Annotated[Any, Range(least=0, usual=8)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.places is not None:
            require_places(self.places)

    @property
    def offsets_key(self) -> dict[str, Any]:
        """Cache key of the offsets. Where 8 is refused, nothing else has the key of the default."""
        places = USUAL_PLACES if self.places is None else self.places
        return {**super().offsets_key, "places": key_of(places)}

    def find(self, model: PreTrainedModel, decoder_blocks: Sequence[str]) -> list[Place]:
        """Return the places behind blocks; see `Anchor.find`."""
        places = usual_places(len(decoder_blocks)) if self.places is None else self.places
        return places_behind(model, decoder_blocks, places)


def places_behind(
    model: PreTrainedModel, decoder_blocks: Sequence[str], places: int | Sequence[int]
) -> list[Place]:
    """Return the places behind blocks of a model; see `spread`.

    With a vision tower there is one more, in front of the first block.

    Raises:
        ConfigError: the model does not have them.
    """
    entry = [Place(decoder_blocks[0], at_input=True)] if _has_other_blocks(model) else []
    return entry + [Place(block) for block in spread(decoder_blocks, places)]


def _has_other_blocks(model: PreTrainedModel) -> bool:
    """Whether the model has layers in front of its decoder beside the token embedding."""
    decoder = {id(module) for module in model.get_decoder().modules()}
    ends = {id(model.get_output_embeddings())}
    return any(
        isinstance(module, nn.Linear) and id(module) not in decoder | ends
        for module in model.modules()
    )
