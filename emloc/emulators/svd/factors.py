"""The factors of one block's linears, from its second moments and, if need be, one more pass."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from emloc.calibration.blockwise import Block
from emloc.calibration.calibrate import linears_of
from emloc.calibration.moments import PIECE, InputRecorder, Statistics
from emloc.emulators import Ranks
from emloc.precision import Packed, Precision
from emloc.tensors.linalg.allocate import spectrum
from emloc.tensors.linalg.factorize import Factors, eigen, refit, rounded, whiten
from emloc.tensors.linalg.gram import cross, gram, product
from emloc.tensors.linalg.subspace import subspace

# Directions whose energy is kept for the record: more would show nothing new in a figure.
POINTS = 64


@dataclass(frozen=True)
class LayerFactors:
    """One layer's factors and the seconds they took."""

    factors: Factors  # where packed: v as it is multiplied by, u not yet quantised
    seconds: float
    v: Packed | None  # None in the model's dtype

    @property
    def facts(self) -> dict[str, Any]:
        """What is kept with the emulator."""
        one = self.factors
        rank = one.v.shape[0]
        return {
            "rank": rank,
            "kept": one.kept,
            "seen": one.seen,
            "solver": one.solver,
            "steps": one.steps,
            "seconds": round(self.seconds, 4),
            "spectrum": recorded(one),
        }


def recorded(factors: Factors) -> dict[str, Any]:
    """Output energy of some directions, as evenly spaced in the logarithm as their numbers allow.

    `index`: which direction, the strongest is 1; `energy`: of each; `total`: of all there are;
    `directions`: how many that is, min(m, n).
    """
    spectrum, rank = factors.spectrum.cpu(), factors.v.shape[0]
    known = len(spectrum)
    index = sorted({round(known ** (step / (POINTS - 1))) for step in range(POINTS)})
    total = float(spectrum[:rank].sum()) / factors.kept if factors.kept > 0 else 0.0
    return {
        "index": index,
        "energy": [float(f"{spectrum[i - 1]:.5g}") for i in index],
        "total": float(f"{total:.5g}"),
        "directions": min(factors.u.shape[0], factors.v.shape[1]),
    }


def factorize(
    weights: Mapping[str, Tensor],
    ranks: Ranks,
    statistics: Statistics | None,
    algorithm: str,
    precision: Precision | None = None,
) -> dict[str, LayerFactors]:
    """Layer -> factors in the dtype of its weight (out, in); plain SVD without statistics."""
    found = {}
    for layer, weight in weights.items():
        start = time.perf_counter()
        grams = _grams(layer, weight, statistics)
        factors, v = reduced(weight, ranks[layer], grams, algorithm, precision, weight.dtype)
        found[layer] = LayerFactors(factors, time.perf_counter() - start, v)
    return found


def reduced(
    target: Tensor,
    rank: int,
    grams: Mapping[str, Tensor],
    algorithm: str,
    precision: Precision | None,
    dtype: torch.dtype,
) -> tuple[Factors, Packed | None]:
    """The factors of one matrix (out, in), as `Factored` has them, and v packed.

    Args:
        target: what they stand for, be it the layer's weight or not.
        rank: k.
        grams: `input_gram`, `output_gram` or none, on the target's device.
        algorithm: eigen, subspace or whiten.
        precision: of a kept number; None: `dtype`.
        dtype: of the factors.
    """
    if algorithm == "whiten":
        factors = whiten(target, rank, grams["input_gram"], dtype=dtype)
    else:
        solve = {"eigen": eigen, "subspace": subspace}[algorithm]
        factors = solve(target, rank, **grams, dtype=dtype)
    if precision is None:
        return factors, None
    # The paper's own chain solves nothing again.
    solves = algorithm != "whiten" and "output_gram" not in grams
    return _quantized(factors, precision, target, grams.get("input_gram"), solves)


def spectra(weights: Mapping[str, Tensor], statistics: Statistics | None) -> dict[str, Tensor]:
    """Layer -> output energy of every direction (min(m, n),), descending, in host memory."""
    return {
        layer: spectrum(weight, **_grams(layer, weight, statistics)).cpu()
        for layer, weight in weights.items()
    }


def _grams(layer: str, weight: Tensor, statistics: Statistics | None) -> dict[str, Tensor]:
    grams = {} if statistics is None else statistics.of(layer)
    return {kind: total.to(weight.device) for kind, total in grams.items()}


def _quantized(
    factors: Factors,
    precision: Precision,
    target: Tensor,
    input_gram: Tensor | None,
    solves: bool,
) -> tuple[Factors, Packed]:
    """The factors with v as the format leaves it, and u solved again against that."""
    quantized = precision.quantize(factors.v)
    u, v = factors.u, quantized.dequantize()
    if solves:
        u = rounded(target.detach().double(), u, v, input_gram).to(u.dtype)
    return replace(factors, u=u, v=v), quantized


def refine(
    block: Block, found: dict[str, LayerFactors], layers: Sequence[str]
) -> dict[str, LayerFactors]:
    """Run the block and solve u again, against the rounded v, where only outputs were known.

    For those layers the first pass kept the Gram of the outputs alone, which says nothing about
    what the rounding of v did, be it to 16 bits or to fewer.
    """
    linears = linears_of(block, layers)
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(mask: Tensor | None) -> None:
        for layer, rows in taken.rows(mask).items():
            for some in rows.split(PIECE):  # type: ignore[no-untyped-call]
                z = product(some, found[layer].factors.v.T)
                y = product(some, linears[layer].weight.T)
                yz, zz = sums.get(layer, (None, None))
                sums[layer] = cross(y, z, total=yz), gram(z, total=zz)

    with InputRecorder(linears) as taken:
        block.run(add)
    return found | {layer: _refitted(found[layer], *sums[layer]) for layer in layers}


def _refitted(one: LayerFactors, yz: Tensor, zz: Tensor) -> LayerFactors:
    start = time.perf_counter()
    u = refit(yz, zz, one.factors.u).to(one.factors.u.dtype)
    seconds = one.seconds + time.perf_counter() - start
    return replace(one, factors=replace(one.factors, u=u), seconds=seconds)
