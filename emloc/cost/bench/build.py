"""Benchmark of the time of a build from a checkpoint, beside the least time that it can take."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from emloc.cost.bench.bound import (
    Operations,
    bounded_rows,
    disk_rate,
    drop_cached,
    matrix_operations,
    seconds_alone,
)
from emloc.cost.bench.host import build_emulator, checkpoint_source, setup_of, write_checkpoint
from emloc.cost.bench.rows import BenchRow, row
from emloc.cost.bench.setting import BenchSetup, reset_memory, time_call
from emloc.runtime.work_meter import metered
from emloc.tensors.side_by_side import one_after_another


def build(benchmark: str, model: str) -> Iterator[BenchRow]:
    """Time the build from a checkpoint of the model's depth, and from one twice as deep.

    The peers are the bytes that the build reads and writes over the disk's rate, and its operations
    on matrices, each timed alone at its shape. The checkpoint is in no cache when the build begins,
    and all factors are on the disk when it ends.
    """
    standard = BenchSetup(model)
    depth = standard.run_config.model.shape["num_hidden_layers"]
    # This also loads and initialises libraries.
    block_seconds = seconds_alone(_block_operations(model), standard.device)
    for blocks in (depth, 2 * depth):
        setup = setup_of(model, blocks)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint"
            size = write_checkpoint(setup.source, checkpoint, setup.device)
            files = sorted(checkpoint.glob("*.safetensors"))
            rate = disk_rate(files)
            seconds, nbytes = _time_build(setup, Path(folder), files)
        what = f"build of {blocks} blocks ({size / 1e9:.3g} GB on disk)"
        disk_seconds, alone_seconds = nbytes / rate, blocks * block_seconds
        yield row(benchmark, f"{what}: rate of the disk", "GB/s", rate / 1e9)
        yield from bounded_rows(
            *(benchmark, what, seconds, disk_seconds, alone_seconds),
            is_target=standard.is_full_size,
        )


def _block_operations(model: str) -> Operations:
    """Return the operations on matrices of a build of one block, from random weights."""
    setup = setup_of(model, 1)
    with tempfile.TemporaryDirectory() as folder, one_after_another():
        return matrix_operations(lambda: build_emulator(setup, setup.source, Path(folder)))


def _time_build(setup: BenchSetup, folder: Path, files: list[Path]) -> tuple[float, int]:
    """Return the seconds of a build of `folder/checkpoint`, and the bytes it reads and writes."""
    source, target = checkpoint_source(setup, folder / "checkpoint"), folder / "emulator"
    target.mkdir()
    reset_memory(setup.device)
    drop_cached(files)
    with metered() as meter:
        seconds = time_call(lambda: build_emulator(setup, source, target), setup.device)
    written = sum(path.stat().st_size for path in target.iterdir())
    return seconds, meter.weight_bytes + written
