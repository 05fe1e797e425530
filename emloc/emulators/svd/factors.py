"""Factorise the linears of one block, given their second moments."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from emloc.calibration.blockwise import Block
from emloc.calibration.calibrate import linears_of
from emloc.calibration.moments import PIECE, InputRecorder, Statistics
from emloc.calibration.padding import TokenMask
from emloc.emulators import Ranks
from emloc.emulators.size import Groups
from emloc.errors import ConfigError
from emloc.precision import Packed, Precision
from emloc.tensors.linalg.allocate import spectrum
from emloc.tensors.linalg.factorize import Factors, eigen, refit, refit_to_v, whiten
from emloc.tensors.linalg.gram import cross, exact_float32, gram, product
from emloc.tensors.linalg.sensitivity import output_root, unweighted
from emloc.tensors.linalg.subspace import subspace
from emloc.tensors.side_by_side import run_side_by_side

# Number of directions whose energy is reported; more would not change a figure.
POINTS = 64

# Two groups of layers are factorised at a time if a GPU has room for so many copies of all weights
# of the block in float64. What one group takes at most is about three copies of its own weights.
COPIES_BESIDE = 8


@dataclass(frozen=True)
class LayerFactors:
    """The factors of one layer, with the seconds that their computation took.

    Layers that are factorised together have one v, and the spectrum and shares of all of them.
    """

    factors: Factors  # in a packed format: v is dequantised, u not quantised yet
    seconds: float
    v: Packed | None  # v in the packed format; None: v is in the model's dtype
    group: Sequence[str] = ()  # layers with the same v, in the order of their rows; empty: none
    rows: int = 0  # output features of the group together
    # Gram (k, k) of what v makes of the inputs; a packed format with feedback uses it for u
    through: Tensor | None = None

    @cached_property
    def ut(self) -> Packed:
        """u^T (k, m) in the packed format; only if v is packed."""
        assert self.v is not None
        return self.v.precision.quantize(self.factors.u.T.contiguous(), rows=self.through)

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
            "spectrum": spectrum_record(factors, self.rows),
            **({"group": [*self.group]} if self.group else {}),
        }


def spectrum_record(factors: Factors, rows: int = 0) -> dict[str, Any]:
    """Output energy of at most `POINTS` directions, evenly spaced on a logarithmic axis.

    Args:
        factors: of one layer.
        rows: output features of all layers with this v; 0: the layer's own.

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
        "directions": min(rows or factors.u.shape[0], factors.v.shape[1]),
    }


def factorize(
    weights: Mapping[str, Tensor],
    ranks: Ranks,
    statistics: Statistics | None,
    algorithm: str,
    precision: Precision | None = None,
    gradients: Mapping[str, Tensor] = MappingProxyType({}),
    groups: Groups | None = None,
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
        groups: names of layers that read the same input and get one v; None: each layer is alone.

    Raises:
        ConfigError: the layers of a group read different inputs.
    """
    partition = [[name] for name in weights] if groups is None else groups
    device = next(iter(weights.values())).device

    def factorize_group(names: Sequence[str]) -> dict[str, LayerFactors]:
        """The factors of the layers of one group."""
        start = time.perf_counter()
        parts, rank = [weights[name] for name in names], ranks[names[0]]
        grams = _grams(names, device, statistics)
        roots = [
            output_root(gradients[name].to(device)) if name in gradients else None for name in names
        ]
        if any(root is not None for root in roots):
            factors, v = _factorize_weighted(parts, roots, rank, grams, algorithm, precision)
        else:
            target = stacked(parts)
            factors, v = factorize_matrix(target, rank, grams, algorithm, precision, target.dtype)
        seconds = time.perf_counter() - start
        return split_group(names, parts, factors, v, seconds, grams.get("input_gram"))

    work = {tuple(names): partial(factorize_group, names) for names in partition}
    sizes = {names: sum(weights[name].numel() for name in names) for names in work}
    needed_bytes = COPIES_BESIDE * torch.float64.itemsize * sum(sizes.values())
    # The switches for exact products belong to the process, so no group may change them.
    with exact_float32(device):
        by_group = run_side_by_side(work, sizes, device, needed_bytes)
    return {name: layer for layers in by_group.values() for name, layer in layers.items()}


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """The matrices (m, n) below each other; the matrix itself if there is one."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def split_group(
    names: Sequence[str],
    parts: Sequence[Tensor],
    factors: Factors,
    v: Packed | None,
    seconds: float,
    input_gram: Tensor | None,
) -> dict[str, LayerFactors]:
    """Layer name -> its factors, of the factors of the stacked weights (m, n) in `parts`.

    `input_gram` (n, n) is that of all these layers, or None.
    """
    through = None
    if v is not None and v.precision.feedback and input_gram is not None:
        through = factors.v.double() @ input_gram.double() @ factors.v.double().T
    if len(names) == 1:
        return {names[0]: LayerFactors(factors, seconds, v, through=through)}
    us = torch.split(factors.u, [len(part) for part in parts])
    rest = (seconds / len(names), v, names, len(factors.u), through)
    return {
        name: LayerFactors(replace(factors, u=u), *rest) for name, u in zip(names, us, strict=True)
    }


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
    if precision.feedback:
        factors = rotated(factors)
    # The authors' whitening does not refit u; without an input Gram, `refine` does so later.
    refits = algorithm != "whiten" and "output_gram" not in grams
    return _quantize_v(factors, precision, target, grams.get("input_gram"), refits)


