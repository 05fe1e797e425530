"""Replace PEFT's LoRA layers by fused ones: base layer and LoRA in one autograd function.

See `emloc.tensors.lean`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from emloc.precision import Packed, PackedLayer
from emloc.tensors.lean.layers import (
    DenseBase,
    FactorizedBase,
    FrozenBase,
    FusedLora,
    LoraOperands,
    ScratchBuffer,
    aligned_height,
    update_operands,
    with_spare_rows,
)
from emloc.tensors.nn.factorized import Factorized, PackedFactorized

# Two buffers, since a packed factorised layer needs both dequantised factors at once.
ScratchPair = tuple[ScratchBuffer, ScratchBuffer]


def fuse(model: nn.Module) -> int:
    """Replace the forward of every LoRA layer by a fused one, if all of them can be fused.

    PEFT keeps owning the adapter's parameters, so training and saving are unchanged. PEFT's own
    features in the forward pass (disabling, switching or merging adapters) are lost.

    Returns:
        Number of fused layers: all LoRA layers, or 0 if any of them uses dropout, DoRA or several
        adapters, or has an unsupported base layer.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers or not all(_can_fuse(layer) for layer in layers):
        return 0
    operands = []
    scratch = ScratchBuffer(), ScratchBuffer()
    for layer in layers:
        base, lora = _split(layer, scratch)
        layer.forward = partial(_forward, base, lora)
        operands.append(lora)
    update_operands(operands)
    # Once per forward pass of the model: a checkpointed layer that is recomputed reads the same
    # values. The hook is on the model inside, which the recording of anchors calls without PEFT's.
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    inner.register_forward_pre_hook(lambda *_: update_operands(operands))
    return len(layers)


def _can_fuse(layer: Any) -> bool:
    """Whether a LoRA layer has one plain adapter, and a base layer that can be fused."""
    name = layer.active_adapters[0]
    return (
        _fusion_for(layer.base_layer) is not None
        and list(layer.lora_A) == [name]
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
    )


def _forward(base: FrozenBase, lora: LoraOperands, x: Tensor, *_: Any) -> Tensor:
    """Output (..., m) of a fused layer for the input x (..., n)."""
    y: Tensor = FusedLora.apply(x, lora.a, lora.b, base, lora)  # type: ignore[no-untyped-call]
    return y


def _split(layer: Any, scratch: ScratchPair) -> tuple[FrozenBase, LoraOperands]:
    """Split one of PEFT's LoRA layers into its frozen base and its LoRA operands."""
    name = layer.active_adapters[0]
    lora = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    fusion = _fusion_for(layer.base_layer)
    assert fusion is not None  # `_can_fuse` was true for this layer
    return fusion(layer.base_layer, scratch, *lora)


def _operands(like: Tensor, a: nn.Parameter, b: nn.Parameter, scale: float) -> LoraOperands:
    """LoRA operands with empty copies of a and b^T in the dtype and on the device of `like`."""
    return LoraOperands(a, b, scale, like.new_empty(a.shape), like.new_empty(b.T.shape))


def _fuse_dense(base: nn.Linear, _: ScratchPair, *lora: Any) -> tuple[FrozenBase, LoraOperands]:
    """Frozen base and LoRA operands of a plain linear layer."""
    return DenseBase(lambda: base.weight, base.bias), _operands(base.weight, *lora)


def _fuse_packed(
    base: PackedLayer, scratch: ScratchPair, *lora: Any
) -> tuple[FrozenBase, LoraOperands]:
    """Frozen base and LoRA operands of a packed linear; its weight is dequantised per product."""
    matrix = base.matrix
    part = next(iter(matrix.parts.values()))
    operands = _operands(part.new_empty(0, dtype=matrix.dtype), *lora)

    def weight() -> Tensor:
        return matrix.dequantize(scratch[0].view(*matrix.shape, operands.down))

    return DenseBase(weight, base.bias), operands


def _fuse_factorized(
    base: Factorized, _: ScratchPair, a: nn.Parameter, b: nn.Parameter, scale: float
) -> tuple[FrozenBase, LoraOperands]:
    """Frozen base and LoRA operands of a factorised layer, all views of two stacked matrices."""
    k, r = base.rank, a.shape[0]
    down, up = with_spare_rows(base.v.data, r), with_spare_rows(base.u.data.T, r)
    # The layer's factors become views of the stacked matrices, so memory holds them once.
    base.v.data, base.u.data = down[:k], up[:k].T
    operands = LoraOperands(a, b, scale, down[k : k + r], up[k : k + r])
    return FactorizedBase(k, lambda _: (down, up), base.bias), operands


def _fuse_packed_factorized(
    base: PackedFactorized, scratch: ScratchPair, *lora: Any
) -> tuple[FrozenBase, LoraOperands]:
    """Frozen base and LoRA operands of a packed factorised layer, stacked anew per product."""
    v, ut, k = base.v, base.ut, base.rank
    operands = _operands(base.weight, *lora)
    height = aligned_height(k + len(operands.down))

    def stacked(buffer: ScratchBuffer, factor: Packed, lora_rows: Tensor) -> Tensor:
        full = buffer.view(height, factor.shape[1], lora_rows)
        factor.dequantize(full[:k])
        full[k : k + len(lora_rows)] = lora_rows
        if height > k + len(lora_rows):
            full[k + len(lora_rows) :] = 0
        return full

    def matrices(lora: LoraOperands) -> tuple[Tensor, Tensor]:
        return stacked(scratch[0], v, lora.down), stacked(scratch[1], ut, lora.up)

    return FactorizedBase(k, matrices, base.bias), operands


# Exactly these classes: the forward of a subclass may do more than multiply by its weight.
_FUSIONS: dict[type, Callable[..., tuple[FrozenBase, LoraOperands]]] = {
    nn.Linear: _fuse_dense,
    Factorized: _fuse_factorized,
    PackedFactorized: _fuse_packed_factorized,
}


def _fusion_for(layer: nn.Module) -> Callable[..., tuple[FrozenBase, LoraOperands]] | None:
    """The function that fuses this kind of base layer with a LoRA; None if none can.

    All packed linear layers share one function, whatever their format.
    """
    return _fuse_packed if isinstance(layer, PackedLayer) else _FUSIONS.get(type(layer))
