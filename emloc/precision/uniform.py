"""Formats of two or three bits: evenly spaced levels, in groups of 64 numbers of a row.

A number of a group is `step * (code - zero)`. Steps and zeros take 8 bits each, so a number takes a
quarter of a bit more than its code. With so few levels it matters which way a number is rounded.
So codes are chosen by error feedback (`error_feedback`) if it is known what the matrix is
multiplied by, and are the nearest ones otherwise.

Libraries have such formats for whole models, not for one matrix at a time. hqq has no error
feedback, GPTQModel quantises models that it has loaded itself, torchao keeps a byte for each number
of less than four bits, and gemlite's kernels have no backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from emloc.config.values import Range
from emloc.precision import Layout, Packed, Precision
from emloc.precision.error_feedback import round_rows
from emloc.precision.kernel_trial import tried

GROUP = 64  # numbers that share a step and a zero

# Codes of steps are logarithmic: this many codes halve the step, and code 0 is the largest step.
STEPS_PER_OCTAVE = 16

# A group's range may be cut to one of these shares, if the error over the group gets smaller.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)
# Columns count by the root of their inputs' energy when steps are chosen. On SmolLM2-135M in two
# bits this gives 2.25 nats, the energy itself 2.32, and equal weights 3.04. This share of the mean
# energy is added, so that a column without inputs still counts.
INPUT_FLOOR = 0.01

BYTE = 255

# Fills a matrix from its parts, as `uniform_kernel.unpack` does.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Uniform(Precision):
    """Evenly spaced levels; a matrix has the parts `codes`, `steps`, `zeros` and `top`.

    codes: uint8 (rows, groups x 8 x bits), 8 codes in `bits` bytes, the first in the lowest bits.
    steps: uint8 (rows, groups), the step of a group is top / 2^(code / 16).
    zeros: uint8 (rows, groups), the level of the number 0 as a share of the largest level.
    top: float32 (1,).
    """

    # per number, without the step and the zero of its group
    bits: Annotated[int, Range(least=2, most=4, usual=2)]

    feedback: ClassVar[bool] = True
    dequantize_operations: ClassVar[int] = 8

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def layout(self, rows: int, columns: int) -> Layout:
        """Shapes and dtypes of the parts; the last group of a row is padded."""
        groups = -(-columns // GROUP)
        return {
            "codes": ((rows, groups * GROUP * self.bits // 8), torch.uint8),
            "steps": ((rows, groups), torch.uint8),
            "zeros": ((rows, groups), torch.uint8),
            "top": ((1,), torch.float32),
        }

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Quantise a matrix to the nearest codes."""
        return self.pack_for(matrix, None, None)

    def pack_for(
        self, matrix: Tensor, columns: Tensor | None, rows: Tensor | None
    ) -> dict[str, Tensor]:
        """Quantise a matrix by error feedback along its columns or its rows, or to the nearest.

        Steps and zeros are chosen before. Chosen when a row's turn comes, they are no better.
        """
        weights = torch.ones_like(matrix[:1], dtype=torch.float32)
        if columns is not None:
            energy = columns.diagonal().float()
            weights = (energy + energy.mean() * INPUT_FLOOR).sqrt()[None]
        groups = _groups(matrix)
        grid = _fitted(groups, _groups(weights), self.levels)
        if columns is None and rows is None:
            codes = grid.nearest(groups)
        else:
            steps, zeros = grid.at_each(matrix.shape[1])
            if columns is None:
                assert rows is not None
                codes = _groups(round_rows(matrix, rows, steps, zeros, self.levels))
            else:
                turned = (steps.T.contiguous(), zeros.T.contiguous(), self.levels)
                codes = _groups(round_rows(matrix.T, columns, *turned).T)
        packed = _packed_codes(codes.to(torch.uint8).flatten(1), self.bits)
        return {"codes": packed, "steps": grid.steps, "zeros": grid.zeros, "top": grid.top}

    def unpack(self, packed: Packed, out: Tensor | None) -> Tensor:
        """Dequantise a matrix, directly into `out` if there is a kernel for the device."""
        parts = packed.parts
        rows, columns = packed.shape
        if parts["codes"].is_cuda and (kernel := _kernel(parts["codes"].device)) is not None:
            if out is None:
                out = parts["codes"].new_empty((rows, columns), dtype=packed.dtype)
            return _by(kernel, packed, out)
        codes = _unpacked_codes(parts["codes"], self.bits).view(rows, -1, GROUP)
        grid = _Grid(parts["steps"], parts["zeros"], parts["top"], self.levels)
        values = grid.values(codes.to(torch.float32))
        return values.view(rows, -1)[:, :columns].to(packed.dtype)


