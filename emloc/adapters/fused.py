"""PEFT's LoRA layers with one operation in place of base layer and adapter (see
`emloc.tensors.lean`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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
    aligned,
    refresh,
    stack,
)
from emloc.tensors.nn.factorized import Factorized, PackedFactorized

# Two, since both factors of a layer are needed at once.
Rooms = tuple[ScratchBuffer, ScratchBuffer]


def fuse(model: nn.Module) -> int:
    """Give every LoRA layer a forward of one operation, as long as all of them can have it.

    The adapter's parameters stay PEFT's, so that what is trained and saved is the same. What PEFT
    itself does in a forward pass (disabling, switching or merging adapters) is gone.

    Returns:
        Number of layers changed: all, or none where one of them computes something else (dropout,
        DoRA, several adapters) or has a base layer of another kind.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers or not all(_plain(layer) for layer in layers):
        return 0
    lows = []
    rooms = ScratchBuffer(), ScratchBuffer()
    for layer in layers:
        base, low = _halves(layer, rooms)
        layer.forward = partial(_forward, base, low)
        lows.append(low)
    refresh(lows)
    # Once per pass, before its first layer; the recomputation of a checkpoint finds them fresh.
    model.register_forward_pre_hook(lambda *_: refresh(lows))
    return len(layers)


def _plain(layer: Any) -> bool:
    name = layer.active_adapters[0]
    return (
        _base_of(layer.base_layer) is not None
        and list(layer.lora_A) == [name]
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
    )


def _forward(base: FrozenBase, low: LoraOperands, x: Tensor, *_: Any) -> Tensor:
    y: Tensor = FusedLora.apply(x, low.a, low.b, base, low)  # type: ignore[no-untyped-call]
    return y


def _halves(layer: Any, rooms: Rooms) -> tuple[FrozenBase, LoraOperands]:
    name = layer.active_adapters[0]
    lora = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    base = _base_of(layer.base_layer)
    assert base is not None  # or the layer were not plain
    return base(layer.base_layer, rooms, *lora)


def _low(like: Tensor, a: nn.Parameter, b: nn.Parameter, scale: float) -> LoraOperands:
    return LoraOperands(a, b, scale, like.new_empty(a.shape), like.new_empty(b.T.shape))


def _whole(base: nn.Linear, _: Rooms, *lora: Any) -> tuple[FrozenBase, LoraOperands]:
    return DenseBase(lambda: base.weight, base.bias), _low(base.weight, *lora)


def _whole_packed(base: PackedLayer, rooms: Rooms, *lora: Any) -> tuple[FrozenBase, LoraOperands]:
    matrix = base.matrix
    part = next(iter(matrix.parts.values()))
    low = _low(part.new_empty(0, dtype=matrix.dtype), *lora)

    def weight() -> Tensor:
        return matrix.dequantize(rooms[0].of(*matrix.shape, low.down))

    return DenseBase(weight, base.bias), low


def _stacked(
    base: Factorized, _: Rooms, a: nn.Parameter, b: nn.Parameter, scale: float
) -> tuple[FrozenBase, LoraOperands]:
    k, r = base.rank, a.shape[0]
    down, up = stack(base.v.data, r), stack(base.u.data.T, r)
    base.v.data, base.u.data = down[:k], up[:k].T  # the layer looks into the stack: nothing twice
    low = LoraOperands(a, b, scale, down[k : k + r], up[k : k + r])
    return FactorizedBase(k, lambda _: (down, up), base.bias), low


def _stacked_packed(
    base: PackedFactorized, rooms: Rooms, *lora: Any
) -> tuple[FrozenBase, LoraOperands]:
    v, ut, k = base.v, base.ut, base.rank
    low = _low(base.weight, *lora)
    height = aligned(k + len(low.down))

    def formed(room: ScratchBuffer, matrix: Packed, below: Tensor) -> Tensor:
        full = room.of(height, matrix.shape[1], below)
        matrix.dequantize(full[:k])
        full[k : k + len(below)] = below
        if height > k + len(below):
            full[k + len(below) :] = 0
        return full

    def matrices(low: LoraOperands) -> tuple[Tensor, Tensor]:
        return formed(rooms[0], v, low.down), formed(rooms[1], ut, low.up)

    return FactorizedBase(k, matrices, base.bias), low


# Of exactly these classes: another one's forward may do more than its weight says.
_BASES: dict[type, Callable[..., tuple[FrozenBase, LoraOperands]]] = {
    nn.Linear: _whole,
    Factorized: _stacked,
    PackedFactorized: _stacked_packed,
}


def _base_of(layer: nn.Module) -> Callable[..., tuple[FrozenBase, LoraOperands]] | None:
    """How the layer is fused; None if it cannot be. A packed one of any format is its matrix."""
    return _whole_packed if isinstance(layer, PackedLayer) else _BASES.get(type(layer))
