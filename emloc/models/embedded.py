"""What a model with a vision tower hands to its decoder, so that the decoder can run by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emloc.models.decoder import decoder_of

# Name of the vectors of the tokens among the inputs of a model.
VECTORS = "inputs_embeds"
# Inputs of a decoder that a batch without images has as well.
PER_TOKEN = ("attention_mask", "position_ids")


class _DecoderReached(Exception):
    """Ends a forward pass where it enters the decoder."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.inputs = inputs


@torch.no_grad()
def decoder_inputs(model: Any, inner: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Run a model up to its decoder; return the vectors of all tokens, with mask and positions.

    Args:
        model: the model, perhaps inside an adapter.
        inner: the transformers model inside.
        inputs: of the model, such as ids and pixels.

    Raises:
        RuntimeError: the model has no decoder that reads vectors.
    """

    def stop(_: object, __: object, arguments: dict[str, Any]) -> None:
        raise _DecoderReached(arguments)

    handle = decoder_of(inner).register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        model(**inputs)
    except _DecoderReached as reached:
        arguments = reached.inputs
    else:
        raise RuntimeError("the model does not call its decoder")
    finally:
        handle.remove()
    vectors = arguments.get(VECTORS)
    if not isinstance(vectors, Tensor):
        raise RuntimeError("the decoder of the model reads no vectors")
    result = {VECTORS: vectors}
    for name in PER_TOKEN:
        value = inputs.get(name, arguments.get(name))
        if isinstance(value, Tensor):
            result[name] = value
    return result
