"""How large a training is, and the largest emulator that fits."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from emloc.config import Cell
from emloc.emulators.full import Full
from emloc.emulators.svd import Svd
from emloc.errors import ConfigError
from emloc.memory import GIB
from emloc.plan.scheme import Scheme, Work
from emloc.settings import Compression
from emloc.source import Source

log = logging.getLogger(__name__)

# Of a budget, not to be planned with: the driver's own memory and what lies unused between pieces.
RESERVE = 0.06
# What the libraries of products and attention keep for themselves.
WORKSPACE = 64 * 2**20
# With this share kept at 16 bits there is nothing to gain from four.
NEARLY_ALL = 0.9
STEP = 0.01


@dataclass(frozen=True)
class Need:
    """Bytes on the device in the heaviest moment of a step: the start of its backward pass."""

    weights: int
    adapter: int  # with optimizer state
    activations: int  # all that comes and goes; the gradients of the adapter too
    scratch: int  # where four-bit matrices are formed, and libraries work
    operations: int  # of one step

    @property
    def peak(self) -> int:
        """Bytes held at most."""
        return self.weights + self.adapter + self.activations + self.scratch


def need_of(scheme: Scheme, work: Work) -> Need:
    """What training under this scheme needs."""
    rest = _at_rest(scheme)
    # Gradients come up in the trace, layer by layer, while activations go.
    traced = scheme.traced(work)
    return replace(rest, activations=traced.peak, operations=traced.operations)


def _at_rest(scheme: Scheme) -> Need:
    return Need(scheme.weights, scheme.adapter, 0, scheme.scratch + WORKSPACE, 0)


def scheme_of(cell: Cell, source: Source, ratio: float | None, bits: int) -> Scheme:
    """The cell's model and adapter, its compressed layers held at `ratio` and `bits`."""
    multiple = cell.emulator.multiple if isinstance(cell.emulator, Svd) else 1
    return Scheme(
        source,
        cell.model.lora_targets,
        cell.model.adapted(source),
        cell.model.compressed(source),
        cell.lora,
        ratio,
        bits,
        multiple,
    )


def fitting(cell: Cell, source: Source, work: Work) -> Compression:
    """The largest ratio, with its bits, whose training stays within `budget.gpu_gib`.

    16 bits where nearly all can be kept so, else nf4: a number of four bits loses less than leaving
    out three of four.

    Raises:
        ConfigError: there is no budget, or nothing fits it.
    """
    limit = cell.budget.gpu_gib
    if limit is None:
        raise ConfigError("compression=auto needs budget.gpu_gib; set budget.gpu_gib=24")
    room = int(limit * GIB * (1 - RESERVE))
    wanted = cell.compression.bits
    if isinstance(cell.emulator, Full):
        return _whole(cell, source, work, room)
    found: dict[int, float] = {}
    for bits in (16, 4) if wanted is None else (wanted,):
        ratio = _largest(cell, source, work, bits, room)
        if ratio is not None:
            found[bits] = ratio
    if not found:
        rest = scheme_of(cell, source, None, 16).uncompressed / GIB
        raise ConfigError(
            f"budget.gpu_gib={limit:g}: no ratio fits; what is never compressed takes {rest:.1f} "
            "GiB of it, the adapter and activations the rest; set budget.gpu_gib higher, or "
            "train.batch or lora.rank lower"
        )
    bits = 16 if found.get(16, 0) >= NEARLY_ALL or 4 not in found else 4
    log.info("compression=auto: ratio %.2f at %d bits within %g GiB", found[bits], bits, limit)
    return replace(cell.compression, ratio=found[bits], bits=bits, of="linears")


def _whole(cell: Cell, source: Source, work: Work, room: int) -> Compression:
    for bits in (16, 4) if cell.compression.bits is None else (cell.compression.bits,):
        if need_of(scheme_of(cell, source, None, bits), work).peak <= room:
            return replace(cell.compression, ratio=0.5, bits=bits)  # the ratio is not read
    raise ConfigError(
        f"budget.gpu_gib={cell.budget.gpu_gib:g}: the whole model does not fit, at 4 bits either; "
        "set method=emloc or budget.gpu_gib higher"
    )


def _largest(cell: Cell, source: Source, work: Work, bits: int, room: int) -> float | None:
    """The largest multiple of STEP that fits; activations hardly depend on it, weights do."""
    passing = need_of(scheme_of(cell, source, 0.5, bits), work).activations

    def fits(ratio: float) -> bool:
        scheme = scheme_of(cell, source, ratio, bits)
        try:
            return replace(_at_rest(scheme), activations=passing).peak <= room
        except ConfigError:  # it leaves a layer without rank
            return False

    ratios = (round(STEP * count, 2) for count in range(1, round(1 / STEP)))
    return max((ratio for ratio in ratios if fits(ratio)), default=None)
