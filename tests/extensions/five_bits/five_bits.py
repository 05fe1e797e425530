"""A plug-in: a packed format of five bits, with 31 evenly spaced levels per group of weights.

The levels range from minus to plus the largest absolute value of the group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from emloc.errors import ConfigError
from emloc.precision import Layout, Packed, Precision

BITS, STEPS = 5, 15  # code - STEPS is the level, from -15 to 15


@dataclass(frozen=True, kw_only=True)
class FiveBits(Precision):
    """Stores a matrix in row-major order as `codes` and `scales`.

    Eight codes take five bytes. Each group of weights has one scale.
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
        words = (codes.view(len(flat), -1, 8) << _shifts(flat.device, BITS, 8)).sum(-1)
        data = (words[..., None] >> _shifts(flat.device, 8, BITS)) & 255
        return {"codes": data.to(torch.uint8).flatten(1), "scales": scales}

    def unpack(self, packed: Packed, out: Tensor | None) -> Tensor:
        """Multiply levels by scales and return a new matrix; `out` is not used."""
        codes, scales = packed.parts["codes"], packed.parts["scales"]
        data = codes.view(len(codes), -1, BITS).long()
        words = (data << _shifts(codes.device, 8, BITS)).sum(-1)
        steps = ((words[..., None] >> _shifts(codes.device, BITS, 8)) & 31).flatten(1) - STEPS
        rows, columns = packed.shape
        flat = (steps * scales.float()[:, None]).flatten()[: rows * columns]
        return flat.view(rows, columns).to(packed.dtype)


def _shifts(device: torch.device, bits: int, count: int) -> Tensor:
    """The bit positions of `count` numbers of `bits` bits in a word of 40 bits."""
    return torch.arange(bits * (count - 1), -1, -bits, device=device)
