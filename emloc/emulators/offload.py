"""The original model with its blocks in host memory: what LoRA gives, in less of the device.

Why not a well-kept engine: accelerate's `cpu_offload` leaves the adapter without gradients, and
FSDP2's `CPUOffloadPolicy` takes no weights of four bits. The latter is the peer of
`emloc bench offload_8b`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from emloc.calibrate import Layers
from emloc.emulators.full import Full, in_blocks, quantized_layers
from emloc.errors import ConfigError
from emloc.nn.nf4 import PARTS, Nf4, Nf4Linear
from emloc.nn.streamed import Streamed
from emloc.nn.surgery import put
from emloc.ranks import sharded
from emloc.settings import Compression
from emloc.source import Source
from emloc.walk import by_block


@dataclass(frozen=True, kw_only=True)
class Offload(Full):
    """Every layer whole, two blocks on the device at a time; at 4 bits they travel in nf4."""

    keeps_weights = False  # not where an adapter could read them before a block is computed
    recomputes = True

    def plan(self, source: Source, layers: Layers, budget: Compression) -> None:
        """No ranks.

        Raises:
            ConfigError: the bits are not solved for, or FSDP is to split the weights.
        """
        super().plan(source, layers, budget)
        _refuse_shards()

    def open(self, folder: Path, source: Source, device: torch.device) -> PreTrainedModel:
        """The original model, frozen; its numbered blocks are in host memory.

        Raises:
            ConfigError: FSDP is to split the weights, the checkpoint leaves a parameter without
                weights, or blocks share one.
        """
        _refuse_shards()
        return load_streamed(source, set(quantized_layers(folder)), device)


def load_streamed(
    source: Source, quantized: Collection[str], device: torch.device
) -> PreTrainedModel:
    """The original, frozen, its blocks streamed to `device`; these layers in nf4.

    Raises:
        ConfigError: the checkpoint leaves a parameter without weights, or blocks share one.
    """
    model = source.skeleton()
    names = by_block(in_blocks(source))
    streamed = Streamed([_held(source, model, name, quantized) for name in names], device)
    for index, layers in enumerate(tqdm(names.values(), "offload", unit="block")):
        views = streamed.views(index)
        _fill(source, model, views, [layer for layer in layers if layer in quantized], device)
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
        model.is_loaded_in_4bit = True  # what PEFT asks for
    return model.to(device).requires_grad_(False)


def _refuse_shards() -> None:
    if sharded():
        raise ConfigError(
            "emulator=offload keeps whole blocks in host memory, and FSDP would split them; "
            "launch without FSDP, or set emulator=full"
        )


def _held(
    source: Source, model: PreTrainedModel, block: str, quantized: Collection[str]
) -> dict[str, Tensor]:
    """What of a block is streamed: name -> a tensor of its shape and dtype.

    A parameter of the block itself, such as the scale of a layer, stays on the device: it could be
    read before any module inside the block is called.
    """
    held: dict[str, Tensor] = {}
    for leaf, parameter in model.get_submodule(block).named_parameters():
        name = f"{block}.{leaf}"
        layer = name.removesuffix(".weight")
        if layer in quantized:
            packed = Nf4.nowhere(*source.linears[layer], source.dtype)
            held |= {f"{layer}.{part}": getattr(packed, part) for part in PARTS}
        elif "." in leaf:
            held[name] = torch.empty(parameter.shape, dtype=source.dtype, device="meta")
    return held


def _fill(
    source: Source,
    model: PreTrainedModel,
    views: dict[str, Tensor],
    quantized: list[str],
    device: torch.device,
) -> None:
    """Read a block into its room and make its parameters look there; these layers in nf4."""
    packed = {f"{layer}.{part}" for layer in quantized for part in PARTS}
    for name, tensor in source.read([name for name in views if name not in packed], device):
        put(model, name, tensor)  # refuses another shape, which a copy would spread out
        put(model, name, views[name].copy_(tensor))
    for layer in quantized:
        exact = Nf4.quantize(source.weight(layer, device))
        codes, absmax, scales = (
            views[f"{layer}.{part}"].copy_(getattr(exact, part)) for part in PARTS
        )
        matrix = Nf4(codes, absmax, scales, exact.shape, exact.dtype)
        model.set_submodule(layer, Nf4Linear(matrix, views.get(f"{layer}.bias")))
