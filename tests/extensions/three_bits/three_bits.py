"""A plug-in: a packed format of three bits, with seven evenly spaced levels per group of weights.

The levels range from minus to plus the largest absolute value of the group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from emloc.errors import ConfigError
from emloc.precision import Layout, Packed, Precision

BITS, STEPS = 3, 3  # code - STEPS is the level, from -3 to 3


@dataclass(frozen=True, kw_only=True)
class ThreeBits(Precision):
    """Stores a matrix in row-major order as `codes` and `scales`.

    Eight codes take three bytes. Each group of weights has one scale.
    """

    group: int  # weights that share one scale; a multiple of eight

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != BITS:
            raise ConfigError(f"precision.bits={self.bits}: set precision.bits={BITS}")
        if self.group < 8 or self.group % 8:
            raise ConfigError(
                f"precision.group must be a multiple of 8, got {self.group}; set precision.group=64"
            )

    def layout(self, rows: int, columns: int) -> Layout:
        """Shapes and dtypes of the stored tensors; the last group is padded."""
        groups = -(-rows * columns // self.group)
        return {
            "codes": ((groups, self.group * BITS // 8), torch.uint8),
            "scales": ((groups,), torch.float16),
        }

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Round each weight to the nearest level of its group and pack the codes."""
        flat = matrix.reshape(-1).float()
        flat = functional.pad(flat, (0, -flat.numel() % self.group)).view(-1, self.group)
        scales = (flat.abs().amax(1) / STEPS).half()
        # A group of zeros has the scale 0; the clamp avoids a division by zero.
        steps = flat / scales.float().clamp_min(torch.finfo(torch.float16).tiny)[:, None]
        codes = steps.round().clamp(-STEPS, STEPS).long() + STEPS
        words = (codes.view(len(flat), -1, 8) << _shifts(flat.device)).sum(-1)
        data = torch.stack([words >> 16, words >> 8, words], -1) & 255
        return {"codes": data.to(torch.uint8).flatten(1), "scales": scales}

    def unpack(self, packed: Packed, out: Tensor | None) -> Tensor:
        """Multiply levels by scales and return a new matrix; `out` is not used."""
        codes, scales = packed.parts["codes"], packed.parts["scales"]
        data = codes.view(len(codes), -1, 3).long()
        words = (data[..., 0] << 16) | (data[..., 1] << 8) | data[..., 2]
        steps = ((words[..., None] >> _shifts(codes.device)) & 7).flatten(1) - STEPS
        rows, columns = packed.shape
        flat = (steps * scales.float()[:, None]).flatten()[: rows * columns]
        return flat.view(rows, columns).to(packed.dtype)


def _shifts(device: torch.device) -> Tensor:
    """The bit positions of the eight codes in a word of 24 bits."""
    return torch.arange(21, -1, -3, device=device)