def rotated(factors: Factors) -> Factors:
    """Return the factors u R and R^T v of the same product, with a random orthogonal R (k, k).

    The features v x of the leading directions are uncorrelated, so that error feedback along the
    columns of u could not make up for anything. Those of a rotated v are correlated. On
    SmolLM2-135M in two bits this divides the error of outputs by three.
    """
    rank = factors.v.shape[0]
    generator = torch.Generator().manual_seed(rank)
    random = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(random.to(factors.v.device)).Q
    u, v = (factors.u.double() @ rotation), (rotation.T @ factors.v.double())
    return replace(factors, u=u.to(factors.u.dtype), v=v.to(factors.v.dtype))


def _factorize_weighted(
    parts: Sequence[Tensor],
    roots: Sequence[Tensor | None],
    rank: int,
    grams: Mapping[str, Tensor],
    algorithm: str,
    precision: Precision | None,
) -> tuple[Factors, Packed | None]:
    """Factorise R W instead of W, and take R off the factors; see `linalg.sensitivity`.

    Args:
        parts: the weights W (m, n) of the layers of a group.
        roots: the root R (m, m) of each layer; None stands for the identity.
        rank: k.
        grams: as in `factorize_matrix`; an output Gram only for one layer.
        algorithm: eigen, subspace or whiten.
        precision: packed format of the factors; None: the dtype of the weights.
    """
    weighted = dict(grams)
    if (outputs := grams.get("output_gram")) is not None:
        (root,) = roots
        assert root is not None
        weighted["output_gram"] = root @ outputs.double() @ root.T
    dtype, targets = parts[0].dtype, [part.detach().double() for part in parts]
    target = stacked(
        [one if root is None else root @ one for root, one in zip(roots, targets, strict=True)]
    )
    # R^-1 enlarges what rounding has changed in u, so u is not rounded before. In a packed format,
    # `refine` fits u again.
    of_factors = torch.float64 if precision is None else dtype
    factors, packed = factorize_matrix(target, rank, weighted, algorithm, precision, of_factors)
    us = torch.split(factors.u, [len(part) for part in parts])
    u = stacked(
        [
            one.double() if root is None else unweighted(root, one)
            for root, one in zip(roots, us, strict=True)
        ]
    )
    v = factors.v.to(dtype)
    if "output_gram" not in grams:
        u = refit_to_v(stacked(targets), u, v, grams.get("input_gram"))
    return replace(factors, u=u.to(dtype), v=v), packed


def spectra(
    weights: Mapping[str, Tensor], statistics: Statistics | None, groups: Groups
) -> dict[str, Tensor]:
    """Output energy of every direction (min(m, n),), descending, in host memory.

    The key is the name of the first layer of a group, whose weights are taken together.
    """
    energies = {}
    for names in groups:
        weight = stacked([weights[name] for name in names])
        energies[names[0]] = spectrum(weight, **_grams(names, weight.device, statistics)).cpu()
    return energies


def _grams(
    names: Sequence[str], device: torch.device, statistics: Statistics | None
) -> dict[str, Tensor]:
    """The Gram matrices of a group by keyword (`input_gram` or `output_gram`), on a device.

    Raises:
        ConfigError: the layers of the group read different inputs.
    """
    if statistics is None:
        return {}
    sites = {name: statistics.sites.get(name, name) for name in names}
    if other := next((name for name in names if sites[name] != sites[names[0]]), None):
        raise other_input(other, names[0])
    return {kind: total.to(device) for kind, total in statistics.of(names[0]).items()}


def other_input(layer: str, first: str) -> ConfigError:
    """Return the error for layers of a group that do not read the same input."""
    return ConfigError(
        f"{layer}: reads another input than {first}, so they have no common factor; "
        "set emulator.shared=none"
    )


def _quantize_v(
    factors: Factors,
    precision: Precision,
    target: Tensor,
    input_gram: Tensor | None,
    refits: bool,
) -> tuple[Factors, Packed]:
    """Quantise v, and refit u to the quantised v if `refits`; return the factors and packed v."""
    quantized = precision.quantize(factors.v, columns=input_gram)
    u, v = factors.u, quantized.dequantize()
    if refits:
        u = refit_to_v(target, u, v, input_gram).to(u.dtype)
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
