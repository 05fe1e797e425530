"""Set up the memory-saving training path (`train.lean`) on a model before it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emloc.adapters import Adapter
from emloc.config.settings import LoraSettings, TrainSettings
from emloc.models.objectives import Loss, Objective
from emloc.runtime.distributed import is_sharded
from emloc.tensors.lean.activations import offload_layer_inputs
from emloc.tensors.lean.kernels import DEVICES
from emloc.tensors.lean.model import offload_embedding, recompute_layers
from emloc.tensors.lean.modules import fuse_modules


def required_override(lora: LoraSettings) -> str | None:
    """Return an override that the memory-saving path needs; None if it can be used already.

    Dropout keeps a LoRA from being fused with its layer.
    Sharded weights (FSDP) are only gathered by the modules of PEFT and transformers.
    """
    for is_obstacle, override in (
        (lora.dropout > 0, "lora.dropout=0"),
        (is_sharded(), "ACCELERATE_USE_FSDP=false"),
    ):
        if is_obstacle:
            return override
    return None


def prepare_model(
    model: Any, adapter: Adapter, recipe: TrainSettings, objective: Objective
) -> tuple[bool, Loss | None, str]:
    """Set up the memory-saving path on `model`, which `adapter` is already attached to.

    Returns:
        Whether each layer is fused with its adapter, the objective's chunked loss, and the log line
        that says what the path saves. A fused layer casts its operands itself; others need
        autocast, and the rest of the path works the same for both. The loss is None if the model
        has to use the objective's ordinary loss.
    """
    fused = adapter.fuse(model)
    inner = adapter.base(model)
    # Read before the embedding is offloaded: the dtype is that of the first floating-point
    # parameter, and without the embedding a packed model only has those of the LoRA.
    dtype = inner.dtype
    saved = offload_embedding(inner)
    # A fused MLP overwrites the outputs of its layers. A fused layer does not need its output in
    # the backward pass; other layers may.
    # A kernel takes the host as long as several operations of torch, unless a graph launches it.
    kernels = recipe.capture and inner.device.type in DEVICES
    shorter = fuse_modules(inner, dtype, kernels=kernels) if fused else []
    loss = objective.lean_loss(inner)
    if recipe.checkpointing:
        recompute_layers(inner)
    if recipe.host_activations:
        offload_layer_inputs(inner)
    saved = saved if inner.device.type == "cuda" else 0
    return fused, loss, savings(fused, shorter, saved, loss is not None)


def savings(fused: bool, modules: Sequence[str], embedding_bytes: int, chunked: bool) -> str:
    """The log line that says by what `train.lean` saves memory and time.

    Args:
        fused: whether each layer and its adapter are one operation.
        modules: classes of modules with a fused forward.
        embedding_bytes: device memory that the embedding table leaves free.
        chunked: whether the loss is computed in chunks.
    """
    gigabytes = f"{embedding_bytes / 1e9:.2f} GB"
    ways = [
        "each layer and its adapter run as one operation" if fused else "",
        f"{' and '.join(modules)} are fused" if modules else "",
        f"the embedding table stays in host memory ({gigabytes} less on the GPU)"
        if embedding_bytes
        else "",
        "the loss is computed in chunks" if chunked else "",
    ]
    words = ", ".join(way for way in ways if way)
    if not words:
        return "train: train.lean=true saves no memory with this model and adapter"
    return f"train: train.lean=true saves memory and time: {words}"
