"""How much of an adapter is left after its sum with a weight was rounded to 16 bits."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Rounding:
    """Sums over the merged weights of a checkpoint: energy of the updates, and energy lost.

    A weight W gets the update D, and round(W + D) is stored. The energy of the update is |D|², and
    the energy lost is |round(W + D) - (W + D)|², both summed over all elements. The share that
    survives is 1 - lost / energy. W has the same precision as the sum, so W itself is a candidate
    for the rounding, and no element loses more than its update: the share lies between 0 (no weight
    has changed) and 1 (nothing was rounded).
    """

    energies: dict[str, float] = field(default_factory=dict)  # layer -> |D|²
    losses: dict[str, float] = field(default_factory=dict)  # layer -> energy lost
    dtype: torch.dtype | None = None  # type of the stored weights, if it has less than 32 bits

    def add(self, layer: str, weight: Tensor, total: Tensor, stored: Tensor) -> None:
        """Count one weight.

        Args:
            layer: its name.
            weight: the original weight W.
            total: W + D in float32.
            stored: `total` as it is written.
        """
        self.energies[layer] = _energy(total - weight.float())
        self.losses[layer] = _energy(stored.float() - total)
        if stored.dtype.itemsize < torch.float32.itemsize:
            self.dtype = stored.dtype

    def share(self, layer: str) -> float:
        """Share of one layer's update that survives; 1 if there is no update."""
        return _share(self.energies[layer], self.losses[layer])

    @property
    def total_share(self) -> float:
        """Share of all updates together that survives, by energy."""
        return _share(sum(self.energies.values()), sum(self.losses.values()))

    @property
    def line(self) -> str | None:
        """The shares in words; None if no merged weight was rounded to less than 32 bits."""
        if self.dtype is None:
            return None
        least = min(self.energies, key=self.share)
        return (
            f"merge: {self.total_share:.1%} of the adapter survives rounding to "
            f"{str(self.dtype).removeprefix('torch.')}: 1 - |rounding error|² / |update|² over "
            f"{len(self.energies)} layers, least in {least} ({self.share(least):.1%}); "
            "--dtype float32 keeps all of it, in a checkpoint of twice the size"
        )


def _energy(tensor: Tensor) -> float:
    """Sum of the squares of all elements."""
    return float(torch.linalg.vector_norm(tensor)) ** 2


def _share(energy: float, lost: float) -> float:
    """Share of the energy that is not lost; 1 if there is no energy."""
    return 1 - lost / energy if energy else 1.0
