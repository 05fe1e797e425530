"""Merge the adapter of a finished run into the weights of its model."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import OmegaConf

from emloc.config.settings import Compression
from emloc.errors import ConfigError
from emloc.stages.run_config import instantiate


def merge_run(run: Path, target: Path, dtype: torch.dtype | None = None) -> Path:
    """Merge the recovered adapter of a finished run into the model that it adapts.

    Args:
        run: the folder of the run.
        target: the folder for the merged checkpoint, which must not exist yet.
        dtype: of the weights in the merged checkpoint; None: as the original stores them.

    Returns:
        The folder of the merged checkpoint.

    Raises:
        ConfigError: `run` is no run folder or has no adapter, weights cannot hold the update of
            this kind of adapter, or `target` exists.
    """
    if not (run / "config.yaml").exists():
        raise ConfigError(f"{run} is not a run folder; pass one such as runs/demo/<run>")
    if not (run / "adapter").exists():
        raise ConfigError(
            f"{run} has no adapter: its method trains none, or the run is not finished"
        )
    cfg = OmegaConf.load(run / "config.yaml")
    adapted_model = instantiate(cfg.emulator).model(
        instantiate(cfg.model), Compression(**cfg.compression)
    )
    # Plug-ins may have been written before adapters knew `dtype`.
    options = {} if dtype is None else {"dtype": dtype}
    merged: Path = instantiate(cfg.adapter).merge(
        adapted_model.open(), run / "adapter", target, **options
    )
    return merged
