"""Merge an adapter into the original weights, file by file, and write the merged checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from emloc.adapters.companion_files import copy_companions, write_config, write_index
from emloc.adapters.rounding import Rounding
from emloc.adapters.saved import SavedLora
from emloc.errors import ConfigError
from emloc.models.checkpoint.origins import Converted, Direct, is_quantised
from emloc.models.checkpoint.source import Source
from emloc.models.checkpoint.weights import SafetensorsWeights
from emloc.runtime.atomic import atomic_folder
from emloc.runtime.progress import tracked

log = logging.getLogger(__name__)


def merge(
    source: Source, adapter: SavedLora, target: Path, dtype: torch.dtype | None = None
) -> Path:
    """Write a copy of the checkpoint of `source` with `W + s B A` instead of each adapted weight W.

    The copy has the file names of the source, and no other weights than the merged ones. For a
    DoRA, each row of the sum is scaled to the trained magnitude. Sums are computed in float32 and
    rounded once, to the dtype of the weight. In 16 bits a small update is lost in part; the log
    says how much survives (`emloc.adapters.rounding`). Modules that were trained in full replace
    those of the source; parameters that the source's files lack are added to its last file.
    The copy of a quantised checkpoint is dequantised.

    Args:
        source: the original model.
        adapter: recovered for the original model.
        target: folder to write.
        dtype: of all weights that are written; None: as they are stored.

    Returns:
        `target`.

    Raises:
        ConfigError: `target` exists, the source has no checkpoint, the adapter names a layer or
            parameter that the model does not have, or one that shares its values with another, or
            a merged weight is not finite.
    """
    if target.exists():
        raise ConfigError(f"{target} is already there; give another folder with --to")
    weights = source.weights
    if not isinstance(weights, SafetensorsWeights):
        raise ConfigError(
            f"{weights.description}: there is no checkpoint to merge into; set model.source"
        )
    _refuse_tied(source, adapter)
    missing = [name for name in adapter.pairs if f"{name}.weight" not in weights.names]
    if missing:
        raise ConfigError(f"the model has no layer {missing[0]}; the adapter is for another model")
    added = _added_parameters(source, weights, adapter)
    with atomic_folder(target) as draft:
        copy_companions(weights.folder, draft)
        write_config(source, draft, dtype)
        merger = _Merger(adapter, dtype)
        _write_weights(draft, source, weights, merger, added)
    if merger.rounding.line:
        log.info("%s", merger.rounding.line)
    return target


@dataclass(frozen=True)
class _Merger:
    """Merges an adapter into one weight after the other, and counts what rounding loses."""

    adapter: SavedLora
    dtype: torch.dtype | None  # of all merged weights; None: as they are stored
    rounding: Rounding = field(default_factory=Rounding)

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor that the adapter does not change, in the dtype of the merged checkpoint."""
        if self.dtype is None or not tensor.is_floating_point():
            return tensor.contiguous()
        return tensor.to(self.dtype).contiguous()

    def merged(self, parameter: str, weight: Tensor) -> Tensor:
        """The parameter with the adapter merged in; `weight` is the original.

        Raises:
            ConfigError: a value of the sum is not finite, or too large for the dtype.
        """
        dtype = self.dtype or weight.dtype
        if not self.adapter.changes(parameter):
            return self.cast(weight)
        if parameter in self.adapter.extras:
            return self.adapter.extras[parameter].to(dtype).contiguous()
        layer = parameter.removesuffix(".weight")
        pair, magnitude = self.adapter.pairs[layer], self.adapter.magnitudes.get(layer)
        total = weight.float() + pair.scale * (pair.b.float() @ pair.a.float())
        if magnitude is not None:
            total *= (magnitude.float() / torch.linalg.vector_norm(total, dim=1))[:, None]
        merged = total.to(dtype)
        if not torch.isfinite(merged).all():
            remedy = "--dtype float32" if torch.isfinite(total).all() else "a new training"
            raise ConfigError(
                f"{parameter}: weight plus adapter is not finite in {dtype}; this needs {remedy}"
            )
        self.rounding.add(layer, weight, total, merged)
        return merged


def _write_weights(
    folder: Path,
    source: Source,
    weights: SafetensorsWeights,
    merger: _Merger,
    added: Mapping[str, Tensor],
) -> None:
    """Write the merged weights and their index; `added` are parameters the source's files lack."""
    files, size = dict[str, str](), 0
    for shard in tracked(weights.files, "merge", len(weights.files), "file"):
        tensors, metadata = _merged_file(shard, source, weights, merger)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in added}
        if shard == weights.files[-1]:
            tensors |= {name: merger.cast(tensor) for name, tensor in added.items()}
        files |= dict.fromkeys(tensors, shard.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / shard.name, metadata=metadata or {"format": "pt"})
    if not weights.ignores_index:
        new = sum(tensor.numel() for tensor in added.values())
        write_index(weights.folder, folder, files, size, new)


