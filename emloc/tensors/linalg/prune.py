"""Choose the units of a model to keep within a budget, and enlarge a LoRA of the pruned model.

A unit can only be removed as a whole: a neuron of an MLP, or a key/value head with its queries. In
each layer it owns a number of neighbouring rows or columns.
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
    """The prunable units of one module; any of them can be removed."""

    kind: str  # attention | mlp: scores are only compared within one kind
    count: int  # number of units
    size: int  # number of parameters of one unit


def minimum_parameters(groups: Mapping[str, UnitGroup]) -> int:
    """Number of parameters if only one unit of each group is kept, the minimum of any pruning."""
    return sum(group.size for group in groups.values())


def keep_best(
    groups: Mapping[str, UnitGroup], scores: Mapping[str, Tensor], budget: int
) -> dict[str, Tensor]:
    """Keep the best units of all groups together, as many as fit the budget (UPop).

    Scores are standardised among all units of one kind, which makes attention and MLP comparable.
    The best unit of each group is kept first. All others follow by descending score; a unit that
    does not fit the remaining budget is skipped.

    Args:
        groups: name -> its units.
        scores: name -> (count,), finite; units with higher scores are kept.
        budget: number of parameters that all kept units may have together.

    Returns:
        Name -> indices of the kept units, ascending, int64.

    Raises:
        ValueError: the budget does not suffice for one unit of each group.
    """
    _check_budget(groups, budget)
    standard_scores = _standardise(groups, scores)
    kept_units = {name: [int(values.argmax())] for name, values in standard_scores.items()}
    remaining = budget - minimum_parameters(groups)
    smallest = min(group.size for group in groups.values())
    units = [(name, unit) for name, group in groups.items() for unit in range(group.count)]
    all_scores = torch.cat([standard_scores[name] for name in groups])
    for index in torch.argsort(all_scores, descending=True, stable=True).tolist():
        if remaining < smallest:
            break
        name, unit = units[index]
        if unit != kept_units[name][0] and groups[name].size <= remaining:
            kept_units[name].append(unit)
            remaining -= groups[name].size
    return {name: torch.tensor(sorted(indices)) for name, indices in kept_units.items()}


def keep_evenly(
    groups: Mapping[str, UnitGroup], scores: Mapping[str, Tensor], budget: int
) -> dict[str, Tensor]:
    """Keep the same share of every group, the largest that fits the budget (LoRAM).

    Within a group, the units with the highest scores are kept. Of `count` units, a share p keeps
    floor(p count) neurons or count - floor((1 - p) count) heads, but at least one. Arguments,
    result and errors are those of `keep_best`.
    """
    _check_budget(groups, budget)
    # The number of kept units changes only at multiples of 1 / count, or right above them, so
    # these shares include every possible outcome.
    steps = 2 * lcm(*(group.count for group in groups.values()))

    def counts(step: int) -> dict[str, int]:
        return {name: _kept_count(group, step, steps) for name, group in groups.items()}

    def size(step: int) -> int:
        return sum(count * groups[name].size for name, count in counts(step).items())

    best = bisect_right(range(1, steps + 1), budget, key=size)
    return {
        name: torch.argsort(scores[name], descending=True, stable=True)[:count].sort().values
        for name, count in counts(best).items()
    }


def unit_indices(units: Tensor, size: int) -> Tensor:
    """Indices (units * size,) of the rows or columns of these units, `size` neighbours each."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def scatter(
    pair: LoraPair, shape: tuple[int, int], rows: Tensor | None, columns: Tensor | None
) -> LoraPair:
    """Enlarge the LoRA of a pruned layer to the original shape, with zeros for removed entries.

    Its delta W is the trained one on kept rows and columns, and zero elsewhere (LoRAM's recovery).

    Args:
        pair: a (r, kept columns) and b (kept rows, r).
        shape: (out, in) of the original layer.
        rows: indices of the kept rows; None: all rows are kept.
        columns: indices of the kept columns; None: all columns are kept.
    """
    a, b = pair.a, pair.b
    if columns is not None:
        a = a.new_zeros(a.shape[0], shape[1]).index_copy_(1, columns.to(a.device), a)
    if rows is not None:
        b = b.new_zeros(shape[0], b.shape[1]).index_copy_(0, rows.to(b.device), b)
    return LoraPair(a, b, pair.scale)


def _check_budget(groups: Mapping[str, UnitGroup], budget: int) -> None:
    """Raise ValueError if the budget does not suffice for one unit of each group."""
    minimum = minimum_parameters(groups)
    if budget < minimum:
        raise ValueError(f"one unit of each group has {minimum} parameters, not {budget}")


def _kept_count(group: UnitGroup, step: int, steps: int) -> int:
    """Number of units of a group that are kept at the share step / steps."""
    floor, rest = divmod(group.count * step, steps)
    return max(1, floor + (group.kind == ATTENTION and rest > 0))


def _standardise(
    groups: Mapping[str, UnitGroup], scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Scores with mean 0 and deviation 1 among the units of one kind; zeros if all are equal."""
    standard: dict[str, Tensor] = {}
    for kind in {group.kind for group in groups.values()}:
        names = [name for name, group in groups.items() if group.kind == kind]
        all_scores = torch.cat([scores[name].double() for name in names])
        mean, deviation = all_scores.mean(), all_scores.std(correction=0)
        for name in names:
            centred = scores[name].double() - mean
            standard[name] = centred / deviation if deviation > 0 else torch.zeros_like(centred)
    return standard
