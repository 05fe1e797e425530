"""LoRA with the blocks in host memory: the device it needs, and what the copies cost.

The peers are the same training with the whole model on the device, an ordinary script of it, and
FSDP2 with its weights in host memory: an ordinary loop again, given our answers-only logits and
layers computed again, so that the two engines are what differs.
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
from emloc.cost.bench.setting import BenchSetup, fresh, now, out_of_memory
from emloc.cost.bench.training import (
    FOUR_BITS,
    STEPS,
    TrainingFigures,
    fitted,
    of_steps,
    scripted,
    tried,
    whole,
)
from emloc.emulators import BuildInputs
from emloc.emulators.full import block_linears
from emloc.emulators.offload import Offload
from emloc.precision import Precision
from emloc.runtime.memory import GIB, HostMemoryPeak
from emloc.stages.run_config import precision_of
from emloc.tensors.lean.model import checkpoint_layers

LEAST_RATIO = 4  # times the memory of the device that the whole model needs

RECIPE = (f"train.steps={STEPS}", "train.checkpointing=true")


@dataclass(frozen=True)
class HostFigures:
    """One way of training, and the host memory it took."""

    found: TrainingFigures
    host: Figure  # GiB at most


def offload(work: str, model: str) -> Iterator[BenchRow]:
    """Measure our engine at 16 and 4 bits beside the peers."""
    setting = BenchSetup(model, RECIPE)
    other = _in_its_own_process(model)
    # First: what others have pinned stays with the process.
    ours = hosted(partial(tried, partial(fitted, setting, partial(streamed, precision=None))))
    four = precision_of(FOUR_BITS)
    packed = tried(partial(fitted, setting, partial(streamed, precision=four)))
    lora, again = (tried(partial(fitted, setting, whole)) for _ in range(2))
    plain = tried(partial(scripted, setting, whole))
    least = LEAST_RATIO if setting.full else None
    peak, found = "peak reserved", ours.found
    yield row(work, f"{peak}; LoRA", "GB", found.reserved, peer=lora.reserved, least_ratio=least)
    yield row(work, f"{peak}; PEFT LoRA", "GB", found.reserved, peer=plain.reserved)
    yield row(work, f"{peak}; FSDP2", "GB", found.reserved, peer=other.found.reserved)
    yield row(work, f"{peak} in nf4; LoRA", "GB", packed.reserved, peer=lora.reserved)
    yield row(work, "step; LoRA", "s", found.step, peer=lora.step)
    yield row(work, "step; PEFT LoRA", "s", found.step, peer=plain.step)
    yield row(work, "step; FSDP2", "s", found.step, peer=other.found.step)
    yield row(work, "step in nf4; LoRA", "s", packed.step, peer=lora.step)
    yield row(work, "host memory, at most; FSDP2", "GiB", ours.host, peer=other.host)
    apart, noise = apart_at_most(found, lora), apart_at_most(again, lora)
    yield row(work, "loss, largest distance from LoRA's; of LoRA's own", "nats", apart, peer=noise)


def apart_at_most(one: TrainingFigures, other: TrainingFigures) -> Figure:
    """Nats between two loss curves; nan where there is not a whole one of each."""
    if len(one.losses) != STEPS or len(other.losses) != STEPS:
        return nan
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def streamed(
    setting: BenchSetup, device: torch.device, *, precision: Precision | None
) -> PreTrainedModel:
    """The original model with its blocks in host memory."""
    build_inputs, emulator = BuildInputs(None, None, None, precision), Offload()
    with tempfile.TemporaryDirectory() as folder:
        emulator.build(Path(folder), setting.source, build_inputs, device=device)
        return emulator.open(Path(folder), setting.source, device, precision=precision)


def hosted(measure: Callable[[], TrainingFigures]) -> HostFigures:
    """What was measured, with the host memory at most: anonymous, or pinned if that is more.

    Whether the system counts pinned memory as the process's own depends on the driver.
    """
    with HostMemoryPeak() as host:
        found = measure()
    pinned = 0
    if torch.cuda.is_available():
        pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
    return HostFigures(found, max(host.bytes, pinned) / GIB)


def by_fsdp(setting: BenchSetup) -> TrainingFigures:
    """The same training by FSDP2, every block a group of its own in host memory."""
    device, run_config = setting.device, setting.run_config
    backend = "cpu:gloo,cuda:nccl" if setting.full else "gloo"
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    model = whole(setting, device)
    names = by_block(block_linears(setting.source))
    blocks = [model.get_submodule(name) for name in names]
    checkpoint_layers(model)
    tuned: Any = setting.training_inputs.adapter.attach(
        model, run_config.lora, setting.training_inputs.layers
    )
    learnt = [one for one in tuned.parameters() if one.requires_grad]
    for one in learnt:
        one.data = one.data.to(setting.source.dtype)  # a group has one type
    mesh = init_device_mesh(device.type, (1,))
    policy = CPUOffloadPolicy(pin_memory=setting.full)
    for part in (*blocks, tuned):
        fully_shard(part, mesh=mesh, offload_policy=policy)
    tuned.train()
    fresh(device)  # the whole model was there to be cut
    learnt = [one for one in tuned.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=run_config.train.learning_rate)
    ends: list[float] = []
    losses: list[float] = []
    for batch in [setting.learnt(seed) for seed in range(STEPS)]:
        loss = tuned(**{name: one.to(device) for name, one in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ends.append(now(device))
    found = of_steps(ends, device, tuple(losses))
    distributed.destroy_process_group()
    return found


def _in_its_own_process(model: str) -> HostFigures:
    """FSDP2's figures, or the word of why there are none: how it fails is not ours to decide."""
    command = [sys.executable, "-m", "emloc.cost.bench.offload", model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        word = f"exit {done.returncode}"
        return HostFigures(TrainingFigures(word, word, word), word)
    found = json.loads(lines[-1])
    return HostFigures(TrainingFigures(**found["found"]), found["host"])


def _say(model: str) -> None:
    """Print what FSDP2 needs as one line of JSON."""
    try:
        found = hosted(partial(by_fsdp, BenchSetup(model, RECIPE)))
    except Exception as error:  # why: how a library fails is the figure, and goes to stderr too
        if not out_of_memory(error):
            print(error, file=sys.stderr)
        word = "OOM" if out_of_memory(error) else type(error).__name__
        found = HostFigures(TrainingFigures(word, word, word), word)
    print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    _say(sys.argv[1])
