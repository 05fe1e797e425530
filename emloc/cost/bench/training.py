"""Benchmark of a training step: memory and time of our training, of a script, and of the plan.

The peers are an ordinary script: the whole model, PEFT, transformers' Trainer with bfloat16 and
gradient checkpointing, and logits of every token. For QLoRA it uses the layers of bitsandbytes.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from emloc.cost.bench.bound import Recorder, seconds_alone
from emloc.cost.bench.busy import shared_core
from emloc.cost.bench.rows import BenchRow, Figure, row
from emloc.cost.bench.setting import (
    BenchSetup,
    peak_gb,
    reserved_gb,
    reset_memory,
    synchronized_time,
)
from emloc.cost.plan.fit import layout_of, need_of
from emloc.cost.plan.layout import StepShape
from emloc.emulators.full import block_linears, load_quantized
from emloc.emulators.size import ranks_at
from emloc.models.checkpoint.source import Source
from emloc.precision import require_format
from emloc.precision.nf4 import Nf4Linear
from emloc.recovery import ignore_log
from emloc.runtime.memory import GIB, is_out_of_memory, limit_device_memory
from emloc.stages.run_config import precision_of
from emloc.stages.training import capture
from emloc.stages.training.train import fit_rows
from emloc.tensors.nn.factorized import Factorized, PackedFactorized

FOUR_BITS = 4  # bits of QLoRA and of the packed models
STEPS, WARM_UP_STEPS = 8, 4  # steps of a measurement; the warm-up is not timed
# Steps that are timed together, so that the host may run ahead of the GPU, and steps in all.
TOGETHER, MORE_STEPS = 4, 12
BUSY_LOOPS = 3  # of other programs, for a measurement beside them
# Targets: largest relative distances, of a planned or a usual peak from the measured one, and of a
# step on a core that others use from one that has its core alone.
NEAR, NEAR_ON_SHARED_CORE = 0.05, 0.2
CAPTURE_OFF = "train.capture=false"  # override


@dataclass(frozen=True)
class TrainingFigures:
    """Memory, time and losses of a training."""

    peak: Figure  # peak of allocated device memory in 10^9 bytes
    reserved: Figure  # peak of reserved device memory in 10^9 bytes
    step: Figure  # median seconds of a step, or the mean of steps that are timed together
    losses: tuple[float, ...] = ()  # loss of each step; empty if not recorded


# Figures of a training that does not fit into the device memory it may use.
OUT_OF_MEMORY = TrainingFigures("OOM", "OOM", "OOM")


@dataclass(frozen=True)
class Target:
    """Limits on device memory and step time that an emulator has to keep."""

    gb: float  # 10^9 bytes of device memory
    step: float | None  # seconds of a step; None: no target


@dataclass(frozen=True)
class PreparedModel:
    """A model to train, with the interface of a built emulator."""

    source: Source
    open_model: Callable[[torch.device], PreTrainedModel]
    key: tuple[Any, ...] = ()  # of its weights, for trainings that may use it again

    def open(self, device: torch.device) -> PreTrainedModel:
        """Return the frozen model on the device."""
        return self.open_model(device)

    def targets(self, layers: Sequence[str]) -> list[str]:
        """Return all layers: the model contains each of the layers to adapt."""
        return list(layers)


Opener = Callable[[BenchSetup, torch.device], PreTrainedModel]


def training(
    model: str, ratio: float, names: tuple[str, str, str], targets: tuple[Target, Target]
) -> Iterator[BenchRow]:
    """Measure the methods lora, qlora, emloc and emloc_nf4 on one model, and the two peers.

    `names` are the benchmark names for the rows of the emulator, of the packed emulator and of the
    plan. `targets` belong to the first two.
    """
    steps = f"train.steps={MORE_STEPS}"
    setup = BenchSetup(model, (steps,), TOGETHER)
    setup_without_graphs = BenchSetup(model, (steps, CAPTURE_OFF), TOGETHER)
    open_emulator: Opener = partial(open_factorized, ratio=ratio)
    open_packed_emulator: Opener = partial(open_packed, ratio=ratio)
    lora, qlora = (
        measure_or_oom(partial(measure_script, setup, opener))
        for opener in (open_original, open_quantized)
    )
    for name, opener, target in zip(
        names, (open_emulator, open_packed_emulator), targets, strict=False
    ):
        # Our training may only use the memory of the target; the peers had the whole device.
        limit_device_memory(setup.device, target.gb * 1e9 / GIB)
        ours = measure_or_oom(partial(measure_our_training, setup, opener))
        plain = measure_or_oom(partial(measure_our_training, setup_without_graphs, opener))
        limit_device_memory(setup.device, None)
        yield from comparison_rows(name, ours, lora, qlora, target if setup.is_full_size else None)
        yield row(name, "step; without CUDA graphs", "s", ours.step, peer=plain.step)
        with shared_core(BUSY_LOOPS):
            beside = measure_or_oom(partial(measure_our_training, setup, opener))
        is_measured = setup.is_full_size and OUT_OF_MEMORY not in (ours, plain, beside)
        yield row(
            *(name, f"step; on a core that {BUSY_LOOPS} busy loops share", "s", ours.step),
            peer=beside.step,
            near=NEAR_ON_SHARED_CORE if is_measured else None,
        )
        alone = products_alone(BenchSetup(model, (f"train.steps={STEPS}",)), opener)
        yield row(name, "step; its products alone", "s", ours.step, peer=alone)
        near = NEAR if is_measured else None
        for what, with_graphs, without in (
            ("allocated", ours.peak, plain.peak),
            ("reserved", ours.reserved, plain.reserved),
        ):
            yield row(
                *(name, f"peak {what}; without CUDA graphs", "GB", with_graphs),
                peer=without,
                near=near,
            )
    step_shape = StepShape.of(setup.run_config.train, setup.length, setup.answer)
    nf4 = precision_of(FOUR_BITS)
    for method, opener, method_ratio, precision in (
        ("lora", open_original, None, None),
        ("qlora", open_quantized, None, nf4),
        ("emloc", open_emulator, ratio, None),
        ("emloc_nf4", open_packed_emulator, ratio, nf4),
    ):
        measured = measure_or_oom(partial(measure_our_training, setup, opener))
        layout = layout_of(setup.run_config, setup.source, method_ratio, precision)
        planned = need_of(layout, step_shape).peak / 1e9
        near = NEAR if setup.is_full_size and measured is not OUT_OF_MEMORY else None
        what = f"peak of {method}: planned, measured"
        yield row(names[2], what, "GB", planned, peer=measured.peak, near=near)
        yield row(names[2], f"step of {method}", "s", measured.step)
        yield row(names[2], f"reserved by {method}", "GB", measured.reserved)


def comparison_rows(
    name: str,
    ours: TrainingFigures,
    lora: TrainingFigures,
    qlora: TrainingFigures,
    target: Target | None,
) -> Iterator[BenchRow]:
    """Yield the rows that compare an emulator with the peers and with its target."""
    gb, step = (target.gb, target.step) if target else (None, None)
    peak = "peak reserved, on a device of the target's size"
    yield row(name, f"{peak}; PEFT LoRA", "GB", ours.reserved, peer=lora.reserved, most=gb)
    yield row(name, f"{peak}; bitsandbytes QLoRA", "GB", ours.reserved, peer=qlora.reserved)
    yield row(name, "step; PEFT LoRA", "s", ours.step, peer=lora.step, most=step)
    yield row(name, "step; bitsandbytes QLoRA", "s", ours.step, peer=qlora.step)


def measure_or_oom(measure: Callable[[], TrainingFigures]) -> TrainingFigures:
    """Measure a training; the figures are `OUT_OF_MEMORY` if it does not fit on the device."""
    try:
        return measure()
    except Exception as error:  # why: a library may wrap the error for full memory in its own
        if not is_out_of_memory(error):
            raise
        return OUT_OF_MEMORY


def measure_our_training(setup: BenchSetup, opener: Opener) -> TrainingFigures:
    """Measure our own training of the model that `opener` opens."""
    device = setup.device
    reset_memory(device)
    ends: list[float] = []
    losses: list[float] = []

    def record(step: int, values: dict[str, float]) -> None:
        ends.append(synchronized_time(device))
        losses.append(values["loss"])

    _fit(setup, opener, record)
    return figures_of_steps(ends, device, tuple(losses), setup.log_every)


def _fit(
    setup: BenchSetup, opener: Opener, report: Callable[[int, dict[str, float]], None]
) -> None:
    """Run our own training of the model that `opener` opens; `report` gets each step."""
    steps = setup.run_config.train.steps
    batches = [setup.labelled_batch(seed) for seed in range(steps)]  # generated before the steps
    with tempfile.TemporaryDirectory() as folder:
        fit_rows(
            Path(folder),
            PreparedModel(setup.training_source, partial(opener, setup)),  # type: ignore[arg-type]
            setup.training_inputs,
            setup.rows(),
            lambda rows: dict(batches[rows[0].seed]),
            device=setup.device,
            report=report,
        )


def products_alone(setup: BenchSetup, opener: Opener) -> float:
    """Return the seconds of the matrix products of a step, each timed alone at its shape."""
    device = setup.device
    reset_memory(device)
    recorder = Recorder()

    def count(step: Callable[[], None]) -> Callable[[], None]:
        """Count the operations that a graph would have, instead of recording it."""
        with recorder:
            step()
        return step

    with patch.multiple(capture, RECORDER=lambda _: count, DEVICES=(*capture.DEVICES, "cpu")):
        _fit(setup, opener, ignore_log)
    seconds = seconds_alone(recorder.operations, device)
    reset_memory(device)
    return seconds


def measure_script(setup: BenchSetup, opener: Opener) -> TrainingFigures:
    """Measure an ordinary training script on the model that `opener` opens."""
    run_config, device = setup.run_config, setup.device
    reset_memory(device)
    model = opener(setup, device)
    for layer in model.modules():
        if isinstance(layer, Nf4Linear):  # use bitsandbytes' own forward pass
            layer.forward = super(Nf4Linear, layer).forward  # type: ignore[method-assign]
    tuned = setup.training_inputs.adapter.attach(
        model, run_config.lora, setup.training_inputs.layers
    )
    ends: list[float] = []
    steps = run_config.train.steps
    batches = [setup.batch(seed) for seed in range(steps)]  # generated before the steps

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = batches[rows[0]["seed"]]
        labels = batch["input_ids"].clone()
        labels[:, : -setup.answer] = -100
        return batch | {"labels": labels}

    class StepTimer(TrainerCallback):
        """Callback that records when steps end, as often as our training logs."""

        def on_step_end(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
            """Record the time at which a step has ended."""
            if state.global_step % setup.log_every == 0:
                ends.append(synchronized_time(device))

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=1,
            bf16=True,
            gradient_checkpointing=True,
            use_cpu=device.type == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        args._n_gpu = min(args.n_gpu, 1)  # the Trainer would use all visible GPUs
        Trainer(
            model=tuned,
            args=args,
            train_dataset=[{"seed": seed} for seed in range(steps)],
            data_collator=collate,
            callbacks=[StepTimer()],
        ).train()
    return figures_of_steps(ends, device, together=setup.log_every)


def figures_of_steps(
    ends: Sequence[float],
    device: torch.device,
    losses: tuple[float, ...] = (),
    together: int = 1,
) -> TrainingFigures:
    """Return the figures of a training since `reset_memory`.

    `ends` are the times at the ends of its steps, or of each so many `together`.
    """
    first = WARM_UP_STEPS // together - 1
    step = median_step(ends[first:], together)
    figures = TrainingFigures(peak_gb(device), reserved_gb(device), step, losses)
    reset_memory(device)
    return figures


def median_step(ends: Sequence[float], together: int) -> float:
    """Return the median seconds of a step, of the times at the ends of each so many `together`.

    Raises:
        StatisticsError: there are fewer than two times.
    """
    return statistics.median((after - before) / together for before, after in pairwise(ends))


def open_original(setup: BenchSetup, device: torch.device) -> PreTrainedModel:
    """Open the original model."""
    return setup.training_source.load(device)


def open_quantized(setup: BenchSetup, device: torch.device) -> PreTrainedModel:
    """Open the original model with the linear layers of its blocks packed into four bits."""
    layers = block_linears(setup.source)
    return load_quantized(setup.source, layers, device, precision_of(FOUR_BITS))


def open_factorized(setup: BenchSetup, device: torch.device, *, ratio: float) -> PreTrainedModel:
    """Open an emulator with random factors, which are as large as fitted ones."""
    return _random_emulator(setup, device, ratio, Factorized)


def open_packed(setup: BenchSetup, device: torch.device, *, ratio: float) -> PreTrainedModel:
    """Open an emulator with random factors packed into four bits."""
    quantize = require_format(precision_of(FOUR_BITS)).quantize

    def packed_layer(u: Tensor, v: Tensor, bias: Tensor | None) -> nn.Module:
        return PackedFactorized(quantize(v), quantize(u.T.contiguous()), bias)

    return _random_emulator(setup, device, ratio, packed_layer)


def _random_emulator(
    setup: BenchSetup, device: torch.device, ratio: float, layer_class: Callable[..., nn.Module]
) -> PreTrainedModel:
    """Open the model with random factors in place of its compressed layers.

    `layer_class` is called with `u`, `v` and the bias of each layer.
    """
    source = setup.training_source
    layers = setup.run_config.model.compressible_layers(setup.source)
    modules = {}
    ranks = ranks_at(ratio, layers, 1)
    for layer in source.emulated(ranks):
        rank = ranks[layer]
        rows, columns = layers[layer]
        u = 0.02 * torch.randn(rows, rank, device=device, dtype=source.dtype)
        v = torch.randn(rank, columns, device=device, dtype=source.dtype) / rank**0.5
        modules[layer] = layer_class(u, v, source.bias(layer, device))
    return source.load(device, modules)
