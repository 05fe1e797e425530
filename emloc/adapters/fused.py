"""Replace PEFT's LoRA layers by fused ones: base layers and their LoRAs in one autograd function.

See `emloc.tensors.lean`. Layers that read the same input are one function together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from emloc.adapters.shared_input import PendingOutputs, SharedInput
from emloc.models.shared_inputs import names_by_input
from emloc.precision import Packed, PackedLayer
from emloc.tensors.lean.layers import (
    DenseLayer,
    DenseLayers,
    FactorizedLayer,
    FactorizedLayers,
    FrozenLayers,
    JointLayers,
    LoraOperands,
    ScratchBuffer,
    aligned_height,
    split,
    update_operands,
    with_spare_rows,
)
from emloc.tensors.nn.factorized import Factorized, PackedFactorized


def fuse(model: nn.Module) -> int:
    """Replace the forward of every LoRA layer by a fused one, if all of them can be fused.

    PEFT keeps owning the adapter's parameters, so training and saving are unchanged. PEFT's own
    features in the forward pass (disabling, switching or merging adapters) are lost.

    Returns:
        Number of fused layers: all LoRA layers, or 0 if any of them uses dropout, DoRA or several
        adapters, or has an unsupported base layer.
    """
    layers = {name: one for name, one in model.named_modules() if isinstance(one, LoraLayer)}
    if not layers or not all(_can_fuse(layer) for layer in layers.values()):
        return 0
    operands: list[LoraOperands] = []
    scratch, pending = ScratchBuffer(), PendingOutputs()
    for names in names_by_input(layers):
        group = [layers[name] for name in names]
        for members in _alike(group):
            frozen = _frozen_layers(members, scratch)
            shared = SharedInput(frozen, pending)
            for index, layer in enumerate(members):
                layer.forward = partial(shared.forward, index)
            operands += frozen.loras
    update_operands(operands)

    def before_pass(*_: Any) -> None:
        pending.clear()
        update_operands(operands)

    # Once per forward pass of the model: a checkpointed layer that is recomputed reads the same
    # values. The hooks are on the model inside: the recording of anchors does not call PEFT's.
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    inner.register_forward_pre_hook(before_pass)
    inner.register_forward_hook(lambda *_: pending.clear(), always_call=True)
    return len(layers)


def _alike(group: Sequence[Any]) -> list[list[Any]]:
    """Split LoRA layers that read one input into those that are computed together.

    These are all of them if they are of one kind, and have one v each or all the same; else those
    with the same v.
    """
    by_v: dict[Any, list[Any]] = {}
    for index, layer in enumerate(group):
        by_v.setdefault(getattr(layer.base_layer, "v_id", index), []).append(layer)
    if len(by_v) == len(group):
        return _of_one_kind(group)
    return [part for same in by_v.values() for part in _of_one_kind(same)]


def _of_one_kind(group: Sequence[Any]) -> list[list[Any]]:
    """The layers together if all are of one kind, else each alone."""
    is_alike = len({_kind(layer) for layer in group}) == 1
    return [[*group]] if is_alike else [[layer] for layer in group]


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


# The parameters a and b of a LoRA, and its scale.
Lora = tuple[nn.Parameter, nn.Parameter, float]


def _lora(layer: Any) -> Lora:
    """The parameters and the scale of one of PEFT's LoRA layers."""
    name = layer.active_adapters[0]
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def _kind(layer: Any) -> tuple[Any, ...]:
    """What layers must have in common to be computed together."""
    a, b, scale = _lora(layer)
    like = _like(layer.base_layer)
    fusion = _fusion_for(layer.base_layer)
    return fusion, a.shape[1], scale, a.dtype, b.dtype, like.dtype, like.device


def _like(base: Any) -> Tensor:
    """An empty tensor in the dtype of the layer's matrices, on their device."""
    if isinstance(base, PackedLayer):
        matrix = base.matrix
        return next(iter(matrix.parts.values())).new_empty(0, dtype=matrix.dtype)
    return torch.empty(0, dtype=base.weight.dtype, device=base.weight.device)


def _frozen_layers(layers: Sequence[Any], scratch: ScratchBuffer) -> FrozenLayers:
    """The frozen bases of PEFT's LoRA layers of one kind, with the operands of their LoRAs."""
    fusion = _fusion_for(layers[0].base_layer)
    assert fusion is not None  # `_can_fuse` was true for these layers
    return fusion([layer.base_layer for layer in layers], [_lora(one) for one in layers], scratch)


def _fuse_dense(
    bases: Sequence[Any], loras: Sequence[Lora], scratch: ScratchBuffer
) -> FrozenLayers:
    """Plain or packed linear layers; a packed weight is dequantised per product."""
    like = _like(bases[0])
    # In the memory layout of b, so that one operation copies all b.
    ups = [like.new_empty(b.shape).t() for _, b, _ in loras]
    down, operands = _operands(like, loras, ups)
    layers = [
        DenseLayer(_weight(base, scratch, like), base.bias, lora)
        for base, lora in zip(bases, operands, strict=True)
    ]
    return DenseLayers(layers, down)


def _operands(
    like: Tensor, loras: Sequence[Lora], ups: Sequence[Tensor]
) -> tuple[Tensor, list[LoraOperands]]:
    """The stacked matrices s a (R, n) of several LoRAs, still empty, and the LoRAs' operands."""
    ranks = [len(a) for a, _, _ in loras]
    down = like.new_empty(sum(ranks), loras[0][0].shape[1])
    return down, [
        LoraOperands(*lora, a_rows, up)
        for lora, a_rows, up in zip(loras, split(down, ranks, 0), ups, strict=True)
    ]


