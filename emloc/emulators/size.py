"""How large an emulator is, and the rank each layer may have under a budget."""

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

# Layer -> (rows, columns) of the matrices it is held as.
Held = Mapping[str, Sequence[tuple[int, int]]]

Number = TypeVar("Number", int, float)


def uniform_ranks(source: Source, layers: Layers, budget: Compression, multiple: int) -> Ranks:
    """The same share of every layer, such that the budget's ratio is kept.

    Raises:
        ConfigError: the budget is not solved for, cannot be met, or leaves a layer without rank.
    """
    share = solved(budget.ratio)
    if budget.of == "model":
        share = share_of_linears(source, layers, share)
    try:
        return ranks_at(share, layers, multiple)
    except ConfigError as error:
        raise ConfigError(f"{error}; set compression.ratio higher") from error


def solved(number: Number | None) -> Number:
    """A number of the budget.

    Raises:
        ConfigError: it was to be solved for, and nobody did.
    """
    if number is None:
        raise ConfigError("compression=auto needs budget.gpu_gib; set budget.gpu_gib=24")
    return number


def ranks_at(share: float, layers: Layers, multiple: int) -> Ranks:
    """The rank at which each layer keeps at most `share` of its parameters.

    Raises:
        ConfigError: the share is no share, or leaves a layer without rank.
    """
    ranks = {}
    for name, (rows, columns) in layers.items():
        try:
            ranks[name] = rank_of(share, rows, columns, multiple)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error
    return ranks


def share_of_linears(source: Source, layers: Layers, ratio: float) -> float:
    """The share of `layers` that leaves `ratio` of the whole model.

    Raises:
        ConfigError: the rest alone is more, or nothing would be left out.
    """
    total = sum(source.sizes.values())
    linears = sum(rows * columns for rows, columns in layers.values())
    rest = total - linears
    share = (ratio * total - rest) / linears
    if not 0 < share < 1:
        raise ConfigError(
            f"compression.ratio={ratio} of a model that is {rest / total:.2f} uncompressed; "
            f"set compression.ratio between {rest / total:.2f} and 1, or compression.of=linears"
        )
    return share


def factors_of(source: Source, ranks: Ranks) -> Held:
    """Both factors of every layer of rank k: u^T (k, m) and v (k, n)."""
    return {layer: thin(source.linears[layer], rank) for layer, rank in ranks.items()}


def thin(shape: tuple[int, int], rank: int) -> list[tuple[int, int]]:
    """The matrices that stand for one of `shape` (m, n): u^T (k, m) and v (k, n)."""
    rows, columns = shape
    return [(rank, rows), (rank, columns)]


def bytes_of(
    matrices: Iterable[tuple[int, int]], precision: Precision | None, dtype: torch.dtype
) -> int:
    """Bytes of matrices (rows, columns) in a packed format, or in `dtype` without one."""
    if precision is not None:
        return sum(precision.nbytes(rows, columns) for rows, columns in matrices)
    return sum(rows * columns for rows, columns in matrices) * dtype.itemsize


def size_facts(
    source: Source, held: Held, precision: Precision | None, gone: int = 0
) -> dict[str, Any]:
    """Parameters and bytes of the model that is trained through, and both shares kept.

    Args:
        source: the original.
        held: what stands in for the layers that are not as they were.
        precision: of these; None for the model's dtype.
        gone: parameters beside these layers' weights that the model trained through has not.
    """
    size = source.dtype.itemsize
    total = sum(source.sizes.values())
    before = sum(rows * columns for rows, columns in (source.linears[layer] for layer in held))
    matrices = [shape for shapes in held.values() for shape in shapes]
    after = sum(rows * columns for rows, columns in matrices)
    kept = total - before + after - gone
    return {
        "parameters": kept,
        "bytes": (total - before - gone) * size + bytes_of(matrices, precision, source.dtype),
        "bits": bits_of(precision),
        "share_of_linears": round(after / before, 4) if before else 1.0,
        "share_of_model": round(kept / total, 4),
        **({"precision": precision.name} if precision else {}),
    }