@dataclass(frozen=True)
class _Grid:
    """The levels that the groups (rows, groups) of a matrix may take, as `Uniform` stores them."""

    steps: Tensor
    zeros: Tensor
    top: Tensor
    levels: int  # the largest code

    @property
    def step(self) -> Tensor:
        """Distance of two levels of each group, in float32."""
        return self.top * torch.exp2(self.steps.to(torch.float32) / -STEPS_PER_OCTAVE)

    @property
    def zero(self) -> Tensor:
        """Level of the number 0 of each group, in float32."""
        return self.zeros.to(torch.float32) * (self.levels / BYTE)

    def nearest(self, groups: Tensor) -> Tensor:
        """The nearest codes of groups (rows, groups, 64), in float32."""
        level = (groups / self.step[..., None]).add_(self.zero[..., None])
        return level.round_().clamp_(0, self.levels)

    def values(self, codes: Tensor) -> Tensor:
        """The numbers that codes (rows, groups, 64) in float32 stand for."""
        return (codes - self.zero[..., None]).mul_(self.step[..., None])

    def at_each(self, columns: int) -> tuple[Tensor, Tensor]:
        """Step and zero (rows, columns) at each number."""
        step, zero = (one.repeat_interleave(GROUP, 1) for one in (self.step, self.zero))
        return step[:, :columns].contiguous(), zero[:, :columns].contiguous()


def _fitted(groups: Tensor, weights: Tensor, levels: int) -> _Grid:
    """The grid of groups (rows, groups, 64) with the least squared error.

    `weights` (1, groups, 64) multiplies the squared errors; that of padding is 0.
    """
    lowest, highest = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    width = (highest - lowest).clamp(min=torch.finfo(torch.float32).tiny)
    zeros = (-lowest / width * BYTE).round_().to(torch.uint8)
    top = width.amax().reshape(1) / levels
    octaves = [(top * levels / (width * share)).log2_() for share in SHARES]
    candidates = [
        (octave * STEPS_PER_OCTAVE).round_().clamp_(0, BYTE).to(torch.uint8) for octave in octaves
    ]
    costs = []
    for steps in candidates:
        grid = _Grid(steps, zeros, top, levels)
        error = grid.values(grid.nearest(groups)).sub_(groups)
        costs.append(error.square_().mul_(weights).sum(-1))
    best = torch.stack(costs).argmin(0, keepdim=True)
    return _Grid(torch.stack(candidates).gather(0, best)[0], zeros, top, levels)


def _groups(matrix: Tensor) -> Tensor:
    """The numbers of a matrix (rows, columns) as groups (rows, groups, 64), padded with 0."""
    padded = functional.pad(matrix.float(), (0, -matrix.shape[1] % GROUP))
    return padded.view(len(matrix), -1, GROUP)


def _packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n), n a multiple of 8, as bytes (rows, n x bits / 8)."""
    eights = codes.view(len(codes), -1, 8).to(torch.int64)
    words = (eights << _shifts(bits, 8, codes.device)).sum(-1)
    data = (words[..., None] >> _shifts(8, bits, codes.device)) & BYTE
    return data.to(torch.uint8).flatten(1)


def _unpacked_codes(data: Tensor, bits: int) -> Tensor:
    """Codes (rows, n) of the bytes that `_packed_codes` returns."""
    if 8 % bits == 0:
        parts = [(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, -1).flatten(1)
    triples = data.view(len(data), -1, bits).to(torch.int32)
    words = (triples << _shifts(8, bits, data.device).int()).sum(-1, dtype=torch.int32)
    codes = (words[..., None] >> _shifts(bits, 8, data.device).int()) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)


def _shifts(bits: int, count: int, device: torch.device) -> Tensor:
    """The positions (count,) of numbers of `bits` bits in a word."""
    return torch.arange(0, bits * count, bits, device=device)


@cache
def _kernel(device: torch.device) -> Kernel | None:
    """Return the Triton kernel for a GPU; None, with a log line, if it does not work there."""
    precision = Uniform(name="int3", bits=3)
    trial = torch.linspace(-1, 1, 3 * 130, device=device, dtype=torch.bfloat16).view(3, 130)
    packed = Packed(precision, precision.pack(trial), (3, 130), trial.dtype)
    expected = Packed(precision, packed.to(torch.device("cpu")).parts, (3, 130), trial.dtype)

    def trial_run() -> tuple[Kernel, bool]:
        from emloc.precision.uniform_kernel import unpack

        actual = _by(unpack, packed, torch.empty_like(trial))
        return unpack, torch.allclose(actual.cpu(), expected.dequantize(), rtol=0.01)

    return tried(trial_run, "two and three bits: torch dequantises")


def _by(kernel: Kernel, packed: Packed, out: Tensor) -> Tensor:
    """Dequantise a matrix into `out` by a kernel."""
    names = ("codes", "steps", "zeros", "top")
    codes, steps, zeros, top = (packed.parts[name] for name in names)
    sizes = (packed.precision.bits, GROUP, STEPS_PER_OCTAVE)
    return kernel(codes, steps, zeros, top, out, *sizes)
