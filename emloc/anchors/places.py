"""Places where the hidden states of an emulator are put back onto the original's.

Shapes: B rows of a batch, L positions, d the width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emloc.data.collate import IGNORE
from emloc.data.fixed_shapes import PREDICTING, REAL_TOKENS, predicting_mask
from emloc.errors import ConfigError

# Places of a model with at least as many blocks, if nothing says how many.
USUAL_PLACES = 8
# Returns the hidden states that replace those of a place, both (B, L, d).
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """Hidden states at the input or the output of a module, of all tokens or the predicting ones.

    A token predicts if the one behind it is an answer token; only these reach the loss.
    """

    module: str  # full name in the original model and in the emulator
    at_input: bool = False
    predicting_only: bool = False

    def attach(self, model: nn.Module, change: Change) -> RemovableHandle:
        """Register a hook on `model` that replaces the hidden states of this place."""
        module = model.get_submodule(self.module)
        if not self.at_input:
            return module.register_forward_hook(lambda _, __, output: _changed(output, change))

        def replace_input(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

        return module.register_forward_pre_hook(replace_input, with_kwargs=True)

    def tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """Return which positions of a batch have an offset, (B, L) bool; padding has none."""
        if not self.predicting_only:
            mask: Tensor | None = batch.get("attention_mask", batch.get(REAL_TOKENS))
            if mask is None:
                mask = torch.ones_like(batch["input_ids"])
            return mask.bool()
        if PREDICTING in batch:
            return predicting_mask(batch)
        labels = batch["labels"]
        is_predicting = labels[:, 1:] != IGNORE
        return torch.cat([is_predicting, is_predicting.new_zeros(len(labels), 1)], dim=1)

    def count(self, row: Any) -> int:
        """Return how many tokens of an encoded row have an offset, without a batch of it."""
        length: int = row.length
        # The first token of a text has no token before that predicts it.
        return length - max(row.answer_start, 1) if self.predicting_only else length


def _changed(output: Any, change: Change) -> Any:
    """Return the output of a block with other hidden states; some blocks return a tuple."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)


def usual_places(depth: int) -> int:
    """Return how many places a model with so many blocks has, if nothing says how many."""
    return min(USUAL_PLACES, depth)


def require_places(places: Any) -> None:
    """Check a number of places, or a list of indices of blocks, without a model.

    Raises:
        ConfigError: it is neither.
    """
    indices = [places] if isinstance(places, int) else places
    is_list = isinstance(indices, Sequence) and not isinstance(indices, str)
    least = 1 if isinstance(places, int) else 0
    if not is_list or any(type(one) is not int or one < least for one in indices):
        raise ConfigError(
            f"anchor.places={places} is neither a number of blocks, at least 1, nor a list of "
            f"their indices; set anchor.places={USUAL_PLACES}, or a list as in "
            "anchor.places=[3,7,11]"
        )


def spread(blocks: Sequence[str], places: int | Sequence[int]) -> list[str]:
    """Return the blocks behind which the emulator is put back, in order.

    Args:
        blocks: names of the decoder's blocks, in order.
        places: how many, spread evenly with the last one behind the last block; or the indices of
            blocks, to which the last block is added.

    Raises:
        ConfigError: there are fewer blocks, or `places` is neither; see `require_places`.
    """
    require_places(places)
    depth = len(blocks)
    if isinstance(places, int):
        if places > depth:
            raise ConfigError(
                f"anchor.places={places}: the model has only {depth} blocks; "
                f"set anchor.places={depth} or less"
            )
        return [blocks[round((index + 1) * depth / places) - 1] for index in range(places)]
    if behind := [index for index in places if index >= depth]:
        raise ConfigError(
            f"anchor.places={list(places)}: block {behind[0]} is behind the last block of the "
            f"model, which is {depth - 1}; set anchor.places to indices from 0 to {depth - 1}"
        )
    return [blocks[index] for index in sorted({*places, depth - 1})]
