"""How large an emulator is, and the rank each layer may have under a budget."""

from __future__ import annotations

from typing import Any

from emloc.calibrate import Layers
from emloc.emulators import Ranks
from emloc.errors import ConfigError
from emloc.linalg.factorize import rank_of
from emloc.settings import Compression
from emloc.source import Source


def uniform_ranks(source: Source, layers: Layers, budget: Compression, multiple: int) -> Ranks:
    """The same share of every layer, such that the budget's ratio is kept.

    Raises:
        ConfigError: the budget cannot be met, or leaves a layer without rank.
    """
    share = budget.ratio
    if budget.of == "model":
        share = _share_of_linears(source, layers, budget.ratio)
    try:
        return ranks_at(share, layers, multiple)
    except ConfigError as error:
        raise ConfigError(f"{error}; set compression.ratio higher") from error


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


def _share_of_linears(source: Source, layers: Layers, ratio: float) -> float:
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


def size_facts(source: Source, ranks: Ranks) -> dict[str, Any]:
    """Parameters and bytes of the model that is trained through, and both shares kept."""
    total = sum(source.sizes.values())
    shapes = {name: source.linears[name] for name in ranks}
    before = sum(rows * columns for rows, columns in shapes.values())
    after = sum(ranks[name] * (rows + columns) for name, (rows, columns) in shapes.items())
    kept = total - before + after
    return {
        "parameters": kept,
        "bytes": kept * source.dtype.itemsize,
        "share_of_linears": round(after / before, 4) if before else 1.0,
        "share_of_model": round(kept / total, 4),
    }
