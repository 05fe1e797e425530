"""Benchmark of an anchored training at full size, in a given device memory: passes and steps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.adapters.training_inputs import TrainingInputs
from emloc.anchors.batches import KeyedRow
from emloc.anchors.shards import OffsetReader, shard_file, write_rows, write_shard
from emloc.calibration.image_features import compute_features
from emloc.cost.bench.bound import (
    bounded_rows,
    disk_rate,
    drop_cached,
    matrix_operations,
    seconds_alone,
)
from emloc.cost.bench.capped import emulate, recover, samples_of, stage_rows
from emloc.cost.bench.host import checkpoint_source, write_checkpoint
from emloc.cost.bench.rows import BenchRow, row
from emloc.cost.bench.setting import BenchSetup, RandomRow, RandomSamples, reset_memory
from emloc.cost.plan.cost import weight_bytes
from emloc.cost.plan.features import trained_source
from emloc.data.stored_features import FEATURES
from emloc.emulators import BuiltEmulator
from emloc.emulators.svd import Svd
from emloc.errors import StageError
from emloc.models.checkpoint.source import Source
from emloc.models.checkpoint.tower import packed_features
from emloc.recovery import ignore_log
from emloc.runtime.memory import GIB, HostMemoryPeak, is_out_of_memory, limit_device_memory
from emloc.runtime.stage_cache import Artifact, Store
from emloc.stages.training.anchored_rows import AnchoredRows
from emloc.stages.training.order import order_of
from emloc.stages.training.refit import Refit
from emloc.stages.training.rounds import rounds_of
from emloc.stages.training.trainee import open_trainee

ROUNDS, STEPS, ROWS_OF_STEP = 2, 16, 4  # 32 rows in each round
Collate = Callable[[Sequence[RandomRow]], dict[str, Tensor]]


@dataclass(frozen=True)
class TimedRows(AnchoredRows):
    """Anchored rows that time the passes over them: seconds, rows and bytes of the offsets.

    The content of `files`, those of the original, is not in the system's memory when a pass begins.
    """

    files: Sequence[Path] = ()
    passes: list[tuple[float, int, int]] = field(default_factory=list)

    def record(self, folder: Path, *args: Any, **options: Any) -> Any:
        """Run one pass; see `AnchoredRows.record`."""
        drop_cached(self.files)
        start = time.perf_counter()
        losses = super().record(folder, *args, **options)
        seconds = time.perf_counter() - start
        offsets = sum(path.stat().st_size for path in folder.glob("place-*"))
        self.passes.append((seconds, len(losses), offsets))
        return losses


@dataclass(frozen=True)
class RandomRefit(Refit):
    """Refit to random samples, which need no tokenizer."""

    def encoded(self) -> list[KeyedRow]:
        """Return the samples as training rows."""
        return [KeyedRow(one, f"sample {one.id}") for one in self.samples.examples]


def anchored_rounds(
    benchmark: str,
    model: str,
    ratio: float,
    bits: int,
    gb: float,
    *,
    stored: bool,
    features: str = "computed",
) -> Iterator[BenchRow]:
    """Build, train in two rounds of eight steps, and save, with `gb` (10^9 bytes) of device memory.

    If a stage needs more, the benchmark ends with one row that names this stage.

    Args:
        benchmark: its name.
        model: choice of the group `model`.
        ratio: share of the parameters that the factors keep.
        bits: of the factors.
        gb: most device memory.
        stored: the weights are in a checkpoint on disk. Otherwise they are drawn while they are
            read, where the disk is too small for them.
        features: the setting `train.features`.
    """
    setup = BenchSetup(
        model,
        tuple(
            f"method=emloc_anchored compression.ratio={ratio} compression.bits={bits} "
            f"train.steps={STEPS} train.accumulate={ROWS_OF_STEP} "
            f"anchor.rounds={ROUNDS} anchor.guard=0 train.features={features} "
            f"{_small_size(model)}".split()
        ),
    )
    # Timed before the memory is limited, since a vision tower alone may need more.
    alone = _forward_alone(model)
    reset_memory(setup.device)
    limit_device_memory(setup.device, gb * 1e9 / GIB)
    weights = "in a checkpoint" if stored else "drawn while they are read"
    what = (
        f"build, {ROUNDS} rounds of {STEPS // ROUNDS} steps, save in {gb:g} GB; weights {weights}"
    )
    with tempfile.TemporaryDirectory() as name, HostMemoryPeak() as host:
        folder, source, rate = Path(name), setup.source, 0.0
        if stored:
            write_checkpoint(source, folder / "checkpoint", setup.device)
            files = sorted((folder / "checkpoint").glob("*.safetensors"))
            rate = disk_rate(files)
            drop_cached(files)
            source = checkpoint_source(setup, folder / "checkpoint")
        reset_memory(setup.device)
        try:
            stages, passes = _stages(setup, source, Store(folder / "store"))
        except StageError as error:
            if not is_out_of_memory(error):
                raise
            yield row(benchmark, f"{what}: peak reserved", "GB", f"OOM in {error.stage}", most=gb)
            return
    yield from stage_rows(benchmark, f"{what}: peak reserved", setup, stages, gb)
    for number, one in enumerate(passes, 1):
        yield from _pass_rows(benchmark, f"pass {number}", one, setup, rate, alone)
    trained = stages[-2]
    yield row(benchmark, f"step of {ROWS_OF_STEP} samples", "s", trained.facts["step_seconds"])
    yield row(benchmark, "host memory, anonymous, at most", "GiB", host.bytes / GIB)


def _pass_rows(
    benchmark: str,
    name: str,
    timed: tuple[float, int, int],
    setup: BenchSetup,
    rate: float,
    alone: float,
) -> Iterator[BenchRow]:
    """Yield the seconds of a pass for each sample, beside those of its bytes and operations.

    Only the operations of the original are counted, not those of the emulator. The target is that
    of the longest pass, over the rows of a round; others read as many bytes for fewer rows. `rate`
    is that of the disk, 0 for weights that are drawn.
    """
    seconds, count, offsets = timed
    what = f"{name}, {count} rows of {setup.length} tokens: a sample"
    sample = seconds / count
    if rate:
        disk = weight_bytes(setup.source) / rate / count
        is_target = setup.is_full_size and count == STEPS // ROUNDS * ROWS_OF_STEP
        yield from bounded_rows(
            *(benchmark, what, sample, disk, alone), whose="the original's", is_target=is_target
        )
    else:
        yield row(
            benchmark, f"{what}, and the original's operations alone", "s", sample, peer=alone
        )
    yield row(benchmark, f"{name}: offsets", "GB", offsets / 1e9)


def _forward_alone(model: str) -> float:
    """Return the seconds of the matrix operations of the original's forward pass over one sample.

    Each is timed alone at its shape, of models with one and two decoder blocks. Every further block
    adds what the second one does.
    """

    def seconds(depth: int) -> float:
        setup = BenchSetup(model, (f"model.shape.text_config.num_hidden_layers={depth}",))
        batch = {name: tensor.to(setup.device) for name, tensor in setup.batch(0).items()}
        network = setup.source.load(setup.device)
        operations = matrix_operations(partial(network, **batch, logits_to_keep=1))
        return seconds_alone(operations, setup.device)

    one, two = seconds(1), seconds(2)
    depth: int = BenchSetup(model).source.config.get_text_config().num_hidden_layers
    return one + (depth - 1) * (two - one)


def _small_size(model: str) -> str:
    """Return settings for a model of two blocks; none for one of full size."""
    if BenchSetup(model).is_full_size:
        return ""
    return f"anchor.places=2 train.steps={2 * ROUNDS} train.accumulate=2"


def _rows(setup: BenchSetup, source: Source, collate: Collate) -> TimedRows:
    """Return the random rows of the training, with its places and rounds."""
    anchor, recipe = setup.run_config.anchor, setup.run_config.train
    assert anchor.anchors
    rows = [KeyedRow(one, one.id) for one in setup.random_rows(recipe.steps * recipe.accumulate)]
    timed = TimedRows.of(
        anchor,
        source,
        rows,
        [],
        order_of(rows, recipe, setup.run_config.seed),
        recipe.steps,
        collate,
        setup.run_config.budget.disk_gib,
    )
    folder = source.folder
    return replace(timed, files=sorted(folder.glob("*.safetensors")) if folder else ())


def _batch(
    setup: BenchSetup, features: OffsetReader | None, rows: Sequence[RandomRow]
) -> dict[str, Tensor]:
    """Return a batch of random rows, all of one length, with labels on their answers.

    `features` are those of the rows; None: the batch has pixels.
    """
    batches = [
        setup.labelled_batch(one.seed, features.read(one.id, 0) if features else None)
        for one in rows
    ]
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return joined | {"logits_to_keep": batches[0]["logits_to_keep"]}


def _stages(
    setup: BenchSetup, source: Source, store: Store
) -> tuple[list[Artifact], list[tuple[float, int, int]]]:
    """Run the stages that build, train and recover; return their artifacts, and the passes."""
    samples, device = samples_of(setup), setup.device
    built = emulate(setup, source, samples, store)
    stages, features = [built.artifact], None
    if setup.stores_features:
        stages.append(store.stage("features", _store_features, setup.overrides, setup=setup))
        features = OffsetReader([stages[-1].folder])
        source = trained_source(setup.run_config.train, source)
        built = replace(built, source=source)
    rows = _rows(setup, source, partial(_batch, setup, features))
    inputs = setup.training_inputs
    trained = store.stage("train", _fit, built, inputs, rows=rows, samples=samples, setup=setup)
    recovery = setup.run_config.recovery
    recovered = store.stage("recover", recover, recovery, trained, built, device=device)
    return [*stages, trained, recovered], rows.passes


def _store_features(folder: Path, _: Sequence[str], *, setup: BenchSetup) -> dict[str, Any]:
    """Write the features of all training rows; the stage has no facts of its own."""
    recipe = setup.run_config.train
    rows = setup.random_rows(recipe.steps * recipe.accumulate)

    def keep(index: int, output: Any) -> None:
        features, _, _ = packed_features(output)
        write_shard(shard_file(folder, 0, index), {rows[index].id: {FEATURES: features.cpu()}})

    compute_features(
        setup.source,
        lambda index: setup.batch(rows[index].seed),
        len(rows),
        keep,
        device=setup.device,
        limits=setup.state_limits,
    )
    write_rows(folder, [[one.id] for one in rows])
    return {}


def _fit(
    folder: Path,
    built: BuiltEmulator,
    inputs: TrainingInputs,
    *,
    rows: TimedRows,
    samples: RandomSamples,
    setup: BenchSetup,
) -> dict[str, Any]:
    """Train in rounds, and return the facts of the training stage."""
    run_config, emulator = setup.run_config, built.emulator
    assert isinstance(emulator, Svd)
    all_ranks = emulator.ranks(built.artifact.folder)
    ranks = {layer: all_ranks[layer] for layer in built.source.emulated(all_ranks)}
    return rounds_of(
        folder,
        open_trainee(built, inputs, setup.device),
        rows,
        run_config.recovery,
        None,
        setup.state_limits,
        ignore_log,
        RandomRefit(rows, samples, ranks),  # type: ignore[arg-type]
    ).run()
