"""Benchmark of a LoRA training with the blocks in host memory: device memory and time of a step.

The peers are our training with the whole model on the device, an ordinary script, and FSDP2 with
its weights in host memory. The FSDP2 training is an ordinary loop with our answers-only logits and
activation checkpointing, so that only the offload engines differ.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from transformers import PreTrainedModel

from emloc.calibration.blockwise import by_block
from emloc.cost.bench.rows import BenchRow, Figure, row
from emloc.cost.bench.setting import BenchSetup, reset_memory, synchronized_time
from emloc.cost.bench.training import (
    FOUR_BITS,
    STEPS,
    TrainingFigures,
    figures_of_steps,
    measure_or_oom,
    measure_our_training,
    measure_script,
    open_original,
)
from emloc.emulators import BuildInputs
from emloc.emulators.full import block_linears
from emloc.emulators.offload import Offload
from emloc.precision import Precision
from emloc.runtime.memory import GIB, HostMemoryPeak, is_out_of_memory
from emloc.stages.run_config import precision_of
from emloc.tensors.lean.model import checkpoint_layers

LEAST_RATIO = 4  # target: device memory of the whole model, over that of the offloaded one

RECIPE = (f"train.steps={STEPS}", "train.checkpointing=true")


@dataclass(frozen=True)
class HostFigures:
    """Figures of a training, with its host memory."""

    training: TrainingFigures
    host: Figure  # peak in GiB


def offload(benchmark: str, model: str) -> Iterator[BenchRow]:
    """Measure our offload engine at 16 and 4 bits, and the peers."""
    setup = BenchSetup(model, RECIPE)
    fsdp = _measure_fsdp_in_process(model)
    # Our engine runs first, since memory that the others pin stays with the process.
    open_16_bit, open_4_bit = (
        partial(open_streamed, precision=precision) for precision in (None, precision_of(FOUR_BITS))
    )
    train, script = partial(measure_our_training, setup), partial(measure_script, setup)
    offloaded = with_host_memory(partial(measure_or_oom, partial(train, open_16_bit)))
    packed = measure_or_oom(partial(train, open_4_bit))
    lora, repeated = (measure_or_oom(partial(train, open_original)) for _ in range(2))
    peft = measure_or_oom(partial(script, open_original))
    least = LEAST_RATIO if setup.is_full_size else None
    peak, ours = "peak reserved", offloaded.training
    yield row(
        benchmark, f"{peak}; LoRA", "GB", ours.reserved, peer=lora.reserved, least_ratio=least
    )
    yield row(benchmark, f"{peak}; PEFT LoRA", "GB", ours.reserved, peer=peft.reserved)
    yield row(benchmark, f"{peak}; FSDP2", "GB", ours.reserved, peer=fsdp.training.reserved)
    yield row(benchmark, f"{peak} in nf4; LoRA", "GB", packed.reserved, peer=lora.reserved)
    yield row(benchmark, "step; LoRA", "s", ours.step, peer=lora.step)
    yield row(benchmark, "step; PEFT LoRA", "s", ours.step, peer=peft.step)
    yield row(benchmark, "step; FSDP2", "s", ours.step, peer=fsdp.training.step)
    yield row(benchmark, "step in nf4; LoRA", "s", packed.step, peer=lora.step)
    yield row(benchmark, "host memory, at most; FSDP2", "GiB", offloaded.host, peer=fsdp.host)
    distance, noise = max_loss_distance(ours, lora), max_loss_distance(repeated, lora)
    label = "loss, largest distance from LoRA's; of LoRA's own"
    yield row(benchmark, label, "nats", distance, peer=noise)


def max_loss_distance(first: TrainingFigures, second: TrainingFigures) -> Figure:
    """Return the largest distance of two loss curves in nats; nan if one is incomplete."""
    if len(first.losses) != STEPS or len(second.losses) != STEPS:
        return nan
    return max(abs(a - b) for a, b in zip(first.losses, second.losses, strict=True))


def open_streamed(
    setup: BenchSetup, device: torch.device, *, precision: Precision | None
) -> PreTrainedModel:
    """Open the original model with its blocks in host memory."""
    build_inputs, emulator = BuildInputs(None, None, None, precision), Offload()
    with tempfile.TemporaryDirectory() as folder:
        emulator.build(Path(folder), setup.source, build_inputs, device=device)
        return emulator.open(Path(folder), setup.source, device, precision=precision)


def with_host_memory(measure: Callable[[], TrainingFigures]) -> HostFigures:
    """Measure a training together with its peak of host memory, anonymous or pinned.

    The larger of the two counts: whether the system counts pinned memory as anonymous memory of the
    process depends on the driver.
    """
    with HostMemoryPeak() as host:
        figures = measure()
    pinned = 0
    if torch.cuda.is_available():
        pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
    return HostFigures(figures, max(host.bytes, pinned) / GIB)


def measure_fsdp(setup: BenchSetup) -> TrainingFigures:
    """Measure the training by FSDP2, with one group per block and weights in host memory."""
    device, run_config = setup.device, setup.run_config
    backend = "cpu:gloo,cuda:nccl" if setup.is_full_size else "gloo"
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    model = open_original(setup, device)
    names = by_block(block_linears(setup.source))
    blocks = [model.get_submodule(name) for name in names]
    checkpoint_layers(model)
    tuned: Any = setup.training_inputs.adapter.attach(
        model, run_config.lora, setup.training_inputs.layers
    )
    for parameter in tuned.parameters():
        if parameter.requires_grad:  # all parameters of a group must have one dtype
            parameter.data = parameter.data.to(setup.source.dtype)
    mesh = init_device_mesh(device.type, (1,))
    policy = CPUOffloadPolicy(pin_memory=setup.is_full_size)
    for part in (*blocks, tuned):
        fully_shard(part, mesh=mesh, offload_policy=policy)
    tuned.train()
    reset_memory(device)  # leaves out the unsharded model, which was on the device before
    trainable = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=run_config.train.learning_rate)
    ends: list[float] = []
    losses: list[float] = []
    for batch in [setup.labelled_batch(seed) for seed in range(STEPS)]:
        loss = tuned(**{name: value.to(device) for name, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ends.append(synchronized_time(device))
    figures = figures_of_steps(ends, device, tuple(losses))
    distributed.destroy_process_group()
    return figures


def _measure_fsdp_in_process(model: str) -> HostFigures:
    """Measure FSDP2 in a process of its own; if it fails, the figures say how it failed."""
    command = [sys.executable, "-m", "emloc.cost.bench.offload", model]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = process.stdout.splitlines()
    if process.returncode or not lines:
        word = f"exit {process.returncode}"
        return HostFigures(TrainingFigures(word, word, word), word)
    values = json.loads(lines[-1])
    return HostFigures(TrainingFigures(**values["training"]), values["host"])


def _print_fsdp_figures(model: str) -> None:
    """Measure FSDP2 and print its figures as one line of JSON."""
    try:
        figures = with_host_memory(partial(measure_fsdp, BenchSetup(model, RECIPE)))
    except Exception as error:  # why: any failure of FSDP2 is a figure; stderr has its message
        if not is_out_of_memory(error):
            print(error, file=sys.stderr)
        word = "OOM" if is_out_of_memory(error) else type(error).__name__
        figures = HostFigures(TrainingFigures(word, word, word), word)
    print(json.dumps(asdict(figures)), flush=True)


if __name__ == "__main__":
    _print_fsdp_figures(sys.argv[1])
