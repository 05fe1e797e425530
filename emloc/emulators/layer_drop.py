"""Offsite-tuning: the middle of a model thinned out, and a LoRA on the layers at both ends.

After Xiao et al., "Offsite-Tuning: Transfer Learning without Full Model" (2023), without its
distillation. A model has one stack of blocks; of a decoder and a vision tower, the decoder's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.calibration.blockwise import block_of, by_block
from emloc.calibration.calibrate import Layers
from emloc.config.settings import MODEL_BITS, Compression
from emloc.emulators import BuildInputs, Emulator, Plan
from emloc.emulators.full import in_blocks, load_quantized, rounding
from emloc.emulators.size import size_facts, solved
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import CPU, Source
from emloc.models.decoder import Decoder
from emloc.precision import Precision

# Of the middle, its first and its last block are always kept.
FEWEST = 2


class IdentityBlock(nn.Module):
    """In the place of a block: hands the hidden states on.

    Of a model whose blocks give a tensor, as those of transformers do but for a few hybrids.
    """

    def __init__(self, attention_type: str | None) -> None:
        super().__init__()
        self.attention_type = attention_type  # some models ask a block which mask it takes

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """(batch, length, width) as it comes."""
        return hidden_states


@dataclass(frozen=True, kw_only=True)
class LayerDrop(Emulator):
    """Whole blocks left out, evenly. All others keep their names and weights."""

    first: int  # blocks at the beginning that are kept and adapted
    last: int  # blocks at the end that are kept and adapted

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            if (count := getattr(self, name)) < 1:
                raise ConfigError(
                    f"emulator.{name} must be at least 1, got {count}; set emulator.{name}=2"
                )

    def plan(self, source: Source, layers: Layers, budget: Compression) -> Plan:
        """Names of the blocks that are adapted, of those kept beside them, and of those dropped.

        As many are kept as the ratio allows: of all parameters, or of those in `layers`.

        Raises:
            ConfigError: the ratio leaves less than two blocks in the middle, or there are none to
                drop.
        """
        ratio = solved(budget.ratio)
        counted = {f"{layer}.weight": rows * columns for layer, (rows, columns) in layers.items()}
        if budget.of == "model":
            counted = source.sizes
        blocks = stack_of(source)
        sizes = [_size(counted, block) for block in blocks]
        total = sum(counted.values())
        fixed = total - sum(sizes)
        shares = self._shares(sizes, fixed, total)
        if len(shares) < 2:
            raise ConfigError(
                f"emulator.first={self.first} and emulator.last={self.last} leave nothing to drop "
                f"of {len(blocks)} blocks, {FEWEST} between them being kept; set model to "
                "a deeper one, or emulator=svd"
            )
        middle = max((count for count, share in shares.items() if share <= ratio), default=None)
        if middle is None:
            least = ceil(1000 * shares[FEWEST]) / 1000
            thin = LayerDrop(first=1, last=1)._shares(sizes, fixed, total)[FEWEST] <= ratio
            raise ConfigError(
                f"compression.ratio={ratio:g} of the {budget.of} leaves less than {FEWEST} "
                f"blocks between emulator.first={self.first} and emulator.last={self.last}; set "
                f"compression.ratio={least:g} or higher"
                + (", or emulator.first=1 emulator.last=1" if thin else "")
            )
        kept = {blocks[index] for index in thinned(len(blocks), self.first, self.last, middle)}
        ends = [*blocks[: self.first], *blocks[-self.last :]]
        return {
            "adapted": ends,
            "kept": [block for block in blocks if block in kept and block not in ends],
            "dropped": [block for block in blocks if block not in kept],
        }

    def _shares(self, sizes: Sequence[int], fixed: int, total: int) -> dict[int, float]:
        """Blocks kept in the middle -> share of all that is counted."""
        depth, ends = len(sizes), (self.first, self.last)
        return {
            count: (fixed + sum(sizes[index] for index in thinned(depth, *ends, count))) / total
            for count in range(FEWEST, depth - sum(ends) + 1)
        }

    def build(
        self,
        folder: Path,
        source: Source,
        build_inputs: BuildInputs,
        *,
        device: torch.device,
        host_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Write which blocks are adapted, kept and dropped; only kept ones are ever packed."""
        plan = build_inputs.plan
        assert plan is not None
        (folder / "layers.json").write_text(
            json.dumps({**plan, "bits": build_inputs.bits}, indent=1)
        )
        dropped = set(plan["dropped"])
        held = {
            layer: [] if block_of(layer) in dropped else [source.linears[layer]]
            for layer in in_blocks(source)
        }
        whole = {n: c for n, c in source.sizes.items() if n.removesuffix(".weight") not in held}
        gone = sum(_size(whole, block) for block in dropped)
        return size_facts(source, held, build_inputs.precision, gone) | {"dropped": len(dropped)}

    def targets(self, folder: Path, layers: Sequence[str]) -> list[str]:
        """Those in the blocks at both ends."""
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
        """The original, frozen, with nothing where its dropped blocks were."""
        dropped = set(_table(folder)["dropped"])
        kinds = getattr(source.config.get_text_config(), "layer_types", None)
        skipped = {
            block: IdentityBlock(kinds[index] if kinds else None)
            for index, block in enumerate(stack_of(source))
            if block in dropped
        }
        return load_quantized(source, _quantized(folder, source), device, precision, skipped)

    def residual(
        self,
        folder: Path,
        source: Source,
        layer: str,
        device: torch.device = CPU,
        *,
        precision: Precision | None = None,
    ) -> Tensor | None:
        """What quantising, done again here, takes from the weight; None for a layer left whole.

        Of a dropped block nothing is adapted, and so nothing is asked.
        """
        if layer not in _quantized(folder, source):
            return None
        return rounding(source, layer, device, precision)


def thinned(count: int, first: int, last: int, middle: int) -> list[int]:
    """Indices of the blocks that are kept: the ends, and `middle` >= 2 evenly between them.

    The j-th of S among M is round(j (M - 1) / (S - 1)), halves to even, as in the authors' code.
    """
    between = count - first - last
    steps = (round(j * (between - 1) / (middle - 1)) for j in range(middle))
    return [*range(first), *(first + step for step in steps), *range(count - last, count)]


def stack_of(source: Source) -> list[str]:
    """Names of the blocks of the model's one numbered stack, in order.

    Where a vision tower has another, of the language decoder's.
    """
    blocks = list(by_block(in_blocks(source)))
    if len({block.rpartition(".")[0] for block in blocks}) > 1:
        inside = Decoder(source).prefix
        blocks = [block for block in blocks if block.startswith(inside)]
    return blocks


def _size(counted: dict[str, int], block: str) -> int:
    return sum(count for name, count in counted.items() if name.startswith(f"{block}."))


def _quantized(folder: Path, source: Source) -> list[str]:
    table = _table(folder)
    if table["bits"] == MODEL_BITS:
        return []
    dropped = set(table["dropped"])
    return [layer for layer in in_blocks(source) if block_of(layer) not in dropped]


def _table(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "layers.json").read_text())
    return table