def _merged_file(
    shard: Path, source: Source, weights: SafetensorsWeights, merger: _Merger
) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Tensors and metadata of one file of the merged checkpoint.

    Quantised weights are dequantised to the dtype of the source, and their scales are left out.

    Raises:
        ConfigError: an adapted parameter is stored in a way that cannot be written again.
    """
    with safe_open(shard, framework="pt") as file:
        originals = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    direct: dict[str, list[tuple[str, Direct]]] = {}
    converted: dict[str, Converted] = {}
    tensors: dict[str, Tensor] = {}
    for parameter, origin in weights.origins.items():
        stored = origin.inputs[0]
        if isinstance(origin, Direct):
            if stored.file == shard and merger.adapter.changes(parameter):
                direct.setdefault(stored.name, []).append((parameter, origin))
        elif is_quantised(origin):
            for tensor in origin.inputs:
                originals.pop(tensor.name, None)
            if origin.main_input.file == shard:
                tensors |= _dequantised_weight(source, origin, merger)
        elif any(merger.adapter.changes(name) for name in origin.targets) and stored.file == shard:
            converted[stored.name] = origin  # with all its targets
    while originals:  # an original is dropped as soon as its merged tensor is there
        name, weight = originals.popitem()
        if name in converted:
            tensors[name] = _merged_conversion(source, converted[name], merger)
        else:
            tensors[name] = _merged_tensor(weight, direct.get(name, []), merger)
    return tensors, metadata


def _merged_tensor(
    weight: Tensor, parameters: Sequence[tuple[str, Direct]], merger: _Merger
) -> Tensor:
    """The stored tensor with the adapter merged into `parameters`, each in rows of its own."""
    merged = merger.cast(weight)
    for parameter, origin in parameters:
        if origin.part is None:
            merged = merger.merged(parameter, weight)
        else:
            rows = origin.part.extract(weight, len(weight))
            origin.part.insert(merged, merger.merged(parameter, rows))
    return merged


def _dequantised_weight(source: Source, origin: Converted, merger: _Merger) -> dict[str, Tensor]:
    """Name and value of a weight that is stored quantised, with the adapter merged in.

    Raises:
        ConfigError: the weight is put together from several quantised tensors.
    """
    [(_, weight)] = source.read([origin.first])
    try:
        return {origin.dequantised_name: merger.merged(origin.first, weight)}
    except ValueError as error:
        raise _unmerged_error(origin, error) from error


def _merged_conversion(source: Source, origin: Converted, merger: _Merger) -> Tensor:
    """The stored tensor that several merged parameters are computed from.

    Raises:
        ConfigError: transformers cannot compute it from the parameters.
    """
    values = dict(source.read(origin.targets))
    merged = {name: merger.merged(name, value) for name, value in values.items()}
    try:
        return origin.store(merged).contiguous()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise _unmerged_error(origin, error) from error


def _unmerged_error(origin: Converted, error: Exception) -> ConfigError:
    """The error for a parameter that cannot be written in the way in which it is stored."""
    return ConfigError(
        f"{origin.inputs[0].file}: {origin.first} cannot be written to a merged checkpoint: "
        f"{error}; set model.source to a checkpoint that transformers wrote unquantised"
    )


def _refuse_tied(source: Source, adapter: SavedLora) -> None:
    """Refuse an adapter of a weight that is also the weight of another module, such as a tied head.

    The adapter is for one of the modules, while a merged weight would change both.

    Raises:
        ConfigError: the adapter changes such a weight.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in source.meta_model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        for name in tied:
            if len(tied) > 1 and adapter.changes(name):
                other = next(one for one in tied if one != name).removesuffix(".weight")
                raise ConfigError(
                    f"the model has no layer {name.removesuffix('.weight')} with a weight of its "
                    f"own: it shares the weight of {other}, and a merge would change both; use the "
                    "adapter unmerged, or train without this layer (model.lora_targets)"
                )


def _added_parameters(
    source: Source, weights: SafetensorsWeights, adapter: SavedLora
) -> dict[str, Tensor]:
    """Parameters trained in full that the checkpoint's files lack, in the source's dtype.

    Raises:
        ConfigError: the model has no parameter of this name, or the checkpoint's format has no
            tensor for it.
    """
    names = [name for name in adapter.extras if name not in weights.names]
    for name in names:
        if name not in source.sizes:
            raise ConfigError(
                f"the model has no parameter {name}; the adapter is for another model"
            )
        if not source.stores_by_name(name):
            raise ConfigError(
                f"{weights.description}: a checkpoint of this format has no tensor for {name}, "
                "which was trained in full; set model.source to one in the format of transformers"
            )
    return {name: adapter.extras[name].to(source.dtype).contiguous() for name in names}
