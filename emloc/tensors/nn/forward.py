"""Which arguments the forward of a model accepts, and the model inside its wrappers."""

from __future__ import annotations

import inspect
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel


def unwrap(model: Any) -> Any:
    """Return the model of transformers inside the wrappers of accelerate and PEFT."""
    inner = extract_model_from_parallel(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def accepts_use_cache(model: nn.Module) -> bool:
    """Whether the model's forward accepts `use_cache`, itself or through `**kwargs`."""
    parameters = inspect.signature(model.forward).parameters
    is_open = isinstance(model, PreTrainedModel) and _accepts_any_keyword(model)
    return "use_cache" in parameters or is_open


def accepts_item_count(model: Any) -> bool:
    """Whether the model divides its loss by `num_items_in_batch`, not by the tokens of one batch.

    The rule is that of transformers' Trainer: the class has `accepts_loss_kwargs`, or its forward
    accepts any keyword.
    """
    inner = unwrap(model)
    if hasattr(inner, "accepts_loss_kwargs"):
        return bool(inner.accepts_loss_kwargs)
    return _accepts_any_keyword(inner)


def _accepts_any_keyword(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
