"""Distribute a budget of parameters over layers: how many directions each layer keeps.

The loss to minimise is the sum of the layers' relative tail energies. It is separable, and within a
layer the gain decreases from one direction to the next. So a greedy choice by gain per parameter is
optimal, up to the last direction that fits.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from emloc.tensors.linalg.factorize import check, energy_matrix

# Share of a layer's energy. A swap that gains less may be a rounding error, which the next swap
# could undo, without end.
MIN_GAIN = 1e-12


@dataclass(frozen=True)
class _Allocation:
    """Number of chunks of directions that each layer keeps; all lists are in the layers' order."""

    gains: Sequence[Sequence[float]]  # share of the layer's energy in each chunk it may keep
    costs: Sequence[int]  # parameters of one chunk of the layer
    counts: list[int]  # chunks that the layer keeps, at least one
    remaining: int  # parameters that are not spent

    @property
    def kept_energy(self) -> float:
        """Sum over layers of the kept share of energy, which the allocation maximises."""
        pairs = zip(self.gains, self.counts, strict=True)
        return math.fsum(gain for gains, count in pairs for gain in gains[:count])


def spectrum(
    weight: Tensor, *, input_gram: Tensor | None = None, output_gram: Tensor | None = None
) -> Tensor:
    """Output energy of every direction of a weight: the spectrum that `eigen` truncates.

    Args:
        weight: (m, n).
        input_gram: (n, n), as in `eigen`.
        output_gram: (m, m), as in `eigen`.

    Returns:
        (min(m, n),) float64, descending, none negative.

    Raises:
        ValueError: both Grams are given, a shape does not fit, or a value is not finite.
        torch.linalg.LinAlgError: the decomposition did not converge.
    """
    check(weight, 1, input_gram, output_gram)
    gram = None if input_gram is None else input_gram.double()
    _, _, energy = energy_matrix(weight.detach().double(), gram, output_gram)
    return torch.linalg.eigvalsh(energy).flip(0).clamp(min=0)


def greedy(
    spectra: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    uniform: Mapping[str, int],
    multiple: int,
) -> dict[str, int]:
    """Ranks that lose the least relative energy, for at most the parameters of uniform ranks.

    Directions are added by descending `energy / (energy of the layer * (m + n))` while they fit.
    Then single directions are swapped between layers as long as this keeps more energy.

    Args:
        spectra: layer -> (min(m, n),) float64, descending: output energy of every direction.
        shapes: layer -> (m, n).
        uniform: layer -> rank, a multiple of `multiple` with k (m + n) <= m n; these ranks
            together define the budget.
        multiple: every rank is a multiple of this (a chunk).

    Returns:
        Layer -> rank, in the order of `uniform`: at least `multiple`, and factors no larger than
        the weight. Together they have at most the parameters of `uniform` and keep at least as much
        energy.

    Raises:
        ValueError: a uniform rank is no multiple, or its factors are larger than the weight.
    """
    for layer, rank in uniform.items():
        rows, columns = shapes[layer]
        if rank < multiple or rank % multiple or rank * (rows + columns) > rows * columns:
            raise ValueError(
                f"{layer}: rank {rank} must be a multiple of {multiple}, and its factors no larger "
                f"than the weight ({rows} x {columns})"
            )
    costs = [multiple * sum(shapes[layer]) for layer in uniform]
    gains = [_gains(spectra[layer], shapes[layer], multiple) for layer in uniform]
    even = _Allocation(gains, costs, [rank // multiple for rank in uniform.values()], 0)
    spare = sum((count - 1) * cost for count, cost in zip(even.counts, costs, strict=True))
    best = _fill(_Allocation(gains, costs, [1] * len(costs), spare))
    # The greedy order ignores which chunks fit at the end, so with few directions it can be worse
    # than uniform ranks.
    best = best if best.kept_energy >= even.kept_energy else even
    while (better := _best_swap(best)) is not None:
        best = _fill(better)
    return {layer: count * multiple for layer, count in zip(uniform, best.counts, strict=True)}


def _gains(spectrum: Tensor, shape: tuple[int, int], multiple: int) -> list[float]:
    """Share of the layer's energy in each chunk that the layer may keep."""
    most = shape[0] * shape[1] // sum(shape) // multiple
    total = float(spectrum.sum())
    if not total > 0:
        return [0.0] * most
    chunks = spectrum[: most * multiple].double().reshape(most, multiple).sum(1) / total
    # Made monotone, since rounding errors could make a later chunk seem better than an earlier one.
    return list(accumulate(chunks.tolist(), min))


def _fill(start: _Allocation) -> _Allocation:
    """Add chunks by descending gain per parameter, until no further chunk fits the budget."""
    counts, remaining = list(start.counts), start.remaining
    candidates: list[tuple[float, int, int]] = []

    def push_next_chunk(layer: int) -> None:
        if counts[layer] < len(start.gains[layer]):
            worth = start.gains[layer][counts[layer]] / start.costs[layer]
            # Among equal worths, the layer with the fewest chunks is first.
            heapq.heappush(candidates, (-worth, counts[layer], layer))

    for layer in range(len(counts)):
        push_next_chunk(layer)
    while candidates:
        *_, layer = heapq.heappop(candidates)
        if start.costs[layer] <= remaining:
            remaining -= start.costs[layer]
            counts[layer] += 1
            push_next_chunk(layer)
    return replace(start, counts=counts, remaining=remaining)


def _best_swap(start: _Allocation) -> _Allocation | None:
    """Swap the last chunk of one layer for the next chunk of another; None if no swap gains energy.

    Of all swaps that fit the budget, the one with the largest gain is made.
    """
    rows = list(zip(start.gains, start.counts, strict=True))
    last_gains = [gains[count - 1] if count > 1 else math.inf for gains, count in rows]
    next_gains = [gains[count] if count < len(gains) else -math.inf for gains, count in rows]
    costs = torch.tensor(start.costs)
    lost, gained = (torch.tensor(item, dtype=torch.float64) for item in (last_gains, next_gains))
    gain = gained[None, :] - lost[:, None]
    extra_cost = costs[None, :] - costs[:, None]
    gain[extra_cost > start.remaining] = -math.inf
    gain.fill_diagonal_(-math.inf)
    giver, receiver = divmod(int(gain.argmax()), len(rows))
    if not float(gain[giver, receiver]) > MIN_GAIN:
        return None
    counts = list(start.counts)
    counts[giver] -= 1
    counts[receiver] += 1
    remaining = start.remaining - int(extra_cost[giver, receiver])
    return replace(start, counts=counts, remaining=remaining)
