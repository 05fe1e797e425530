"""Enlarge a LoRA of a pruned model to the original's shapes, with zeros (LoRAM's recovery)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from emloc.adapters.saved import read_lora
from emloc.recovery import Recovery, RecoveryInputs
from emloc.tensors.linalg.correct import LoraPair
from emloc.tensors.linalg.prune import scatter


@runtime_checkable
class PrunedEmulator(Protocol):
    """An emulator whose layers lack some rows or columns of the original weights."""

    def kept_indices(self, folder: Path, layer: str) -> tuple[Tensor | None, Tensor | None]:
        """Ascending indices of a layer's kept rows and of its kept columns; None: all are kept."""


@dataclass(frozen=True, kw_only=True)
class Scatter(Recovery):
    """Puts the rows of B and columns of A at their indices in the original; all others are zero.

    The kept weights equal those of the original, so there is no emulator error to correct.
    """

    scatters = True

    def recover(self, folder: Path, inputs: RecoveryInputs) -> dict[str, Any]:
        """Write the adapter with matrices of the original model's shapes.

        Raises:
            TypeError: the emulator has no method `kept_indices`.
        """
        emulator, source = inputs.built_emulator.emulator, inputs.built_emulator.source
        if not isinstance(emulator, PrunedEmulator):
            raise TypeError(
                f"recovery=scatter: {type(emulator).__name__} has no method kept_indices"
            )
        enlarged = 0

        def enlarge(layer: str, pair: LoraPair) -> LoraPair:
            nonlocal enlarged
            rows, columns = emulator.kept_indices(inputs.built_emulator.artifact.folder, layer)
            enlarged += rows is not None or columns is not None
            return scatter(pair, source.linears[layer], rows, columns)

        adapter = read_lora(inputs.trained.folder / "adapter")
        adapter.map(enlarge, {"by": "scatter"}).save(folder / "adapter")
        return {"enlarged_layers": enlarged}
