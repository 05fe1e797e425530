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
from emloc.cost.plan.blocks import DecoderBlocks
from emloc.cost.plan.layout import StepShape, TrainingLayout
from emloc.cost.plan.trace import TraceResult
from emloc.emulators.full import Full
from emloc.emulators.size import uniform_ranks
from emloc.emulators.svd import Svd
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.models.family import ModelFamily
from emloc.precision import Precision, bits_of
from emloc.runtime.memory import GIB
from emloc.stages.run_config import RunConfig, formats
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
class MemoryNeed:
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


def need_of(scheme: TrainingLayout, work: StepShape) -> MemoryNeed:
    """What training under this scheme needs."""
    return need_from_trace(scheme, work, scheme.traced(work))


def need_from_trace(scheme: TrainingLayout, work: StepShape, traced: TraceResult) -> MemoryNeed:
    """The same where it is known what comes and goes, which hardly depends on the precision."""
    adapter = scheme.copies + FLOAT * scheme.parameters
    kept = FLOAT * scheme.parameters if work.accumulate > 1 else 0
    return MemoryNeed(
        weights=scheme.weights,
        adapter=adapter + MOMENTS * scheme.parameters + kept,
        activations=traced.peak,
        scratch=scheme.scratch + WORKSPACE,
        opening=adapter + scheme.embedding,
        operations=traced.operations,
    )


def scheme_of(
    run_config: RunConfig, source: Source, ratio: float | None, precision: Precision | None
) -> TrainingLayout:
    """The cell's model and adapter, its compressed layers held at `ratio` in `precision`.

    `ratio` counts what `compression.of` says; None leaves every layer whole.

    Raises:
        ConfigError: the training is not the lean one, a pattern matches no layer, or the ratio
            leaves a layer without rank.
    """
    wanted = obstacle(run_config.lora, source.dtype) if run_config.train.lean else "train.lean=true"
    if wanted:
        raise ConfigError(f"only the lean training is planned with; set {wanted}")
    whole = TrainingLayout(
        DecoderBlocks(source),
        run_config.model.adapted(source),
        run_config.model.compressed(source),
        run_config.lora,
        {},
        precision,
    )
    if ratio is None:
        return whole
    return factored(
        whole, run_config, Compression(ratio, run_config.compression.of, bits_of(precision))
    )


def factored(whole: TrainingLayout, run_config: RunConfig, budget: Compression) -> TrainingLayout:
    """The same with its compressed layers as factors within the ratio of `budget`.

    Raises:
        ConfigError: the ratio leaves a layer without rank.
    """
    multiple = run_config.emulator.multiple if isinstance(run_config.emulator, Svd) else 1
    ranks = uniform_ranks(whole.source, whole.compressed, budget, multiple)
    return replace(whole, ranks=ranks)


def precisions(run_config: RunConfig) -> list[Precision | None]:
    """What a compression may be solved for, from the most bits to the fewest.

    The model's dtype and a packed format of each width there is, as far as the cell leaves it open.

    Raises:
        ConfigError: two formats have one width, and the cell names neither.
    """
    if run_config.compression.bits is not None:
        return [run_config.precision]
    return [None, *([run_config.precision] if run_config.precision else formats())]


def fitting(run_config: RunConfig, source: Source, work: StepShape) -> Compression:
    """The compression whose training stays within `budget.gpu_gib`.

    Of a model that is trained through whole the most bits; else as `fitting_emulator`.

    Raises:
        ConfigError: there is no budget, nothing fits it, or the emulator is one that no plan knows.
    """
    room(run_config)  # a missing budget is found out before anything is counted
    if type(run_config.emulator) not in (Full, Svd):
        raise ConfigError(
            "compression=auto is solved for emulator=svd and emulator=full; with others "
            "set compression=r50"
        )
    if run_config.adapter.trains and run_config.adapter.nonlinear:
        raise ConfigError(
            "compression=auto is solved for adapters whose update is s B A, while this adapter "
            f"{run_config.adapter.nonlinear}; set adapter=lora, or compression=r50"
        )
    whole = scheme_of(run_config, source, None, None)
    if isinstance(run_config.emulator, Full):
        return _fitting_whole(run_config, whole, work)
    return fitting_emulator(run_config, whole, work)


