"""Weight-decomposed LoRA (DoRA), as implemented by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.adapters.lora import Lora
from emloc.config.settings import MODEL_BITS, LoraSettings
from emloc.errors import ConfigError
from emloc.precision import Packed, PackedLayer


@dataclass(frozen=True, kw_only=True)
class Dora(Lora):
    """DoRA: `m (W + s B A) x / |W + s B A|`, with one norm and one trained magnitude m per row.

    A and B start as in LoRA; m starts as the row norms of W. As in the paper, the gradient treats
    the norm as a constant. The layers are never fused, since DoRA is more than two matrix products.
    """

    nonlinear = "sets the norm of each row of the weight it is added to"
    needs_weight = "computes the row norms of each layer's weight"
    starts_at_zero = False  # m has the row norms of the emulator, which differ from the original's
    variant = MappingProxyType({"use_dora": True})

    def attach(
        self,
        model: PreTrainedModel,
        lora: LoraSettings,
        layers: Sequence[str],
        modules_to_save: Sequence[str] = (),
    ) -> PeftModel:
        """Return PEFT's DoRA model, with its magnitudes in float32.

        Raises:
            ConfigError: PEFT cannot read the packed weight of a layer on this device.
        """
        adapted = set(layers)
        for name, layer in model.named_modules():
            if isinstance(layer, PackedLayer) and name in adapted:
                _require_readable(name, layer.matrix)
        tuned = super().attach(model, lora, layers, modules_to_save)
        for layer in tuned.modules():
            if isinstance(layer, LoraLayer):
                weight = _weight(layer.get_base_layer())
                # PEFT rounds the magnitudes to the model's dtype; the untrained DoRA would then
                # change the model's outputs.
                norms = torch.linalg.vector_norm(weight.float(), dim=1)
                layer.lora_magnitude_vector["default"].weight = nn.Parameter(norms)
        return tuned

    def training(self, model: PeftModel, mixed: bool) -> AbstractContextManager[None]:
        """Return an empty context: norms need PEFT's float32 inputs, as in evaluation."""
        return nullcontext()


def _weight(layer: nn.Module) -> Tensor:
    """Weight (out, in) of a linear layer, dequantised if it is packed."""
    if isinstance(layer, PackedLayer):
        return layer.matrix.dequantize()
    return layer.get_parameter("weight")


def _require_readable(name: str, matrix: Packed) -> None:
    """Raise ConfigError if PEFT cannot read the packed weight of the layer `name`."""
    device = next(iter(matrix.parts.values())).device
    if reason := matrix.precision.unreadable_reason(*matrix.shape, device):
        raise ConfigError(
            f"adapter=dora needs the weight of {name}, and {reason}; "
            f"set compression.bits={MODEL_BITS}"
        )
