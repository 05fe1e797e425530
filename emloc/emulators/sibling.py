"""A smaller checkpoint of the model's family, trained and scored instead: the main baseline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emloc.calibration.offload import UNLIMITED, StateLimits
from emloc.config.settings import Compression
from emloc.emulators import BuildInputs
from emloc.emulators.full import Full
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.models.family import ModelFamily


@dataclass(frozen=True, kw_only=True)
class Sibling(Full):
    """Replaces the original by a smaller checkpoint, which is trained and scored itself.

    Nothing is compressed; the budget's ratio selects the sibling, for instance r50 at ratio 0.5.
    """

    unanchored = "replaces the original, so there are no hidden states to put back"

    def model(self, original: ModelFamily, budget: Compression) -> ModelFamily:
        """Return the sibling that the budget's ratio selects.

        Raises:
            ConfigError: the original has no siblings, or none for this ratio.
        """
        choices = ", ".join(original.siblings)
        if not choices:
            raise ConfigError(
                f"emulator=sibling: {original.name} names no smaller checkpoint of its family; "
                "set model to one with siblings, such as model=internvl2_5_8b, or emulator=full"
            )
        first = next(iter(original.siblings))
        if budget.ratio is None:
            raise ConfigError(
                "emulator=sibling: compression=auto has no ratio to choose a smaller checkpoint "
                f"by; {original.name} has {choices}; set compression={first}"
            )
        name = f"r{round(100 * budget.ratio)}"
        if name not in original.siblings:
            raise ConfigError(
                f"emulator=sibling: compression.ratio={budget.ratio:g} selects {name}, but "
                f"{original.name} has only {choices}; set compression={first}"
            )
        return original.siblings[name]

    def build(
        self,
        folder: Path,
        source: Source,
        build_inputs: BuildInputs,
        *,
        device: torch.device,
        limits: StateLimits = UNLIMITED,
    ) -> dict[str, Any]:
        """Write the files of `Full.build`; add the sibling's name to the returned facts."""
        facts = super().build(folder, source, build_inputs, device=device, limits=limits)
        return {"model": source.name, **facts}
