"""The factors of one block's linears, from its second moments and, if need be, one more pass."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from emloc.calibrate import linears_of
from emloc.emulators import Ranks
from emloc.linalg.factorize import Factors, eigen, refit, whiten
from emloc.linalg.gram import cross, exact_float32, gram
from emloc.statistics import Statistics, Taken
from emloc.walk import Block


@dataclass(frozen=True)
class Factored:
    """One layer's factors and the seconds they took."""

    factors: Factors
    seconds: float

    @property
    def facts(self) -> dict[str, Any]:
        """What is kept with the emulator."""
        one = self.factors
        rank = one.v.shape[0]
        return {"rank": rank, "kept": one.kept, "seen": one.seen, "seconds": round(self.seconds, 4)}


def factorize(
    weights: Mapping[str, Tensor],
    ranks: Ranks,
    statistics: Statistics | None,
    algorithm: str,
) -> dict[str, Factored]:
    """Layer -> factors in the dtype of its weight (out, in); plain SVD without statistics."""
    found = {}
    for layer, weight in weights.items():
        start = time.perf_counter()
        grams = {} if statistics is None else statistics.of(layer)
        grams = {kind: total.to(weight.device) for kind, total in grams.items()}
        if algorithm == "whiten":
            factors = whiten(weight, ranks[layer], grams["input_gram"], dtype=weight.dtype)
        else:
            factors = eigen(weight, ranks[layer], **grams, dtype=weight.dtype)
        found[layer] = Factored(factors, time.perf_counter() - start)
    return found


def refine(block: Block, found: dict[str, Factored], layers: Sequence[str]) -> dict[str, Factored]:
    """Run the block and solve u again, against the rounded v, where only outputs were known.

    For those layers the first pass kept the Gram of the outputs alone, which says nothing about
    what the rounding of v did.
    """
    linears = linears_of(block, layers)
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(mask: Tensor | None) -> None:
        for layer, rows in taken.rows(mask).items():
            with exact_float32(rows.device):
                z = rows.float() @ found[layer].factors.v.float().T
                y = rows.float() @ linears[layer].weight.float().T
            pair = cross(y, z), gram(z)
            old = sums.get(layer)
            sums[layer] = pair if old is None else (old[0] + pair[0], old[1] + pair[1])

    with Taken(linears) as taken:
        block.run(add)
    return found | {layer: _refitted(found[layer], *sums[layer]) for layer in layers}


def _refitted(one: Factored, yz: Tensor, zz: Tensor) -> Factored:
    start = time.perf_counter()
    u = refit(yz, zz, one.factors.u).to(one.factors.u.dtype)
    return Factored(replace(one.factors, u=u), one.seconds + time.perf_counter() - start)
