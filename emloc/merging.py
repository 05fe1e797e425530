"""Fold an adapter into the original weights, tensor by tensor, and write a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from emloc.adapters.saved import SavedLora, read_adapter
from emloc.atomic import whole_folder
from emloc.config import part
from emloc.errors import ConfigError
from emloc.settings import Compression
from emloc.source import Source
from emloc.weights import Safetensors


def merge_run(run: Path, target: Path) -> Path:
    """Merge the carried adapter of a finished run with the model it was made for.

    Raises:
        ConfigError: the run has no adapter, or `target` is already there.
    """
    if not (run / "config.yaml").exists():
        raise ConfigError(f"{run} is no run folder; give one such as runs/demo/<run>")
    if not (run / "adapter").exists():
        raise ConfigError(f"{run} has no adapter: its method trains none, or it is not done")
    cfg = OmegaConf.load(run / "config.yaml")
    made_for = part(cfg.emulator).model(part(cfg.model), Compression(**cfg.compression))
    return merge(made_for.open(), read_adapter(run / "adapter"), target)


def merge(source: Source, adapter: SavedLora, target: Path) -> Path:
    """Write `source` with `W + s B A` in place of each adapted weight, in the source's own files.

    Where the adapter has a magnitude (DoRA), each row is scaled to have it as its norm.
    Sums are float32 and rounded once to the dtype of the weight.

    Raises:
        ConfigError: `target` is already there, the source is no checkpoint, or the adapter names a
            layer the model has not.
    """
    if target.exists():
        raise ConfigError(f"{target} is already there; give another folder with --to")
    weights = source.weights
    if not isinstance(weights, Safetensors):
        raise ConfigError(
            f"{weights.where}: there is no checkpoint to merge into; set model.source"
        )
    missing = [name for name in adapter.pairs if f"{name}.weight" not in weights.names]
    if missing:
        raise ConfigError(f"the model holds no layer {missing[0]}; the adapter is for another one")
    with whole_folder(target) as draft:
        for path in weights.folder.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copy(path, draft)
        for shard in tqdm(sorted(set(weights.files.values())), "merge", unit="file"):
            with safe_open(shard, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
            for name, weight in tensors.items():
                for parameter, rows in weights.layout(name).items():
                    layer = parameter.removesuffix(".weight")
                    if layer not in adapter.pairs:
                        continue
                    if rows is None:
                        tensors[name] = _merged(weight, adapter, layer)
                    else:
                        own = rows.of(weight, len(weight))
                        rows.put(weight, _merged(own, adapter, layer))
            save_file(tensors, draft / shard.name, metadata=metadata)
    return target


def _merged(weight: Tensor, adapter: SavedLora, layer: str) -> Tensor:
    pair, magnitude = adapter.pairs[layer], adapter.magnitudes.get(layer)
    total = weight.float() + pair.scale * (pair.b.float() @ pair.a.float())
    if magnitude is not None:
        total *= (magnitude.float() / torch.linalg.vector_norm(total, dim=1))[:, None]
    return total.to(weight.dtype)
