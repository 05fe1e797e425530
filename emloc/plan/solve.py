"""`compression=auto`: from what a run will train on to the ratio and bits it can afford."""

from __future__ import annotations

from dataclasses import replace

from emloc.config import Cell
from emloc.plan.fit import fitting, refuse_unplanned
from emloc.plan.scheme import Work
from emloc.reading import encode_all
from emloc.settings import Compression
from emloc.source import Source


def solved(cell: Cell, source: Source) -> Compression:
    """The compression with its numbers: as set, or found for the longest training sample.

    Raises:
        ConfigError: there is no budget to solve for, nothing fits it, or the model is of a family
            that no plan knows.
    """
    chosen = cell.compression
    if chosen.ratio is not None and chosen.bits is not None:
        return chosen
    if not cell.adapter.trains:  # then nothing is compressed
        return replace(chosen, bits=16)
    refuse_unplanned(cell.model, "compression=r50")
    encoded = encode_all(source.reader(), cell.task.train(), cell.model.longest)
    length = max(one.length for one in encoded)
    answer = max(one.length - one.answer_start for one in encoded)
    work = Work.of(cell.train, length, answer)
    return fitting(cell, source, work)
