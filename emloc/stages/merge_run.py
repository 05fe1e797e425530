"""Merge the adapter of a finished run into the weights of its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from emloc.config.run_folder import Run
from emloc.config.settings import Compression
from emloc.errors import ConfigError
from emloc.models.checkpoint.damaged import read_header, read_json
from emloc.stages.run_config import section_of


def merge_run(run: Path, target: Path, dtype: torch.dtype | None = None) -> Path:
    """Merge the recovered adapter of a finished run into the model that it adapts.

    Args:
        run: the folder of the run.
        target: the folder for the merged checkpoint, which must not exist yet.
        dtype: of the weights in the merged checkpoint; None: as the original stores them.

    Returns:
        The folder of the merged checkpoint.

    Raises:
        ConfigError: `run` is no run folder or has no adapter, one of its files is damaged or names
            code that is not trusted, weights cannot hold the update of this kind of adapter, or
            `target` exists.
    """
    if not (run / "config.yaml").exists():
        raise ConfigError(f"{run} is not a run folder; pass one such as runs/demo/<run>")
    if not (run / "adapter").exists():
        raise ConfigError(
            f"{run} has no adapter: its method trains none, or the run is not finished"
        )
    cfg = _settings_of(run)
    _check_adapter(run / "adapter")
    compression = Compression(**cfg.compression)
    adapted_model = section_of(cfg, "emulator").model(section_of(cfg, "model"), compression)
    # Plug-ins may have been written before adapters knew `dtype`.
    options = {} if dtype is None else {"dtype": dtype}
    merged: Path = section_of(cfg, "adapter").merge(
        adapted_model.open(), run / "adapter", target, **options
    )
    return merged


def _check_adapter(folder: Path) -> None:
    """Check the files of an adapter, since libraries do not name a damaged one.

    Raises:
        ConfigError: names the file.
    """
    remedy = f"delete the folder {folder.parent.name} and run its command again"
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            read_header(path, remedy)
        elif path.suffix == ".json":
            read_json(path, remedy)


def _settings_of(run: Path) -> DictConfig:
    """The settings of the run, which may come from somebody else, as plain values.

    Raises:
        ConfigError: config.yaml is damaged, lacks a section, or refers to something outside.
    """
    values = Run(run).config
    path = run / "config.yaml"
    missing = [
        name
        for name in ("emulator", "model", "adapter", "compression")
        if not isinstance(values.get(name), Mapping)
    ]
    if missing:
        raise ConfigError(f"{path}: it has no section {missing[0]}; give another run")
    # OmegaConf would follow a reference: ${oc.env:X} reads a variable of the environment.
    for text in _texts(values):
        if "${" in text:
            raise ConfigError(
                f"{path}: {text!r} refers to something outside the run; write the value there"
            )
    return OmegaConf.create(values)


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in nested mappings and lists, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
