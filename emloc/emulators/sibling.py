"""A smaller checkpoint of the family in the model's place: what all of this has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emloc.config.settings import Compression
from emloc.emulators import BuildInputs
from emloc.emulators.full import Full
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.models.family import ModelFamily


@dataclass(frozen=True, kw_only=True)
class Sibling(Full):
    """The sibling whole. It is trained, carried to and scored itself; the original takes no part.

    Nothing is compressed: the budget's ratio says which sibling, the one called r50 at 0.5.
    """

    def model(self, original: ModelFamily, budget: Compression) -> ModelFamily:
        """The sibling of this share.

        Raises:
            ConfigError: the model names none, or none of this share.
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
        wanted = f"r{round(100 * budget.ratio)}"
        if wanted not in original.siblings:
            raise ConfigError(
                f"emulator=sibling: compression.ratio={budget.ratio:g} asks for {wanted}, and "
                f"{original.name} has {choices}; set compression={first}"
            )
        return original.siblings[wanted]

    def build(
        self,
        folder: Path,
        source: Source,
        build_inputs: BuildInputs,
        *,
        device: torch.device,
        host_bytes: int | None = None,
    ) -> dict[str, Any]:
        """As of a model trained whole, with the sibling's name for the record."""
        facts = super().build(folder, source, build_inputs, device=device, host_bytes=host_bytes)
        return {"model": source.name, **facts}
