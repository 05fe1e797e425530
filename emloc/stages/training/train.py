"""Train an adapter on the emulator: a thin layer over transformers.Trainer.

Under `torchrun` or `accelerate launch` each process trains on its own device. An optimizer step
then has `train.batch` x `train.accumulate` rows of every process: n processes with accumulate=1
take the same steps as one process with accumulate=n.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerState, TrainingArguments

from emloc.adapters.training_inputs import TrainingInputs
from emloc.anchors.attached import AttachedOffsets
from emloc.config.settings import TrainSettings
from emloc.data.collate import EncodedRow
from emloc.data.reader import encode_all, training_collate
from emloc.emulators import BuiltEmulator
from emloc.models.decoder import decoder_of
from emloc.models.objectives import Batch
from emloc.runtime.distributed import is_first
from emloc.stages.training.callbacks import LogLines, Report, StepTimer, StopAfter, TrainingProgress
from emloc.stages.training.capture import Capture, capture_of
from emloc.stages.training.graphed_passes import KeptPasses
from emloc.stages.training.kept_trainee import KeptTrainee
from emloc.stages.training.trainee import Trainee, open_trainee
from emloc.stages.training.trainer import (
    FiniteTrainer,
    newest_intact_checkpoint,
    unshard_parameters,
)
from emloc.stages.training.work import rows_of_step
from emloc.tensors.lean.kernels import fused_rotary
from emloc.tensors.nn.attention import without_cudnn

log = logging.getLogger(__name__)

# transformers 5.23 renamed this argument and warns at the older name.
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


def train(
    folder: Path,
    built_emulator: BuiltEmulator,
    training_inputs: TrainingInputs,
    *,
    device: torch.device,
    report: Report,
    keeper: KeptTrainee | None = None,
) -> dict[str, Any]:
    """Train an adapter and write it with its curve into `folder`, which may hold checkpoints.

    A training whose checkpoints are in `folder` is resumed from the newest of them. `keeper` has
    what an earlier training of this process has loaded; None: everything is loaded anew.

    Returns:
        The number of trainable parameters, of optimizer steps, the median seconds of a step, and
        the facts of `training_work`.
    """
    reader = built_emulator.source.reader()
    encoded = encode_all(reader, training_inputs.examples, training_inputs.max_length)
    return fit_rows(
        folder,
        built_emulator,
        training_inputs,
        encoded,
        training_collate(reader),
        device=device,
        report=report,
        keeper=keeper,
    )


def fit_rows(
    folder: Path,
    built_emulator: BuiltEmulator,
    training_inputs: TrainingInputs,
    rows: Sequence[EncodedRow],
    collate_rows: Callable[[list[Any]], Batch],
    *,
    device: torch.device,
    report: Report,
    start: Path | None = None,
    keeper: KeptTrainee | None = None,
) -> dict[str, Any]:
    """Train as `train` does, on rows that are encoded already.

    `collate_rows` turns some rows into a batch. The adapter is a new one, or continues from the
    adapter that the folder `start` holds.

    Raises:
        ConfigError: FSDP is to split weights in a packed format.
    """
    train_rows = partial(_fit, folder, rows=rows, collate_rows=collate_rows, report=report)
    if keeper is None or start is not None:
        return train_rows(open_trainee(built_emulator, training_inputs, device, start), None)
    with keeper.opened(built_emulator, training_inputs, device) as entry:
        return train_rows(entry.trainee, entry.passes)


def _fit(
    folder: Path,
    trainee: Trainee,
    kept_passes: KeptPasses | None,
    *,
    rows: Sequence[EncodedRow],
    collate_rows: Callable[[list[Any]], Batch],
    report: Report,
) -> dict[str, Any]:
    """Train, write the adapter and the curve, and return the facts of the training."""
    training_inputs = trainee.training_inputs
    checkpoints, timer = folder / "checkpoints", StepTimer()
    log_start(trainee, len(rows))
    capture = capture_of(trainee, rows, collate_rows, 0, training_inputs.recipe.steps)
    collator = collate_rows if capture is None else capture.collator(collate_rows)
    segment = Segment(capture=capture, kept_passes=kept_passes)
    state = run_steps(trainee, rows, collator, checkpoints, report, timer, segment)
    unshard_parameters(trainee.model)
    if is_first():
        base = trainee.built_emulator.source.name
        training_inputs.adapter.save(trainee.model, folder / "adapter", base)
        write_curve(folder, [line for line in state.log_history if "loss" in line])
        shutil.rmtree(checkpoints, ignore_errors=True)
    return {
        "trainable": trainee.trainable,
        "steps": state.global_step,
        "step_seconds": timer.median,
        **trainee.work(state.global_step * rows_of_step(training_inputs.recipe, len(rows))),
    }


def log_start(trainee: Trainee, rows: int) -> None:
    """Log how a training saves memory, how much is trained, and on how many rows."""
    if trainee.path:
        log.info("%s", trainee.path)
    log.info("train: %s trainable parameters, %d training rows", f"{trainee.trainable:,}", rows)


def run_steps(
    trainee: Trainee,
    rows: Sequence[Any],
    collate_rows: Callable[[list[Any]], Batch],
    checkpoints: Path,
    report: Report,
    timer: StepTimer,
    segment: Segment | None = None,
) -> TrainerState:
    """Run the optimizer steps of a training, or a segment of them, and return the Trainer's state.

    A training whose checkpoints are in the folder `checkpoints` is resumed from the newest of them.

    Args:
        trainee: the model; its adapter changes.
        rows: training rows.
        collate_rows: turns some rows into a batch.
        checkpoints: folder of the checkpoints.
        report: called with each line of the training log.
        timer: times the steps.
        segment: which steps to run; None: all of them.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    training_inputs, source = trainee.training_inputs, trainee.built_emulator.source
    segment = segment or Segment()
    progress = TrainingProgress(report, skipped=segment.skipped)
    newest = newest_intact_checkpoint(checkpoints)
    trainer = FiniteTrainer(
        adapter=training_inputs.adapter,
        model=trainee.model,
        args=arguments(
            replace(
                training_inputs.recipe,
                learning_rate=training_inputs.recipe.learning_rate * segment.rate,
            ),
            training_inputs.seed,
            checkpoints,
            source.dtype,
            trainee.device,
            lean=trainee.lean,
            fused=trainee.fused,
        ),
        train_dataset=rows,
        data_collator=collate_rows,
        callbacks=[
            *(progress, timer, segment.log),
            *([StopAfter(segment.end)] if segment.end is not None else []),
        ],
        objective=source.objective,
        loss=trainee.loss,
        anchors=segment.anchors,
        skipped=segment.skipped,
        restart=segment.restart and newest is None,
        capture=segment.capture,
        kept_passes=segment.kept_passes,
    )
    trainer.remove_callback(PrinterCallback)
    mixed = trainer.args.bf16 or trainer.args.fp16
    adapter = training_inputs.adapter
    training = adapter.training(trainee.model, mixed=mixed)
    rotary = nullcontext() if segment.capture is None else fused_rotary(decoder_of(trainee.inner))
    with without_cudnn(), rotary, training, trainer.graphed(), closing(progress):
        checkpoint = newest or segment.start
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.check_losses()
        finally:
            # Off with the wrapper for autocast, since the next segment would put another around it.
            # With its mark, accelerate would take the model for wrapped and put none around it.
            trainer.accelerator.unwrap_model(trainee.model, keep_fp32_wrapper=False)
            vars(trainee.model).pop("_is_accelerate_prepared", None)
    trainer.accelerator.wait_for_everyone()  # every process writes a part of the last checkpoint
    return trainer.state


