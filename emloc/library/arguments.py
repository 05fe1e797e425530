"""Checks of what a user passes: models that are whole and plain, and batches that can be run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from emloc.adapters.recoverable import has_adapter, without_adapter
from emloc.calibration.blockwise import Batch, by_block
from emloc.errors import ConfigError
from emloc.library.identity import Stamp, stamp_of
from emloc.models.block_names import IN_A_BLOCK
from emloc.models.coverage import log_share, no_linear_reason, require_linear_blocks
from emloc.tensors.nn.factorized import Factorized

# Buffers of layers with packed weights (GPTQ, AWQ, compressed-tensors), which are no parameters.
_PACKED_BUFFERS = ("qweight", "weight_packed", "qweight_packed")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of data parallelism and torch.compile."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def emulator_and_stamp(
    emulator: Any, call: str = "correct(adapter, model, emulator)"
) -> tuple[nn.Module, Stamp]:
    """Return the emulator without wrappers, and its stamp.

    `call` is the call that takes an emulator, for the message.

    Raises:
        ConfigError: it is no emulator.
    """
    model = base_model(emulator) if isinstance(emulator, nn.Module) else None
    stamp = stamp_of(model) if model is not None else None
    if model is None or stamp is None:
        raise ConfigError(
            f"emulator is no emulator but a {type(emulator).__name__}; call {call} with the "
            "emulator that emloc.build_emulator or load_emulator returned"
        )
    return model, stamp


def base_model(model: nn.Module) -> nn.Module:
    """Return the transformer inside a model of PEFT and other wrappers."""
    model = unwrapped(model)
    return unwrapped(without_adapter(model))


def original_model(model: Any) -> nn.Module:
    """Return the original model without wrappers, if its weights can be read and its blocks run.

    Raises:
        ConfigError: `model` is an emulator, has an adapter, is compiled, or has weights that are
            packed, sharded or not loaded.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a model (nn.Module), got {type(model).__name__}")
    model = unwrapped(model)
    if stamp_of(base_model(model)) or any(
        isinstance(module, Factorized) for module in model.modules()
    ):
        raise ConfigError("model is an emulator; pass the original model that it was built from")
    if has_adapter(model):
        raise ConfigError(
            "model has a PEFT adapter; pass the original without one: tuned.unload() takes an "
            "adapter off, tuned.merge_and_unload() merges it"
        )
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise ConfigError(
                f"{name or 'model'} is compiled; pass the model as it was before torch.compile"
            )
    _require_weights(model)
    return model


def _require_weights(model: nn.Module) -> None:
    """Check that every parameter is a whole floating-point tensor in memory."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigError(
                f"model: {name} is on the meta device and has no values; load the model whole "
                "(without offloading by device_map)"
            )
        if hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id"):
            raise ConfigError(f"model: {name} is sharded; pass the model before it is sharded")
        if not parameter.is_floating_point() or parameter.itemsize < 2:
            raise ConfigError(
                f"model: {name} is quantised ({str(parameter.dtype).removeprefix('torch.')}); load "
                "the model without quantization_config, or call model.dequantize()"
            )
    for name, _ in model.named_buffers():
        if name.rpartition(".")[2] in _PACKED_BUFFERS:
            raise ConfigError(
                f"model: {name} is a quantised weight; load the model without quantization_config"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shape = (module.out_features, module.in_features)
            if tuple(module.weight.shape) != shape:
                raise ConfigError(
                    f"model: {name}.weight has the shape {tuple(module.weight.shape)} and not "
                    f"{shape}; pass the model before it is sharded or packed"
                )


def target_linears(model: nn.Module, targets: str | None) -> dict[str, nn.Linear]:
    """Return the linear layers whose full name matches `targets`, by name.

    A subclass of `nn.Linear` may do more than multiply by its weight, so it is left out.

    Raises:
        ConfigError: `targets` is no regular expression, no linear layer matches, one that matches
            lies outside the numbered blocks, or, without `targets`, most parameters of the blocks
            are in no linear layer.
    """
    try:
        pattern = re.compile(IN_A_BLOCK if targets is None else targets)
    except re.error as error:
        raise ConfigError(f"targets={targets!r} is no regular expression: {error}") from error
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and pattern.fullmatch(name)
    }
    if not linears:
        if reason := no_linear_reason(model):
            raise ConfigError(f"the model cannot be emulated: {reason}; pass another model")
        raise ConfigError(f"targets={pattern.pattern!r} matches no linear layer of the model")
    blocks = by_block(linears)
    if targets is None:
        override = "pass targets to compress these alone"
        require_linear_blocks(model, blocks, "build_emulator", override)
    else:
        log_share(model, blocks, "build_emulator works on linear layers")
    return linears


def batches_of(batches: Any, model: nn.Module) -> list[Batch]:
    """Return the batches as a list, which is run several times: a generator is read once.

    Raises:
        ConfigError: there is no batch, or one of them is no mapping, is empty, has nothing but
            padding, or has an argument that the model's forward does not take.
    """
    if isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"batches must be a list of batches, got {type(batches).__name__}; pass [batch] for one"
        )
    batch_list = list(batches)
    if not batch_list:
        raise ConfigError(
            "batches is empty: an emulator is built from samples of the task; pass a few dozen"
        )
    for index, batch in enumerate(batch_list):
        require_batch(batch, f"batches[{index}]", model)
    return batch_list


def require_batch(batch: Any, where: str, model: nn.Module) -> None:
    """Check one batch; `where` names it in messages.

    Raises:
        ConfigError: the batch is no mapping, is empty, has nothing but padding, or has an argument
            that the model's forward does not take.
    """
    if not isinstance(batch, Mapping) or not batch:
        raise ConfigError(
            f"{where} must be a dictionary of arguments of model.forward, such as input_ids; "
            f"got {batch!r:.60}"
        )
    parameters = inspect.signature(model.forward).parameters
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        for name in batch:
            if name not in parameters:
                raise ConfigError(
                    f"{where} has {name!r}, which {type(model).__name__}.forward does not take; "
                    "leave it out"
                )
    for name, value in batch.items():
        if isinstance(value, Tensor) and not value.numel():
            raise ConfigError(f"{where}: {name} is empty, shape {tuple(value.shape)}; leave it out")
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() != 2:
        raise ConfigError(
            f"{where}: attention_mask must have the shape (rows, tokens), got {tuple(mask.shape)}"
        )
    if isinstance(mask, Tensor) and not mask.any():
        raise ConfigError(f"{where} has nothing but padding: attention_mask is 0 throughout")


def require_finite(name: str, *tensors: Tensor) -> None:
    """Check that the tensors of the layer or parameter `name` are finite.

    Raises:
        ConfigError: one is not.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ConfigError(
            f"adapter: {name} is not finite, so its training has diverged; train it again with a "
            "lower learning rate"
        )
