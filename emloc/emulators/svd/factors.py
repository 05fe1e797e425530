"""Factorise the linears of one block, given their second moments."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from emloc.calibration.blockwise import Block
from emloc.calibration.calibrate import linears_of
from emloc.calibration.moments import PIECE, InputRecorder, Statistics
from emloc.calibration.padding import TokenMask
from emloc.emulators import Ranks
from emloc.precision import Packed, Precision
from emloc.tensors.linalg.allocate import spectrum
from emloc.tensors.linalg.factorize import Factors, eigen, refit, refit_to_v, whiten
from emloc.tensors.linalg.gram import cross, gram, product
from emloc.tensors.linalg.sensitivity import output_root, unweighted
from emloc.tensors.linalg.subspace import subspace

# Number of directions whose energy is reported; more would not change a figure.
POINTS = 64


@dataclass(frozen=True)
class LayerFactors:
    """The factors of one layer, with the seconds that their computation took."""

    factors: Factors  # in a packed format: v is dequantised, u not quantised yet
    seconds: float
    v: Packed | None  # v in the packed format; None: v is in the model's dtype

    @property
    def facts(self) -> dict[str, Any]:
        """The layer's entry in `layers.json`: rank, kept energy, solver, seconds and spectrum."""
        factors = self.factors
        return {
            "rank": factors.v.shape[0],
            "kept": factors.kept_share,
            "seen": factors.data_rank,
            "solver": factors.solver,
            "steps": factors.steps,
            "seconds": round(self.seconds, 4),
            "spectrum": spectrum_record(factors),
        }


def spectrum_record(factors: Factors) -> dict[str, Any]:
    """Output energy of at most `POINTS` directions, evenly spaced on a logarithmic axis.

    Returns:
        `index`: numbers of these directions, the strongest is 1; `energy`: energy of each;
        `total`: energy of all directions; `directions`: the number of all directions, min(m, n).
    """
    spectrum, rank = factors.spectrum.cpu(), factors.v.shape[0]
    count = len(spectrum)
    index = sorted({round(count ** (step / (POINTS - 1))) for step in range(POINTS)})
    kept_share = factors.kept_share
    total = float(spectrum[:rank].sum()) / kept_share if kept_share > 0 else 0.0
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
    gradients: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, LayerFactors]:
    """Layer name -> factors of its weight (out, in); a plain truncated SVD without statistics.

    Args:
        weights: layer name -> weight (out, in); the factors get its dtype.
        ranks: layer name -> rank.
        statistics: second moments of these layers, or None.
        algorithm: eigen, subspace or whiten.
        precision: packed format of the factors; None: the weight's dtype.
        gradients: layer name -> gradients (N, out) of the loss with respect to its outputs. Such a
            layer keeps what the loss depends on, others keep the most output energy.
    """
    layers = {}
    for name, weight in weights.items():
        start = time.perf_counter()
        grams = _grams(name, weight, statistics)
        root = output_root(gradients[name].to(weight.device)) if name in gradients else None
        if root is None:
            factors, v = factorize_matrix(
                weight, ranks[name], grams, algorithm, precision, weight.dtype
            )
        else:
            factors, v = _factorize_weighted(weight, root, ranks[name], grams, algorithm, precision)
        layers[name] = LayerFactors(factors, time.perf_counter() - start, v)
    return layers


def factorize_matrix(
    target: Tensor,
    rank: int,
    grams: Mapping[str, Tensor],
    algorithm: str,
    precision: Precision | None,
    dtype: torch.dtype,
) -> tuple[Factors, Packed | None]:
    """Factorise one matrix (out, in); return the factors as in `LayerFactors`, and the packed v.

    Args:
        target: the matrix to approximate: the layer's weight, or a matrix fitted in its place.
        rank: k.
        grams: `input_gram` or `output_gram`, on the target's device, or empty.
        algorithm: eigen, subspace or whiten.
        precision: packed format of the factors; None: `dtype`.
        dtype: of the factors.
    """
    if algorithm == "whiten":
        factors = whiten(target, rank, grams["input_gram"], dtype=dtype)
    else:
        solve = {"eigen": eigen, "subspace": subspace}[algorithm]
        factors = solve(target, rank, **grams, dtype=dtype)
    if precision is None:
        return factors, None
    # The authors' whitening does not refit u; without an input Gram, `refine` does so later.
    refits = algorithm != "whiten" and "output_gram" not in grams
    return _quantize_v(factors, precision, target, grams.get("input_gram"), refits)


