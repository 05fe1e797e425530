"""Read and write PEFT adapter folders: LoRA matrices with their scale, and full modules."""

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

from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from emloc.adapters.recoverable import active_adapter, option_to_drop
from emloc.errors import ConfigError
from emloc.runtime.safetensors_file import write_safetensors
from emloc.tensors.linalg.correct import LoraPair

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# How the adapter was recovered for the original model; PEFT ignores this extra file.
RECOVERY_FILE = "carried.json"

# Initialisations of a LoRA (PEFT's init_lora_weights) that subtract the initial B A from the
# model's weights.
_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")

# PEFT's prefix of the names of the model's own modules.
PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")
_MAGNITUDE = ".lora_magnitude_vector"


@dataclass(frozen=True)
class SavedLora:
    """A LoRA or DoRA in memory, as read from a PEFT adapter folder.

    Attributes:
        pairs: layer name -> the LoRA matrices with their scale.
        config: PEFT's adapter_config.json.
        recovered: how the adapter was recovered for the original model; None: as trained.
        magnitudes: layer name -> row norms (out,) of a DoRA's `W + s B A`; empty for a LoRA.
        extras: parameter name -> tensor of modules that were trained in full (PEFT's
            modules_to_save). Every recovery keeps these tensors.
    """

    pairs: dict[str, LoraPair]
    config: dict[str, Any]
    recovered: dict[str, Any] | None = None
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)

    def changes(self, parameter: str) -> bool:
        """Whether merging the adapter changes or adds this parameter of the model."""
        return parameter in self.extras or parameter.removesuffix(".weight") in self.pairs

    def map(
        self, change: Callable[[str, LoraPair], LoraPair], recovered: dict[str, Any]
    ) -> SavedLora:
        """Return the adapter with `change` applied to every pair, marked as `recovered`.

        Raises:
            ConfigError: the adapter was recovered before.
        """
        self.require_as_trained()
        pairs = {layer: change(layer, pair) for layer, pair in self.pairs.items()}
        return replace(self, pairs=pairs, recovered=recovered)

    def require_as_trained(self) -> None:
        """Check that the adapter is as it was trained.

        Raises:
            ConfigError: the adapter was recovered before.
        """
        if self.recovered is not None:
            raise ConfigError(
                f"this adapter was already recovered for the original model by {self.recovered}; "
                "pass the adapter as it was trained (folder adapter_trained)"
            )

    def save(self, folder: str | Path) -> None:
        """Write an adapter folder that `PeftModel.from_pretrained` loads on the original model."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for layer, pair in self.pairs.items():
            tensors[f"{PREFIX}{layer}.lora_A.weight"] = pair.a.contiguous()
            tensors[f"{PREFIX}{layer}.lora_B.weight"] = pair.b.contiguous()
        for layer, magnitude in self.magnitudes.items():
            tensors[f"{PREFIX}{layer}{_MAGNITUDE}"] = magnitude
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in self.extras.items()}
        write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2))
        if self.recovered is not None:
            (folder / RECOVERY_FILE).write_text(json.dumps(self.recovered, indent=2))


def read_lora(folder: Path) -> SavedLora:
    """Read a PEFT folder of a plain LoRA.

    Raises:
        ConfigError: the folder holds no adapter, or tensors that a plain LoRA does not have.
    """
    adapter = read_adapter(folder)
    for layer in adapter.magnitudes:
        raise ConfigError(
            f"{folder}: {layer}{_MAGNITUDE} is no LoRA matrix; recovery and merge need plain LoRA"
        )
    return adapter


def read_adapter(folder: Path) -> SavedLora:
    """Read a PEFT folder of a LoRA or a DoRA.

    Raises:
        ConfigError: the folder holds no adapter, or tensors that neither of them has.
    """
    if not (folder / WEIGHTS).exists():
        # PEFT saves an adapter with a name of its own into a folder of that name.
        named = [path.parent for path in sorted(folder.glob(f"*/{WEIGHTS}"))]
        advice = f"; pass {named[0]}" if named else ""
        raise ConfigError(
            f"{folder}: the file {WEIGHTS} is missing; this is no adapter folder{advice}"
        )
    config, tensors = _read_files(folder)
    start = str(config.get("init_lora_weights")).split("_niter")[0].lower()
    if start in _CHANGES_THE_MODEL:
        raise ConfigError(
            f"{folder}: the adapter was initialised by {start}, which changes the model's own "
            "weights; recovery and merge need plain LoRA"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    magnitudes, extras = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := _KEY.fullmatch(key):
            parts.setdefault(match["layer"], {})[match["part"]] = tensor
        elif key.endswith(_MAGNITUDE):
            magnitudes[name.removesuffix(_MAGNITUDE)] = tensor
        elif _is_extra(config, name):
            extras[name] = tensor
        else:
            raise ConfigError(
                f"{folder}: {key} is no LoRA matrix; recovery and merge need plain LoRA"
            )
    if option := option_to_drop(config | {"use_dora": False}):
        raise ConfigError(
            f"{folder}: a LoRA with {option} is no plain LoRA; recovery and merge need plain LoRA"
        )
    for layer, matrices in parts.items():
        for part in {"A", "B"} - matrices.keys():
            raise ConfigError(f"{folder}: {layer}.lora_{part}.weight is missing; save it again")
    pairs = {
        layer: LoraPair(matrices["A"], matrices["B"], _scale(config, layer))
        for layer, matrices in parts.items()
    }
    path = folder / RECOVERY_FILE
    recovered = json.loads(path.read_text()) if path.exists() else None
    return SavedLora(pairs, config, recovered, magnitudes, extras)


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the tensors of an adapter folder.

    Raises:
        ConfigError: a file cannot be read.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
        path = folder / WEIGHTS
        return config, load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); save the adapter again") from error


def _is_extra(config: dict[str, Any], parameter: str) -> bool:
    """Whether a parameter belongs to a module in PEFT's modules_to_save (suffixes of names)."""
    modules = config.get("modules_to_save") or []
    return any(f".{module}." in f".{parameter}" for module in modules)


