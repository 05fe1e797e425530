"""How large a training is, and the largest emulator that fits."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

from emloc.config.settings import MODEL_BITS, Compression
from emloc.cost.plan.blocks import Blocks
from emloc.cost.plan.scheme import Scheme, Work
from emloc.cost.plan.trace import Traced
from emloc.emulators.full import Full
from emloc.emulators.size import uniform_ranks
from emloc.emulators.svd import Svd
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.models.checkpointed import Checkpointed
from emloc.precision import Precision, bits_of
from emloc.runtime.memory import GIB
from emloc.stages.run_config import Cell, formats
from emloc.stages.training.lean_setup import obstacle

log = logging.getLogger(__name__)

# Of a budget, not to be planned with: the driver's own memory and what lies unused between pieces.
RESERVE = 0.06
# What the libraries of products and attention keep for themselves.
WORKSPACE = 64 * 2**20
# With this share kept there is nothing to gain from fewer bits.
NEARLY_ALL = 0.9
RATIOS = [count / 100 for count in range(1, 100)]
# Of a parameter in float32, of its gradient, and of the two moments of AdamW.
FLOAT, MOMENTS = 4, 8


@dataclass(frozen=True)
class Need:
    """Bytes on the device in the heaviest moments: of a step, and of what comes before the first.

    A step's is the start of its backward pass, mostly. Before the first one the token embedding
    lies where the optimizer's moments and the activations will be.
    """

    weights: int
    adapter: int  # with optimizer state, and gradients where they outlive a pass
    activations: int  # all that comes and goes; the gradients of one pass too
    scratch: int  # where packed matrices are formed, and libraries work
    opening: int  # the embedding, and the adapter without an optimizer
    operations: int  # of one pass

    @property
    def peak(self) -> int:
        """Bytes held at most."""
        step = self.adapter + self.activations + self.scratch
        return self.weights + max(step, self.opening)


def need_of(scheme: Scheme, work: Work) -> Need:
    """What training under this scheme needs."""
    return need(scheme, work, scheme.traced(work))


def need(scheme: Scheme, work: Work, traced: Traced) -> Need:
    """The same where it is known what comes and goes, which hardly depends on the precision."""
    adapter = scheme.copies + FLOAT * scheme.parameters
    kept = FLOAT * scheme.parameters if work.accumulate > 1 else 0
    return Need(
        weights=scheme.weights,
        adapter=adapter + MOMENTS * scheme.parameters + kept,
        activations=traced.peak,
        scratch=scheme.scratch + WORKSPACE,
        opening=adapter + scheme.embedding,
        operations=traced.operations,
    )


def scheme_of(
    cell: Cell, source: Source, ratio: float | None, precision: Precision | None
) -> Scheme:
    """The cell's model and adapter, its compressed layers held at `ratio` in `precision`.

    `ratio` counts what `compression.of` says; None leaves every layer whole.

    Raises:
        ConfigError: the training is not the lean one, a pattern matches no layer, or the ratio
            leaves a layer without rank.
    """
    wanted = obstacle(cell.lora, source.dtype) if cell.train.lean else "train.lean=true"
    if wanted:
        raise ConfigError(f"only the lean training is planned with; set {wanted}")
    whole = Scheme(
        Blocks(source),
        cell.model.adapted(source),
        cell.model.compressed(source),
        cell.lora,
        {},
        precision,
    )
    if ratio is None:
        return whole
    return factored(whole, cell, Compression(ratio, cell.compression.of, bits_of(precision)))


def factored(whole: Scheme, cell: Cell, budget: Compression) -> Scheme:
    """The same with its compressed layers as factors within the ratio of `budget`.

    Raises:
        ConfigError: the ratio leaves a layer without rank.
    """
    multiple = cell.emulator.multiple if isinstance(cell.emulator, Svd) else 1
    ranks = uniform_ranks(whole.source, whole.compressed, budget, multiple)
    return replace(whole, ranks=ranks)


def precisions(cell: Cell) -> list[Precision | None]:
    """What a compression may be solved for, from the most bits to the fewest.

    The model's dtype and a packed format of each width there is, as far as the cell leaves it open.

    Raises:
        ConfigError: two formats have one width, and the cell names neither.
    """
    if cell.compression.bits is not None:
        return [cell.precision]
    return [None, *([cell.precision] if cell.precision else formats())]


def fitting(cell: Cell, source: Source, work: Work) -> Compression:
    """The compression whose training stays within `budget.gpu_gib`.

    Of a model that is trained through whole the most bits; else as `fitting_emulator`.

    Raises:
        ConfigError: there is no budget, nothing fits it, or the emulator is one that no plan knows.
    """
    room(cell)  # a missing budget is found out before anything is counted
    if type(cell.emulator) not in (Full, Svd):
        raise ConfigError(
            "compression=auto is solved for emulator=svd and emulator=full; with others "
            "set compression=r50"
        )
    if cell.adapter.trains and cell.adapter.nonlinear:
        raise ConfigError(
            "compression=auto is solved for adapters whose update is s B A, while this adapter "
            f"{cell.adapter.nonlinear}; set adapter=lora, or compression=r50"
        )
    whole = scheme_of(cell, source, None, None)
    if isinstance(cell.emulator, Full):
        return _fitting_whole(cell, whole, work)
    return fitting_emulator(cell, whole, work)


def fitting_emulator(cell: Cell, whole: Scheme, work: Work) -> Compression:
    """The largest ratio of the linears, with its bits, whose training stays within the budget.

    The most bits of which nearly all can be kept, else the fewest: a number of four bits loses less
    than leaving out three of four.

    Raises:
        ConfigError: there is no budget, or nothing fits it.
    """
    limit, wanted = room(cell), cell.compression.bits
    schemes = dict(_by_ratio(cell, whole))
    passing = _passing(schemes, work)

    def too_large(ratio: float, precision: Precision | None) -> bool:
        scheme = replace(schemes[ratio], precision=precision)
        return need(scheme, work, passing(ratio)).peak > limit

    found: dict[int, float] = {}
    for precision in precisions(cell):
        ratios = list(schemes)
        count = bisect_left(ratios, True, key=partial(too_large, precision=precision))
        if count:
            found[bits_of(precision)] = ratios[count - 1]
    gib = cell.budget.gpu_gib
    if not found:
        raise ConfigError(
            f"budget.gpu_gib={gib:g}: no ratio fits{_at(wanted)}; what is never compressed takes "
            f"{whole.uncompressed / GIB:.1f} GiB of it, the adapter and activations the rest; set "
            "budget.gpu_gib higher, or train.batch or lora.rank lower"
        )
    bits = next((b for b, ratio in found.items() if ratio >= NEARLY_ALL), min(found))
    log.info(
        "compression=auto: ratio %.2f at %d bits is the largest within budget.gpu_gib=%g",
        *(found[bits], bits, gib),
    )
    return replace(cell.compression, ratio=found[bits], bits=bits, of="linears")


def _by_ratio(cell: Cell, whole: Scheme) -> Iterator[tuple[float, Scheme]]:
    """The ratios to choose from that leave every layer a rank, upwards.

    Raises:
        ConfigError: none does.
    """
    for ratio in RATIOS:
        with suppress(ConfigError) if ratio < RATIOS[-1] else nullcontext():
            yield ratio, factored(whole, cell, Compression(ratio, "linears", MODEL_BITS))


def _passing(schemes: Mapping[float, Scheme], work: Work) -> Callable[[float], Traced]:
    """Ratio -> at most what comes and goes, with two of them traced.

    A peak is the largest of several moments, each of which grows with the ranks along a line: so it
    is nowhere above the line between its two ends.
    """
    low, high = min(schemes), max(schemes)
    first, last = (schemes[ratio].traced(work) for ratio in (low, high))

    def at(ratio: float) -> Traced:
        share = (ratio - low) / (high - low or 1)
        return Traced(ceil(first.peak + share * (last.peak - first.peak)), first.operations)

    return at


def _fitting_whole(cell: Cell, whole: Scheme, work: Work) -> Compression:
    limit, gib = room(cell), cell.budget.gpu_gib
    traced = whole.traced(work)
    tried = precisions(cell)
    for precision in tried:
        if need(replace(whole, precision=precision), work, traced).peak <= limit:
            bits = bits_of(precision)
            log.info(
                "compression=auto: the whole model at %d bits fits budget.gpu_gib=%g", bits, gib
            )
            return replace(cell.compression, bits=bits)
    raise ConfigError(
        f"budget.gpu_gib={gib:g}: the whole model does not fit{_at(bits_of(tried[-1]))}; "
        "set method=emloc or budget.gpu_gib higher"
    )


def refuse_unplanned(model: Checkpointed, override: str) -> None:
    """Refuse a model of a family whose training cannot be planned.

    Raises:
        ConfigError: with the family's own reason, and the override that does without a plan.
    """
    if model.unplanned is not None:
        raise ConfigError(
            "only the training of models that write text is planned, and "
            f"model={model.name} {model.unplanned}; set {override}"
        )


def room(cell: Cell) -> int:
    """Bytes of the budget that may be planned with.

    Raises:
        ConfigError: there is no budget.
    """
    if cell.budget.gpu_gib is None:
        raise ConfigError("compression=auto needs budget.gpu_gib; set budget.gpu_gib=24")
    return usable(cell.budget.gpu_gib)


def usable(gib: float) -> int:
    """Bytes of so much device memory that may be planned with."""
    return int(gib * GIB * (1 - RESERVE))


def _at(bits: int | None) -> str:
    return "" if bits is None else f" at {bits} bits"
