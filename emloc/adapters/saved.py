"""A LoRA in a PEFT folder, as pairs of matrices with their scale."""

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
from transformers import PreTrainedModel

from emloc.errors import ConfigError
from emloc.linalg.correct import Pair

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# Beside the two PEFT files: how the adapter was carried to the original model. PEFT ignores it.
CARRIED = "carried.json"

# Ways to start a LoRA (PEFT's init_lora_weights) that take its first product out of the weights.
_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")

_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")
_MAGNITUDE = ".lora_magnitude_vector"


@dataclass(frozen=True)
class SavedLora:
    """Layer name -> pair, with PEFT's configuration and how it was carried (None: as trained).

    A DoRA has a magnitude (out,) for each layer as well: the norms of the rows of `W + s B A` are
    set to it.
    """

    pairs: dict[str, Pair]
    config: dict[str, Any]
    carried: dict[str, Any] | None = None
    magnitudes: dict[str, Tensor] = field(default_factory=dict)

    def map(self, change: Callable[[str, Pair], Pair], carried: dict[str, Any]) -> SavedLora:
        """The adapter with every pair changed, marked as carried.

        Raises:
            ConfigError: it has been carried before.
        """
        if self.carried is not None:
            raise ConfigError(
                f"this adapter was already carried to the original model by {self.carried}; "
                "give the one that was trained (adapter_trained)"
            )
        pairs = {layer: change(layer, pair) for layer, pair in self.pairs.items()}
        return replace(self, pairs=pairs, carried=carried)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `PeftModel.from_pretrained` loads on the original model."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for layer, pair in self.pairs.items():
            tensors[f"base_model.model.{layer}.lora_A.weight"] = pair.a.contiguous()
            tensors[f"base_model.model.{layer}.lora_B.weight"] = pair.b.contiguous()
        for layer, magnitude in self.magnitudes.items():
            tensors[f"base_model.model.{layer}{_MAGNITUDE}"] = magnitude
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2))
        if self.carried is not None:
            (folder / CARRIED).write_text(json.dumps(self.carried, indent=2))


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
    magnitudes = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        if key.endswith(_MAGNITUDE):
            magnitudes[key.removeprefix("base_model.model.").removesuffix(_MAGNITUDE)] = tensor
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise ConfigError(f"{folder}: {key} is no LoRA matrix; only plain LoRA can be carried")
        parts.setdefault(match["layer"], {})[match["part"]] = tensor
    pairs = {
        layer: Pair(found["A"], found["B"], _scale(config, layer)) for layer, found in parts.items()
    }
    carried = folder / CARRIED
    how = json.loads(carried.read_text()) if carried.exists() else None
    return SavedLora(pairs, config, how, magnitudes)


def lora_of(model: nn.Module) -> SavedLora:
    """The adapter of a PEFT model in memory, as if it had been saved and read."""
    with tempfile.TemporaryDirectory() as folder:
        if not isinstance(model, PeftModel):
            raise ConfigError("adapter must be a PEFT model or the folder of one")
        model.save_pretrained(folder, save_embedding_layers=False)
        return read_lora(Path(folder))


def load_on(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with the adapter in `folder` on top, unmerged, exactly as any user loads it."""
    return PeftModel.from_pretrained(model, folder)


def carry_unchanged(folder: Path, target: Path, carried: dict[str, Any]) -> None:
    """Copy an adapter of whatever kind, marked as carried."""
    copy_adapter(folder, target)
    (target / CARRIED).write_text(json.dumps(carried, indent=2))


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
