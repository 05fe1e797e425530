"""Solve `compression=auto`: choose ratio and bits by the memory that the run's training needs."""

from __future__ import annotations

from dataclasses import replace

from emloc.config.settings import MODEL_BITS
from emloc.cost.plan.anchors import anchor_plan, with_offsets
from emloc.cost.plan.features import trained_source
from emloc.cost.plan.fit import candidate_precisions, refuse_unplanned, solve_compression
from emloc.cost.plan.layout import StepShape
from emloc.data.reader import encode_all
from emloc.models.checkpoint.source import Source
from emloc.precision import bits_of
from emloc.stages.run_config import RunConfig


def solve_auto_compression(run_config: RunConfig, source: Source) -> RunConfig:
    """Return the run's configuration with ratio, bits and packed format filled in.

    Settings that are null are solved for the longest row of the training data.

    Raises:
        ConfigError: `budget.gpu_gib` is missing, nothing fits into it, or the training of this
            model family cannot be planned.
    """
    compression = run_config.compression
    if compression.ratio is not None and compression.bits is not None:
        return run_config
    if not run_config.adapter.trains:  # a run without training compresses nothing
        return replace(
            run_config, compression=replace(compression, bits=MODEL_BITS), precision=None
        )
    refuse_unplanned(run_config.model, "compression=r50")
    step_shape = longest_step(run_config, source)
    step_shape = with_offsets(step_shape, anchor_plan(run_config, source, step_shape))
    trained = trained_source(run_config.train, source)
    solution = solve_compression(run_config, trained, step_shape)
    precision = next(p for p in candidate_precisions(run_config) if bits_of(p) == solution.bits)
    return replace(run_config, compression=solution, precision=precision)


def longest_step(run_config: RunConfig, source: Source) -> StepShape:
    """Return the shape of a step whose rows are as long as the longest of the training data.

    Raises:
        ConfigError: a row cannot be read.
    """
    encoded = encode_all(source.reader(), run_config.task.train(), run_config.model.length_limit)
    length = max(row.length for row in encoded)
    answer = max(row.length - row.answer_start for row in encoded)
    return StepShape.of(run_config.train, length, answer)