def lora_of(model: nn.Module) -> SavedLora:
    """Return the active LoRA of a PEFT model, as `read_lora` would read it from a folder.

    Raises:
        ConfigError: `model` is no PEFT model, no adapter or several are active, or the active one
            is no plain LoRA.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError("adapter must be a PEFT model or the folder of one")
    name = active_adapter(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=[name])
        # PEFT saves an adapter with a name of its own into a folder of that name.
        return read_lora(Path(folder) if name == "default" else Path(folder) / name)


def copy_unchanged(folder: Path, target: Path, recovered: dict[str, Any]) -> None:
    """Copy an adapter folder of any kind, and mark the copy as `recovered`."""
    copy_adapter(folder, target)
    (target / RECOVERY_FILE).write_text(json.dumps(recovered, indent=2))


def copy_recovery(folder: Path, target: Path) -> None:
    """Mark the adapter in `target` as recovered like the one in `folder`, if that is."""
    if (folder / RECOVERY_FILE).exists():
        (target / RECOVERY_FILE).write_bytes((folder / RECOVERY_FILE).read_bytes())


def copy_adapter(folder: Path, target: Path) -> None:
    """Copy an adapter folder to `target`, replacing a folder of that name.

    The copies have the permissions of new files, not those of the files in `folder`.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in sorted(folder.rglob("*")):
        copy = target / path.relative_to(folder)
        if path.is_dir():
            copy.mkdir()
        else:
            shutil.copyfile(path, copy)


def name_base(folder: Path, base: str, revision: str | None = None) -> None:
    """Write the base model's name into the configuration and the model card of a PEFT folder.

    Folders of other adapters are left as they are.
    """
    path, card_path = folder / CONFIG, folder / "README.md"
    config = json.loads(path.read_text()) if path.exists() else {}
    if "base_model_name_or_path" not in config:
        return
    config |= {"base_model_name_or_path": base, "revision": revision}
    path.write_text(json.dumps(config, indent=2, sort_keys=True))
    if card_path.exists():
        card = ModelCard.load(card_path)
        tags = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")]
        card.data.base_model, card.data.tags = base, [f"base_model:adapter:{base}", *tags]
        card.save(card_path)


def _scale(config: dict[str, Any], layer: str) -> float:
    """Scale of one layer's LoRA by PEFT's rules: alpha / r, or alpha / sqrt(r) for rsLoRA."""

    def setting(pattern: str, default: str) -> float:
        overrides = config.get(pattern) or {}
        matches = (v for k, v in overrides.items() if re.fullmatch(rf"(.*\.)?({k})", layer))
        override = next(matches, None)
        return config[default] if override is None else override

    rank, alpha = setting("rank_pattern", "r"), setting("alpha_pattern", "lora_alpha")
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)
