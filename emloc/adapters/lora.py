"""Plain LoRA, by PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from transformers import PreTrainedModel

from emloc.adapters import Adapter
from emloc.adapters.fused import fuse
from emloc.settings import LoraSettings


@dataclass(frozen=True, kw_only=True)
class Lora(Adapter):
    """`W x + (alpha / rank) B A x` on every targeted linear; A random, B zero at the start."""

    trains = True
    variant: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # what PEFT is told beside the size

    def attach(self, model: PreTrainedModel, lora: LoraSettings, targets: str) -> PeftModel:
        """PEFT's own LoRA model; factorised layers are linears to it like any other."""
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            bias="none",
            task_type="CAUSAL_LM",
            **self.variant,
        )
        return get_peft_model(model, config)

    def fuse(self, model: PeftModel) -> bool:
        """Not with dropout, which is between the two."""
        return fuse(model) > 0

    def training(self, model: PeftModel, mixed: bool) -> AbstractContextManager[None]:
        """Leave the casting of inputs to autocast, where it is on.

        PEFT would first make a float32 copy of each input and keep it for the backward pass, only
        for autocast to round it back to what it was.
        """
        context: AbstractContextManager[None] = disable_input_dtype_casting(model, active=mixed)
        return context

    def save(self, model: PeftModel, folder: Path, base: str) -> None:
        """Write adapter_model.safetensors and adapter_config.json."""
        # PEFT knows the path the model was loaded from, which is a cache folder of this machine.
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(folder, save_embedding_layers=False)
