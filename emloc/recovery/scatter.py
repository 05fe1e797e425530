"""Carry a LoRA of a pruned model over: zeros where the original has more (LoRAM's recovery)."""

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
    """An emulator that left rows and columns out of layers."""

    def kept(self, folder: Path, layer: str) -> tuple[Tensor | None, Tensor | None]:
        """The rows and the columns that are left of a layer, ascending; None where all are."""


@dataclass(frozen=True, kw_only=True)
class Scatter(Recovery):
    """The LoRA's rows and columns at their places in the original; it adds nothing elsewhere.

    Kept weights are the original's, so that there is no error of the emulator to correct.
    """

    scatters = True

    def recover(self, folder: Path, inputs: RecoveryInputs) -> dict[str, Any]:
        """Write the adapter at the original's shapes.

        Raises:
            TypeError: the emulator does not say what it kept.
        """
        emulator, source = inputs.built_emulator.emulator, inputs.built_emulator.source
        if not isinstance(emulator, PrunedEmulator):
            raise TypeError(f"{type(emulator).__name__} does not say which rows it kept")
        enlarged = 0

        def enlarge(layer: str, pair: LoraPair) -> LoraPair:
            nonlocal enlarged
            rows, columns = emulator.kept(inputs.built_emulator.artifact.folder, layer)
            enlarged += rows is not None or columns is not None
            return scatter(pair, source.linears[layer], rows, columns)

        adapter = read_lora(inputs.trained.folder / "adapter")
        adapter.map(enlarge, {"by": "scatter"}).save(folder / "adapter")
        return {"enlarged_layers": enlarged}
