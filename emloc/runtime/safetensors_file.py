"""Write a safetensors file whole or not at all, so that one that is there can be believed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from emloc.runtime.atomic import whole_file


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write the tensors, from whatever device."""
    here = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as draft:
        save_file(here, draft, metadata=metadata)
