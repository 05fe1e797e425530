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
from emloc.adapters.saved import PREFIX
from emloc.errors import ConfigError
from emloc.nn.nf4 import BLOCK, Nf4Linear
from emloc.settings import LoraSettings


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
            ConfigError: a layer in nf4 is one that PEFT reads wrongly on this device.
        """
        tuned = super().attach(model, lora, layers, whole)
        for name, layer in tuned.named_modules():
            if isinstance(layer, LoraLayer):
                weight = _weight(name.removeprefix(PREFIX), layer.get_base_layer())
                # PEFT rounds them to the model's dtype: the start would not be the model itself.
                norms = torch.linalg.vector_norm(weight.float(), dim=1)
                layer.lora_magnitude_vector["default"].weight = nn.Parameter(norms)
        return tuned

    def training(self, model: PeftModel, mixed: bool) -> AbstractContextManager[None]:
        """Inputs are float32, as in evaluation: what they are decides what norms are rounded to."""
        return nullcontext()


def _weight(name: str, layer: nn.Module) -> Tensor:
    if not isinstance(layer, Nf4Linear):
        return layer.get_parameter("weight")
    # PEFT has bitsandbytes form the weight, which it does wrongly there (see `emloc.nn.nf4`).
    if layer.weight.device.type == "cpu" and layer.in_features % BLOCK:
        raise ConfigError(
            f"adapter=dora needs the weight of {name}, and on a CPU bitsandbytes reads one of "
            f"4 bits wrongly unless its width, {layer.in_features}, is a multiple of {BLOCK}; set "
            "compression.bits=16"
        )
    return layer.matrix.dequantize()
