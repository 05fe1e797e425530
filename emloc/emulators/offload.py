"""The original model with its blocks offloaded to host memory: LoRA in less device memory.

Two libraries were tried and do not fit: with accelerate's `cpu_offload` the adapter gets no
gradients, and FSDP2's `CPUOffloadPolicy` rejects packed weights. `emloc bench offload_8b` compares
this emulator with FSDP2.
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
from emloc.emulators.full import Full, block_linears, quantized_layers
from emloc.emulators.packed_weights import packed_weight
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.precision import Precision, require_format
from emloc.runtime.distributed import is_sharded
from emloc.runtime.progress import tracked
from emloc.tensors.nn.streamed import StreamedBlocks
from emloc.tensors.nn.surgery import replace_tensor


@dataclass(frozen=True, kw_only=True)
class Offload(Full):
    """The original model with at most two blocks on the device; packed blocks are copied packed."""

    keeps_weights = False  # a block's weights reach the device only when the block runs
    recomputes = True
    unanchored = "computes the original itself, so there is nothing to put back"

    def plan(self, source: Source, layers: Layers, budget: Compression) -> None:
        """Return None: every layer is kept.

        Raises:
            ConfigError: the bits are still `auto`, or the launch uses FSDP.
        """
        super().plan(source, layers, budget)
        _require_unsharded()

    def open(
        self,
        folder: Path,
        source: Source,
        device: torch.device,
        *,
        precision: Precision | None = None,
    ) -> PreTrainedModel:
        """Load the original model, frozen, with its numbered blocks in host memory.

        Raises:
            ConfigError: the launch uses FSDP, the checkpoint lacks a parameter, or blocks share
                one.
        """
        _require_unsharded()
        layers = set(source.emulated(quantized_layers(folder)))
        return load_streamed(source, layers, device, precision, folder)


def load_streamed(
    source: Source,
    quantized: Collection[str],
    device: torch.device,
    precision: Precision | None = None,
    folder: Path | None = None,
) -> PreTrainedModel:
    """Load the original model, frozen, with its blocks in host memory, streamed to `device`.

    Args:
        source: the original model.
        quantized: names of the linears to quantise.
        device: where the model computes.
        precision: packed format of these linears.
        folder: of the emulator; see `packed_weight`.

    Raises:
        ValueError: `precision` is None, and there are layers to quantise.
        ConfigError: the checkpoint lacks a parameter, or blocks share one.
    """
    model = source.skeleton()
    layers_by_block = by_block(block_linears(source))
    formats = dict.fromkeys(quantized, require_format(precision)) if quantized else {}
    streamed = StreamedBlocks(
        [_streamed_tensors(source, model, name, formats) for name in layers_by_block], device
    )
    for index, layers in enumerate(
        tracked(layers_by_block.values(), "offload", len(layers_by_block), "block")
    ):
        views = streamed.views(index)
        block_formats = {layer: formats[layer] for layer in layers if layer in formats}
        _read_block(source, model, views, block_formats, device, folder)
        streamed.store(index)
    block_parameters = {name: p for name, p in model.named_parameters() if not p.is_meta}
    parameters = [name for name, p in model.named_parameters() if p.is_meta]
    source.fill(model, [*parameters, *source.buffers], device)
    model.tie_weights()
    parameters = [name for name, p in model.named_parameters() if p.is_meta]
    source.require([*parameters, *source.buffers])
    for name, parameter in block_parameters.items():
        if model.get_parameter(name) is not parameter:
            raise ConfigError(
                f"{name} is shared with another layer, so it cannot be offloaded with its block; "
                "set emulator=full"
            )
    streamed.attach([model.get_submodule(name) for name in layers_by_block])
    if quantized:
        require_format(precision).mark_model(model)
    return model.to(device).requires_grad_(False)


def _require_unsharded() -> None:
    """Raise ConfigError if this launch shards weights by FSDP."""
    if is_sharded():
        raise ConfigError(
            "emulator=offload keeps whole blocks in host memory, and FSDP would split them; "
            "launch without FSDP, or set emulator=full"
        )


def _streamed_tensors(
    source: Source, model: PreTrainedModel, block: str, formats: Mapping[str, Precision]
) -> dict[str, Tensor]:
    """Tensors of a block that are streamed: name -> meta tensor of the right shape and dtype.

    `formats` is layer -> packed format. Parameters of the block module itself, such as a layer
    scale, stay on the device, since the block may read them before it calls a submodule.
    """
    tensors: dict[str, Tensor] = {}
    for leaf, parameter in model.get_submodule(block).named_parameters():
        name = f"{block}.{leaf}"
        layer = name.removesuffix(".weight")
        if layer in formats:
            matrix = formats[layer].meta_matrix(*source.linears[layer], source.dtype)
            tensors |= {f"{layer}.{part}": tensor for part, tensor in matrix.parts.items()}
        elif "." in leaf:
            tensors[name] = torch.empty(parameter.shape, dtype=source.dtypes[name], device="meta")
    return tensors


def _read_block(
    source: Source,
    model: PreTrainedModel,
    views: dict[str, Tensor],
    formats: Mapping[str, Precision],
    device: torch.device,
    folder: Path | None,
) -> None:
    """Read a block into its device buffer and make the parameters of `model` views of the buffer.

    `views` is name -> view of the buffer; layers in `formats` are quantised on the way.
    """
    packed_names = {
        f"{layer}.{part}"
        for layer, precision in formats.items()
        for part in precision.layout(*source.linears[layer])
    }
    for name, tensor in source.read([name for name in views if name not in packed_names], device):
        replace_tensor(model, name, tensor)  # checks the shape; `copy_` alone would broadcast
        replace_tensor(model, name, views[name].copy_(tensor))
    for layer, precision in formats.items():
        matrix = packed_weight(source, layer, device, precision, folder)
        parts = {p: views[f"{layer}.{p}"].copy_(tensor) for p, tensor in matrix.parts.items()}
        in_buffer = replace(matrix, parts=parts)
        model.set_submodule(layer, precision.linear(in_buffer, views.get(f"{layer}.bias")))
