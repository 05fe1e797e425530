"""Read and write the safetensors file with the factors of one block.

It holds `<layer>.u` (m, k) and `<layer>.v` (k, n) for each layer, or, in a packed format, the
tensors of `<layer>.ut` (k, m) and `<layer>.v`. Of layers that were factorised together only the
first one has v. The file's metadata holds the facts of each layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

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
        has_v = not layer.group or layer.group[0] == name
        if layer.v is None:
            tensors |= {f"{name}.u": u} | ({f"{name}.v": v} if has_v else {})
        else:
            tensors |= layer.ut.tensors(f"{name}.ut")
            tensors |= layer.v.tensors(f"{name}.v") if has_v else {}
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
    vs: dict[str, Any] = {}  # by the layer that stores it; layers of a group get the same object
    with safe_open(verified_file(path), framework="pt", device=str(device)) as file:
        keys, facts = set(file.keys()), file.metadata()

        def read(prefix: str) -> Any:
            """The parameter or packed matrix whose tensors have the prefix."""
            names = [key for key in keys if key == prefix or key.startswith(f"{prefix}.")]
            parts = {name: file.get_tensor(name) for name in names}
            count_weights(sum(tensor.nbytes for tensor in parts.values()))
            if prefix in parts:
                return nn.Parameter(parts[prefix], requires_grad=False)
            return require_format(precision).from_tensors(prefix, parts)

        for layer, bias in biases.items():
            owner = json.loads(facts[layer]).get("group", [layer])[0]
            if owner not in vs:
                vs[owner] = read(f"{owner}.v")
            if f"{layer}.u" in keys:
                modules[layer] = Factorized(read(f"{layer}.u"), vs[owner], bias)
            else:
                modules[layer] = PackedFactorized(vs[owner], read(f"{layer}.ut"), bias)
    return modules


def read_facts(path: Path) -> dict[str, Any]:
    """Layer name -> its facts (`LayerFactors.facts`), sorted, since the file has no order."""
    with safe_open(verified_file(path), framework="pt") as file:
        return {layer: json.loads(facts) for layer, facts in sorted(file.metadata().items())}
