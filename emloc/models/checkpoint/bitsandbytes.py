"""Dequantise weights that bitsandbytes stored in 8 or 4 bits, tensor by tensor.

transformers reads such weights packed, and dequantises only a whole model. bitsandbytes is imported
at the first such tensor, since its import takes long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer


class _Dequantize(ConversionOps):
    """Computes a weight from the tensors that it is stored as."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        """Return the weight under its name `weight`; plain tensors are returned unchanged."""
        if len(input_dict) == 1:
            return dict(input_dict)
        return {"weight": self.weight({name: _only(one) for name, one in input_dict.items()})}

    def weight(self, parts: dict[str, Tensor]) -> Tensor:
        """The weight; `parts` are its codes, under the name `weight`, and their companions."""
        raise NotImplementedError


class Dequantize4bit(_Dequantize):
    """Computes a weight from its packed codes and the tensors of its quantisation state."""

    def weight(self, parts: dict[str, Tensor]) -> Tensor:
        """The dequantised weight."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        codes = parts.pop("weight").flatten()
        quant_state = QuantState.from_dict(parts, device=codes.device)
        # One full block per row: for widths that are no multiple of a block, the CPU kernel of
        # bitsandbytes takes the scales of other blocks.
        shape, block = torch.Size(quant_state.shape), quant_state.blocksize
        blocks = -(-shape.numel() // block)
        codes = functional.pad(codes, (0, blocks * block // 2 - codes.numel()))
        quant_state.shape = torch.Size((blocks, block))
        rows: Tensor = dequantize_4bit(codes[:, None], quant_state)
        return rows.flatten()[: shape.numel()].reshape(shape)


class Dequantize8bit(_Dequantize):
    """Computes a weight from its 8-bit numbers and one scale per row."""

    def weight(self, parts: dict[str, Tensor]) -> Tensor:
        """The dequantised weight."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        weight: Tensor = int8_vectorwise_dequant(parts["weight"], parts["SCB"].float())
        return weight


class Dequantizer4bit(Bnb4BitHfQuantizer):
    """transformers' quantizer for 4 bits, which dequantises instead of reading packed weights."""

    def get_load_operations(self) -> dict[str, Any]:
        """Return the operation that dequantises a weight."""
        return {"dequantize": Dequantize4bit}


class Dequantizer8bit(Bnb8BitHfQuantizer):
    """transformers' quantizer for 8 bits, which dequantises instead of reading packed weights."""

    def get_load_operations(self) -> dict[str, Any]:
        """Return the operation that dequantises a weight."""
        return {"dequantize": Dequantize8bit}


def _only(tensors: Sequence[Tensor] | Tensor) -> Tensor:
    """The only tensor of a list, or the tensor itself."""
    return tensors if isinstance(tensors, Tensor) else tensors[0]
