"""The factors of one block as a file.

A layer is `<layer>.u` (m, k) and `<layer>.v` (k, n), or packed the parts of `<layer>.ut` (k, m) and
`<layer>.v`. What is known of each layer stands in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from emloc.emulators.svd.factors import LayerFactors
from emloc.precision import Precision, require_format
from emloc.runtime.manifest import whole
from emloc.runtime.safetensors_file import write_shard
from emloc.tensors.nn.factorized import Factorized, PackedFactorized


def save_factors(found: Mapping[str, LayerFactors], path: Path) -> None:
    """Write one block's layers, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for layer, one in found.items():
        factors = one.factors
        if one.v is None:
            tensors |= {f"{layer}.u": factors.u, f"{layer}.v": factors.v}
        else:
            ut = one.v.precision.quantize(factors.u.T)
            tensors |= one.v.tensors(f"{layer}.v") | ut.tensors(f"{layer}.ut")
    write_shard(path, tensors, {layer: json.dumps(one.facts) for layer, one in found.items()})


def load_factors(
    path: Path,
    biases: Mapping[str, Tensor | None],
    device: torch.device,
    precision: Precision | None,
) -> dict[str, Factorized | PackedFactorized]:
    """Layer -> module, of the layers that have an entry in `biases`; `precision` as they were made.

    Raises:
        KeyError: one of them is not in the file.
        ValueError: they are packed, and in no format or another one.
    """
    found: dict[str, Factorized | PackedFactorized] = {}
    with safe_open(whole(path), framework="pt", device=str(device)) as file:
        held = set(file.keys())
        for layer, bias in biases.items():
            packed = (f"{layer}.v.", f"{layer}.ut.")
            names = [n for n in held if n in (f"{layer}.u", f"{layer}.v") or n.startswith(packed)]
            parts = {name: file.get_tensor(name) for name in names}
            if f"{layer}.u" in parts:
                found[layer] = Factorized(parts[f"{layer}.u"], parts[f"{layer}.v"], bias)
            else:
                read = require_format(precision).from_tensors
                v, ut = (read(f"{layer}.{name}", parts) for name in ("v", "ut"))
                found[layer] = PackedFactorized(v, ut, bias)
    return found


def facts_of(path: Path) -> dict[str, Any]:
    """Layer -> what is known of it, by name: the file keeps no order."""
    with safe_open(whole(path), framework="pt") as file:
        return {layer: json.loads(facts) for layer, facts in sorted(file.metadata().items())}
