"""The whole state of a model: its parameters and the buffers that a checkpoint stores."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from emloc.errors import ConfigError
from emloc.models.checkpoint.files import StoredTensor
from emloc.models.checkpoint.origins import Direct, Layout, Origin, is_quantised
from emloc.models.checkpoint.quantized import FLOATS, is_scale, quantized_error

log = logging.getLogger(__name__)

# Buffers that used to be stored, with a name at whose end transformers ignores the stored tensor.
_FORMER_BUFFERS = {
    "rotary_emb.inv_freq": r"rotary_emb\.inv_freq",
    "position_ids": r"(^|\.)position_ids$",
}


def persistent_buffers(model: nn.Module) -> list[str]:
    """Names of the buffers that a checkpoint of the model stores."""
    stored = model.state_dict().keys()
    return [name for name, _ in model.named_buffers() if name in stored]


def optional_names(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Those of `names` that a checkpoint may lack, by the rules of `from_pretrained`."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def state_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name -> dtype in which `from_pretrained(dtype=dtype)` loads a parameter or buffer.

    It is the dtype in a new model, or float32 where the class of the model asks for that.
    """
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    in_float32 = build_glob_alternation(list(plan))[0] if plan else None
    return {
        name: torch.float32 if in_float32 and in_float32.search(name) else tensor.dtype
        for name, tensor in model.state_dict().items()
    }


def checked_layout(layout: Layout, model: PreTrainedModel, fresh: Sequence[str] = ()) -> Layout:
    """A layout for this model alone, which refuses tensors that the model cannot have.

    Tensors that belong to no parameter are reported and left out. A tied parameter that is not
    stored has the origin of the parameter that it is tied to.

    Args:
        layout: where parameters are stored.
        model: on the meta device, with all its parameters.
        fresh: names of modules whose stored tensors are not used.
    """
    state = model.state_dict()
    prefixes = tuple(f"{name}." for name in fresh)

    def checked(tensors: Sequence[StoredTensor]) -> dict[str, Origin]:
        """Parameter name -> origin.

        Raises:
            ConfigError: tensors are quantised in a format that is not read, or have other shapes
                than the parameters of the model.
        """
        origins = {
            name: origin
            for name, origin in layout(tensors).items()
            if not name.startswith(prefixes)
        }
        _report_unexpected(model, {n: o for n, o in origins.items() if n not in state})
        origins = {name: origin for name, origin in origins.items() if name in state}
        for name, origin in origins.items():
            _refuse_mismatch(name, origin, state[name])
        return origins | _tied_origins(model, origins)

    return checked


def _report_unexpected(model: PreTrainedModel, origins: Mapping[str, Origin]) -> None:
    """Log how many stored tensors belong to no parameter, as `from_pretrained` does.

    Raises:
        ConfigError: a tensor belongs to quantised weights.
    """
    for origin in origins.values():
        for stored in origin.inputs:
            if is_scale(stored.name):
                raise quantized_error(stored.file, stored.name, stored.dtype)
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    for ending, pattern in _FORMER_BUFFERS.items():
        if any(name.endswith(ending) for name in buffers):
            patterns.append(pattern)
    names = [name for name in origins if not any(re.search(item, name) for item in patterns)]
    if names:
        first = origins[names[0]].inputs[0]
        log.warning(
            "model: tensors in the files without a parameter in the model, which are not read: %d "
            "(first: %s in %s)",
            len(names),
            first.name,
            first.file.name,
        )


def _refuse_mismatch(name: str, origin: Origin, parameter: torch.Tensor) -> None:
    """Raise ConfigError if a stored tensor is not the parameter or buffer of the model.

    The shapes of converted tensors are only known when they are read.
    """
    for stored in origin.inputs if parameter.is_floating_point() else ():
        if stored.dtype not in FLOATS and not is_quantised(origin):
            raise quantized_error(stored.file, stored.name, stored.dtype)
    if isinstance(origin, Direct) and origin.part is None:
        stored = origin.tensor
        if stored.shape != tuple(parameter.shape):
            raise ConfigError(
                f"{stored.file}: {stored.name} has shape {stored.shape}, but {name} has shape "
                f"{tuple(parameter.shape)} in the model; set model.source to another checkpoint"
            )


def _tied_origins(model: PreTrainedModel, origins: Mapping[str, Origin]) -> dict[str, Origin]:
    """Origins of parameters that are not stored, but tied to a parameter that is."""
    tied: dict[str, Origin] = {}
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if source not in origins and target in origins:
            tied.setdefault(source, origins[target])
    return tied
