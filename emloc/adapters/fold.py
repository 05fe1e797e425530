"""Merge an adapter into the original weights, file by file, and write the merged checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from emloc.adapters.saved import SavedLora
from emloc.errors import ConfigError
from emloc.models.checkpoint.files import INDEX
from emloc.models.checkpoint.origins import Converted, Direct, is_quantised
from emloc.models.checkpoint.source import Source
from emloc.models.checkpoint.weights import SafetensorsWeights
from emloc.runtime.atomic import atomic_folder
from emloc.runtime.progress import tracked


def merge(source: Source, adapter: SavedLora, target: Path) -> Path:
    """Write a copy of the checkpoint of `source` with `W + s B A` instead of each adapted weight W.

    The copy has the file names of the source. For a DoRA, each row of the sum is scaled to the
    trained magnitude. Sums are computed in float32 and rounded once, to the dtype of the weight.
    Modules that were trained in full replace those of the source; parameters that the source's
    files lack are added to its last file. The copy of a quantised checkpoint is dequantised.

    Returns:
        `target`.

    Raises:
        ConfigError: `target` exists, the source has no checkpoint, or the adapter names a layer or
            parameter that the model does not have.
    """
    if target.exists():
        raise ConfigError(f"{target} is already there; give another folder with --to")
    weights = source.weights
    if not isinstance(weights, SafetensorsWeights):
        raise ConfigError(
            f"{weights.description}: there is no checkpoint to merge into; set model.source"
        )
    missing = [name for name in adapter.pairs if f"{name}.weight" not in weights.names]
    if missing:
        raise ConfigError(f"the model has no layer {missing[0]}; the adapter is for another model")
    added = _added_parameters(source, weights, adapter)
    with atomic_folder(target) as draft:
        _write_checkpoint(draft, source, weights, adapter, added)
    return target


def _write_checkpoint(
    folder: Path,
    source: Source,
    weights: SafetensorsWeights,
    adapter: SavedLora,
    added: dict[str, Tensor],
) -> None:
    """Write all files of the merged checkpoint; `added` are parameters the source's files lack."""
    for path in weights.folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, folder)
    if weights.ignores_index:
        (folder / INDEX).unlink(missing_ok=True)
    sizes: dict[str, dict[str, int]] = {}
    for shard in tracked(weights.files, "merge", len(weights.files), "file"):
        tensors, metadata = _merged_file(shard, source, weights, adapter)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in added}
        if shard == weights.files[-1]:
            tensors |= added
        save_file(tensors, folder / shard.name, metadata=metadata)
        sizes[shard.name] = {name: tensor.nbytes for name, tensor in tensors.items()}
    if any(is_quantised(origin) for origin in weights.origins.values()):
        _forget_quantization(folder / "config.json")
    if (folder / INDEX).exists():
        _update_index(folder / INDEX, sizes)


def _merged_file(
    shard: Path, source: Source, weights: SafetensorsWeights, adapter: SavedLora
) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Tensors and metadata of one file of the merged checkpoint.

    Quantised weights are dequantised to the dtype of the source, and their scales are left out.

    Raises:
        ConfigError: an adapted parameter is stored in a way that cannot be written again.
    """
    with safe_open(shard, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for parameter, origin in weights.origins.items():
        stored = origin.inputs[0]
        if isinstance(origin, Direct):
            if stored.file == shard and adapter.changes(parameter):
                _merge_rows(tensors, origin, adapter, parameter)
        elif is_quantised(origin):
            quantised_names = {tensor.name for tensor in origin.inputs}
            tensors = {n: tensor for n, tensor in tensors.items() if n not in quantised_names}
            if origin.main_input.file == shard:
                tensors |= _dequantised_weight(source, origin, adapter)
        elif parameter == origin.first and stored.file == shard:  # all targets at once
            tensors[stored.name] = _merged_conversion(source, origin, adapter, tensors[stored.name])
    return tensors, metadata


def _dequantised_weight(source: Source, origin: Converted, adapter: SavedLora) -> dict[str, Tensor]:
    """Name and value of a weight that is stored quantised, with the adapter merged in.

    Raises:
        ConfigError: the weight is put together from several quantised tensors.
    """
    [(_, weight)] = source.read([origin.first])
    try:
        return {origin.dequantised_name: _merged_weight(weight, adapter, origin.first)}
    except ValueError as error:
        raise _unmerged_error(origin, error) from error


def _unmerged_error(origin: Converted, error: Exception) -> ConfigError:
    """The error for a parameter that cannot be written in the way in which it is stored."""
    return ConfigError(
        f"{origin.inputs[0].file}: {origin.first} cannot be written to a merged checkpoint: "
        f"{error}; set model.source to a checkpoint that transformers wrote unquantised"
    )


def _merge_rows(
    tensors: dict[str, Tensor], origin: Direct, adapter: SavedLora, parameter: str
) -> None:
    """Merge the adapter into the rows of the stored tensor that hold the parameter."""
    name, rows = origin.tensor.name, origin.part
    if rows is None:
        tensors[name] = _merged_weight(tensors[name], adapter, parameter)
    else:
        part = rows.extract(tensors[name], len(tensors[name]))
        rows.insert(tensors[name], _merged_weight(part, adapter, parameter))


def _merged_conversion(
    source: Source, origin: Converted, adapter: SavedLora, stored: Tensor
) -> Tensor:
    """The stored tensor that several merged parameters are computed from.

    It is `stored` itself if the adapter changes none of them.

    Raises:
        ConfigError: transformers cannot compute it from the parameters.
    """
    if not any(adapter.changes(name) for name in origin.targets):
        return stored
    values = dict(source.read(origin.targets))
    merged = {name: _merged_weight(value, adapter, name) for name, value in values.items()}
    try:
        return origin.store(merged).contiguous()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise _unmerged_error(origin, error) from error


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


def _forget_quantization(path: Path) -> None:
    """Remove the settings of the quantisation from a config.json."""
    settings = json.loads(path.read_text())
    for section in (settings, *settings.values()):
        if isinstance(section, dict):
            section.pop("quantization_config", None)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _update_index(path: Path, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """List other tensors in an index if the files contain others; file -> tensor -> bytes."""
    index = json.loads(path.read_text())
    weight_map = {tensor: file for file, tensors in sizes.items() for tensor in tensors}
    if index["weight_map"] == weight_map:
        return
    index["weight_map"] = weight_map
    total = sum(size for tensors in sizes.values() for size in tensors.values())
    index.setdefault("metadata", {})["total_size"] = total
    path.write_text(json.dumps(index, indent=2))


def _merged_weight(weight: Tensor, adapter: SavedLora, parameter: str) -> Tensor:
    """The parameter with the adapter merged in, in its own dtype; the original is `weight`."""
    if not adapter.changes(parameter):
        return weight.contiguous()
    if parameter in adapter.extras:
        return adapter.extras[parameter].to(weight.dtype).contiguous()
    layer = parameter.removesuffix(".weight")
    pair, magnitude = adapter.pairs[layer], adapter.magnitudes.get(layer)
    total = weight.float() + pair.scale * (pair.b.float() @ pair.a.float())
    if magnitude is not None:
        total *= (magnitude.float() / torch.linalg.vector_norm(total, dim=1))[:, None]
    return total.to(weight.dtype)
