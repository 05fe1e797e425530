"""The original model itself: LoRA as everybody knows it, and the upper bound; packed: QLoRA."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.calibration.calibrate import Layers
from emloc.config.settings import Compression
from emloc.emulators import BuildInputs, Emulator
from emloc.emulators.size import size_facts, solved
from emloc.models.checkpoint.source import CPU, Source
from emloc.precision import PackedLayer, Precision, require_format
from emloc.runtime.progress import tracked

# What is quantised: not embeddings, head or projector, as in QLoRA.
IN_A_BLOCK = r".*\.\d+\..*"


@dataclass(frozen=True, kw_only=True)
class Full(Emulator):
    """Every layer whole. The artifact is a reference: no weight is copied.

    In a packed format every linear of the numbered blocks is quantised while it is read.
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
        build_inputs: BuildInputs,
        *,
        device: torch.device,
        host_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Write in `layers.json` which layers are quantised; the size for the record."""
        packed = in_blocks(source) if build_inputs.precision else []
        held = {layer: [source.linears[layer]] for layer in packed}
        table = {layer: {"bits": build_inputs.bits} for layer in held}
        (folder / "layers.json").write_text(json.dumps(table, indent=1))
        return size_facts(source, held, build_inputs.precision)

    def open(
        self,
        folder: Path,
        source: Source,
        device: torch.device,
        *,
        precision: Precision | None = None,
    ) -> PreTrainedModel:
        """The original model, frozen; what is quantised, one weight at a time."""
        return load_quantized(source, quantized_layers(folder), device, precision)

    def residual(
        self,
        folder: Path,
        source: Source,
        layer: str,
        device: torch.device = CPU,
        *,
        precision: Precision | None = None,
    ) -> Tensor | None:
        """What quantising, done again here, takes from the weight; None for a layer left whole."""
        if layer not in quantized_layers(folder):
            return None
        return rounding(source, layer, device, precision)


def rounding(
    source: Source, layer: str, device: torch.device, precision: Precision | None
) -> Tensor:
    """What a packed format takes from a weight (out, in), in float64."""
    weight = source.weight(layer, device)
    packed = require_format(precision).quantize(weight)
    return weight.double().sub_(packed.dequantize().double())


def in_blocks(source: Source) -> list[str]:
    """The linears of the numbered blocks."""
    return [layer for layer in source.linears if re.fullmatch(IN_A_BLOCK, layer)]


def load_quantized(
    source: Source,
    layers: Sequence[str],
    device: torch.device,
    precision: Precision | None,
    others: Mapping[str, nn.Module] | None = None,
) -> PreTrainedModel:
    """The original, frozen, with these layers packed; one of their weights at a time is whole.

    `others`: modules to put in the place of the model's own beside them, by name.

    Raises:
        ValueError: there are such layers, and no format.
    """
    replace = dict(others or {})
    for layer in tracked(layers, "quantize", len(layers), "layer"):
        held = require_format(precision)
        weight = held.quantize(source.weight(layer, device))
        replace[layer] = held.linear(weight, source.bias(layer, device))
    model = source.load(device, replace)
    if precision and any(isinstance(module, PackedLayer) for module in replace.values()):
        precision.announce(model)
    return model


def quantized_layers(folder: Path) -> list[str]:
    """The layers that are quantised. The file is always there: a lost one does not mean none."""
    return list(json.loads((folder / "layers.json").read_text()))
