"""Which linear layers make up a unit that is only pruned as a whole, and which module has units."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from emloc.calibration.blockwise import block_of, by_block
from emloc.emulators.full import in_blocks
from emloc.models.checkpoint.source import Source
from emloc.models.decoder import Decoder
from emloc.tensors.linalg.prune import ATTENTION, MLP, UnitGroup

# What makes the neurons, and what takes them.
_MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"))


@dataclass(frozen=True)
class Units(UnitGroup):
    """The units of one module: unit i has the rows or columns i * n to (i + 1) * n of a layer.

    Of an MLP a unit is a neuron; of attention a key and value head with the g query heads that read
    it, of `head_dim` rows each.
    """

    rows: Mapping[str, int]  # layer -> n, the rows of one unit in it
    columns: Mapping[str, int]  # likewise

    @property
    def layers(self) -> list[str]:
        """All layers a unit lies in."""
        return [*self.rows, *self.columns]


def units_of(source: Source, layers: Collection[str], first: int, last: int) -> dict[str, Units]:
    """Module name -> its units, of each module with more than one, all in `layers`.

    Attention only of the decoder, and where heads are counted by what the projections give. The
    `first` and `last` blocks of the decoder have none.
    """
    model = source.skeleton()
    inside = Decoder(source).prefix
    blocks = list(by_block(name for name in in_blocks(source) if name.startswith(inside)))
    whole = {*blocks[:first], *blocks[max(0, len(blocks) - last) :]}
    found: dict[str, Units] = {}
    for name, module in model.named_modules():
        for units in _of_module(name, module, name.startswith(inside)):
            numbered = all(layer in layers for layer in units.layers)
            if numbered and units.count > 1 and block_of(units.layers[0]) not in whole:
                found[name] = units
    return found


def _of_module(name: str, module: nn.Module, in_decoder: bool) -> Iterator[Units]:
    if in_decoder and name.endswith("self_attn"):
        yield from _attention(name, module)
    for makers, taker in _MLPS:
        yield from _neurons(name, module, makers, taker)


def _neurons(name: str, module: nn.Module, makers: tuple[str, ...], taker: str) -> Iterator[Units]:
    linears = _linears(module, (*makers, taker))
    if linears is None:
        return
    count = linears[taker].in_features
    if any(linears[leaf].out_features != count for leaf in makers):
        return
    # Such as a norm between the two, which would have to be cut as well.
    if any(count in shape for shape in _others(module, linears)):
        return
    size = sum(linears[leaf].in_features for leaf in makers) + linears[taker].out_features
    rows = {f"{name}.{leaf}": 1 for leaf in makers}
    yield Units(MLP, count, size, rows, {f"{name}.{taker}": 1})


def _attention(name: str, module: nn.Module) -> Iterator[Units]:
    linears = _linears(module, ("q_proj", "k_proj", "v_proj", "o_proj"))
    head = getattr(module, "head_dim", None)
    # One that keeps the number of its heads splits by that, whatever the projections give.
    if linears is None or not isinstance(head, int) or hasattr(module, "num_heads"):
        return
    q, k, v, o = linears.values()
    count, over = divmod(k.out_features, head)
    queries, uneven = divmod(q.out_features, k.out_features)
    if over or uneven or v.out_features != k.out_features or o.in_features != q.out_features:
        return
    # What a head has to itself, as a norm of its features, fits any number of heads.
    if any(shape != (head,) for shape in _others(module, linears)):
        return
    own = {"q_proj": queries * head, "k_proj": head, "v_proj": head}
    size = sum(n * linears[leaf].in_features for leaf, n in own.items())
    size += queries * head * o.out_features
    rows = {f"{name}.{leaf}": n for leaf, n in own.items()}
    yield Units(ATTENTION, count, size, rows, {f"{name}.o_proj": queries * head})


def _linears(module: nn.Module, leaves: tuple[str, ...]) -> dict[str, nn.Linear] | None:
    """The module's linears of these names; None if one is not there."""
    found = {leaf: getattr(module, leaf, None) for leaf in leaves}
    linears = {leaf: one for leaf, one in found.items() if isinstance(one, nn.Linear)}
    return linears if len(linears) == len(leaves) else None


def _others(module: nn.Module, linears: Collection[str]) -> list[tuple[int, ...]]:
    """Shapes of what else the module has."""
    return [
        tuple(parameter.shape)
        for name, parameter in module.named_parameters()
        if name.partition(".")[0] not in linears
    ]