@dataclass(frozen=True)
class Segment:
    """Some of the optimizer steps of a training, with or without offsets of anchors."""

    start: Path | None = None  # checkpoint of the step it begins at; None: the first step
    end: int | None = None  # the step it ends at, with a checkpoint; None: the last step
    skipped: int = 0  # steps whose rows were used by rejected rounds
    rate: float = 1.0  # factor of the learning rate
    restart: bool = False  # without the averages of gradients of the checkpoint `start`
    anchors: AttachedOffsets | None = None  # hooks of the model that add offsets; None: no offsets
    capture: Capture | None = None  # how its passes run as CUDA graphs; None: without graphs
    kept_passes: KeptPasses | None = None  # graphs of segments before it, kept for later ones
    log: LogLines = field(default_factory=LogLines)  # of this training
    first: int = 0  # number of the step it begins at


def write_curve(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the training curve, one line of JSON for each line of the Trainer's log."""
    (folder / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def arguments(
    recipe: TrainSettings,
    seed: int,
    output: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    lean: bool,
    fused: bool,
) -> TrainingArguments:
    """Return the recipe as arguments of transformers' Trainer.

    With `lean` the layers recompute their activations already, so the Trainer does not set up
    checkpointing. With `fused` the layers cast their operands, so autocast is off.
    """
    training_arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=math.ceil(recipe.warmup * recipe.steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        bf16=dtype == torch.bfloat16 and not fused,
        use_cpu=device.type == "cpu",
        train_sampling_strategy="group_by_length",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # buffers never change
        seed=seed,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,  # the filter would log 0 for a loss that is not finite
        save_steps=recipe.save_every,
        save_total_limit=2,  # keeps a complete checkpoint while the next one is written
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        accelerator_config={"non_blocking": device.type == "cuda"},
        report_to=[],
        disable_tqdm=True,  # `Progress` shows the bar
        **{_CHECKPOINTING: recipe.checkpointing and not lean},
    )
    # A process uses one device; the Trainer would split its batches over all visible GPUs.
    training_arguments._n_gpu = min(training_arguments.n_gpu, 1)
    return training_arguments
