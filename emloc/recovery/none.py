"""Carry the adapter over as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emloc.adapters.saved import read_lora
from emloc.emulators import Built
from emloc.samples import Samples
from emloc.store import Artifact


@dataclass(frozen=True, kw_only=True)
class NoRecovery:
    """The LoRA's matrices, unchanged, on the original model."""

    statistics = False

    def carry(
        self,
        folder: Path,
        trained: Artifact,
        built: Built,
        samples: Samples | None,
        *,
        device: torch.device,
        host_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Copy the adapter, marked as carried."""
        adapter = read_lora(trained.folder / "adapter")
        adapter.map(lambda _, pair: pair, {"by": "none"}).save(folder / "adapter")
        return {}
