"""A step of training: its memory and time, ours beside an ordinary script's, and what was planned.

The peers are a script as anybody writes it: the whole model, PEFT, transformers' Trainer with
bfloat16 and gradient checkpointing, logits of every token; for QLoRA with bitsandbytes' layers.
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

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from emloc.cost.bench.rows import BenchRow, Figure, row
from emloc.cost.bench.setting import BenchSetup, fresh, now, out_of_memory, peak_gb, reserved_gb
from emloc.cost.plan.fit import need_of, scheme_of
from emloc.cost.plan.layout import StepShape
from emloc.emulators.full import block_linears, load_quantized
from emloc.emulators.size import ranks_at
from emloc.models.checkpoint.source import Source
from emloc.precision import require_format
from emloc.precision.nf4 import Nf4Linear
from emloc.runtime.memory import GIB, stay_within
from emloc.stages.run_config import precision_of
from emloc.stages.training.train import fit_rows
from emloc.tensors.nn.factorized import Factorized, PackedFactorized

FOUR_BITS = 4  # of QLoRA, and of what is measured beside it
STEPS, WARM = 8, 4  # of one measurement, and of these not timed
NEAR = 0.05  # the share by which a planned peak may be off the measured one


@dataclass(frozen=True)
class TrainingFigures:
    """One way of training."""

    peak: Figure  # 10^9 bytes allocated at most
    reserved: Figure  # 10^9 bytes taken from the device at most
    step: Figure  # seconds, the median
    losses: tuple[float, ...] = ()  # of each step, where they were asked for


# What is measured of a training that the device, or what it may use of it, is too small for.
FULL = TrainingFigures("OOM", "OOM", "OOM")


@dataclass(frozen=True)
class Target:
    """What an emulator has to stay within."""

    gb: float  # 10^9 bytes of the device
    step: float | None  # seconds


@dataclass(frozen=True)
class PreparedModel:
    """A model to train, in the place of a built emulator."""

    source: Source
    by: Callable[[torch.device], PreTrainedModel]

    def open(self, device: torch.device) -> PreTrainedModel:
        """The model, frozen."""
        return self.by(device)

    def targets(self, layers: Sequence[str]) -> list[str]:
        """All of them."""
        return list(layers)


Opener = Callable[[BenchSetup, torch.device], PreTrainedModel]


def training(
    model: str, ratio: float, names: tuple[str, str, str], targets: tuple[Target, Target]
) -> Iterator[BenchRow]:
    """Measure lora, qlora, emloc and emloc_nf4 of one model, and the two peers.

    `names`: what the rows of the emulator, of its four-bit form and of the plan are called;
    `targets`: of the first two.
    """
    setting = BenchSetup(model, (f"train.steps={STEPS}",))
    thin: Opener = partial(factorized, ratio=ratio)
    thin_nf4: Opener = partial(packed, ratio=ratio)
    lora, qlora = (tried(partial(scripted, setting, peer)) for peer in (whole, quantized))
    for name, opener, target in zip(names, (thin, thin_nf4), targets, strict=False):
        # On a device no larger than the target; the peers had all of it.
        stay_within(setting.device, target.gb * 1e9 / GIB)
        ours = tried(partial(fitted, setting, opener))
        stay_within(setting.device, None)
        yield from beside(name, ours, lora, qlora, target if setting.full else None)
    work = StepShape.of(setting.run_config.train, setting.length, setting.answer)
    four = precision_of(FOUR_BITS)
    for method, opener, share, precision in (
        ("lora", whole, None, None),
        ("qlora", quantized, None, four),
        ("emloc", thin, ratio, None),
        ("emloc_nf4", thin_nf4, ratio, four),
    ):
        measured = tried(partial(fitted, setting, opener))
        scheme = scheme_of(setting.run_config, setting.source, share, precision)
        planned = need_of(scheme, work).peak / 1e9
        near = NEAR if setting.full and measured is not FULL else None
        what = f"peak of {method}: planned, measured"
        yield row(names[2], what, "GB", planned, peer=measured.peak, near=near)
        yield row(names[2], f"step of {method}", "s", measured.step)
        yield row(names[2], f"reserved by {method}", "GB", measured.reserved)


def beside(
    name: str,
    ours: TrainingFigures,
    lora: TrainingFigures,
    qlora: TrainingFigures,
    target: Target | None,
) -> Iterator[BenchRow]:
    """The rows of an emulator and its target beside the peers."""
    gb, step = (target.gb, target.step) if target else (None, None)
    peak = "peak reserved, on a device of the target's size"
    yield row(name, f"{peak}; PEFT LoRA", "GB", ours.reserved, peer=lora.reserved, most=gb)
    yield row(name, f"{peak}; bitsandbytes QLoRA", "GB", ours.reserved, peer=qlora.reserved)
    yield row(name, "step; PEFT LoRA", "s", ours.step, peer=lora.step, most=step)
    yield row(name, "step; bitsandbytes QLoRA", "s", ours.step, peer=qlora.step)


def tried(measure: Callable[[], TrainingFigures]) -> TrainingFigures:
    """What was measured, or that there was no room for it."""
    try:
        return measure()
    except Exception as error:  # why: it may come wrapped in a library's own
        if not out_of_memory(error):
            raise
        return FULL


def fitted(setting: BenchSetup, opener: Opener) -> TrainingFigures:
    """Our own training of the model that `opener` gives."""
    device = setting.device
    fresh(device)
    ends: list[float] = []
    losses: list[float] = []

    def follow(step: int, values: dict[str, float]) -> None:
        ends.append(now(device))
        losses.append(values["loss"])

    made = [setting.learnt(seed) for seed in range(STEPS)]  # not on the clock
    with tempfile.TemporaryDirectory() as folder:
        fit_rows(
            Path(folder),
            PreparedModel(setting.source, partial(opener, setting)),  # type: ignore[arg-type]
            setting.training_inputs,
            setting.rows(),
            lambda some: dict(made[some[0].seed]),
            device=device,
            report=follow,
        )
    return of_steps(ends, device, tuple(losses))


def scripted(setting: BenchSetup, opener: Opener) -> TrainingFigures:
    """The same training by an ordinary script."""
    run_config, device = setting.run_config, setting.device
    fresh(device)
    model = opener(setting, device)
    for layer in model.modules():
        if isinstance(layer, Nf4Linear):  # bitsandbytes' own product
            layer.forward = super(Nf4Linear, layer).forward  # type: ignore[method-assign]
    tuned = setting.training_inputs.adapter.attach(
        model, run_config.lora, setting.training_inputs.layers
    )
    ends: list[float] = []
    made = [setting.batch(seed) for seed in range(STEPS)]  # not on the clock

    def whole_labels(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = made[some[0]["seed"]]
        labels = batch["input_ids"].clone()
        labels[:, : -setting.answer] = -100
        return batch | {"labels": labels}

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(now(device))

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=1,
            bf16=True,
            gradient_checkpointing=True,
            use_cpu=device.type == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        args._n_gpu = min(args.n_gpu, 1)  # one device, as ours, however many are in sight
        Trainer(
            model=tuned,
            args=args,
            train_dataset=[{"seed": seed} for seed in range(STEPS)],
            data_collator=whole_labels,
            callbacks=[Clock()],
        ).train()
    return of_steps(ends, device)


def of_steps(
    ends: Sequence[float], device: torch.device, losses: tuple[float, ...] = ()
) -> TrainingFigures:
    """What was measured since `fresh`, of a training that is over; `ends`: of each step."""
    steps = [after - before for before, after in pairwise(ends[WARM - 1 :])]
    found = TrainingFigures(peak_gb(device), reserved_gb(device), statistics.median(steps), losses)
    fresh(device)
    return found


def whole(setting: BenchSetup, device: torch.device) -> PreTrainedModel:
    """The original model."""
    return setting.source.load(device)


def quantized(setting: BenchSetup, device: torch.device) -> PreTrainedModel:
    """The original with the linears of its blocks in four bits."""
    layers = block_linears(setting.source)
    return load_quantized(setting.source, layers, device, precision_of(FOUR_BITS))


def factorized(setting: BenchSetup, device: torch.device, *, ratio: float) -> PreTrainedModel:
    """An emulator of random factors, which are as large as any."""
    return _emulator(setting, device, ratio, Factorized)


def packed(setting: BenchSetup, device: torch.device, *, ratio: float) -> PreTrainedModel:
    """The same in four bits."""
    quantize = require_format(precision_of(FOUR_BITS)).quantize

    def module(u: Tensor, v: Tensor, bias: Tensor | None) -> nn.Module:
        return PackedFactorized(quantize(v), quantize(u.T.contiguous()), bias)

    return _emulator(setting, device, ratio, module)


def _emulator(
    setting: BenchSetup, device: torch.device, ratio: float, module: Callable[..., nn.Module]
) -> PreTrainedModel:
    source = setting.source
    layers = setting.run_config.model.compressed(source)
    replace = {}
    for layer, rank in ranks_at(ratio, layers, 1).items():
        rows, columns = layers[layer]
        u = 0.02 * torch.randn(rows, rank, device=device, dtype=source.dtype)
        v = torch.randn(rank, columns, device=device, dtype=source.dtype) / rank**0.5
        replace[layer] = module(u, v, source.bias(layer, device))
    return source.load(device, replace)
