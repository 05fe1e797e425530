"""Layers that read the same input are computed together, when the first of them is called.

A model calls its layers one after another. The call of one layer computes the outputs of all
layers of its group. Each further layer of the group returns its output if it is called with the
same tensor. With another tensor, the group is computed again, so the results are right for any
model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emloc.tensors.lean.layers import FrozenLayers, FusedLora


class PendingOutputs:
    """Outputs of one group of layers that wait for the calls of their layers.

    All groups of a model share one object, so that at most one group's outputs are in memory. The
    call of any other fused layer removes them, and so do the end of a pass and the backward pass.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._outputs: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Remove all outputs."""
        self._key, self._outputs = (), {}

    def put(self, layers: FrozenLayers, x: Tensor, outputs: dict[int, Tensor]) -> None:
        """Replace the outputs by those of `layers` for the input x, by the layers' indices."""
        self.clear()
        if outputs:
            self._key, self._outputs = _key(layers, x), outputs

    def take(self, layers: FrozenLayers, index: int, x: Tensor) -> Tensor | None:
        """Remove and return the output of one of `layers` for the input x, if there is one."""
        if index not in self._outputs or not _is_same(self._key, _key(layers, x)):
            return None
        output = self._outputs.pop(index)
        if not self._outputs:
            self.clear()
        return output


class SharedInput:
    """Layers that read the same input, and share the outputs of one call.

    Args:
        layers: the layers with their LoRAs.
        pending: shared by all fused layers of the model.
    """

    def __init__(self, layers: FrozenLayers, pending: PendingOutputs) -> None:
        self.layers, self._pending = layers, pending
        self._parameters = [lora.a for lora in layers.loras] + [lora.b for lora in layers.loras]

    def forward(self, index: int, x: Tensor, *_: Any) -> Tensor:
        """Output (..., m) of the layer number `index` for the input x (..., n)."""
        output = self._pending.take(self.layers, index, x)
        if output is not None:
            return output
        self._pending.clear()  # before new outputs need memory
        outputs = FusedLora.apply(  # type: ignore[no-untyped-call]
            x, self.layers, self._pending.clear, *self._parameters
        )
        others = {i: one for i, one in enumerate(outputs) if i != index}
        self._pending.put(self.layers, x, others)
        return outputs[index]


def _key(layers: FrozenLayers, x: Tensor) -> tuple[Any, ...]:
    """What two calls must have in common to share outputs.

    The version changes if the tensor is changed in place; tensors of inference mode have none.
    """
    version = None if x.is_inference() else x._version
    return layers, x, version, torch.is_grad_enabled()


def _is_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two keys consist of the same objects and equal numbers."""
    return all(a is b for a, b in zip(one[:2], other[:2], strict=True)) and one[2:] == other[2:]
