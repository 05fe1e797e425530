"""The vision tower of a model with its projector, and the model without them.

The language model of transformers asks the method `get_image_features` for what stands in the place
of image tokens. A model without its tower has another method there, which returns features that
were stored before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.data.stored_features import FeatureLayout
from emloc.errors import ConfigError

# Tokens of a vision tower, at most, for each image token of the language model, as in InternVL.
TOWER_TOKENS = 4
# What an output of `get_image_features` may hold; the language model reads the first two.
_OUTPUTS = (
    "pooler_output",
    "deepstack_features",
    "last_hidden_state",
    "hidden_states",
    "attentions",
)


@dataclass
class ImageFeatures:
    """What `get_image_features` hands to the language model."""

    pooler_output: Tensor | list[Tensor]
    # For each further level, one tensor (n, d) in a list.
    deepstack_features: list[list[Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class PassedFeatures:
    """The method `get_image_features` of a model without its tower: the pixels are the features."""

    layout: FeatureLayout

    def __call__(self, pixel_values: Tensor, *_: Any, **__: Any) -> ImageFeatures:
        """Return the features that `packed_features` has put into one tensor."""
        first, *others = pixel_values.chunk(self.layout.levels, -1)
        return ImageFeatures([first] if self.layout.is_list else first, [[one] for one in others])


class LeftOut(nn.Module):
    """A module without parameters in the place of one that is never called."""


def feature_owner(model: PreTrainedModel) -> Any:
    """Return the innermost module with a method `get_image_features`; None if there is none."""
    owners = [module for module in model.modules() if hasattr(module, "get_image_features")]
    return owners[-1] if owners else None


def tower_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the outermost modules that compute features of images.

    They are all modules beside decoder, token embedding and output head. A model that computes no
    such features has none.
    """
    owner = feature_owner(model)
    if owner is None:
        return []
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    others = {id(module) for part in parts if part is not None for module in part.modules()}

    def outermost(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            if id(child) in others:
                continue
            if any(id(inner) in others for inner in child.modules()):
                yield from outermost(child, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    start = next(name for name, module in model.named_modules() if module is owner)
    return list(outermost(owner, f"{start}." if start else ""))


def leave_out_tower(model: PreTrainedModel, layout: FeatureLayout) -> None:
    """Take the tower out of a model, which then reads features in place of pixels."""
    for name in tower_modules(model):
        model.set_submodule(name, LeftOut())
    feature_owner(model).get_image_features = PassedFeatures(layout)


def packed_features(output: Any) -> tuple[Tensor, bool, int]:
    """Return an output of `get_image_features` as one tensor (..., levels x d).

    Returns:
        The tensor, whether the output was a list of tensors, and the number of levels.

    Raises:
        ConfigError: the output holds anything else that a language model may read.
    """
    values = vars(output) if not isinstance(output, Tensor | tuple | list) else {}
    unknown = [name for name, one in values.items() if name not in _OUTPUTS and one is not None]
    pooled: Any = values.get("pooler_output")
    is_list = isinstance(pooled, list | tuple)
    if unknown or not (is_list or isinstance(pooled, Tensor)):
        raise ConfigError(
            f"train.features=stored: what the vision tower hands to the language model cannot be "
            f"stored ({', '.join(unknown) or type(output).__name__}); set train.features=computed"
        )
    first = torch.cat(list(pooled)) if is_list else pooled
    deep = [
        torch.cat(list(one)) if isinstance(one, list | tuple) else one
        for one in values.get("deepstack_features") or ()
    ]
    assert isinstance(first, Tensor)
    return torch.cat([first, *deep], -1), is_list, 1 + len(deep)
