"""Weight-decomposed LoRA, by PEFT."""

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
    """`m (W + s B A) x / |W + s B A|`, norms by row; A and B as LoRA's, m the norms at the start.

    As in the paper, the norm is taken as a constant by the gradient. Trained by PEFT's own modules:
    it is more than two products.
    """

    nonlinear = "sets the norm of each row of the weight it is added to"
    needs_weight = "is made of the norms of a layer's weight"
    variant = MappingProxyType({"use_dora": True})

    def attach(
        self,
        model: PreTrainedModel,
        lora: LoraSettings,
        layers: Sequence[str],
        whole: Sequence[str] = (),
    ) -> PeftModel:
        """PEFT's own DoRA model, its magnitudes in float32.

        Raises:
            ConfigError: a layer is packed in a way that PEFT cannot read on this device.
        """
        chosen = set(layers)
        for name, layer in model.named_modules():
            if isinstance(layer, PackedLayer) and name in chosen:
                _refuse_unreadable(name, layer.matrix)
        tuned = super().attach(model, lora, layers, whole)
        for layer in tuned.modules():
            if isinstance(layer, LoraLayer):
                weight = _weight(layer.get_base_layer())
                # PEFT rounds them to the model's dtype: the start would not be the model itself.
                norms = torch.linalg.vector_norm(weight.float(), dim=1)
                layer.lora_magnitude_vector["default"].weight = nn.Parameter(norms)
        return tuned

    def training(self, model: PeftModel, mixed: bool) -> AbstractContextManager[None]:
        """Inputs are float32, as in evaluation: what they are decides what norms are rounded to."""
        return nullcontext()


def _weight(layer: nn.Module) -> Tensor:
    if isinstance(layer, PackedLayer):
        return layer.matrix.dequantize()
    return layer.get_parameter("weight")


def _refuse_unreadable(name: str, matrix: Packed) -> None:
    """Refuse a layer before PEFT reads its weight, or fails to."""
    device = next(iter(matrix.parts.values())).device
    if why := matrix.precision.unreadable(*matrix.shape, device):
        raise ConfigError(
            f"adapter=dora needs the weight of {name}, and {why}; set compression.bits={MODEL_BITS}"
        )
