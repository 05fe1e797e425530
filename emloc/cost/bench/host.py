"""Host memory while an emulator is built from a checkpoint on disk: flat in the model's depth."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from emloc.calibration.blockwise import Batch
from emloc.cost.bench.rows import BenchRow, row
from emloc.cost.bench.setting import BenchSetup, fresh
from emloc.emulators import BuildInputs
from emloc.models.checkpoint.source import Source
from emloc.models.decoder import Decoder
from emloc.runtime.memory import GIB, HostMemoryPeak

MOST_GIB, MOST_RATIO = 8, 1.1
SAMPLES, LENGTH = 8, 512
SHARD = 2 * GIB  # bytes of one file of the checkpoint


class RandomTexts:
    """Calibration samples of random tokens."""

    ids: tuple[str, ...] = ()

    def batches(self, source: Source) -> list[Batch]:
        """Batches of one text."""
        draw = torch.Generator().manual_seed(0)
        size = (SAMPLES, 1, LENGTH)
        return [
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for ids in torch.randint(0, Decoder(source).vocabulary, size, generator=draw)
        ]


def host_memory(work: str, model: str) -> Iterator[BenchRow]:
    """Build from a checkpoint of the model's depth, and from one twice as deep."""
    usual = BenchSetup(model)
    depth = usual.run_config.model.shape["num_hidden_layers"]
    most, most_ratio = (MOST_GIB, MOST_RATIO) if usual.full else (None, None)
    peaks = []
    for deep in (depth, 2 * depth):
        one = BenchSetup(model, (f"model.shape.num_hidden_layers={deep}", "compression=r25"))
        with tempfile.TemporaryDirectory() as folder:
            size = _write(one.source, Path(folder) / "checkpoint", one.device)
            peak = _build(one, Path(folder))
        peaks.append(peak)
        what = f"anonymous, at most, of {deep} blocks ({size / 1e9:.3g} GB on disk)"
        yield row(work, what, "GiB", peak, most=most)
    ratio = peaks[1] / peaks[0]
    yield row(work, "of twice the blocks, over that of half", "", ratio, most=most_ratio)


def _write(source: Source, folder: Path, device: torch.device) -> int:
    """The model as safetensors of a few GB each; their bytes."""
    folder.mkdir()
    source.config.save_pretrained(folder)
    files: dict[str, str] = {}
    waiting: dict[str, torch.Tensor] = {}
    total = held = 0
    names = sorted(source.weights.names)
    for index, (name, tensor) in enumerate(source.read(names, device)):
        waiting[name] = tensor.cpu()
        held += tensor.nbytes
        if held > SHARD or index == len(names) - 1:
            file = f"model-{len(set(files.values())):05d}.safetensors"
            save_file(waiting, folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys(waiting, file)
            total, held, waiting = total + held, 0, {}
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": files}))
    return total


def _build(setting: BenchSetup, folder: Path) -> float:
    """GiB of host memory at most, while an emulator of `folder/checkpoint` is built."""
    run_config, device = setting.run_config, setting.device
    found = replace(run_config.model, source=str(folder / "checkpoint"), weights="checkpoint")
    source = found.open()
    layers = found.compressed(source)
    ranks = run_config.emulator.plan(source, layers, run_config.compression)
    build_inputs = BuildInputs(ranks, None, RandomTexts(), None)  # type: ignore[arg-type]
    home = folder / "emulator"
    home.mkdir()
    fresh(device)
    with HostMemoryPeak() as peak:
        run_config.emulator.build(home, source, build_inputs, device=device, host_bytes=GIB)
    return peak.bytes / GIB
