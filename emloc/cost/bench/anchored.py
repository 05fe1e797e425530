"""Benchmark of a training step with anchors, beside the same step without them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from emloc.anchors.attached import AttachedOffsets
from emloc.anchors.batches import AnchoredCollator, KeyedRow
from emloc.anchors.formats import FORMATS, OffsetFormat
from emloc.anchors.places import USUAL_PLACES, Place, spread, usual_places
from emloc.anchors.shards import OffsetReader, shard_file, write_rows, write_shard
from emloc.cost.bench.rows import BenchRow, row
from emloc.cost.bench.setting import BenchSetup, reset_memory, synchronized_time
from emloc.cost.bench.training import (
    MORE_STEPS,
    TOGETHER,
    PreparedModel,
    TrainingFigures,
    figures_of_steps,
    measure_our_training,
    open_factorized,
)
from emloc.emulators.layer_drop import block_stack
from emloc.stages.training.callbacks import StepTimer
from emloc.stages.training.capture import capture_of
from emloc.stages.training.train import Segment, run_steps
from emloc.stages.training.trainee import open_trainee

# Target: a step with anchors takes at most a tenth longer.
LEAST_RATIO = 1 / 1.1


def anchored(name: str, model: str, ratio: float) -> Iterator[BenchRow]:
    """Measure the step and the memory of an SVD emulator with offsets of each format."""
    setup = BenchSetup(model, (f"train.steps={MORE_STEPS}",), TOGETHER)
    plain = measure_our_training(setup, partial(open_factorized, ratio=ratio))
    least_ratio = LEAST_RATIO if setup.is_full_size else None
    for dtype in ("bfloat16", "int8"):
        ours = _measure(setup, ratio, FORMATS[dtype])
        yield row(
            *(name, f"step with {dtype} offsets; without", "s", ours.step),
            peer=plain.step,
            least_ratio=least_ratio,
        )
        yield row(name, f"peak with {dtype} offsets; without", "GB", ours.peak, peer=plain.peak)
        batch = setup.length * USUAL_PLACES * FORMATS[dtype].token_bytes(_width(setup)) / 1e9
        yield row(name, f"one batch of {dtype} offsets", "GB", batch)


def _width(setup: BenchSetup) -> int:
    width: int = setup.source.config.get_text_config().hidden_size
    return width


def _measure(setup: BenchSetup, ratio: float, stored_as: OffsetFormat) -> TrainingFigures:
    """Measure a training with random offsets, which are read from files as in a run."""
    device = setup.device
    blocks = block_stack(setup.source)
    places = [Place(block) for block in spread(blocks, usual_places(len(blocks)))]
    rows = [KeyedRow(one, str(one.seed)) for one in setup.rows()]
    reset_memory(device)
    ends: list[float] = []

    def record(step: int, values: dict[str, float]) -> None:
        ends.append(synchronized_time(device))

    batches = [setup.labelled_batch(seed) for seed in range(MORE_STEPS)]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        _write_offsets(folder, setup, rows, len(places), stored_as)
        trainee = open_trainee(
            PreparedModel(setup.source, partial(open_factorized, setup, ratio=ratio)),  # type: ignore[arg-type]
            setup.training_inputs,
            device,
        )
        hooks = AttachedOffsets(places, stored_as)

        def collate(some: Sequence[Any]) -> dict[str, Any]:
            return dict(batches[some[0].seed])

        capture = capture_of(trainee, setup.rows(), collate, 0, MORE_STEPS)
        collator = AnchoredCollator(
            collate if capture is None else capture.collator(collate),
            OffsetReader([folder]),
            places,
            pinned=device.type == "cuda",
        )
        stack.callback(collator.close)
        stack.enter_context(hooks.attached(trainee.inner))
        run_steps(
            *(trainee, rows, collator, folder / "checkpoints", record, StepTimer()),
            Segment(anchors=hooks, capture=capture),
        )
    return figures_of_steps(ends, device, together=TOGETHER)


def _write_offsets(
    folder: Path, setup: BenchSetup, rows: list[KeyedRow], places: int, stored_as: OffsetFormat
) -> None:
    write_rows(folder, [[keyed.key for keyed in rows]])
    generator = torch.Generator().manual_seed(0)
    for place in range(places):
        offsets = {
            keyed.key: stored_as.encode(
                0.01 * torch.randn(setup.length, _width(setup), generator=generator)
            )
            for keyed in rows
        }
        write_shard(shard_file(folder, place, 0), offsets)
