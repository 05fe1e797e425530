"""Arithmetic of linear layers."""

from __future__ import annotations

from collections.abc import Hashable
from math import prod

from torch import nn

from emloc.precision import PackedLayer
from emloc.tensors.nn.factorized import Factorized, PackedFactorized

# PEFT's names of the matrices of a LoRA begin with this.
_LORA = "lora_"


def linear_operations(module: nn.Module) -> int:
    """Multiplications that one token takes in the linear layers inside `module`, for its forward.

    A layer (m, n) takes m n of them, a factorised layer k (m + n), in any format. Layers with one v
    multiply by it once. Left out are the r (m + n) of a LoRA, biases, norms, and the products of
    queries, keys and values.
    """
    counted: set[Hashable] = set()  # factors v
    return sum(
        _layer_operations(layer, counted)
        for name, layer in module.named_modules()
        if not any(part.startswith(_LORA) for part in name.split("."))
    )


def _layer_operations(layer: nn.Module, counted: set[Hashable]) -> int:
    """Multiplications of one layer for one token; 0 if it is no linear layer.

    `counted` has the factors v that count already.
    """
    if isinstance(layer, Factorized | PackedFactorized):
        is_new = layer.v_id not in counted
        counted.add(layer.v_id)
        return layer.rank * (layer.out_features + (layer.in_features if is_new else 0))
    if isinstance(layer, PackedLayer):
        return prod(layer.matrix.shape)
    return layer.in_features * layer.out_features if isinstance(layer, nn.Linear) else 0