def _factorize_weighted(
    weight: Tensor,
    root: Tensor,
    rank: int,
    grams: Mapping[str, Tensor],
    algorithm: str,
    precision: Precision | None,
) -> tuple[Factors, Packed | None]:
    """Factorise R W instead of W, and take R off the factors; see `linalg.sensitivity`."""
    weighted = dict(grams)
    if (outputs := grams.get("output_gram")) is not None:
        weighted["output_gram"] = root @ outputs.double() @ root.T
    target = weight.detach().double()
    # R^-1 enlarges what rounding has changed in u, so u is not rounded before. In a packed format,
    # `refine` fits u again.
    dtype = torch.float64 if precision is None else weight.dtype
    factors, packed = factorize_matrix(root @ target, rank, weighted, algorithm, precision, dtype)
    u, v = unweighted(root, factors.u), factors.v.to(weight.dtype)
    if "output_gram" not in grams:
        u = refit_to_v(target, u, v, grams.get("input_gram"))
    return replace(factors, u=u.to(weight.dtype), v=v), packed


def spectra(weights: Mapping[str, Tensor], statistics: Statistics | None) -> dict[str, Tensor]:
    """Layer name -> output energy of every direction (min(m, n),), descending, in host memory."""
    return {
        layer: spectrum(weight, **_grams(layer, weight, statistics)).cpu()
        for layer, weight in weights.items()
    }


def _grams(layer: str, weight: Tensor, statistics: Statistics | None) -> dict[str, Tensor]:
    """The layer's Gram matrices by keyword (`input_gram` or `output_gram`), on its device."""
    grams = {} if statistics is None else statistics.of(layer)
    return {kind: total.to(weight.device) for kind, total in grams.items()}


def _quantize_v(
    factors: Factors,
    precision: Precision,
    target: Tensor,
    input_gram: Tensor | None,
    refits: bool,
) -> tuple[Factors, Packed]:
    """Quantise v, and refit u to the quantised v if `refits`; return the factors and packed v."""
    quantized = precision.quantize(factors.v)
    u, v = factors.u, quantized.dequantize()
    if refits:
        u = refit_to_v(target.detach().double(), u, v, input_gram).to(u.dtype)
    return replace(factors, u=u, v=v), quantized


def refine(
    block: Block, factors: dict[str, LayerFactors], layers: Sequence[str]
) -> dict[str, LayerFactors]:
    """Run the block once more and refit u to the rounded v, for layers with an output Gram only.

    The output Gram of such a layer does not tell how the rounding of v, to 16 bits or fewer,
    changed the outputs.

    Args:
        block: the block that all layers are in.
        factors: layer name -> factors.
        layers: names of the layers to refit.

    Returns:
        `factors`, with those of `layers` replaced.
    """
    linears = linears_of(block, layers)
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(mask: TokenMask | None) -> None:
        for layer, rows in recorder.rows(mask).items():
            for piece in rows.split(PIECE):  # type: ignore[no-untyped-call]
                z = product(piece, factors[layer].factors.v.T)
                y = product(piece, linears[layer].weight.T)
                yz, zz = sums.get(layer, (None, None))
                sums[layer] = cross(y, z, total=yz), gram(z, total=zz)

    with InputRecorder(linears) as recorder:
        block.run(add)
    return factors | {layer: _refit_layer(factors[layer], *sums[layer]) for layer in layers}


def _refit_layer(layer: LayerFactors, yz: Tensor, zz: Tensor) -> LayerFactors:
    """The layer's factors with u refitted to the sums yz and zz (see `refit`)."""
    start = time.perf_counter()
    u = refit(yz, zz, layer.factors.u).to(layer.factors.u.dtype)
    seconds = layer.seconds + time.perf_counter() - start
    return replace(layer, factors=replace(layer.factors, u=u), seconds=seconds)
