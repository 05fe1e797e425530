"""A LoRA in a PEFT folder: pairs of matrices with their scale, and modules trained whole."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emloc.errors import ConfigError
from emloc.tensors.linalg.correct import LoraPair

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# Beside the two PEFT files: how the adapter was carried to the original model. PEFT ignores it.
CARRIED = "carried.json"

# Ways to start a LoRA (PEFT's init_lora_weights) that take its first product out of the weights.
_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")

# What PEFT puts before the names of the model's own modules.
PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")
_MAGNITUDE = ".lora_magnitude_vector"


@dataclass(frozen=True)
class SavedLora:
    """Layer name -> pair, with PEFT's configuration and how it was carried (None: as trained).

    A DoRA has a magnitude (out,) for each layer as well: the norms of the rows of `W + s B A` are
    set to it. `extras` are the parameters of modules that were trained whole (PEFT's
    modules_to_save), by their names in the model; every way of carrying the adapter keeps them.
    """

    pairs: dict[str, LoraPair]
    config: dict[str, Any]
    recovered: dict[str, Any] | None = None
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)

    def changes(self, parameter: str) -> bool:
        """Whether a parameter of the model is another one with the adapter merged in."""
        return parameter in self.extras or parameter.removesuffix(".weight") in self.pairs

    def map(
        self, change: Callable[[str, LoraPair], LoraPair], recovered: dict[str, Any]
    ) -> SavedLora:
        """The adapter with every pair changed, marked as carried.

        Raises:
            ConfigError: it has been carried before.
        """
        if self.recovered is not None:
            raise ConfigError(
                f"this adapter was already carried to the original model by {self.recovered}; "
                "give the one that was trained (adapter_trained)"
            )
        pairs = {layer: change(layer, pair) for layer, pair in self.pairs.items()}
        return replace(self, pairs=pairs, recovered=recovered)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `PeftModel.from_pretrained` loads on the original model."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for layer, pair in self.pairs.items():
            tensors[f"{PREFIX}{layer}.lora_A.weight"] = pair.a.contiguous()
            tensors[f"{PREFIX}{layer}.lora_B.weight"] = pair.b.contiguous()
        for layer, magnitude in self.magnitudes.items():
            tensors[f"{PREFIX}{layer}{_MAGNITUDE}"] = magnitude
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in self.extras.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2))
        if self.recovered is not None:
            (folder / CARRIED).write_text(json.dumps(self.recovered, indent=2))


def read_lora(folder: Path) -> SavedLora:
    """Read a PEFT LoRA folder.

    Raises:
        ConfigError: it is none, or holds more than plain LoRA matrices.
    """
    found = read_adapter(folder)
    for layer in found.magnitudes:
        raise ConfigError(
            f"{folder}: {layer}{_MAGNITUDE} is no LoRA matrix; only plain LoRA can be carried"
        )
    return found


def read_adapter(folder: Path) -> SavedLora:
    """Read a PEFT folder of a LoRA or a DoRA.

    Raises:
        ConfigError: it is none, or holds more than their tensors.
    """
    if not (folder / WEIGHTS).exists():
        raise ConfigError(f"{folder}: no {WEIGHTS} there; it is no adapter folder")
    config = json.loads((folder / CONFIG).read_text())
    start = str(config.get("init_lora_weights")).split("_niter")[0].lower()
    if start in _CHANGES_THE_MODEL:
        raise ConfigError(
            f"{folder}: was started by {start}, which changes the model's own weights; "
            "only plain LoRA can be carried"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    magnitudes, extras = {}, {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        name = key.removeprefix(PREFIX)
        if match := _KEY.fullmatch(key):
            parts.setdefault(match["layer"], {})[match["part"]] = tensor
        elif key.endswith(_MAGNITUDE):
            magnitudes[name.removesuffix(_MAGNITUDE)] = tensor
        elif _is_extra(config, name):
            extras[name] = tensor
        else:
            raise ConfigError(f"{folder}: {key} is no LoRA matrix; only plain LoRA can be carried")
    pairs = {
        layer: LoraPair(found["A"], found["B"], _scale(config, layer))
        for layer, found in parts.items()
    }
    recovered = folder / CARRIED
    how = json.loads(recovered.read_text()) if recovered.exists() else None
    return SavedLora(pairs, config, how, magnitudes, extras)


def _is_extra(config: dict[str, Any], parameter: str) -> bool:
    """Whether a parameter is of a module that was trained whole; PEFT knows them by suffix."""
    modules = config.get("modules_to_save") or []
    return any(f".{module}." in f".{parameter}" for module in modules)


def lora_of(model: nn.Module) -> SavedLora:
    """The adapter of a PEFT model in memory, as if it had been saved and read."""
    with tempfile.TemporaryDirectory() as folder:
        if not isinstance(model, PeftModel):
            raise ConfigError("adapter must be a PEFT model or the folder of one")
        model.save_pretrained(folder, save_embedding_layers=False)
        return read_lora(Path(folder))


def copy_unchanged(folder: Path, target: Path, recovered: dict[str, Any]) -> None:
    """Copy an adapter of whatever kind, marked as carried."""
    copy_adapter(folder, target)
    (target / CARRIED).write_text(json.dumps(recovered, indent=2))


def copy_adapter(folder: Path, target: Path) -> None:
    """Copy an adapter folder, replacing what is there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)


def _scale(config: dict[str, Any], layer: str) -> float:
    """alpha / r of one layer, by PEFT's rules."""

    def of(pattern: str, default: str) -> float:
        special = config.get(pattern) or {}
        found = next((v for k, v in special.items() if re.fullmatch(rf"(.*\.)?({k})", layer)), None)
        return config[default] if found is None else found

    rank, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)
