"""Merge an adapter into the original weights, file by file, and write the merged checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from emloc.adapters.saved import SavedLora
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.models.checkpoint.weights import SafetensorsWeights
from emloc.runtime.atomic import atomic_folder
from emloc.runtime.progress import tracked


def merge(source: Source, adapter: SavedLora, target: Path) -> Path:
    """Write a copy of the checkpoint of `source` with `W + s B A` instead of each adapted weight W.

    The copy has the file names of the source. For a DoRA, each row of the sum is scaled to the
    trained magnitude. Sums are computed in float32 and rounded once, to the dtype of the weight.
    Modules that were trained in full replace those of the source; parameters that the source's
    files lack are added to its last file.

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
        _write_checkpoint(draft, weights, adapter, added)
    return target


def _write_checkpoint(
    folder: Path, weights: SafetensorsWeights, adapter: SavedLora, added: dict[str, Tensor]
) -> None:
    """Write all files of the merged checkpoint; `added` are parameters the source's files lack."""
    for path in weights.folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    shards = sorted(set(weights.files.values()))
    for shard in tracked(shards, "merge", len(shards), "file"):
        with safe_open(shard, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        for name, weight in tensors.items():
            for parameter, rows in weights.layout(name).items():
                if not adapter.changes(parameter):
                    continue
                if rows is None:
                    tensors[name] = _merged_weight(weight, adapter, parameter)
                else:
                    part = rows.extract(weight, len(weight))
                    rows.insert(weight, _merged_weight(part, adapter, parameter))
        if shard == shards[-1]:
            tensors |= added
        save_file(tensors, folder / shard.name, metadata=metadata)
    if added:
        _extend_index(folder, added, shards[-1].name)


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
        if weights.layout(name).get(name, ...) is not None:
            raise ConfigError(
                f"{weights.description}: a checkpoint of this format has no tensor for {name}, "
                "which was trained in full; set model.source to one in the format of transformers"
            )
    return {name: adapter.extras[name].to(source.dtype).contiguous() for name in names}


def _extend_index(folder: Path, added: dict[str, Tensor], shard: str) -> None:
    """List the added tensors in the checkpoint's index file; a single-file checkpoint has none."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(added, shard)
    size = sum(tensor.nbytes for tensor in added.values())
    metadata = index.setdefault("metadata", {})
    metadata["total_size"] = metadata.get("total_size", 0) + size
    path.write_text(json.dumps(index, indent=2))


def _merged_weight(weight: Tensor, adapter: SavedLora, parameter: str) -> Tensor:
    """The parameter with the adapter merged in, in its own dtype; the original is `weight`."""
    if parameter in adapter.extras:
        return adapter.extras[parameter].to(weight.dtype).contiguous()
    layer = parameter.removesuffix(".weight")
    pair, magnitude = adapter.pairs[layer], adapter.magnitudes.get(layer)
    total = weight.float() + pair.scale * (pair.b.float() @ pair.a.float())
    if magnitude is not None:
        total *= (magnitude.float() / torch.linalg.vector_norm(total, dim=1))[:, None]
    return total.to(weight.dtype)
