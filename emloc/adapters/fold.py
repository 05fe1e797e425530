"""Merge an adapter into the original weights, file by file, and write the merged checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from emloc.adapters.companion_files import copy_companions, write_config, write_index
from emloc.adapters.rounding import Rounding
from emloc.adapters.saved import SavedLora
from emloc.errors import ConfigError
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
        rounding = _write_weights(draft, weights, adapter, added, dtype)
    if rounding.line:
        log.info("%s", rounding.line)
    return target


def _write_weights(
    folder: Path,
    weights: SafetensorsWeights,
    adapter: SavedLora,
    added: dict[str, Tensor],
    dtype: torch.dtype | None,
) -> Rounding:
    """Write the merged weights and their index; `added` are parameters the source's files lack.

    Returns:
        What the merged weights lost when they were rounded.
    """
    rounding, files, size = Rounding(), dict[str, str](), 0
    shards = sorted(set(weights.files.values()))
    for shard in tracked(shards, "merge", len(shards), "file"):
        with safe_open(shard, framework="pt") as file:
            originals = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        if shard == shards[-1]:
            originals |= added
        tensors = {}
        while originals:
            name, weight = originals.popitem()
            tensors[name] = _merged_tensor(name, weight, weights, adapter, dtype, rounding)
        files |= dict.fromkeys(tensors, shard.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / shard.name, metadata=metadata or {"format": "pt"})
    new = sum(tensor.numel() for tensor in added.values())
    write_index(weights.folder, folder, files, size, new)
    return rounding


def _merged_tensor(
    name: str,
    weight: Tensor,
    weights: SafetensorsWeights,
    adapter: SavedLora,
    dtype: torch.dtype | None,
    rounding: Rounding,
) -> Tensor:
    """The stored tensor `name` with the adapter merged into its parameters."""
    merged = weight.to(dtype) if dtype is not None and weight.is_floating_point() else weight
    for parameter, rows in weights.layout(name).items():
        if not adapter.changes(parameter):
            continue
        if rows is None:
            merged = _merged_weight(weight, adapter, parameter, merged.dtype, rounding)
        else:
            part = rows.extract(weight, len(weight))
            part = _merged_weight(part, adapter, parameter, merged.dtype, rounding)
            rows.insert(merged, part)
    return merged


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
        if weights.layout(name).get(name, ...) is not None:
            raise ConfigError(
                f"{weights.description}: a checkpoint of this format has no tensor for {name}, "
                "which was trained in full; set model.source to one in the format of transformers"
            )
    return {name: adapter.extras[name].to(source.dtype).contiguous() for name in names}


def _merged_weight(
    weight: Tensor, adapter: SavedLora, parameter: str, dtype: torch.dtype, rounding: Rounding
) -> Tensor:
    """The parameter with the adapter merged in, in `dtype`; the original is `weight`.

    Raises:
        ConfigError: a value of the sum is not finite, or too large for `dtype`.
    """
    if parameter in adapter.extras:
        return adapter.extras[parameter].to(dtype).contiguous()
    layer = parameter.removesuffix(".weight")
    pair, magnitude = adapter.pairs[layer], adapter.magnitudes.get(layer)
    total = weight.float() + pair.scale * (pair.b.float() @ pair.a.float())
    if magnitude is not None:
        total *= (magnitude.float() / torch.linalg.vector_norm(total, dim=1))[:, None]
    merged = total.to(dtype)
    if not torch.isfinite(merged).all():
        remedy = "--dtype float32" if torch.isfinite(total).all() else "a new training"
        raise ConfigError(
            f"{parameter}: weight plus adapter is not finite in {merged.dtype}; this needs {remedy}"
        )
    rounding.add(layer, weight, total, merged)
    return merged
