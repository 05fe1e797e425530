"""Which units of a model are kept under a budget, and a LoRA on what is left put back at full size.

A unit is what only goes as a whole: a neuron of an MLP, or a key/value head with its queries. It
owns `size` neighbouring rows or columns in each layer it lies in.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor

from emloc.tensors.linalg.correct import LoraPair

ATTENTION, MLP = "attention", "mlp"


@dataclass(frozen=True)
class UnitGroup:
    """The units of one module, any of which can be left out of it."""

    kind: str  # attention | mlp: scores are compared with those of the same kind
    count: int  # units
    size: int  # parameters of one unit


def least(groups: Mapping[str, UnitGroup]) -> int:
    """Parameters of one unit of each group, which is what has to be kept."""
    return sum(group.size for group in groups.values())


def keep_best(
    groups: Mapping[str, UnitGroup], scores: Mapping[str, Tensor], budget: int
) -> dict[str, Tensor]:
    """The best units of all groups together (UPop): no further unit would fit the budget.

    Scores are standardised among all units of one kind, which makes attention and MLP comparable.
    The best unit of each group is kept first; then all others are taken in their order, each that
    still fits.

    Args:
        groups: name -> its units.
        scores: name -> (count,), finite; what is higher is kept longer.
        budget: parameters that all kept units may have together.

    Returns:
        Name -> the units kept, ascending, int64.

    Raises:
        ValueError: the budget does not hold one unit of each group.
    """
    _refuse_below(groups, budget)
    standard = _standardised(groups, scores)
    kept = {name: [int(one.argmax())] for name, one in standard.items()}
    left = budget - least(groups)
    smallest = min(group.size for group in groups.values())
    names = list(groups)
    owner = [index for index, name in enumerate(names) for _ in range(groups[name].count)]
    number = [unit for name in names for unit in range(groups[name].count)]
    every = torch.cat([standard[name] for name in names])
    for place in torch.argsort(every, descending=True, stable=True).tolist():
        if left < smallest:
            break
        name, unit = names[owner[place]], number[place]
        if unit != kept[name][0] and groups[name].size <= left:
            kept[name].append(unit)
            left -= groups[name].size
    return {name: torch.tensor(sorted(units)) for name, units in kept.items()}


def keep_evenly(
    groups: Mapping[str, UnitGroup], scores: Mapping[str, Tensor], budget: int
) -> dict[str, Tensor]:
    """The same share of every group (LoRAM), the largest that the budget holds, by score within it.

    Of `count` units a share p leaves floor(p count) neurons, and count - floor((1 - p) count) of
    attention; at least one. Arguments, result and errors are those of `keep_best`.
    """
    _refuse_below(groups, budget)
    # Counts change at multiples of 1 / counts only: at one of these or right behind it.
    steps = 2 * lcm(*(group.count for group in groups.values()))

    def counts(step: int) -> dict[str, int]:
        return {name: _share(group, step, steps) for name, group in groups.items()}

    def size(step: int) -> int:
        return sum(count * groups[name].size for name, count in counts(step).items())

    best = bisect_right(range(1, steps + 1), budget, key=size)
    return {
        name: torch.argsort(scores[name], descending=True, stable=True)[:count].sort().values
        for name, count in counts(best).items()
    }


def spans(units: Tensor, size: int) -> Tensor:
    """The rows or columns of these units, `size` neighbours each: (units * size,)."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def scatter(
    pair: LoraPair, shape: tuple[int, int], rows: Tensor | None, columns: Tensor | None
) -> LoraPair:
    """The LoRA of a pruned layer as one of the layer of `shape`, with zeros where it was cut.

    delta W is what was trained on kept rows and columns, and zero on all others (LoRAM's recovery).

    Args:
        pair: a (r, columns kept) and b (rows kept, r).
        shape: (out, in) of the original layer.
        rows: indices of those that were kept; None for all.
        columns: likewise.
    """
    a, b = pair.a, pair.b
    if columns is not None:
        a = a.new_zeros(a.shape[0], shape[1]).index_copy_(1, columns.to(a.device), a)
    if rows is not None:
        b = b.new_zeros(shape[0], b.shape[1]).index_copy_(0, rows.to(b.device), b)
    return LoraPair(a, b, pair.scale)


def _refuse_below(groups: Mapping[str, UnitGroup], budget: int) -> None:
    if budget < least(groups):
        raise ValueError(f"one unit of each group has {least(groups)} parameters, not {budget}")


def _share(group: UnitGroup, step: int, steps: int) -> int:
    """Units that are left of a group at the share step / steps."""
    down, rest = divmod(group.count * step, steps)
    return max(1, down + (group.kind == ATTENTION and rest > 0))


def _standardised(
    groups: Mapping[str, UnitGroup], scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The scores with mean 0 and deviation 1 among the units of one kind; all equal: zeros."""
    found: dict[str, Tensor] = {}
    for kind in {group.kind for group in groups.values()}:
        names = [name for name, group in groups.items() if group.kind == kind]
        every = torch.cat([scores[name].double() for name in names])
        mean, deviation = every.mean(), every.std(correction=0)
        for name in names:
            centred = scores[name].double() - mean
            found[name] = centred / deviation if deviation > 0 else torch.zeros_like(centred)
    return found
