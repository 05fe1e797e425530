"""`compression=auto`: from what a run will train on to the ratio and format it can afford."""

from __future__ import annotations

from dataclasses import replace

from emloc.config.settings import MODEL_BITS
from emloc.cost.plan.fit import fitting, precisions, refuse_unplanned
from emloc.cost.plan.layout import StepShape
from emloc.data.reader import encode_all
from emloc.models.checkpoint.source import Source
from emloc.precision import bits_of
from emloc.stages.run_config import RunConfig


def solved(run_config: RunConfig, source: Source) -> RunConfig:
    """The cell with numbers and format of its compression, as set or for the longest sample.

    Raises:
        ConfigError: there is no budget to solve for, nothing fits it, or the model is of a family
            that no plan knows.
    """
    chosen = run_config.compression
    if chosen.ratio is not None and chosen.bits is not None:
        return run_config
    if not run_config.adapter.trains:  # then nothing is compressed
        return replace(run_config, compression=replace(chosen, bits=MODEL_BITS), precision=None)
    refuse_unplanned(run_config.model, "compression=r50")
    encoded = encode_all(source.reader(), run_config.task.train(), run_config.model.longest)
    length = max(one.length for one in encoded)
    answer = max(one.length - one.answer_start for one in encoded)
    work = StepShape.of(run_config.train, length, answer)
    found = fitting(run_config, source, work)
    precision = next(one for one in precisions(run_config) if bits_of(one) == found.bits)
    return replace(run_config, compression=found, precision=precision)
