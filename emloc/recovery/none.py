"""Carry the adapter over as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc.adapters.saved import copy_unchanged
from emloc.recovery import Recovery, RecoveryInputs


@dataclass(frozen=True, kw_only=True)
class NoRecovery(Recovery):
    """The adapter's tensors, unchanged, on the layers of the same names in the original."""

    reads_pairs = False

    def recover(self, folder: Path, inputs: RecoveryInputs) -> dict[str, Any]:
        """Copy the adapter, marked as carried."""
        copy_unchanged(inputs.trained.folder / "adapter", folder / "adapter", {"by": "none"})
        return {}
