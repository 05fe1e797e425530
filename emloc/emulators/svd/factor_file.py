"""Read and write the safetensors file with the factors of one block.

It holds `<layer>.u` (m, k) and `<layer>.v` (k, n) for each layer, or, in a packed format, the
tensors of `<layer>.ut` (k, m) and `<layer>.v`. The file's metadata holds the facts of each layer.
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
from emloc.runtime.manifest import verified_file
from emloc.runtime.work_meter import count_weights
from emloc.tensors.nn.factorized import Factorized, PackedFactorized


def stored_tensors(factors: Mapping[str, LayerFactors]) -> dict[str, Tensor]:
    """Return the tensors of the file of one block's factors, where the factors are."""
    tensors: dict[str, Tensor] = {}
    for name, layer in factors.items():
        u, v = layer.factors.u, layer.factors.v
        if layer.v is None:
            tensors |= {f"{name}.u": u, f"{name}.v": v}
        else:
            ut = layer.v.precision.quantize(u.T)
            tensors |= layer.v.tensors(f"{name}.v") | ut.tensors(f"{name}.ut")
    return tensors


def load_factors(
    path: Path,
    biases: Mapping[str, Tensor | None],
    device: torch.device,
    precision: Precision | None,
) -> dict[str, Factorized | PackedFactorized]:
    """Layer name -> factorised module, for the layers in `biases`.

    Args:
        path: file of one block.
        biases: layer name -> bias (out,) or None.
        device: where the modules are.
        precision: packed format that the factors were written in; None: the model's dtype.

    Raises:
        KeyError: a layer is not in the file.
        ValueError: the factors are packed, and `precision` is None or another format.
    """
    modules: dict[str, Factorized | PackedFactorized] = {}
    with safe_open(verified_file(path), framework="pt", device=str(device)) as file:
        keys = set(file.keys())
        for layer, bias in biases.items():
            packed = (f"{layer}.v.", f"{layer}.ut.")
            names = [n for n in keys if n in (f"{layer}.u", f"{layer}.v") or n.startswith(packed)]
            parts = {name: file.get_tensor(name) for name in names}
            count_weights(sum(tensor.nbytes for tensor in parts.values()))
            if f"{layer}.u" in parts:
                modules[layer] = Factorized(parts[f"{layer}.u"], parts[f"{layer}.v"], bias)
            else:
                read_matrix = require_format(precision).from_tensors
                v, ut = (read_matrix(f"{layer}.{name}", parts) for name in ("v", "ut"))
                modules[layer] = PackedFactorized(v, ut, bias)
    return modules


def read_facts(path: Path) -> dict[str, Any]:
    """Layer name -> its facts (`LayerFactors.facts`), sorted, since the file has no order."""
    with safe_open(verified_file(path), framework="pt") as file:
        return {layer: json.loads(facts) for layer, facts in sorted(file.metadata().items())}
