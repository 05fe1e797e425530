"""How many directions each layer keeps of what all may keep together.

The sum of the layers' relative tail energies is separable, and each layer's gains fall from one
direction to the next, so taking the best gain for its parameters first is optimal up to the last
direction that fits.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from emloc.tensors.linalg.factorize import check, energies

# Of a layer's energy: a swap that gains no more is rounding, and could be undone by the next.
NO_GAIN = 1e-12


@dataclass(frozen=True)
class _Shares:
    """Chunks of directions, layer by layer in one order."""

    gains: Sequence[Sequence[float]]  # of each chunk that may be kept, of the layer's energy
    costs: Sequence[int]  # parameters of one chunk
    taken: list[int]  # chunks kept, at least one
    left: int  # parameters not spent

    @property
    def kept(self) -> float:
        """Sum of the kept shares of energy: what is to be as large as can be."""
        pairs = zip(self.gains, self.taken, strict=True)
        return math.fsum(gain for gains, count in pairs for gain in gains[:count])


def spectrum(
    weight: Tensor, *, input_gram: Tensor | None = None, output_gram: Tensor | None = None
) -> Tensor:
    """The output energy of every direction: what `eigen` cuts, without the directions.

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
    _, _, energy = energies(weight.detach().double(), gram, output_gram)
    return torch.linalg.eigvalsh(energy).flip(0).clamp(min=0)


def greedy(
    spectra: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    uniform: Mapping[str, int],
    multiple: int,
) -> dict[str, int]:
    """Ranks that lose the least summed relative energy for the parameters uniform ranks would take.

    Directions are taken in the order of `energy / (energy of the layer * (m + n))` while they fit;
    then one is given for another as long as that keeps more.

    Args:
        spectra: layer -> (min(m, n),) float64, descending: output energy of every direction.
        shapes: layer -> (m, n).
        uniform: layer -> rank, a multiple of `multiple` with k (m + n) <= m n; together they
            spend the budget.
        multiple: ranks come in chunks of this.

    Returns:
        Layer -> rank, in the order of `uniform`: at least `multiple`, at most what the weight
        itself takes, and together no more parameters than `uniform`, with no less energy kept.

    Raises:
        ValueError: a uniform rank is no multiple, or no smaller than the weight.
    """
    for layer, rank in uniform.items():
        rows, columns = shapes[layer]
        if rank < multiple or rank % multiple or rank * (rows + columns) > rows * columns:
            raise ValueError(f"{layer}: rank {rank} of {rows} x {columns}, multiple {multiple}")
    costs = [multiple * sum(shapes[layer]) for layer in uniform]
    gains = [_gains(spectra[layer], shapes[layer], multiple) for layer in uniform]
    even = _Shares(gains, costs, [rank // multiple for rank in uniform.values()], 0)
    spare = sum((count - 1) * cost for count, cost in zip(even.taken, costs, strict=True))
    best = _filled(_Shares(gains, costs, [1] * len(costs), spare))
    # The order is blind to what fits at the end, which with few directions can be the worse.
    best = best if best.kept >= even.kept else even
    while (better := _swapped(best)) is not None:
        best = _filled(better)
    return {layer: count * multiple for layer, count in zip(uniform, best.taken, strict=True)}


def _gains(spectrum: Tensor, shape: tuple[int, int], multiple: int) -> list[float]:
    """The share of the layer's energy in each chunk that may be kept."""
    most = shape[0] * shape[1] // sum(shape) // multiple
    total = float(spectrum.sum())
    if not total > 0:
        return [0.0] * most
    chunks = spectrum[: most * multiple].double().reshape(most, multiple).sum(1) / total
    # Rounding may not make a later chunk seem better than an earlier one.
    return list(accumulate(chunks.tolist(), min))


def _filled(shares: _Shares) -> _Shares:
    """Take what is best for its parameters, until nothing more fits."""
    taken, left = list(shares.taken), shares.left
    waiting: list[tuple[float, int, int]] = []

    def offer(layer: int) -> None:
        if taken[layer] < len(shares.gains[layer]):
            worth = shares.gains[layer][taken[layer]] / shares.costs[layer]
            heapq.heappush(waiting, (-worth, taken[layer], layer))  # in turn where equal

    for layer in range(len(taken)):
        offer(layer)
    while waiting:
        *_, layer = heapq.heappop(waiting)
        if shares.costs[layer] <= left:
            left -= shares.costs[layer]
            taken[layer] += 1
            offer(layer)
    return replace(shares, taken=taken, left=left)


def _swapped(shares: _Shares) -> _Shares | None:
    """With the last chunk of one layer given for the next of another; None if none keeps more."""
    rows = list(zip(shares.gains, shares.taken, strict=True))
    last = [gains[count - 1] if count > 1 else math.inf for gains, count in rows]
    after = [gains[count] if count < len(gains) else -math.inf for gains, count in rows]
    costs = torch.tensor(shares.costs)
    lost, won = (torch.tensor(item, dtype=torch.float64) for item in (last, after))
    gain = won[None, :] - lost[:, None]
    dearer = costs[None, :] - costs[:, None]
    gain[dearer > shares.left] = -math.inf
    gain.fill_diagonal_(-math.inf)
    giving, getting = divmod(int(gain.argmax()), len(rows))
    if not float(gain[giving, getting]) > NO_GAIN:
        return None
    taken = list(shares.taken)
    taken[giving] -= 1
    taken[getting] += 1
    return replace(shares, taken=taken, left=shares.left - int(dearer[giving, getting]))
