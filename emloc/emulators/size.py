"""Sizes of emulators, and the layer ranks that meet a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from emloc.calibration.calibrate import Layers
from emloc.config.settings import Compression
from emloc.emulators import Ranks
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.precision import Precision, bits_of
from emloc.tensors.linalg.factorize import rank_of

# Layer name -> (rows, columns) of each matrix that the emulator stores for this layer.
StoredShapes = Mapping[str, Sequence[tuple[int, int]]]

Number = TypeVar("Number", int, float)


# Names of the layers of one factorisation, with one v and a u each. The first one stores v.
Groups = Sequence[Sequence[str]]


def uniform_ranks(
    source: Source,
    layers: Layers,
    budget: Compression,
    multiple: int,
    groups: Groups | None = None,
) -> Ranks:
    """Ranks that keep the same share of parameters in every layer and meet the budget's ratio.

    Args:
        source: the original model.
        layers: the layers to factorise, name -> (out, in).
        budget: its ratio counts all parameters of the model, or those of `layers`.
        multiple: ranks are rounded down to a multiple of this.
        groups: layers that are factorised together; None: each alone.

    Raises:
        ConfigError: the ratio is still `auto`, cannot be met, or leaves a layer with rank 0.
    """
    share = require_solved(budget.ratio)
    if budget.of == "model":
        share = share_of_linears(source, layers, share)
    try:
        return ranks_at(share, layers, multiple, groups)
    except ConfigError as error:
        raise ConfigError(f"{error}; set compression.ratio higher") from error


def require_solved(number: Number | None) -> Number:
    """Return a number of the budget, which is None until `compression=auto` has been solved.

    Raises:
        ConfigError: the number is None.
    """
    if number is None:
        raise ConfigError("compression=auto needs budget.gpu_gib; set budget.gpu_gib=24")
    return number


def ranks_at(share: float, layers: Layers, multiple: int, groups: Groups | None = None) -> Ranks:
    """Largest rank of each layer whose factors keep at most `share` of its parameters.

    Layers of one group have one rank, that of the matrix (sum of m, n) of their rows.

    Raises:
        ConfigError: the share is not between 0 and 1, or leaves a layer with rank 0.
    """
    ranks: Ranks = {}
    for names in [[name] for name in layers] if groups is None else groups:
        try:
            rank = rank_of(share, *stacked_shape(names, layers), multiple)
        except ValueError as error:
            raise ConfigError(f"{names[0]}: {error}") from error
        ranks |= dict.fromkeys(names, rank)
    return {name: ranks[name] for name in layers}


def stacked_shape(names: Sequence[str], layers: Layers) -> tuple[int, int]:
    """Shape (sum of m, n) of the weights of layers that read the same input."""
    return sum(layers[name][0] for name in names), layers[names[0]][1]


def share_of_linears(source: Source, layers: Layers, ratio: float) -> float:
    """Share of the parameters in `layers` to keep, so that the model keeps `ratio` of its own.

    Raises:
        ConfigError: the parameters outside `layers` exceed the ratio, or nothing is compressed.
    """
    total = sum(source.sizes.values())
    linears = sum(rows * columns for rows, columns in layers.values())
    rest = total - linears
    share = (ratio * total - rest) / linears
    if not 0 < share < 1:
        raise ConfigError(
            f"compression.ratio={ratio} counts all parameters of the model, and "
            f"{rest / total:.2f} of them cannot be compressed; "
            f"set compression.ratio between {rest / total:.2f} and 1, or compression.of=linears"
        )
    return share


def stored_shapes(source: Source, ranks: Ranks, groups: Groups | None = None) -> StoredShapes:
    """Layer name -> shapes of its factors of rank k: u^T (k, m), and v (k, n).

    Of layers that are factorised together only the first one has v.
    """
    without_v = followers(groups or ())
    return {
        layer: factor_shapes(source.linears[layer], rank, with_v=layer not in without_v)
        for layer, rank in ranks.items()
    }


def factor_shapes(
    shape: tuple[int, int], rank: int, *, with_v: bool = True
) -> list[tuple[int, int]]:
    """Shapes of the factors u^T (k, m) and v (k, n) of a weight of `shape` (m, n)."""
    rows, columns = shape
    return [(rank, rows), (rank, columns)] if with_v else [(rank, rows)]


def joint_layers(groups: Groups) -> set[str]:
    """Names of the layers that share a v."""
    return {name for names in groups if len(names) > 1 for name in names}


def first_layers(groups: Groups) -> dict[str, str]:
    """Name of each layer -> name of the first layer of its group, which stores v."""
    return {name: names[0] for names in groups for name in names}


def followers(groups: Groups) -> set[str]:
    """Names of the layers that use the v of another layer."""
    return {name for names in groups for name in names[1:]}


def bytes_of(
    matrices: Iterable[tuple[int, int]], precision: Precision | None, dtype: torch.dtype
) -> int:
    """Bytes of matrices (rows, columns) in the packed format, or in `dtype` if it is None."""
    if precision is not None:
        return sum(precision.nbytes(rows, columns) for rows, columns in matrices)
    return sum(rows * columns for rows, columns in matrices) * dtype.itemsize


def size_facts(
    source: Source, stored: StoredShapes, precision: Precision | None, removed: int = 0
) -> dict[str, Any]:
    """Parameters and bytes of the emulator, and its shares of the linears and of the model.

    Args:
        source: the original model.
        stored: shapes of the matrices of all compressed layers; others are as in the original.
        precision: packed format of these matrices; None: the model's dtype.
        removed: parameters that the emulator lacks beside weights of compressed layers.
    """
    size = source.dtype.itemsize
    total = sum(source.sizes.values())
    before = sum(rows * columns for rows, columns in (source.linears[layer] for layer in stored))
    matrices = [shape for shapes in stored.values() for shape in shapes]
    after = sum(rows * columns for rows, columns in matrices)
    parameters = total - before + after - removed
    return {
        "parameters": parameters,
        "bytes": (total - before - removed) * size + bytes_of(matrices, precision, source.dtype),
        "bits": bits_of(precision),
        "share_of_linears": round(after / before, 4) if before else 1.0,
        "share_of_model": round(parameters / total, 4),
        **({"precision": precision.name} if precision else {}),
    }
