"""Put all of the lean path to work on a model that is about to be trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from emloc.adapters import Adapter
from emloc.config.settings import LoraSettings, TrainSettings
from emloc.models.objectives import Loss, Objective
from emloc.runtime.distributed import sharded
from emloc.tensors.lean.activations import offload_layer_inputs
from emloc.tensors.lean.model import offload_embedding, recompute_layers
from emloc.tensors.lean.modules import fuse_modules

log = logging.getLogger(__name__)


def obstacle(lora: LoraSettings, dtype: torch.dtype) -> str | None:
    """The override without which a training is not lean; None if it can be.

    With dropout a LoRA is no part of the layer's product; gradients in float16 have to be scaled;
    and shards of weights only PEFT's and transformers' own modules gather.
    """
    for stands, override in (
        (lora.dropout > 0, "lora.dropout=0"),
        (dtype == torch.float16, "model.dtype=bfloat16"),
        (sharded(), "ACCELERATE_USE_FSDP=false"),
    ):
        if stands:
            return override
    return None


def prepare(
    model: Any, adapter: Adapter, recipe: TrainSettings, objective: Objective
) -> tuple[bool, Loss | None]:
    """Make `model`, which `adapter` is attached to, lean.

    Returns:
        Whether layers and adapter are one operation, which then casts by itself; else they need
        autocast, and everything else is as lean. And the leaner loss of the objective; None where
        its own has to stay.
    """
    fused = adapter.fuse(model)
    inner = adapter.base(model)
    dtype = inner.dtype  # asked now: packed layers have none, and then only the LoRA would
    saved = offload_embedding(inner)
    # A gated MLP is computed in place of what comes out of its layers. A fused layer keeps none of
    # it for its backward pass; of others that is not known.
    shorter = fuse_modules(inner, dtype) if fused else []
    loss = objective.lean_loss(inner)
    if recipe.checkpointing:
        recompute_layers(inner)
    if recipe.host_activations:
        offload_layer_inputs(inner)
    saved = saved if inner.device.type == "cuda" else 0
    log.info("%s", savings(fused, shorter, saved, loss is not None))
    return fused, loss


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
        "each layer and its adapter are one operation" if fused else "",
        f"fused {', '.join(modules)}" if modules else "",
        f"the embedding table is in host memory ({gigabytes} less on the GPU)"
        if embedding_bytes
        else "",
        "the loss is computed in chunks" if chunked else "",
    ]
    words = "; ".join(way for way in ways if way)
    return f"train: less memory and time by train.lean=true: {words or 'nothing applies'}"
