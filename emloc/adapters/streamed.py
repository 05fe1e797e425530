"""The original model with an adapter on it, whose weights are read block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    def fill(
        self,
        model: nn.Module,
        names: Iterable[str],
        device: torch.device,
        ahead: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Load named parameters and buffers of `model` to `device`; move all buffers there.

        Tensors of the source in `ahead` were read by `read_ahead` and are only copied.
        """
        names = list(names)
        for name in names:
            if name in self._adapter_tensors:
                replace_tensor(model, name, self._adapter_tensors[name].to(device))
        inner = self._source_names(names)
        for name, tensor in self._source.read(list(inner), device, ahead):
            replace_tensor(model, inner[name], tensor)
        self._source.fill(model, [], device)  # moves the buffers

    def read_ahead(self, names: Sequence[str], *, pinned: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in the source, tensor in host memory), for `ahead` of `fill`."""
        return self._source.read_ahead(list(self._source_names(names)), pinned=pinned)

    def _source_names(self, names: Iterable[str]) -> dict[str, str]:
        """Name of a tensor in the source -> its name in the model that PEFT has wrapped."""
        others = [name for name in names if name not in self._adapter_tensors]
        return {name.replace(_INNER, "."): name for name in others}


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
