"""Benchmark of host memory during a build: it should not grow with the depth of the model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from emloc.calibration.batch_size import batch_tokens
from emloc.calibration.blockwise import Batch
from emloc.calibration.offload import StateLimits
from emloc.cost.bench.rows import BenchRow, row
from emloc.cost.bench.setting import BenchSetup, reset_memory
from emloc.emulators import BuildInputs
from emloc.models.checkpoint.source import Source
from emloc.models.decoder import Decoder
from emloc.runtime.memory import GIB, HostMemoryPeak

MOST_GIB, MOST_RATIO = 8, 1.1  # targets: the peak, and its ratio at twice the depth
SAMPLES, LENGTH = 8, 512  # calibration samples, and tokens of each
SHARD = 2 * GIB  # bytes of one file of the checkpoint


class RandomTexts:
    """Calibration samples that consist of random tokens."""

    ids: tuple[str, ...] = ()

    def batches(self, source: Source, device: torch.device) -> list[Batch]:
        """Return the samples in batches of the device's size."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, Decoder(source).vocabulary, (SAMPLES, LENGTH), generator=generator)
        tokens = batch_tokens(source.config.get_text_config().hidden_size, device)
        return [
            {"input_ids": some, "attention_mask": torch.ones_like(some)}
            for some in torch.split(ids, max(tokens // LENGTH, 1))
        ]


def host_memory(benchmark: str, model: str) -> Iterator[BenchRow]:
    """Measure the build from a checkpoint of the model's depth, and from one twice as deep."""
    standard = BenchSetup(model)
    depth = standard.run_config.model.shape["num_hidden_layers"]
    most, most_ratio = (MOST_GIB, MOST_RATIO) if standard.is_full_size else (None, None)
    peaks = []
    for blocks in (depth, 2 * depth):
        setup = setup_of(model, blocks)
        with tempfile.TemporaryDirectory() as folder:
            size = write_checkpoint(setup.source, Path(folder) / "checkpoint", setup.device)
            peak = _measure_build(setup, Path(folder))
        peaks.append(peak)
        what = f"anonymous, at most, of {blocks} blocks ({size / 1e9:.3g} GB on disk)"
        yield row(benchmark, what, "GiB", peak, most=most)
    ratio = peaks[1] / peaks[0]
    yield row(benchmark, "of twice the blocks, over that of half", "", ratio, most=most_ratio)


def write_checkpoint(source: Source, folder: Path, device: torch.device) -> int:
    """Write a model as a checkpoint in several safetensors files, and return its bytes."""
    folder.mkdir()
    source.config.save_pretrained(folder)
    files: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    total = pending_bytes = 0
    names = sorted(source.weights.names)
    for index, (name, tensor) in enumerate(source.read(names, device)):
        pending[name] = tensor.cpu()
        pending_bytes += tensor.nbytes
        if pending_bytes > SHARD or index == len(names) - 1:
            file = f"model-{len(set(files.values())):05d}.safetensors"
            save_file(pending, folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys(pending, file)
            total, pending_bytes, pending = total + pending_bytes, 0, {}
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": files}))
    return total


def _measure_build(setup: BenchSetup, folder: Path) -> float:
    """Build an emulator of `folder/checkpoint` and return the peak of host memory in GiB."""
    source, target = checkpoint_source(setup, folder / "checkpoint"), folder / "emulator"
    target.mkdir()
    reset_memory(setup.device)
    with HostMemoryPeak() as peak:
        build_emulator(setup, source, target, StateLimits(host=GIB))
    return peak.bytes / GIB


def setup_of(model: str, blocks: int) -> BenchSetup:
    """Return the setup of a model with so many blocks."""
    return BenchSetup(model, (f"model.shape.num_hidden_layers={blocks}", "compression=r25"))


def checkpoint_source(setup: BenchSetup, folder: Path) -> Source:
    """Return the model whose weights are in the checkpoint `folder`."""
    return replace(setup.run_config.model, source=str(folder), weights="checkpoint").open()


def build_emulator(
    setup: BenchSetup, source: Source, target: Path, limits: StateLimits | None = None
) -> None:
    """Build the emulator of a model on random texts, and write it into the folder `target`.

    `limits` of the memory for hidden states are those of a run, if they are not given.
    """
    run_config = setup.run_config
    layers = run_config.model.compressible_layers(source)
    ranks = run_config.emulator.plan(source, layers, run_config.compression)
    build_inputs = BuildInputs(ranks, None, RandomTexts(), None)  # type: ignore[arg-type]
    limits = limits or setup.state_limits
    run_config.emulator.build(target, source, build_inputs, device=setup.device, limits=limits)
