"""The original with the adapter that is on its emulator, as a pass of anchors runs it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.adapters.recoverable import has_adapter, require_plain_lora
from emloc.anchors.record import Original
from emloc.errors import ConfigError
from emloc.library.arguments import require_finite
from emloc.library.identity import tensor_digest
from emloc.runtime.digest import digest
from emloc.tensors.nn.factorized import Factorized
from emloc.tensors.nn.surgery import replace_tensor, with_modules

# Settings of a LoRA that say how it acts on its layers.
_ACTION = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
# What PEFT adds to the name of a module that is trained in full: the name of the adapter.
_TRAINED_MODULE = re.compile(r"\.modules_to_save\.[^.]+")


class MemoryWeights:
    """Moves the weights of a model in memory to a device block by block.

    It has the methods of a checkpoint's reader that a blockwise forward uses.
    """

    def __init__(self, tensors: dict[str, Tensor], shared: Mapping[str, list[str]]) -> None:
        self._tensors = tensors
        self._shared = shared  # name of a parameter -> other names of the same parameter

    @property
    def buffers(self) -> list[str]:
        """No names: `fill` moves all buffers."""
        return []

    def read_ahead(self, names: Sequence[str], *, pinned: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield nothing, since all weights are in memory."""
        return iter(())

    def fill(
        self,
        model: nn.Module,
        names: Iterable[str],
        device: torch.device,
        ahead: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put named parameters of `model` on `device`; move all buffers there."""
        for name in names:
            replace_tensor(model, name, self._tensors[name].to(device))
            for other in self._shared.get(name, []):
                owner, _, leaf = other.rpartition(".")
                setattr(model.get_submodule(owner), leaf, model.get_parameter(name))
        for name, buffer in [*model.named_buffers()]:
            if not buffer.is_meta:
                replace_tensor(model, name, buffer.to(device))


def adapted_original(original: nn.Module, emulator: nn.Module) -> Original:
    """Return the original with the emulator's adapter, as a model of its own.

    It is a copy of the emulator, in which each tensor that the original has is the original's. It
    uses the memory of both, and neither changes if the copy's weights are moved.
    """
    linears = {
        name: with_modules(original.get_submodule(_plain(name)), {})
        for name, module in emulator.named_modules()
        if isinstance(module, Factorized)
    }
    model = with_modules(emulator, linears)
    assert isinstance(model, PreTrainedModel)
    for name, buffer in original.named_buffers():
        replace_tensor(model, name, buffer.clone())
    own = dict(original.named_parameters(remove_duplicate=False))
    tensors = {
        name: _of_original(name, parameter, own).detach()
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    # `MemoryWeights` ties them. The model's own method does not know the layers of PEFT.
    vars(model)["tie_weights"] = lambda: None
    return Original(model, MemoryWeights(tensors, _shared_names(model)))


def _of_original(name: str, tensor: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """Return the original's parameter of this name, or the adapter's if the original has none.

    A module that is trained in full computes in the dtype of the original's.
    """
    if _plain(name) in own:
        return own[_plain(name)]
    replaced = own.get(_TRAINED_MODULE.sub("", name))
    return tensor if replaced is None else tensor.to(replaced.dtype)


def _shared_names(model: nn.Module) -> dict[str, list[str]]:
    """First name of each parameter that has several -> its other names."""
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    shared: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names[id(parameter)]
        if name != first:
            shared.setdefault(first, []).append(name)
    return shared


def adapter_digest(emulator: nn.Module) -> str | None:
    """Return a digest of what the emulator's adapter computes; None if it computes nothing yet.

    Raises:
        ConfigError: the adapter is no plain LoRA, or is not finite.
    """
    if not has_adapter(emulator):
        return None
    name, config = require_plain_lora(emulator)
    own = {
        parameter: tensor
        for parameter, tensor in emulator.named_parameters()
        if f".{name}." in parameter
    }
    for parameter, tensor in own.items():
        require_finite(parameter, tensor)
    zeros = {n.replace(".lora_B.", ".lora_A.") for n, t in own.items() if _is_zero_update(n, t)}
    digests = {
        parameter: tensor_digest(tensor)
        for parameter, tensor in own.items()
        if parameter not in zeros and not _is_zero_update(parameter, tensor)
    }
    return digest([digests, {key: config[key] for key in _ACTION}]) if digests else None


def _is_zero_update(parameter: str, tensor: Tensor) -> bool:
    """Whether a parameter is the second matrix of a LoRA that does not change its layer."""
    return ".lora_B." in parameter and not tensor.any()


def require_whole(model: nn.Module) -> None:
    """Check that each parameter of the emulator is a whole tensor.

    Raises:
        ConfigError: the emulator is sharded.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id"):
            raise ConfigError(
                f"emulator: {name} is sharded; call emloc.anchor before the emulator is sharded, "
                "and train one round"
            )


def _plain(name: str) -> str:
    """Return the name that a tensor or module had before PEFT wrapped its layer."""
    return name.replace(".base_layer", "").replace(".original_module", "")
