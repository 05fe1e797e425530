"""Write a safetensors file whole or not at all, so that one that is there can be believed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write the tensors, from whatever device, beside `path` and then rename."""
    draft = path.with_suffix(".draft")
    here = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(here, draft, metadata=metadata)
    draft.rename(path)
