"""Plain LoRA, by PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from emloc.adapters import Adapter
from emloc.adapters.fold import merge
from emloc.adapters.fused import fuse
from emloc.adapters.saved import PREFIX, read_adapter
from emloc.config.settings import LoraSettings
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source


@dataclass(frozen=True, kw_only=True)
class Lora(Adapter):
    """`W x + (alpha / rank) B A x` on every targeted linear; A random, B zero at the start."""

    variant: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # what PEFT is told beside the size

    def attach(
        self,
        model: PreTrainedModel,
        lora: LoraSettings,
        layers: Sequence[str],
        whole: Sequence[str] = (),
    ) -> PeftModel:
        """PEFT's own LoRA model; factorised layers are linears to it like any other.

        Raises:
            ConfigError: PEFT would adapt other layers than these.
        """
        wanted = [layer for layer in layers if not _inside(layer, whole)]
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=wanted,
            exclude_modules=_namesakes(model, wanted) or None,
            modules_to_save=list(whole) or None,
            bias="none",
            task_type="CAUSAL_LM" if model.can_generate() else None,
            **self.variant,
        )
        tuned = get_peft_model(model, config)
        if other := sorted(set(wanted).symmetric_difference(_adapted(tuned))):
            raise ConfigError(
                f"PEFT cannot adapt exactly the chosen layers: {other[0]} differs; "
                "set model.lora_targets"
            )
        return tuned

    def load(self, model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
        """The adapter on top of the model, unmerged, exactly as any user of PEFT loads it."""
        return PeftModel.from_pretrained(model, folder, is_trainable=trainable)

    def base(self, model: PeftModel) -> PreTrainedModel:
        """The model inside PEFT's."""
        inner: PreTrainedModel = model.get_base_model()
        return inner

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
        config = model.peft_config["default"]
        # PEFT knows the path the model was loaded from, which is a cache folder of this machine.
        config.base_model_name_or_path = base
        # Of a long list PEFT keeps the suffixes that tell its layers from all others of this model.
        # The original may have more of them, so that the file names every layer.
        config.target_modules = sorted(_adapted(model))
        model.save_pretrained(folder, save_embedding_layers=False)

    def merge(self, source: Source, folder: Path, target: Path) -> Path:
        """Fold the saved matrices into the weights."""
        return merge(source, read_adapter(folder), target)


def _adapted(model: nn.Module) -> list[str]:
    """Names of the adapted layers, as the model without the adapter has them."""
    return [
        name.removeprefix(PREFIX)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


def _namesakes(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Modules that PEFT would take for one of `layers`, because their names end with its name."""
    ends, chosen = tuple(f".{layer}" for layer in layers), set(layers)
    names = (name for name, _ in model.named_modules())
    return [name for name in names if name.endswith(ends) and name not in chosen]


def _inside(layer: str, modules: Sequence[str]) -> bool:
    return any(layer == name or layer.startswith(f"{name}.") for name in modules)
