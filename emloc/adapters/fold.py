"""Fold an adapter into the original weights, tensor by tensor, and write a checkpoint."""

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
from emloc.runtime.atomic import whole_folder
from emloc.runtime.progress import tracked


def merge(source: Source, adapter: SavedLora, target: Path) -> Path:
    """Write `source` with `W + s B A` in place of each adapted weight, in the source's own files.

    Where the adapter has a magnitude (DoRA), each row is scaled to have it as its norm.
    Sums are float32 and rounded once to the dtype of the weight. Modules that were trained whole
    take the place of the source's own; what it does not hold is added to its last file.

    Raises:
        ConfigError: `target` is already there, the source is no checkpoint, or the adapter names a
            layer or a parameter the model has not.
    """
    if target.exists():
        raise ConfigError(f"{target} is already there; give another folder with --to")
    weights = source.weights
    if not isinstance(weights, SafetensorsWeights):
        raise ConfigError(
            f"{weights.where}: there is no checkpoint to merge into; set model.source"
        )
    missing = [name for name in adapter.pairs if f"{name}.weight" not in weights.names]
    if missing:
        raise ConfigError(f"the model holds no layer {missing[0]}; the adapter is for another one")
    fresh = _fresh(source, weights, adapter)
    with whole_folder(target) as draft:
        _fill(draft, weights, adapter, fresh)
    return target


def _fill(
    draft: Path, weights: SafetensorsWeights, adapter: SavedLora, fresh: dict[str, Tensor]
) -> None:
    """Write all files of the merged checkpoint."""
    for path in weights.folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, draft)
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
                    tensors[name] = _merged(weight, adapter, parameter)
                else:
                    own = rows.of(weight, len(weight))
                    rows.put(weight, _merged(own, adapter, parameter))
        if shard == shards[-1]:
            tensors |= fresh
        save_file(tensors, draft / shard.name, metadata=metadata)
    if fresh:
        _index(draft, fresh, shards[-1].name)


def _fresh(source: Source, weights: SafetensorsWeights, adapter: SavedLora) -> dict[str, Tensor]:
    """The extras that the checkpoint does not hold, in the source's dtype.

    Raises:
        ConfigError: one is of no parameter of the model, or the checkpoint's format could not name
            it.
    """
    names = [name for name in adapter.extras if name not in weights.names]
    for name in names:
        if name not in source.sizes:
            raise ConfigError(
                f"the model holds no parameter {name}; the adapter is for another one"
            )
        if weights.layout(name).get(name, ...) is not None:
            raise ConfigError(
                f"{weights.where}: a checkpoint of this format has no place for {name}, which was "
                "trained whole; set model.source to one in the format of transformers"
            )
    return {name: adapter.extras[name].to(source.dtype).contiguous() for name in names}


def _index(folder: Path, fresh: dict[str, Tensor], shard: str) -> None:
    """Add tensors to the index of a checkpoint of several files; one file has none."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(fresh, shard)
    size = sum(tensor.nbytes for tensor in fresh.values())
    metadata = index.setdefault("metadata", {})
    metadata["total_size"] = metadata.get("total_size", 0) + size
    path.write_text(json.dumps(index, indent=2))


def _merged(weight: Tensor, adapter: SavedLora, parameter: str) -> Tensor:
    if parameter in adapter.extras:
        return adapter.extras[parameter].to(weight.dtype).contiguous()
    layer = parameter.removesuffix(".weight")
    pair, magnitude = adapter.pairs[layer], adapter.magnitudes.get(layer)
    total = weight.float() + pair.scale * (pair.b.float() @ pair.a.float())
    if magnitude is not None:
        total *= (magnitude.float() / torch.linalg.vector_norm(total, dim=1))[:, None]
    return total.to(weight.dtype)
