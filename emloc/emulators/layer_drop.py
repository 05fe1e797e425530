"""Offsite-tuning: drop blocks in the middle of a model, adapt the blocks at both ends.

After Xiao et al., "Offsite-Tuning: Transfer Learning without Full Model" (2023), without its
distillation. Only one stack of blocks is thinned: in a model with a vision tower, the decoder's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.calibration.blockwise import block_of, by_block
from emloc.calibration.calibrate import Layers
from emloc.calibration.offload import UNLIMITED, StateLimits
from emloc.config.settings import MODEL_BITS, Compression
from emloc.config.values import Range
from emloc.emulators import BuildInputs, Emulator, Plan
from emloc.emulators.full import (
    block_linears,
    load_quantized,
    quantization_residual,
    require_packable,
)
from emloc.emulators.packed_weights import write_packed
from emloc.emulators.size import require_solved, size_facts
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import CPU, Source
from emloc.models.coverage import log_share
from emloc.models.decoder import Decoder
from emloc.precision import Precision

# The first and the last block of the middle are always kept.
MIN_MIDDLE = 2


class IdentityBlock(nn.Module):
    """Replaces a dropped block and returns the hidden states unchanged.

    Blocks of some families, such as Falcon, return a tuple with the hidden states first. `follow`
    makes this block return the same.
    """

    def __init__(self, attention_type: str | None) -> None:
        super().__init__()
        self.attention_type = attention_type  # read by models that choose a mask per block
        self._tuple_size: int | None = None  # None: the blocks of the model return a tensor

    def follow(self, block: nn.Module) -> None:
        """Return what `block`, which runs before this one, returns: a tensor or a tuple."""
        block.register_forward_hook(self._record_output)

    def _record_output(self, _: nn.Module, __: Any, output: Any) -> None:
        """Forward hook that records whether a block returns a tuple."""
        self._tuple_size = len(output) if isinstance(output, tuple) else None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        """Return the hidden states (batch, length, width) unchanged, alone or first in a tuple."""
        if self._tuple_size is None:
            return hidden_states
        return (hidden_states, *[None] * (self._tuple_size - 1))


@dataclass(frozen=True, kw_only=True)
class LayerDrop(Emulator):
    """Drops evenly spaced blocks in the middle; all other blocks keep their names and weights."""

    leaves_out_tower = True

    # number of blocks at the beginning that are kept and adapted
    first: Annotated[int, Range(least=1, usual=2)]
    # number of blocks at the end that are kept and adapted
    last: Annotated[int, Range(least=1, usual=2)]

    def plan(self, source: Source, layers: Layers, budget: Compression) -> Plan:
        """Return the names of all blocks in three lists: adapted, kept unadapted, and dropped.

        As many blocks are kept as the budget's ratio allows. The ratio counts all parameters of
        the model, or those in `layers`.

        Raises:
            ConfigError: the ratio leaves fewer than two blocks in the middle, the model has no
                blocks to drop, or the weights are packed and most are in no linear layer.
        """
        ratio = require_solved(budget.ratio)
        require_packable(source, require_solved(budget.bits))
        counted = {f"{layer}.weight": rows * columns for layer, (rows, columns) in layers.items()}
        if budget.of == "model":
            counted = source.sizes
        else:
            log_share(
                source.meta_model, by_block(layers), "compression.of=linears counts linear layers"
            )
        blocks = block_stack(source)
        sizes = [_size(counted, block) for block in blocks]
        total = sum(counted.values())
        fixed = total - sum(sizes)
        shares = self._shares(sizes, fixed, total)
        if len(shares) < 2:
            raise ConfigError(
                f"emulator.first={self.first} and emulator.last={self.last} leave nothing to drop: "
                f"the model has {len(blocks)} blocks, and {MIN_MIDDLE} between the ends are always "
                "kept; set model to a deeper one, or emulator=svd"
            )
        middle = max((count for count, share in shares.items() if share <= ratio), default=None)
        if middle is None:
            smallest = ceil(1000 * shares[MIN_MIDDLE]) / 1000
            short_ends = LayerDrop(first=1, last=1)._shares(sizes, fixed, total)
            ends_help = short_ends[MIN_MIDDLE] <= ratio
            raise ConfigError(
                f"compression.ratio={ratio:g} of the {budget.of} leaves less than {MIN_MIDDLE} "
                f"blocks between emulator.first={self.first} and emulator.last={self.last}; set "
                f"compression.ratio={smallest:g} or higher"
                + (", or emulator.first=1 emulator.last=1" if ends_help else "")
            )
        kept_blocks = {
            blocks[index]
            for index in kept_block_indices(len(blocks), self.first, self.last, middle)
        }
        ends = [*blocks[: self.first], *blocks[-self.last :]]
        return {
            "adapted": ends,
            "kept": [block for block in blocks if block in kept_blocks and block not in ends],
            "dropped": [block for block in blocks if block not in kept_blocks],
        }

    def _shares(self, sizes: Sequence[int], fixed: int, total: int) -> dict[int, float]:
        """Number of blocks kept in the middle -> share of the parameters that remains.

        Args:
            sizes: parameters of each block.
            fixed: parameters outside the blocks.
            total: all parameters.
        """
        depth, ends = len(sizes), (self.first, self.last)
        return {
            count: (fixed + sum(sizes[index] for index in kept_block_indices(depth, *ends, count)))
            / total
            for count in range(MIN_MIDDLE, depth - sum(ends) + 1)
        }

    def build(
        self,
        folder: Path,
        source: Source,
        build_inputs: BuildInputs,
        *,
        device: torch.device,
        limits: StateLimits = UNLIMITED,
    ) -> dict[str, Any]:
        """Write the lists of adapted, kept and dropped blocks; only kept blocks are quantised."""
        plan = build_inputs.plan
        assert plan is not None
        (folder / "layers.json").write_text(
            json.dumps({**plan, "bits": build_inputs.bits}, indent=1)
        )
        packed = _quantized(folder, source)
        write_packed(folder, source, packed, build_inputs, device=device, limits=limits)
        dropped = set(plan["dropped"])
        stored = {
            layer: [] if block_of(layer) in dropped else [source.linears[layer]]
            for layer in block_linears(source)
        }
        others = {n: c for n, c in source.sizes.items() if n.removesuffix(".weight") not in stored}
        removed = sum(_size(others, block) for block in dropped)
        facts = size_facts(source, stored, build_inputs.precision, removed)
        return facts | {"dropped": len(dropped)} | build_inputs.sample_facts

    def targets(self, folder: Path, layers: Sequence[str]) -> list[str]:
        """Those of `layers` that are in the blocks at both ends."""
        ends = tuple(f"{block}." for block in _table(folder)["adapted"])
        return [layer for layer in layers if layer.startswith(ends)]

    def open(
        self,
        folder: Path,
        source: Source,
        device: torch.device,
        *,
        precision: Precision | None = None,
    ) -> PreTrainedModel:
        """Load the original model, frozen, with identities in place of the dropped blocks."""
        dropped = set(_table(folder)["dropped"])
        attention_types = getattr(source.config.get_text_config(), "layer_types", None)
        identities = {
            block: IdentityBlock(attention_types[index] if attention_types else None)
            for index, block in enumerate(block_stack(source))
            if block in dropped
        }
        packed = source.emulated(_quantized(folder, source))
        model = load_quantized(source, packed, device, precision, identities, folder)
        first_block = model.get_submodule(block_stack(source)[0])
        for identity in identities.values():
            identity.follow(first_block)
        return model

    def residual(
        self,
        folder: Path,
        source: Source,
        layer: str,
        device: torch.device = CPU,
        *,
        precision: Precision | None = None,
    ) -> Tensor | None:
        """Original minus dequantised weight, quantised anew here; None if it is not quantised.

        Layers of dropped blocks are never adapted, so nobody needs their residual.
        """
        if layer not in _quantized(folder, source):
            return None
        return quantization_residual(folder, source, layer, device, precision)


def kept_block_indices(count: int, first: int, last: int, middle: int) -> list[int]:
    """Indices of the kept blocks: `first` and `last` at the ends, `middle` >= 2 evenly between.

    Of M blocks in the middle, S are kept. The j-th of these is round(j * stride), where the stride
    (M - 1) / (S - 1) is a rounded float, and exact halves are rounded to even. So is it in the
    authors' code (`uniform_choose_layers`). To divide last would choose another block where the
    rounded stride moves a half, as for 15 of 30 blocks.

    Args:
        count: number of all blocks.
        first: blocks kept at the beginning.
        last: blocks kept at the end.
        middle: blocks kept between these, S.
    """
    between = count - first - last
    stride = (between - 1) / (middle - 1)
    steps = (round(j * stride) for j in range(middle))
    return [*range(first), *(first + step for step in steps), *range(count - last, count)]


def block_stack(source: Source) -> list[str]:
    """Names of the model's numbered blocks, in order.

    If the model has several stacks, such as that of a vision tower, the blocks are the decoder's.
    """
    blocks = list(by_block(block_linears(source)))
    if len({block.rpartition(".")[0] for block in blocks}) > 1:
        prefix = Decoder(source).prefix
        blocks = [block for block in blocks if block.startswith(prefix)]
    return blocks


def _size(counted: dict[str, int], block: str) -> int:
    """Number of parameters of a block, of those in `counted` (name -> number)."""
    return sum(count for name, count in counted.items() if name.startswith(f"{block}."))


def _quantized(folder: Path, source: Source) -> list[str]:
    """Names of the layers that the emulator in `folder` quantises."""
    table = _table(folder)
    if table["bits"] == MODEL_BITS:
        return []
    dropped = set(table["dropped"])
    return [layer for layer in block_linears(source) if block_of(layer) not in dropped]


def _table(folder: Path) -> dict[str, Any]:
    """The blocks and bits in the emulator's `layers.json`."""
    table: dict[str, Any] = json.loads((folder / "layers.json").read_text())
    return table
