"""Save an emulator's factors to a folder, and load them over the original model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from emloc.errors import ConfigError
from emloc.library.arguments import emulator_and_stamp, original_model
from emloc.library.emulate import emulator_of, factorized_layer
from emloc.library.identity import (
    Stamp,
    factor_digests,
    factorized_layers,
    require_original,
)
from emloc.runtime.atomic import atomic_folder, write_json
from emloc.runtime.safetensors_file import write_safetensors
from emloc.tensors.nn.factorized import Factorized

FACTORS = "factors.safetensors"
DESCRIPTION = "emulator.json"
VERSION = 1

Model = TypeVar("Model", bound=nn.Module)


def save_emulator(emulator: nn.Module, folder: str | Path) -> None:
    """Write the emulator's factors, and which model they belong to, to a new folder.

    Everything else is in the original model. A LoRA on the emulator is not written: its own
    `save_pretrained` does so.

    Args:
        emulator: of `build_emulator` or `load_emulator`, with or without a LoRA.
        folder: is written completely or not at all.

    Raises:
        ConfigError: `emulator` is none, or `folder` exists and is not empty.
    """
    base, stamp = emulator_and_stamp(emulator)
    layers = factorized_layers(base)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= {f"{name}.u": layer.u.detach(), f"{name}.v": layer.v.detach()}
    description = {
        "version": VERSION,
        "digest": stamp.digest,
        "stamp": asdict(stamp),
        # Differs from the stamp's factors if the emulator was cast.
        "stored": factor_digests(layers),
    }
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not empty; save the emulator to a new folder")
    with atomic_folder(path) as draft:
        write_safetensors(draft / FACTORS, tensors, {"format": "pt"})
        write_json(draft / DESCRIPTION, description)


def load_emulator(folder: str | Path, model: Model, *, share: bool = True) -> Model:
    """Return the emulator that `save_emulator` wrote, over the original model.

    Args:
        folder: written by `save_emulator`.
        model: the original that the emulator was built from; it is not changed.
        share: as for `build_emulator`.

    Raises:
        ConfigError: the folder is incomplete or damaged, or `model` is another model.
    """
    original, path = original_model(model), Path(folder)
    stamp, digests = _read_description(path / DESCRIPTION)
    require_original(original, stamp, stamp.weights)
    tensors = _read_factors(path / FACTORS, stamp)
    modules: dict[str, Factorized] = {}
    for name in stamp.factors:
        linear = original.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        device = linear.weight.device
        u, v = tensors[f"{name}.u"].to(device), tensors[f"{name}.v"].to(device)
        modules[name] = factorized_layer(u, v, linear, share=share)
    if factor_digests(modules) != digests:
        raise ConfigError(f"{path / FACTORS} is damaged; save the emulator again")
    emulator = emulator_of(original, modules, stamp, share=share)
    assert isinstance(emulator, type(original))
    return cast(Model, emulator)


def _read_description(path: Path) -> tuple[Stamp, dict[str, str]]:
    """Return the emulator's stamp, and the digests of its stored factors.

    Raises:
        ConfigError: the file is missing, damaged, or of another version of this package.
    """
    if not path.exists():
        raise ConfigError(f"{path} is missing; pass a folder that emloc.save_emulator has written")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["version"]
        if version == VERSION:
            stamp = Stamp(**description["stamp"])
            if stamp.digest == description["digest"]:
                return stamp, dict(description["stored"])
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged ({error}); save the emulator again") from error
    if version != VERSION:
        raise ConfigError(
            f"{path} has version {version}, and this emloc reads version {VERSION}; save the "
            "emulator again"
        )
    raise ConfigError(f"{path} is damaged; save the emulator again")


def _read_factors(path: Path, stamp: Stamp) -> dict[str, Tensor]:
    """Return the factors of all layers, as `<layer>.u` and `<layer>.v`, in host memory.

    Raises:
        ConfigError: the file cannot be read, or lacks a factor.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); save the emulator again") from error
    for name in (f"{layer}.{part}" for layer in stamp.factors for part in "uv"):
        if name not in tensors:
            raise ConfigError(f"{path} is damaged: {name} is missing; save the emulator again")
    return tensors
