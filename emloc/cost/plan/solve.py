"""`compression=auto`: from what a run will train on to the ratio and format it can afford."""

from __future__ import annotations

from dataclasses import replace

from emloc.config.settings import MODEL_BITS
from emloc.cost.plan.fit import fitting, precisions, refuse_unplanned
from emloc.cost.plan.scheme import Work
from emloc.data.reader import encode_all
from emloc.models.checkpoint.source import Source
from emloc.precision import bits_of
from emloc.stages.run_config import Cell


def solved(cell: Cell, source: Source) -> Cell:
    """The cell with numbers and format of its compression, as set or for the longest sample.

    Raises:
        ConfigError: there is no budget to solve for, nothing fits it, or the model is of a family
            that no plan knows.
    """
    chosen = cell.compression
    if chosen.ratio is not None and chosen.bits is not None:
        return cell
    if not cell.adapter.trains:  # then nothing is compressed
        return replace(cell, compression=replace(chosen, bits=MODEL_BITS), precision=None)
    refuse_unplanned(cell.model, "compression=r50")
    encoded = encode_all(source.reader(), cell.task.train(), cell.model.longest)
    length = max(one.length for one in encoded)
    answer = max(one.length - one.answer_start for one in encoded)
    work = Work.of(cell.train, length, answer)
    found = fitting(cell, source, work)
    precision = next(one for one in precisions(cell) if bits_of(one) == found.bits)
    return replace(cell, compression=found, precision=precision)
