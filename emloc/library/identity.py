"""Digests: which model was an emulator built from, and which emulator does an adapter belong to?

PEFT writes the name of the model under an adapter into adapter_config.json. An emulator has a name
of its own, with its digest. So every folder that PEFT saves says which emulator the adapter was
trained on, also a checkpoint of a trainer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xxhash
from torch import Tensor, nn

from emloc.errors import ConfigError
from emloc.runtime.digest import digest
from emloc.tensors.nn.factorized import Factorized

# Numbers of a tensor that are copied to host memory, in float32, at a time.
_PIECE = 2**22
# Attribute of an emulator that holds its stamp. `copy.deepcopy` and pickling keep it.
_ATTRIBUTE = "_emloc_stamp"
# Attribute of an emulator: the configurations of its adapters that were trained with anchors.
_ANCHORED = "_emloc_anchored"
_TITLE = re.compile(r".* \(emulator ([0-9a-f]{16})\)")


@dataclass(frozen=True)
class Stamp:
    """What an emulator was built from, and what came out.

    Attributes:
        base: the original's `name_or_path`; empty if it has none.
        ratio: share of the compressed layers' parameters.
        weights: parameter of the original -> digest.
        factors: compressed layer -> digest of its factors.
    """

    base: str
    ratio: float
    weights: Mapping[str, str]
    factors: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        """16 hex digits that differ between emulators of other models, ratios or samples."""
        return digest([dict(self.weights), dict(self.factors)])

    @property
    def title(self) -> str:
        """The emulator's `name_or_path`, which PEFT writes into the adapter's configuration."""
        return f"{self.base or 'model'} (emulator {self.digest})"


def digest_in(title: str | None) -> str | None:
    """Return the emulator's digest in a `name_or_path`; None if it names no emulator."""
    match = _TITLE.fullmatch(title or "")
    return match[1] if match else None


def put_stamp(emulator: nn.Module, stamp: Stamp) -> None:
    """Give the emulator its stamp and its name."""
    vars(emulator)[_ATTRIBUTE] = stamp
    vars(emulator)["name_or_path"] = stamp.title


def stamp_of(model: nn.Module) -> Stamp | None:
    """Return the stamp of an emulator; None if the model is none."""
    stamp: Stamp | None = vars(model).get(_ATTRIBUTE)
    return stamp


def note_anchored(emulator: nn.Module, adapters: Iterable[str]) -> None:
    """Remember that adapters on an emulator are trained with anchors."""
    noted = vars(emulator).setdefault(_ANCHORED, [])
    for adapter in adapters:
        if not is_anchored(emulator, adapter):
            noted.append(getattr(emulator, "peft_config", {}).get(adapter))


def is_anchored(emulator: nn.Module, adapter: str) -> bool:
    """Whether the adapter of this name was trained with anchors, on this emulator in memory."""
    config = getattr(emulator, "peft_config", {}).get(adapter)
    return any(config is noted for noted in vars(emulator).get(_ANCHORED, []))


def factorized_layers(emulator: nn.Module) -> dict[str, Factorized]:
    """Return the factorised layers of an emulator by their names in the original model."""
    # PEFT replaces an adapted layer by a module of its own, with the layer as its `base_layer`.
    return {
        name.removesuffix(".base_layer"): module
        for name, module in emulator.named_modules()
        if isinstance(module, Factorized)
    }


def weight_digests(model: nn.Module) -> dict[str, str]:
    """Name of every parameter -> its digest; a tied parameter has all of its names."""
    by_id: dict[int, str] = {}
    digests = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in by_id:
            by_id[id(parameter)] = tensor_digest(parameter)
        digests[name] = by_id[id(parameter)]
    return digests


def factor_digests(layers: Mapping[str, Factorized]) -> dict[str, str]:
    """Layer name -> digest of its factors."""
    return {
        name: digest([tensor_digest(layer.u), tensor_digest(layer.v)])
        for name, layer in layers.items()
    }


def require_original(model: nn.Module, stamp: Stamp, parameters: Iterable[str]) -> None:
    """Check that the parameters of `model` have the values from which the emulator was built.

    Raises:
        ConfigError: a parameter is missing or differs.
    """
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for name in parameters:
        expected = stamp.weights.get(name)
        if name not in own or expected is None or tensor_digest(own[name]) != expected:
            flaw = "differs" if name in own else "is missing"
            raise ConfigError(
                f"model is not the one that the emulator was built from{_named(stamp)}: {name} "
                f"{flaw}; pass that model, unchanged and in the same dtype"
            )


def _named(stamp: Stamp) -> str:
    """The name of the original in brackets, if it has one."""
    return f" ({stamp.base})" if stamp.base else ""


def require_trained_on(config: Mapping[str, Any], stamp: Stamp, where: str) -> None:
    """Check that PEFT's configuration of an adapter names this emulator.

    Args:
        config: as in adapter_config.json.
        stamp: of the emulator.
        where: the adapter, for the message.

    Raises:
        ConfigError: the configuration names another emulator, or none.
    """
    name = config.get("base_model_name_or_path")
    trained_on = digest_in(name)
    if trained_on is None:
        raise ConfigError(
            f"{where} was not trained on this emulator, or was corrected before: its "
            f"base_model_name_or_path is {name!r} and not {stamp.title!r}; pass the adapter as it "
            "was trained on the emulator"
        )
    if trained_on != stamp.digest:
        raise ConfigError(
            f"{where} was trained on the emulator {trained_on}, and this is {stamp.digest} (ratio "
            f"{stamp.ratio:g}); pass the emulator that it was trained on (emloc.save_emulator "
            "stores one for later)"
        )


def tensor_digest(tensor: Tensor) -> str:
    """16 hex digits that depend on the shape and on every number of a tensor.

    Equal numbers have equal digests on all devices, and in all dtypes up to float32.
    """
    hashed = xxhash.xxh3_64(repr(tuple(tensor.shape)).encode())
    for piece in tensor.detach().reshape(-1).split(_PIECE):  # type: ignore[no-untyped-call]
        hashed.update(piece.float().cpu().numpy())
    return hashed.hexdigest()