def _weight(base: Any, scratch: ScratchBuffer, like: Tensor) -> Callable[[], Tensor]:
    """A function that returns the weight (m, n) of a plain or packed linear layer."""
    if not isinstance(base, PackedLayer):
        return lambda: base.weight
    matrix = base.matrix
    return lambda: matrix.dequantize(scratch.view(*matrix.shape, like))


def _fuse_factorized(
    bases: Sequence[Factorized], loras: Sequence[Lora], _: ScratchBuffer
) -> FrozenLayers:
    """Factorised layers, whose factors become views of the stacked matrices: one copy in memory."""
    if _have_one_v(bases):
        return _fuse_joint(bases, loras)
    spare = [len(a) for a, _, _ in loras]
    down = with_spare_rows([base.v.data for base in bases], spare)
    layers, start = [], 0
    for base, lora, rank in zip(bases, loras, spare, strict=True):
        k = base.rank
        up = with_spare_rows([base.u.data.T], [rank])
        rows = down[start : start + len(up)]
        base.v.data, base.u.data = rows[:k], up[:k].T
        operands = LoraOperands(*lora, rows[k : k + rank], up[k : k + rank])
        layers.append(FactorizedLayer(k, partial(_same, up), base.bias, operands))
        start += len(up)
    return FactorizedLayers(layers, partial(_same, down), down.device)


def _have_one_v(bases: Sequence[Factorized | PackedFactorized]) -> bool:
    """Whether several layers have the same v."""
    return len(bases) > 1 and len({base.v_id for base in bases}) == 1


def _fuse_joint(bases: Sequence[Factorized], loras: Sequence[Lora]) -> FrozenLayers:
    """Factorised layers with one v; the factors become views of the stacked matrices."""
    k, total = bases[0].rank, sum(len(a) for a, _, _ in loras)
    down = with_spare_rows([bases[0].v.data], [total])
    bases[0].v.data = down[:k]
    ups, operands, start = [], [], k
    for base, lora in zip(bases, loras, strict=True):
        rows = slice(start, start + len(lora[0]))
        up = with_spare_rows([base.u.data.T], [total])
        base.u.data = up[:k].T
        ups.append(partial(_same, up))
        operands.append(LoraOperands(*lora, down[rows], up[rows]))
        start = rows.stop
    return JointLayers(ups, [base.bias for base in bases], operands, partial(_same, down), k)


def _same(matrix: Tensor) -> Tensor:
    """The matrix; a function of `FactorizedLayers` returns it where nothing is packed."""
    return matrix


def _fuse_packed_factorized(
    bases: Sequence[PackedFactorized], loras: Sequence[Lora], scratch: ScratchBuffer
) -> FrozenLayers:
    """Packed factorised layers; their matrices are dequantised and stacked anew per product."""
    if _have_one_v(bases):
        return _fuse_packed_joint(bases, loras, scratch)
    like = _like(bases[0])
    down, operands = _operands(like, loras, [like.new_empty(b.T.shape) for _, b, _ in loras])
    layers = [
        FactorizedLayer(
            base.rank, partial(_stacked, scratch, [base.ut], [lora.up]), base.bias, lora
        )
        for base, lora in zip(bases, operands, strict=True)
    ]
    downs = partial(_stacked, scratch, [base.v for base in bases], [lora.down for lora in operands])
    return FactorizedLayers(layers, downs, down.device)


def _fuse_packed_joint(
    bases: Sequence[PackedFactorized], loras: Sequence[Lora], scratch: ScratchBuffer
) -> FrozenLayers:
    """Packed factorised layers with one v; see `_fuse_joint`."""
    like, total = _like(bases[0]), sum(len(a) for a, _, _ in loras)
    down = like.new_empty(total, bases[0].in_features)
    ups, operands, start = [], [], 0
    for base, lora in zip(bases, loras, strict=True):
        rows = slice(start, start + len(lora[0]))
        extra = like.new_zeros(total, base.out_features)
        operands.append(LoraOperands(*lora, down[rows], extra[rows]))
        ups.append(partial(_stacked, scratch, [base.ut], [extra]))
        start = rows.stop
    downs = partial(_stacked, scratch, [bases[0].v], [down])
    return JointLayers(ups, [base.bias for base in bases], operands, downs, bases[0].rank)


def _stacked(scratch: ScratchBuffer, factors: Sequence[Packed], extra: Sequence[Tensor]) -> Tensor:
    """Dequantise factors (k, c) below each other, each with its extra rows and rows of zeros."""
    pairs = list(zip(factors, extra, strict=True))
    heights = [aligned_height(factor.shape[0] + len(rows)) for factor, rows in pairs]
    matrix = scratch.view(sum(heights), factors[0].shape[1], extra[0])
    for block, (factor, rows) in zip(split(matrix, heights, 0), pairs, strict=True):
        k = factor.shape[0]
        factor.dequantize(block[:k])
        block[k : k + len(rows)] = rows
        if len(block) > k + len(rows):
            block[k + len(rows) :].zero_()
    return matrix


# Exactly these classes: the forward of a subclass may do more than multiply by its weight.
Fusion = Callable[[Sequence[Any], Sequence[Lora], ScratchBuffer], FrozenLayers]
_FUSIONS: dict[type, Fusion] = {
    nn.Linear: _fuse_dense,
    Factorized: _fuse_factorized,
    PackedFactorized: _fuse_packed_factorized,
}


def _fusion_for(layer: nn.Module) -> Fusion | None:
    """The function that fuses this kind of base layer with a LoRA; None if none can.

    All packed linear layers share one function, whatever their format.
    """
    return _fuse_dense if isinstance(layer, PackedLayer) else _FUSIONS.get(type(layer))
