"""Which adapters of PEFT can be recovered for the original model: plain LoRAs of linear layers.

The same rules hold before a training (for a model in memory) and after it (for a saved adapter).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from emloc.errors import ConfigError
from emloc.tensors.nn.factorized import Factorized

# Initialisations (init_lora_weights) that leave the model's own weights as they are.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Fields of LoraConfig that say which layers get a plain LoRA and how large it is, that describe the
# file, or that belong to an initialisation. All other fields must have their defaults.
_PLAIN_FIELDS = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode", "revision"),
        *("base_model_name_or_path", "runtime_config", "r", "lora_alpha", "lora_dropout"),
        *("use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out"),
        *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    }
)
_DEFAULTS = {
    field.name: field.default for field in fields(LoraConfig) if field.default is not MISSING
}


def option_to_drop(config: Mapping[str, Any]) -> str | None:
    """Return the setting of a PEFT configuration that cannot be recovered, as code; None if none.

    Args:
        config: PEFT's configuration, as in adapter_config.json.
    """
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind not in (None, "LORA"):
        return f"peft_type={kind!r}"
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        return f"init_lora_weights={start!r}"
    for name, default in _DEFAULTS.items():
        value = config.get(name)
        if name not in _PLAIN_FIELDS and value and value != default:
            return f"{name}={value!r}"
    return None


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT has added an adapter of any kind to the model."""
    kinds = (PeftModel, BaseTunerLayer, AuxiliaryTrainingWrapper)
    return any(isinstance(module, kinds) for module in model.modules())


def adapters_of(model: nn.Module) -> tuple[list[str], list[Any]]:
    """Return the active adapters of the model's first adapted layer, and all configurations."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    first = next(layers, None)
    configs = getattr(model, "peft_config", {})
    return list(first.active_adapters) if first is not None else [], list(configs.values())


def without_adapter(model: nn.Module) -> nn.Module:
    """Return the model inside a PEFT model; its adapted layers stay."""
    if not isinstance(model, PeftModel):
        return model
    inner: nn.Module = model.get_base_model()
    return inner


def active_adapter(model: PeftModel) -> str:
    """Return the name of the model's active adapter.

    Raises:
        ConfigError: no adapter is active, or several are.
    """
    return _only(model.active_adapters)


def require_plain_lora(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return name and configuration of the adapter that PEFT has added to `model`.

    Args:
        model: the model inside a PEFT model.

    Raises:
        ConfigError: several adapters are active, or the active one is more than a plain LoRA.
    """
    tuners = {
        n: module for n, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    configs = getattr(model, "peft_config", {})
    if not tuners or not configs:
        raise ConfigError(
            "no LoRA is attached to the emulator; use peft.get_peft_model(emulator, ...)"
        )
    active = _only(dict.fromkeys(n for layer in tuners.values() for n in layer.active_adapters))
    config: dict[str, Any] = configs[active].to_dict()
    if option := option_to_drop(config):
        raise ConfigError(
            f"adapter {active!r}: a LoRA with {option} cannot be recovered for the "
            "original model; leave that setting out of its LoraConfig and attach it again"
        )
    for name, part in _other_parts(model, tuners, active):
        raise ConfigError(
            f"adapter {active!r}: {part} of {name} cannot be recovered for the "
            "original model; leave this module out of its LoraConfig and attach it again"
        )
    return active, config


def _only(active: Any) -> str:
    """Return the one name in `active`."""
    names = list(active)
    if len(names) != 1:
        state = f"several adapters are active: {', '.join(names)}" if names else "none is active"
        raise ConfigError(f"adapter: {state}; choose one with set_adapter(name)")
    return str(names[0])


def _other_parts(
    model: nn.Module, tuners: Mapping[str, BaseTunerLayer], active: str
) -> Iterator[tuple[str, str]]:
    """Yield (module, kind) of everything in the active adapter but LoRAs of linear layers.

    Modules that are trained in full may be any but compressed ones, which the original lacks.
    """
    for name, layer in tuners.items():
        if not isinstance(layer, LoraLayer):
            yield name, f"the adapter ({type(layer).__name__})"
        elif active in {*layer.lora_A, *layer.lora_embedding_A} and not _is_linear_lora(layer):
            yield name, f"the LoRA ({type(layer).__name__})"
    for name, module in model.named_modules():
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        if not isinstance(module, ModulesToSaveWrapper):
            yield name, f"the copy ({type(module).__name__})"
        elif active in module.modules_to_save and any(
            isinstance(part, Factorized) for part in module.modules()
        ):
            yield name, "the full training (modules_to_save)"


def _is_linear_lora(layer: LoraLayer) -> bool:
    """Whether the layer is PEFT's LoRA of an `nn.Linear`, and of no other kind."""
    return type(layer) is Linear and isinstance(layer.get_base_layer(), nn.Linear)
