"""How a trained adapter is carried back to the original model: one file for each way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from emloc.emulators import Built
from emloc.samples import Samples
from emloc.store import Artifact


class Recovery(Protocol):
    """One way of carrying an adapter."""

    reads_pairs: bool = True  # it works on A and B themselves
    scatters: bool = False  # it enlarges what was trained on smaller layers

    @property
    def statistics(self) -> bool:
        """Whether it runs the original model over the calibration samples."""
        return False

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
        """Write the carried adapter into `folder`/adapter."""
