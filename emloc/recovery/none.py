"""No recovery: the original model gets the adapter as it was trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc.adapters.saved import copy_unchanged
from emloc.recovery import Recovery, RecoveryInputs


@dataclass(frozen=True, kw_only=True)
class NoRecovery(Recovery):
    """Leaves the adapter unchanged; the original model loads its matrices by layer name."""

    reads_pairs = False

    def recover(self, folder: Path, inputs: RecoveryInputs) -> dict[str, Any]:
        """Copy the trained adapter into `folder`/adapter and mark the copy as recovered."""
        copy_unchanged(inputs.trained.folder / "adapter", folder / "adapter", {"by": "none"})
        return {}
