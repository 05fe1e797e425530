"""Names and conversions of tensors, by the table of transformers that `from_pretrained` uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from emloc.models.checkpoint.files import StoredTensor
from emloc.models.checkpoint.origins import Converted, Direct, Layout, Origin


def layout_of(model: PreTrainedModel, quantizer: Any = None) -> Layout:
    """The layout of checkpoints that `from_pretrained` reads for this class of models.

    The names in the files may be those of earlier releases, or lack the base model's prefix, as in
    a checkpoint that was saved without a head. Tensors may be split, fused or quantised.

    Args:
        model: on the meta device, with all its parameters.
        quantizer: transformers' quantizer that dequantises the tensors; None: they are not
            quantised.
    """
    state = model.state_dict()

    def layout(tensors: Sequence[StoredTensor]) -> dict[str, Origin]:
        """Parameter name -> origin."""
        # Some renamings remember earlier names, so each checkpoint needs a table of its own.
        table = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        renamings = [item for item in table if isinstance(item, WeightRenaming)]
        converters = [item for item in table if isinstance(item, WeightConverter)]
        by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
        direct: dict[str, Origin] = {}
        inputs: dict[str, list[tuple[str, StoredTensor]]] = {}
        prefix = model.base_model_prefix
        for tensor in sorted(tensors, key=lambda item: dot_natural_key(item.name)):
            name, pattern = rename_source_key(tensor.name, renamings, converters, prefix, state)
            if name not in state and tensor.name in state:
                name, pattern = rename_source_key(tensor.name, [], [], prefix, state)
            if pattern is None:
                direct.setdefault(name, Direct(tensor))
            else:
                inputs.setdefault(name, []).append((pattern, tensor))
        for name, members in inputs.items():
            converter = by_pattern[members[0][0]]
            if len(members) == 1 and _only_dequantises(converter):
                direct.setdefault(name, Direct(members[0][1]))  # there is no scale
        return direct | {
            target: origin
            for name, members in inputs.items()
            if name not in direct
            for origin in [_converted(by_pattern[members[0][0]], name, members, model)]
            for target in origin.targets
        }

    return layout


def _only_dequantises(converter: WeightConverter) -> bool:
    """Whether the only operation of a conversion belongs to a quantizer."""
    return all(hasattr(operation, "hf_quantizer") for operation in converter.operations)


def _converted(
    converter: WeightConverter,
    name: str,
    members: list[tuple[str, StoredTensor]],
    model: PreTrainedModel,
) -> Converted:
    """The conversion of the stored tensors `members` (input of the converter, tensor)."""
    patterns, tensors = zip(*members, strict=True)
    return Converted(converter, name, patterns, tensors, model)
