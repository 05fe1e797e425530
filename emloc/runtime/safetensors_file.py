"""Write safetensors files atomically: a file under its final name is complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from emloc.runtime.atomic import atomic_file


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], *, durable: bool = True
) -> None:
    """Write tensors, which may be on any device, to the safetensors file `path`.

    With `durable=False` the file need not survive a power cut, and is not flushed to the disk.
    """
    host_tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path, durable=durable) as draft:
        save_file(host_tensors, draft, metadata=metadata)
