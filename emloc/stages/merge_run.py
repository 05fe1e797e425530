"""Merge what a finished run carried over with the model it was made for."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from emloc.config.settings import Compression
from emloc.errors import ConfigError
from emloc.stages.run_config import instantiate


def merge_run(run: Path, target: Path) -> Path:
    """Merge the carried adapter of a finished run with the model it was made for.

    Raises:
        ConfigError: the run has no adapter, the adapter is of a kind that no weights can hold, or
            `target` is already there.
    """
    if not (run / "config.yaml").exists():
        raise ConfigError(f"{run} is no run folder; give one such as runs/demo/<run>")
    if not (run / "adapter").exists():
        raise ConfigError(f"{run} has no adapter: its method trains none, or it is not done")
    cfg = OmegaConf.load(run / "config.yaml")
    made_for = instantiate(cfg.emulator).model(
        instantiate(cfg.model), Compression(**cfg.compression)
    )
    merged: Path = instantiate(cfg.adapter).merge(made_for.open(), run / "adapter", target)
    return merged
