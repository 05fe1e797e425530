"""The original model as its own emulator: plain LoRA, or QLoRA if its linears are packed."""

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

from emloc.calibration.blockwise import by_block
from emloc.calibration.calibrate import Layers
from emloc.calibration.offload import UNLIMITED, StateLimits
from emloc.config.settings import MODEL_BITS, Compression
from emloc.emulators import BuildInputs, Emulator
from emloc.emulators.packed_weights import packed_weight, write_packed
from emloc.emulators.size import require_solved, size_facts
from emloc.models.block_names import IN_A_BLOCK
from emloc.models.checkpoint.source import CPU, Source
from emloc.models.coverage import require_linear_blocks
from emloc.precision import PackedLayer, Precision, require_format
from emloc.runtime.progress import tracked


@dataclass(frozen=True, kw_only=True)
class Full(Emulator):
    """The original model; its artifact holds the list of quantised layers.

    In a packed format, every linear of the numbered blocks is quantised: while it is read, or when
    the emulator is built if the format has error feedback (see `packed_weights`).
    """

    leaves_out_tower = True

    def plan(self, source: Source, layers: Layers, budget: Compression) -> None:
        """Return None: every layer is kept.

        Raises:
            ConfigError: the bits are still `auto`, or the weights are packed and most parameters
                are in no linear layer.
        """
        require_packable(source, require_solved(budget.bits))

    def build(
        self,
        folder: Path,
        source: Source,
        build_inputs: BuildInputs,
        *,
        device: torch.device,
        limits: StateLimits = UNLIMITED,
    ) -> dict[str, Any]:
        """Write the list of quantised layers to `layers.json`; return the size of the model."""
        packed = block_linears(source) if build_inputs.precision else []
        stored = {layer: [source.linears[layer]] for layer in packed}
        table = {layer: {"bits": build_inputs.bits} for layer in stored}
        write_packed(folder, source, packed, build_inputs, device=device, limits=limits)
        (folder / "layers.json").write_text(json.dumps(table, indent=1))
        return size_facts(source, stored, build_inputs.precision) | build_inputs.sample_facts

    def open(
        self,
        folder: Path,
        source: Source,
        device: torch.device,
        *,
        precision: Precision | None = None,
    ) -> PreTrainedModel:
        """Load the original model, frozen; packed layers are read and quantised one by one."""
        layers = source.emulated(quantized_layers(folder))
        return load_quantized(source, layers, device, precision, folder=folder)

    def residual(
        self,
        folder: Path,
        source: Source,
        layer: str,
        device: torch.device = CPU,
        *,
        precision: Precision | None = None,
    ) -> Tensor | None:
        """Original minus dequantised weight; None if it is not quantised."""
        if layer not in quantized_layers(folder):
            return None
        return quantization_residual(folder, source, layer, device, precision)


def quantization_residual(
    folder: Path, source: Source, layer: str, device: torch.device, precision: Precision | None
) -> Tensor:
    """Original minus dequantised weight (out, in) of a layer of the emulator in `folder`.

    Both are in float64.

    Raises:
        ValueError: `precision` is None.
    """
    packed = packed_weight(source, layer, device, require_format(precision), folder)
    return source.weight(layer, device).double().sub_(packed.dequantize().double())


def require_packable(source: Source, bits: int) -> None:
    """Check that a packed format holds most parameters of the blocks.

    Raises:
        ConfigError: most of them are in no linear layer.
    """
    if bits != MODEL_BITS:
        require_linear_blocks(
            source.meta_model,
            by_block(block_linears(source)),
            f"compression.bits={bits}",
            f"set model to another, or compression.bits={MODEL_BITS}",
        )


def block_linears(source: Source) -> list[str]:
    """Names of the linears inside numbered blocks, such as `model.layers.3.mlp.up_proj`.

    Only these are quantised, not embeddings, head and projector, as in QLoRA.
    """
    return [layer for layer in source.linears if re.fullmatch(IN_A_BLOCK, layer)]


def load_quantized(
    source: Source,
    layers: Sequence[str],
    device: torch.device,
    precision: Precision | None,
    replacements: Mapping[str, nn.Module] | None = None,
    folder: Path | None = None,
) -> PreTrainedModel:
    """Load the original model, frozen, with `layers` packed; one unpacked weight at a time.

    Args:
        source: the original model.
        layers: names of the linears to quantise.
        device: where the model is loaded.
        precision: the packed format.
        replacements: name -> module that replaces a module of the model.
        folder: of the emulator; see `packed_weight`.

    Raises:
        ValueError: `precision` is None, and there are layers to quantise.
    """
    modules = dict(replacements or {})
    for layer in tracked(layers, "quantize", len(layers), "layer"):
        packed_format = require_format(precision)
        weight = packed_weight(source, layer, device, packed_format, folder)
        modules[layer] = packed_format.linear(weight, source.bias(layer, device))
    model = source.load(device, modules)
    if precision and any(isinstance(module, PackedLayer) for module in modules.values()):
        precision.mark_model(model)
    return model


def quantized_layers(folder: Path) -> list[str]:
    """Names of the quantised layers, from `layers.json`; a missing file is an error."""
    return list(json.loads((folder / "layers.json").read_text()))