def fitting_emulator(run_config: RunConfig, whole: TrainingLayout, work: StepShape) -> Compression:
    """The largest ratio of the linears, with its bits, whose training stays within the budget.

    The most bits of which nearly all can be kept, else the fewest: a number of four bits loses less
    than leaving out three of four.

    Raises:
        ConfigError: there is no budget, or nothing fits it.
    """
    limit, wanted = room(run_config), run_config.compression.bits
    schemes = dict(_by_ratio(run_config, whole))
    passing = _passing(schemes, work)

    def too_large(ratio: float, precision: Precision | None) -> bool:
        scheme = replace(schemes[ratio], precision=precision)
        return need_from_trace(scheme, work, passing(ratio)).peak > limit

    found: dict[int, float] = {}
    for precision in precisions(run_config):
        ratios = list(schemes)
        count = bisect_left(ratios, True, key=partial(too_large, precision=precision))
        if count:
            found[bits_of(precision)] = ratios[count - 1]
    gib = run_config.budget.gpu_gib
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
    return replace(run_config.compression, ratio=found[bits], bits=bits, of="linears")


def _by_ratio(
    run_config: RunConfig, whole: TrainingLayout
) -> Iterator[tuple[float, TrainingLayout]]:
    """The ratios to choose from that leave every layer a rank, upwards.

    Raises:
        ConfigError: none does.
    """
    for ratio in RATIOS:
        with suppress(ConfigError) if ratio < RATIOS[-1] else nullcontext():
            yield ratio, factored(whole, run_config, Compression(ratio, "linears", MODEL_BITS))


def _passing(
    schemes: Mapping[float, TrainingLayout], work: StepShape
) -> Callable[[float], TraceResult]:
    """Ratio -> at most what comes and goes, with two of them traced.

    A peak is the largest of several moments, each of which grows with the ranks along a line: so it
    is nowhere above the line between its two ends.
    """
    low, high = min(schemes), max(schemes)
    first, last = (schemes[ratio].traced(work) for ratio in (low, high))

    def at(ratio: float) -> TraceResult:
        share = (ratio - low) / (high - low or 1)
        return TraceResult(ceil(first.peak + share * (last.peak - first.peak)), first.operations)

    return at


def _fitting_whole(run_config: RunConfig, whole: TrainingLayout, work: StepShape) -> Compression:
    limit, gib = room(run_config), run_config.budget.gpu_gib
    traced = whole.traced(work)
    tried = precisions(run_config)
    for precision in tried:
        if need_from_trace(replace(whole, precision=precision), work, traced).peak <= limit:
            bits = bits_of(precision)
            log.info("compression=auto: the model at %d bits fits budget.gpu_gib=%g", bits, gib)
            return replace(run_config.compression, bits=bits)
    raise ConfigError(
        f"budget.gpu_gib={gib:g}: the whole model does not fit{_at(bits_of(tried[-1]))}; "
        "set method=emloc or budget.gpu_gib higher"
    )


def refuse_unplanned(model: ModelFamily, override: str) -> None:
    """Refuse a model of a family whose training cannot be planned.

    Raises:
        ConfigError: with the family's own reason, and the override that does without a plan.
    """
    if model.unplanned is not None:
        raise ConfigError(
            "only the training of models that write text is planned, and "
            f"model={model.name} {model.unplanned}; set {override}"
        )


def room(run_config: RunConfig) -> int:
    """Bytes of the budget that may be planned with.

    Raises:
        ConfigError: there is no budget.
    """
    if run_config.budget.gpu_gib is None:
        raise ConfigError("compression=auto needs budget.gpu_gib; set budget.gpu_gib=24")
    return usable(run_config.budget.gpu_gib)


def usable(gib: float) -> int:
    """Bytes of so much device memory that may be planned with."""
    return int(gib * GIB * (1 - RESERVE))


def _at(bits: int | None) -> str:
    return "" if bits is None else f" at {bits} bits"
