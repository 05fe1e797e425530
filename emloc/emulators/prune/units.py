"""Find the prunable units of a model: MLP neurons, and key/value heads with their queries."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from emloc.calibration.blockwise import block_of, by_block
from emloc.emulators.full import block_linears
from emloc.models.checkpoint.source import Source
from emloc.models.decoder import Decoder
from emloc.tensors.linalg.prune import ATTENTION, MLP, UnitGroup

# Kinds of MLP: the linears whose outputs are the neurons, and the linear that reads the neurons.
_MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"))


@dataclass(frozen=True)
class Units(UnitGroup):
    """The units of one module: unit i has the rows or columns i * n to (i + 1) * n of a layer.

    A unit of an MLP is a neuron. A unit of attention is a key and value head with the g query
    heads that read it; each head has `head_dim` rows.
    """

    rows: Mapping[str, int]  # layer name -> n, the number of rows that one unit has in this layer
    columns: Mapping[str, int]  # layer name -> number of columns of one unit

    @property
    def layers(self) -> list[str]:
        """Names of all layers that have rows or columns of the units."""
        return [*self.rows, *self.columns]


def units_of(source: Source, layers: Collection[str], first: int, last: int) -> dict[str, Units]:
    """Module name -> its units, for every module with at least two units.

    All layers of a unit are in `layers`. Attention is pruned only in the decoder, and only if the
    module derives the number of heads from the widths of its projections. The `first` and `last`
    blocks of the decoder are left out.
    """
    model = source.skeleton()
    prefix = Decoder(source).prefix
    blocks = list(by_block(name for name in block_linears(source) if name.startswith(prefix)))
    unpruned = {*blocks[:first], *blocks[max(0, len(blocks) - last) :]}
    units_by_module: dict[str, Units] = {}
    for name, module in model.named_modules():
        for units in _module_units(name, module, name.startswith(prefix)):
            is_allowed = all(layer in layers for layer in units.layers)
            if is_allowed and units.count > 1 and block_of(units.layers[0]) not in unpruned:
                units_by_module[name] = units
    return units_by_module


def _module_units(name: str, module: nn.Module, in_decoder: bool) -> Iterator[Units]:
    """Yield the units of a module, if it is an attention of the decoder or an MLP."""
    if in_decoder and name.endswith("self_attn"):
        yield from _attention_units(name, module)
    for producers, consumer in _MLPS:
        yield from _mlp_units(name, module, producers, consumer)


def _mlp_units(
    name: str, module: nn.Module, producers: tuple[str, ...], consumer: str
) -> Iterator[Units]:
    """Yield the neurons of an MLP with these linears; nothing if the module is another one."""
    linears = _linears(module, (*producers, consumer))
    if linears is None:
        return
    count = linears[consumer].in_features
    if any(linears[leaf].out_features != count for leaf in producers):
        return
    # Another parameter of this width, such as a norm of the neurons, would need pruning, too.
    if any(count in shape for shape in _other_shapes(module, linears)):
        return
    size = sum(linears[leaf].in_features for leaf in producers) + linears[consumer].out_features
    rows = {f"{name}.{leaf}": 1 for leaf in producers}
    yield Units(MLP, count, size, rows, {f"{name}.{consumer}": 1})


def _attention_units(name: str, module: nn.Module) -> Iterator[Units]:
    """Yield the key/value heads of an attention module; nothing if its heads cannot be pruned."""
    linears = _linears(module, ("q_proj", "k_proj", "v_proj", "o_proj"))
    head = getattr(module, "head_dim", None)
    # A module with a fixed number of heads would split pruned projections wrongly.
    if linears is None or not isinstance(head, int) or hasattr(module, "num_heads"):
        return
    q, k, v, o = linears.values()
    count, remainder = divmod(k.out_features, head)
    queries, uneven = divmod(q.out_features, k.out_features)
    if remainder or uneven or v.out_features != k.out_features or o.in_features != q.out_features:
        return
    # A parameter of one head's width, such as a norm of its features, fits any number of heads.
    if any(shape != (head,) for shape in _other_shapes(module, linears)):
        return
    heights = {"q_proj": queries * head, "k_proj": head, "v_proj": head}
    size = sum(n * linears[leaf].in_features for leaf, n in heights.items())
    size += queries * head * o.out_features
    rows = {f"{name}.{leaf}": n for leaf, n in heights.items()}
    yield Units(ATTENTION, count, size, rows, {f"{name}.o_proj": queries * head})


def _linears(module: nn.Module, leaves: tuple[str, ...]) -> dict[str, nn.Linear] | None:
    """The module's linears with these names; None if one of them is missing."""
    children = {leaf: getattr(module, leaf, None) for leaf in leaves}
    linears = {leaf: child for leaf, child in children.items() if isinstance(child, nn.Linear)}
    return linears if len(linears) == len(leaves) else None


def _other_shapes(module: nn.Module, linears: Collection[str]) -> list[tuple[int, ...]]:
    """Shapes of the module's parameters outside these linears."""
    return [
        tuple(parameter.shape)
        for name, parameter in module.named_parameters()
        if name.partition(".")[0] not in linears
    ]
