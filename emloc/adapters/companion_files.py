"""Files of a merged checkpoint beside its weights: configuration, tokenizer, processor, code."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from emloc.models.checkpoint.files import INDEX
from emloc.models.checkpoint.source import Source

CONFIG = "config.json"

# Endings of files that are no weights: settings, tokenizers, chat templates, code and texts. Only
# these are copied, since weights have too many formats to name them all.
_SUFFIXES = {
    *("", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".bpe", ".codes", ".vocab"),
    *(".py", ".md", ".yaml", ".yml"),
}
# Files that describe other weights than the merged ones, or the training of the original.
_LEFT_OUT = ("adapter_config.json", "manifest.json", "trainer_state.json", "training_args.json")
_INDEX_SUFFIX = ".index.json"
_TEMPLATES = "additional_chat_templates"  # the only folder of a checkpoint that transformers reads


def copy_companions(source: Path, target: Path) -> None:
    """Copy all files that are no weights from one checkpoint folder to another."""
    folders = [source, *([source / _TEMPLATES] if (source / _TEMPLATES).is_dir() else [])]
    for folder in folders:
        copies = target / folder.relative_to(source)
        copies.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path.is_file() and _is_companion(path):
                shutil.copyfile(path, copies / path.name)


def _is_companion(path: Path) -> bool:
    """Whether a file is neither weights nor an index or description of weights."""
    is_weights = path.suffix not in _SUFFIXES or path.name.endswith(_INDEX_SUFFIX)
    return not is_weights and path.name not in _LEFT_OUT


def write_config(source: Source, folder: Path, dtype: torch.dtype | None) -> None:
    """Make the copied config.json in `folder` that of the merged model.

    A model with fresh modules or a changed configuration gets its own configuration. The settings
    of a quantisation are removed, since the merged weights are dequantised. `dtype` is written as
    the type of the weights; None: the type is unchanged.
    """
    if source.config_changes or source.fresh_modules:
        config = copy.deepcopy(source.config)
        config.architectures = [type(source.meta_model).__name__]
        config.save_pretrained(folder)
    path = folder / CONFIG
    original = json.loads(path.read_text(encoding="utf-8"))
    settings = _without_quantization(original)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        settings = _with_dtype(settings, name)
        if "torch_dtype" not in settings:
            settings["dtype"] = name
    if settings != original:
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _without_quantization(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those of a quantisation, also in their sections."""
    return {
        key: _without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if key != "quantization_config"
    }


def _with_dtype(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings with every type of weights replaced by `name`, also in their sections.

    A section may name its type as `dtype` or `torch_dtype`, or leave it out.
    """
    return {
        key: _with_dtype(value, name)
        if isinstance(value, Mapping)
        else name
        if key in ("dtype", "torch_dtype")
        else value
        for key, value in settings.items()
    }


def write_index(source: Path, target: Path, files: Mapping[str, str], size: int, new: int) -> None:
    """Write the index of a checkpoint with several files, or whose original has an index.

    Args:
        source: folder of the original.
        target: folder of the merged checkpoint.
        files: tensor -> name of its file.
        size: of all tensors in bytes.
        new: number of elements in tensors that the original lacks.
    """
    path = source / INDEX
    if not path.exists():
        return
    metadata = json.loads(path.read_text(encoding="utf-8")).get("metadata") or {}
    if "total_parameters" in metadata:
        metadata["total_parameters"] += new
    index = {"metadata": metadata | {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
