"""Plain LoRA, as implemented by PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from emloc.adapters import Adapter
from emloc.adapters.fold import merge
from emloc.adapters.fused import fuse
from emloc.adapters.saved import PREFIX, name_base, read_adapter
from emloc.config.settings import LoraSettings
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source


@dataclass(frozen=True, kw_only=True)
class Lora(Adapter):
    """LoRA: `W x + (alpha / rank) B A x` for each adapted linear; A starts random, B as zero."""

    variant: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # extra arguments of LoraConfig

    def attach(
        self,
        model: PreTrainedModel,
        lora: LoraSettings,
        layers: Sequence[str],
        modules_to_save: Sequence[str] = (),
    ) -> PeftModel:
        """Return PEFT's LoRA model; PEFT sees factorised layers as ordinary linear layers.

        Raises:
            ConfigError: PEFT would adapt other layers than `layers`.
        """
        targets = [layer for layer in layers if not _is_inside(layer, modules_to_save)]
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            exclude_modules=_namesakes(model, targets) or None,
            modules_to_save=list(modules_to_save) or None,
            bias="none",
            task_type="CAUSAL_LM" if model.can_generate() else None,
            **self.variant,
        )
        tuned = get_peft_model(model, config)
        if other := sorted(set(targets).symmetric_difference(_adapted_layers(tuned))):
            raise ConfigError(
                f"PEFT cannot adapt exactly the chosen layers: {other[0]} differs; "
                "set model.lora_targets"
            )
        return tuned

    def load(self, model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
        """Return the model with the saved adapter, unmerged; see `PeftModel.from_pretrained`."""
        # PEFT leaves the adapter of a model without weights without values, too.
        is_empty = any(parameter.is_meta for parameter in model.parameters())
        return PeftModel.from_pretrained(
            model, folder, is_trainable=trainable, low_cpu_mem_usage=is_empty
        )

    def base(self, model: PeftModel) -> PreTrainedModel:
        """Return the transformers model inside a PEFT model."""
        inner: PreTrainedModel = model.get_base_model()
        return inner

    def fuse(self, model: PeftModel) -> bool:
        """Fuse every layer with its LoRA, unless there is dropout; return whether it was done."""
        return fuse(model) > 0

    def training(self, model: PeftModel, mixed: bool) -> AbstractContextManager[None]:
        """Return a context in which PEFT does not cast inputs to float32, if autocast is on.

        The cast would keep a float32 copy of each input for the backward pass, and autocast would
        only round this copy back to 16 bits.
        """
        context: AbstractContextManager[None] = disable_input_dtype_casting(model, active=mixed)
        return context

    def save(self, model: PeftModel, folder: Path, base: str) -> None:
        """Write adapter_model.safetensors and adapter_config.json for the model called `base`."""
        config = model.peft_config["default"]
        # PEFT shortens a long list of layers to suffixes that are unique within this model. In the
        # original a suffix may match more layers, so the file lists every full name.
        config.target_modules = sorted(_adapted_layers(model))
        config.base_model_name_or_path = base
        model.save_pretrained(folder, save_embedding_layers=False)
        # PEFT's card names the folder that the model was loaded from, on this machine.
        name_base(folder, base)

    def merge(
        self, source: Source, folder: Path, target: Path, dtype: torch.dtype | None = None
    ) -> Path:
        """Merge the saved LoRA into the weights of `source`; see `emloc.adapters.fold.merge`."""
        return merge(source, read_adapter(folder), target, dtype)


def _adapted_layers(model: nn.Module) -> list[str]:
    """Names of the adapted layers, as they are in the model without the adapter."""
    return [
        name.removeprefix(PREFIX)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


def _namesakes(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Modules that PEFT would mistake for one of `layers`: their names end with a layer's name."""
    suffixes, targets = tuple(f".{layer}" for layer in layers), set(layers)
    names = (name for name, _ in model.named_modules())
    return [name for name in names if name.endswith(suffixes) and name not in targets]


def _is_inside(layer: str, modules: Sequence[str]) -> bool:
    """Whether a layer is one of `modules` or a part of one."""
    return any(layer == name or layer.startswith(f"{name}.") for name in modules)
