"""Benchmark of stored features: the pass of the vision tower, and a step without the tower."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from emloc.calibration.image_features import compute_features
from emloc.cost.bench.bound import matrix_operations, seconds_alone
from emloc.cost.bench.rows import BenchRow, row
from emloc.cost.bench.setting import BenchSetup, reserved_gb, reset_memory, time_call
from emloc.cost.bench.training import (
    FOUR_BITS,
    MORE_STEPS,
    NEAR,
    TOGETHER,
    Opener,
    measure_or_oom,
    measure_our_training,
    open_factorized,
    open_packed,
    products_alone,
)
from emloc.cost.plan.fit import layout_of, need_of
from emloc.cost.plan.layout import StepShape
from emloc.models.checkpoint.tower import feature_owner, packed_features
from emloc.stages.run_config import precision_of

SAMPLES = 16  # rows of the pass


def stored(benchmark: str, model: str, ratio: float, most: float) -> Iterator[BenchRow]:
    """Measure the pass, and steps of the emulator at 16 and 4 bits beside those with the tower.

    Args:
        benchmark: its name.
        model: choice of the group `model`.
        ratio: share of the parameters that the factors keep.
        most: target: seconds of a step at 16 bits.
    """
    steps = f"train.steps={MORE_STEPS}"
    setup = BenchSetup(model, (steps, "train.features=stored"), TOGETHER)
    with_tower = BenchSetup(model, (steps,), TOGETHER)
    yield from _pass_rows(benchmark, with_tower)
    for bits in (None, FOUR_BITS):
        open_emulator: Opener = partial(open_packed if bits else open_factorized, ratio=ratio)
        name = "a step in nf4" if bits else "a step"
        ours = measure_or_oom(partial(measure_our_training, setup, open_emulator))
        peer = measure_or_oom(partial(measure_our_training, with_tower, open_emulator))
        is_target = setup.is_full_size and bits is None
        yield row(
            *(benchmark, f"{name}; with the vision tower", "s", ours.step),
            peer=peer.step,
            most=most if is_target else None,
        )
        yield row(
            *(benchmark, f"{name}: peak reserved; with the vision tower", "GB", ours.reserved),
            peer=peer.reserved,
        )
        alone = products_alone(BenchSetup(model, setup.overrides), open_emulator)
        yield row(benchmark, f"{name}; its products alone", "s", ours.step, peer=alone)
        precision = precision_of(FOUR_BITS) if bits else None
        layout = layout_of(setup.run_config, setup.training_source, ratio, precision)
        shape = StepShape.of(setup.run_config.train, setup.length, setup.answer)
        yield row(
            *(benchmark, f"{name}: peak planned, measured", "GB"),
            need_of(layout, shape).peak / 1e9,
            peer=ours.peak,
            near=NEAR if setup.is_full_size else None,
        )


def _pass_rows(benchmark: str, setup: BenchSetup) -> Iterator[BenchRow]:
    """Yield the seconds of the pass for each row, and its memory and bytes of features."""
    count = SAMPLES if setup.is_full_size else 2
    sizes: list[int] = []

    def keep(_: int, output: Any) -> None:
        features, _, _ = packed_features(output)
        sizes.append(features.cpu().nbytes)

    batches = [setup.batch(seed) for seed in range(count)]
    reset_memory(setup.device)
    work = partial(
        compute_features, setup.source, batches.__getitem__, count, keep, device=setup.device
    )
    seconds = time_call(work, setup.device)
    peak = reserved_gb(setup.device)
    what = f"the pass, {count} rows of {setup.tiles} tiles; weights drawn while they are read"
    alone = _tower_alone(setup)
    yield row(
        *(benchmark, f"{what}: a row, and its operations alone", "s", seconds / count), peer=alone
    )
    yield row(benchmark, f"{what}: peak reserved", "GB", peak)
    yield row(benchmark, "features of a row", "MB", sum(sizes) / count / 1e6)


def _tower_alone(setup: BenchSetup) -> float:
    """Return the seconds of the tower's matrix operations over one row, each timed alone."""
    shallow = "model.shape.text_config.num_hidden_layers=1"
    small = BenchSetup(setup.model, (shallow,))
    network = small.source.load(small.device)
    pixels = small.batch(0)["pixel_values"].to(small.device)
    work = partial(feature_owner(network).get_image_features, pixel_values=pixels)
    seconds: float = seconds_alone(matrix_operations(work), small.device)
    return seconds
