"""How a trained adapter is carried back to the original model: one file for each way."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch

from emloc.calibration.samples import Samples
from emloc.config.part import Part
from emloc.emulators import Built
from emloc.runtime.stage_cache import Artifact


class Recovery(Part):
    """One way of carrying an adapter."""

    reads_pairs: ClassVar[bool] = True  # it works on A and B themselves
    scatters: ClassVar[bool] = False  # it enlarges what was trained on smaller layers

    @property
    def statistics(self) -> bool:
        """Whether it runs the original model over the calibration samples."""
        return False

    @abstractmethod
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
        """Write the carried adapter into `folder`/adapter, modules trained whole included."""
