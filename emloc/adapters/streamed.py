"""The original model with an adapter on it, whose weights are read block by block."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.adapters import Adapter
from emloc.adapters.saved import read_adapter
from emloc.models.checkpoint.source import Source
from emloc.tensors.nn.surgery import replace_tensor

# PEFT keeps an adapted layer inside its own layer under this name.
_INNER = ".base_layer."


class AdaptedWeights:
    """Reads a source's weights and the adapter's into a model whose layers PEFT has wrapped.

    It has the methods of a `Source` that `emloc.calibration.blockwise` uses.
    """

    def __init__(self, source: Source, adapter_tensors: dict[str, Tensor]) -> None:
        self._source, self._adapter_tensors = source, adapter_tensors

    @property
    def buffers(self) -> list[str]:
        """Names of the source's buffers, which are read with the weights."""
        return self._source.buffers

    def fill(self, model: nn.Module, names: Iterable[str], device: torch.device) -> None:
        """Load named parameters and buffers of `model` to `device`; move all buffers there."""
        names = list(names)
        own = {name: self._adapter_tensors[name] for name in names if name in self._adapter_tensors}
        for name, tensor in own.items():
            replace_tensor(model, name, tensor.to(device))
        inner = {name.replace(_INNER, "."): name for name in names if name not in own}
        for name, tensor in self._source.read(list(inner), device):
            replace_tensor(model, inner[name], tensor)
        self._source.fill(model, [], device)  # moves the buffers


def load_unread(
    source: Source, adapter: Adapter, folder: Path
) -> tuple[PreTrainedModel, AdaptedWeights]:
    """Return the original model with the adapter saved in `folder`, and the reader of its weights.

    The parameters of the model are on the meta device until the reader fills them.
    """
    model = adapter.base(adapter.load(source.skeleton(), folder))
    saved = read_adapter(folder)
    tensors: dict[str, Tensor] = {}
    for layer, pair in saved.pairs.items():
        tensors[f"{layer}.lora_A.default.weight"] = pair.a
        tensors[f"{layer}.lora_B.default.weight"] = pair.b
    for layer, magnitude in saved.magnitudes.items():
        tensors[f"{layer}.lora_magnitude_vector.default.weight"] = magnitude
    return model, AdaptedWeights(source, tensors)
