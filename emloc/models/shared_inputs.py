"""Which linear layers of a model read the same input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from emloc.models.checkpoint.origins import Direct
from emloc.models.checkpoint.source import Source
from emloc.models.checkpoint.weights import SafetensorsWeights

# Names of the layers that a module calls with one tensor.
GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
)
_GROUP_OF_NAME = {name: group for group in GROUPS for name in group}


def names_by_input(names: Iterable[str]) -> list[list[str]]:
    """Group the dotted names of layers by the input that the layers read.

    Layers of one module share an input if their names are in one line of `GROUPS`. Every other
    layer is alone.
    """
    groups: dict[tuple[str, Sequence[str] | str], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        groups.setdefault((parent, _GROUP_OF_NAME.get(last, last)), []).append(name)
    return list(groups.values())


def names_by_stored_tensor(source: Source, names: Iterable[str]) -> list[list[str]]:
    """Group the dotted names of layers by the tensor of the checkpoint that has their weights.

    Layers whose weights are rows of one tensor, such as InternLM2's `wqkv`, read the same input.
    Every other layer is alone, and so is each layer of a model without a checkpoint.
    """
    weights = source.weights
    origins = weights.origins if isinstance(weights, SafetensorsWeights) else {}
    groups: dict[str, list[str]] = {}
    for name in names:
        origin = origins.get(f"{name}.weight")
        if isinstance(origin, Direct) and origin.part is not None:
            groups.setdefault(origin.tensor.name, []).append(name)
        else:
            groups[name] = [name]
    return list(groups.values())
