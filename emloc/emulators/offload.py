"""The original model with its blocks in host memory: what LoRA gives, in less of the device.

Why not a well-kept engine: accelerate's `cpu_offload` leaves the adapter without gradients, and
FSDP2's `CPUOffloadPolicy` takes no packed weights. The latter is the peer of
`emloc bench offload_8b`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from emloc.calibration.blockwise import by_block
from emloc.calibration.calibrate import Layers
from emloc.config.settings import Compression
from emloc.emulators.full import Full, in_blocks, quantized_layers
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.precision import Precision, require_format
from emloc.runtime.distributed import sharded
from emloc.runtime.progress import tracked
from emloc.tensors.nn.streamed import StreamedBlocks
from emloc.tensors.nn.surgery import put


@dataclass(frozen=True, kw_only=True)
class Offload(Full):
    """Every layer whole, two blocks on the device at a time; packed ones travel packed."""

    keeps_weights = False  # not where an adapter could read them before a block is computed
    recomputes = True

    def plan(self, source: Source, layers: Layers, budget: Compression) -> None:
        """No ranks.

        Raises:
            ConfigError: the bits are not solved for, or FSDP is to split the weights.
        """
        super().plan(source, layers, budget)
        _refuse_shards()

    def open(
        self,
        folder: Path,
        source: Source,
        device: torch.device,
        *,
        precision: Precision | None = None,
    ) -> PreTrainedModel:
        """The original model, frozen; its numbered blocks are in host memory.

        Raises:
            ConfigError: FSDP is to split the weights, the checkpoint leaves a parameter without
                weights, or blocks share one.
        """
        _refuse_shards()
        return load_streamed(source, set(quantized_layers(folder)), device, precision)


def load_streamed(
    source: Source,
    quantized: Collection[str],
    device: torch.device,
    precision: Precision | None = None,
) -> PreTrainedModel:
    """The original, frozen, its blocks streamed to `device`; these layers packed.

    Raises:
        ValueError: there are such layers, and no format.
        ConfigError: the checkpoint leaves a parameter without weights, or blocks share one.
    """
    model = source.skeleton()
    names = by_block(in_blocks(source))
    packed = dict.fromkeys(quantized, require_format(precision)) if quantized else {}
    streamed = StreamedBlocks([_held(source, model, name, packed) for name in names], device)
    for index, layers in enumerate(tracked(names.values(), "offload", len(names), "block")):
        views = streamed.views(index)
        some = {layer: packed[layer] for layer in layers if layer in packed}
        _fill(source, model, views, some, device)
        streamed.keep(index)
    placed = {name: one for name, one in model.named_parameters() if not one.is_meta}
    source.fill(model, [n for n, one in model.named_parameters() if one.is_meta], device)
    model.tie_weights()
    source.require([name for name, one in model.named_parameters() if one.is_meta])
    for name, one in placed.items():
        if model.get_parameter(name) is not one:
            raise ConfigError(
                f"{name} is shared with another layer and cannot travel with its block; "
                "set emulator=full"
            )
    streamed.attach([model.get_submodule(name) for name in names])
    if quantized:
        require_format(precision).announce(model)
    return model.to(device).requires_grad_(False)


def _refuse_shards() -> None:
    if sharded():
        raise ConfigError(
            "emulator=offload keeps whole blocks in host memory, and FSDP would split them; "
            "launch without FSDP, or set emulator=full"
        )


def _held(
    source: Source, model: PreTrainedModel, block: str, packed: Mapping[str, Precision]
) -> dict[str, Tensor]:
    """What of a block is streamed: name -> a tensor of its shape and dtype.

    A parameter of the block itself, such as the scale of a layer, stays on the device: it could be
    read before any module inside the block is called.
    """
    held: dict[str, Tensor] = {}
    for leaf, parameter in model.get_submodule(block).named_parameters():
        name = f"{block}.{leaf}"
        layer = name.removesuffix(".weight")
        if layer in packed:
            matrix = packed[layer].nowhere(*source.linears[layer], source.dtype)
            held |= {f"{layer}.{part}": tensor for part, tensor in matrix.parts.items()}
        elif "." in leaf:
            held[name] = torch.empty(parameter.shape, dtype=source.dtype, device="meta")
    return held


def _fill(
    source: Source,
    model: PreTrainedModel,
    views: dict[str, Tensor],
    packed: Mapping[str, Precision],
    device: torch.device,
) -> None:
    """Read a block into its room and make its parameters look there; these layers packed."""
    own = {
        f"{layer}.{part}"
        for layer, precision in packed.items()
        for part in precision.layout(*source.linears[layer])
    }
    for name, tensor in source.read([name for name in views if name not in own], device):
        put(model, name, tensor)  # refuses another shape, which a copy would spread out
        put(model, name, views[name].copy_(tensor))
    for layer, precision in packed.items():
        matrix = precision.quantize(source.weight(layer, device))
        parts = {p: views[f"{layer}.{p}"].copy_(tensor) for p, tensor in matrix.parts.items()}
        there = replace(matrix, parts=parts)
        model.set_submodule(layer, precision.linear(there, views.get(f"{layer}.bias")))
