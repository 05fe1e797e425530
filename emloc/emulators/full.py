"""The original model itself: LoRA as everybody knows it, and the upper bound; in nf4: QLoRA."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from emloc.calibrate import Layers
from emloc.emulators import Emulator, Given
from emloc.emulators.size import size_facts, solved
from emloc.nn.nf4 import Nf4, Nf4Linear
from emloc.settings import Compression
from emloc.source import CPU, Source

# What is quantised: not embeddings, head or projector, as in QLoRA.
IN_A_BLOCK = r".*\.\d+\..*"


@dataclass(frozen=True, kw_only=True)
class Full(Emulator):
    """Every layer whole. The artifact is a reference: no weight is copied.

    At 4 bits every linear of the numbered blocks is quantised to nf4 while it is read.
    """

    def plan(self, source: Source, layers: Layers, budget: Compression) -> None:
        """No ranks.

        Raises:
            ConfigError: the bits are not solved for.
        """
        solved(budget.bits)

    def build(
        self,
        folder: Path,
        source: Source,
        given: Given,
        *,
        device: torch.device,
        host_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Write in `layers.json` which layers are quantised; the size for the record."""
        held = {layer: [source.linears[layer]] for layer in in_blocks(source) if given.bits == 4}
        table = {layer: {"bits": given.bits} for layer in held}
        (folder / "layers.json").write_text(json.dumps(table, indent=1))
        return size_facts(source, held, given.bits)

    def open(self, folder: Path, source: Source, device: torch.device) -> PreTrainedModel:
        """The original model, frozen; what is quantised, one weight at a time."""
        return load_quantized(source, quantized_layers(folder), device)

    def residual(
        self, folder: Path, source: Source, layer: str, device: torch.device = CPU
    ) -> Tensor | None:
        """What quantising, done again here, takes from the weight; None for a layer left whole."""
        return rounding(source, layer, device) if layer in quantized_layers(folder) else None


def rounding(source: Source, layer: str, device: torch.device) -> Tensor:
    """What nf4 takes from a weight (out, in), in float64."""
    weight = source.weight(layer, device)
    return weight.double().sub_(Nf4.quantize(weight).dequantize().double())


def in_blocks(source: Source) -> list[str]:
    """The linears of the numbered blocks."""
    return [layer for layer in source.linears if re.fullmatch(IN_A_BLOCK, layer)]


def load_quantized(
    source: Source,
    layers: Sequence[str],
    device: torch.device,
    others: Mapping[str, nn.Module] | None = None,
) -> PreTrainedModel:
    """The original, frozen, with these layers in nf4; one of their weights at a time is whole.

    `others`: modules to put in the place of the model's own beside them, by name.
    """
    replace = dict(others or {})
    replace |= {
        layer: Nf4Linear(Nf4.quantize(source.weight(layer, device)), source.bias(layer, device))
        for layer in tqdm(layers, "quantize", unit="layer", disable=not layers)
    }
    model = source.load(device, replace)
    if any(isinstance(module, Nf4Linear) for module in replace.values()):
        model.is_loaded_in_4bit = True  # what PEFT asks for
    return model


def quantized_layers(folder: Path) -> list[str]:
    """The layers that are quantised. The file is always there: a lost one does not mean none."""
    return list(json.loads((folder / "layers.json").read_text()))
