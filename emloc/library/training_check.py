"""The emulator's own guards: what cannot be recovered or saved is refused before it costs time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from emloc.adapters.recoverable import adapters_of, has_adapter, require_plain_lora
from emloc.calibration.offload import tensors_in
from emloc.errors import ConfigError
from emloc.library.identity import require_trained_on, stamp_of

# Attribute of an emulator: the active adapters and the configurations that were checked last.
_CHECKED = "_emloc_checked"


def guard(emulator: nn.Module) -> None:
    """Let the emulator check its adapter at its first training step, and refuse `save_pretrained`.

    Both guards are functions of a module, so that an emulator can be copied and pickled.
    """
    # PEFT looks for the vocabulary of the base model under the emulator's name, at each save.
    warnings.filterwarnings("ignore", r"Could not find a config file in .* \(emulator ")
    emulator.register_forward_pre_hook(check_before_training, with_kwargs=True)
    for method in ("save_pretrained", "push_to_hub"):
        if hasattr(emulator, method):
            vars(emulator)[method] = _refuse_to_save


def check_before_training(
    emulator: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse a training step with an adapter that cannot be recovered; a forward pre-hook.

    Raises:
        ConfigError: the adapter is no plain LoRA, or was not attached to this emulator.
    """
    if not torch.is_grad_enabled():
        return
    if (reason := _reason_to_refuse(emulator)) is not None:
        raise ConfigError(reason)
    if torch.compiler.is_compiling() or not emulator.training or has_adapter(emulator):
        return
    if any(tensor.requires_grad for tensor in _inputs(args, kwargs)):
        raise ConfigError(
            "the emulator is trained by its inputs (prompt or prefix tuning), which cannot be "
            "recovered for the original model; use peft.get_peft_model with a LoraConfig"
        )


# Without the decorator, torch.compile would compile the check. It runs it once instead.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _reason_to_refuse(emulator: nn.Module) -> str | None:
    """Return why the adapter on the emulator cannot be recovered; None if it can, or if none is.

    The answer is looked for once for each adapter, not at each step.
    """
    active, configs = adapters_of(emulator)
    checked_active, checked_configs = vars(emulator).get(_CHECKED, ([], []))
    pairs = zip(configs, checked_configs, strict=False)
    if (
        active == checked_active
        and len(configs) == len(checked_configs)
        and all(one is other for one, other in pairs)
    ):
        return None
    if not has_adapter(emulator) or not any(one.requires_grad for one in emulator.parameters()):
        return None
    if getattr(emulator, "_hf_peft_config_loaded", False):
        return "the adapter was attached by add_adapter; use peft.get_peft_model(emulator, ...)"
    try:
        name, config = require_plain_lora(emulator)
        stamp = stamp_of(emulator)
        assert stamp is not None
        require_trained_on(config, stamp, f"adapter {name!r}")
    except ConfigError as error:
        return str(error)
    vars(emulator)[_CHECKED] = active, configs
    return None


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments of a forward pass, and those of a cache of keys."""
    yield from tensors_in((args, kwargs))
    for layer in getattr(kwargs.get("past_key_values"), "layers", ()):
        yield from tensors_in([getattr(layer, "keys", None), getattr(layer, "values", None)])


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """Stand in for `save_pretrained` and `push_to_hub`, whose files would load as random layers."""
    raise ConfigError(
        "save_pretrained would write factors that from_pretrained replaces by random weights; use "
        "emloc.save_emulator(emulator, folder), and tuned.save_pretrained(folder) for the adapter"
    )
