"""Carry the adapter over as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emloc.adapters.saved import carry_unchanged
from emloc.calibration.samples import Samples
from emloc.emulators import Built
from emloc.recovery import Recovery
from emloc.runtime.stage_cache import Artifact


@dataclass(frozen=True, kw_only=True)
class NoRecovery(Recovery):
    """The adapter's tensors, unchanged, on the layers of the same names in the original."""

    reads_pairs = False

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
        carry_unchanged(trained.folder / "adapter", folder / "adapter", {"by": "none"})
        return {}
