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
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from emloc.adapters.training_inputs import TrainingInputs
from emloc.config.settings import MODEL_BITS, TrainSettings
from emloc.data.collate import EncodedRow
from emloc.data.reader import encode_all
from emloc.emulators import BuiltEmulator
from emloc.emulators.operations import operations_share
from emloc.errors import ConfigError
from emloc.models.objectives import Batch
from emloc.precision import PackedLayer
from emloc.runtime.distributed import is_first, is_sharded
from emloc.stages.training.callbacks import Report, StepTimer, TrainingProgress
from emloc.stages.training.lean_setup import prepare_model, required_override
from emloc.stages.training.trainer import (
    FiniteTrainer,
    newest_intact_checkpoint,
    unshard_parameters,
)
from emloc.stages.training.work import rows_of_step, training_work
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
) -> dict[str, Any]:
    """Train an adapter and write it with its curve into `folder`, which may hold checkpoints.

    A training whose checkpoints are in `folder` is resumed from the newest of them.

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
        reader.collate,
        device=device,
        report=report,
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
) -> dict[str, Any]:
    """Train as `train` does, on rows that are encoded already.

    `collate_rows` turns some rows into a batch. The adapter is a new one, or continues from the
    adapter that the folder `start` holds.

    Raises:
        ConfigError: FSDP is to split weights in a packed format.
    """
    source = built_emulator.source
    # Weights that FSDP splits stay in host memory, mapped from their files, and move to the device
    # block by block.
    model = built_emulator.open(torch.device("cpu") if is_sharded() else device)
    share = operations_share(model, source)
    if is_sharded() and (
        packed_layers := [m for m in model.modules() if isinstance(m, PackedLayer)]
    ):
        raise ConfigError(
            f"FSDP cannot split weights of {packed_layers[0].matrix.precision.bits} bits; "
            f"set compression.bits={MODEL_BITS}, or launch without FSDP"
        )
    set_seed(training_inputs.seed)
    source.redraw_fresh_modules(model, training_inputs.seed)
    if start is None:
        model = training_inputs.adapter.attach(
            model,
            training_inputs.lora,
            built_emulator.targets(training_inputs.layers),
            source.fresh_modules,
        )
    else:
        model = training_inputs.adapter.load(model, start, trainable=True)
    lean, fused, loss = training_inputs.recipe.lean, False, None
    if training_inputs.recipe.lean and (override := required_override(training_inputs.lora)):
        log.info(
            "train: PEFT's own layers, which take more memory and time; %s avoids them", override
        )
        lean = False
    elif training_inputs.recipe.lean:
        fused, loss = prepare_model(
            model, training_inputs.adapter, training_inputs.recipe, source.objective
        )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("train: %s trainable parameters, %d training rows", f"{trainable:,}", len(rows))
    checkpoints = folder / "checkpoints"
    dtype = built_emulator.source.dtype
    progress = TrainingProgress(report)
    trainer = FiniteTrainer(
        adapter=training_inputs.adapter,
        model=model,
        args=arguments(
            training_inputs.recipe,
            training_inputs.seed,
            checkpoints,
            dtype,
            device,
            lean=lean,
            fused=fused,
        ),
        train_dataset=rows,
        data_collator=collate_rows,
        callbacks=[progress],
        objective=source.objective,
        loss=loss,
    )
    trainer.remove_callback(PrinterCallback)
    timer = StepTimer()
    trainer.add_callback(timer)
    mixed = trainer.args.bf16 or trainer.args.fp16
    with without_cudnn(), training_inputs.adapter.training(model, mixed=mixed), closing(progress):
        checkpoint = newest_intact_checkpoint(checkpoints)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    unshard_parameters(model)
    trainer.accelerator.wait_for_everyone()  # every process writes a part of the last checkpoint
    if is_first():
        training_inputs.adapter.save(model, folder / "adapter", source.name)
        curve = [line for line in trainer.state.log_history if "loss" in line]
        (folder / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
        shutil.rmtree(checkpoints, ignore_errors=True)
    return {
        "trainable": trainable,
        "steps": trainer.state.global_step,
        "step_seconds": timer.median,
        **training_work(
            trainer.state.global_step * rows_of_step(training_inputs.recipe, len(rows)),
            share,
            recomputes=training_inputs.recipe.checkpointing,
        ),
    }


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
        report_to=[],
        disable_tqdm=True,  # `Progress` shows the bar
        **{_CHECKPOINTING: recipe.checkpointing and not lean},
    )
    # A process uses one device; the Trainer would split its batches over all visible GPUs.
    training_arguments._n_gpu = min(training_arguments.n_gpu, 1)
    return training_arguments
