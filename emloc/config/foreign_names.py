"""Settings of this package by the names that other training tools give them."""

from __future__ import annotations

# Last word of the name elsewhere (Trainer and PEFT of Hugging Face, Axolotl, LLaMA-Factory, TRL) ->
# setting here.
FOREIGN_NAMES = {
    "lr": "train.learning_rate",
    "learning_rate": "train.learning_rate",
    "peak_lr": "train.learning_rate",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "train_steps": "train.steps",
    "iterations": "train.steps",
    "epoch": "train.steps",
    "epochs": "train.steps",
    "num_epochs": "train.steps",
    "max_epochs": "train.steps",
    "num_train_epochs": "train.steps",
    "batch_size": "train.batch",
    "train_batch_size": "train.batch",
    "micro_batch_size": "train.batch",
    "per_device_train_batch_size": "train.batch",
    "eval_batch_size": "eval.batch",
    "per_device_eval_batch_size": "eval.batch",
    "grad_accum": "train.accumulate",
    "gradient_accumulation": "train.accumulate",
    "gradient_accumulation_steps": "train.accumulate",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "scheduler": "train.schedule",
    "warmup": "train.warmup",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "wd": "train.weight_decay",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.clip",
    "gradient_clipping": "train.clip",
    "grad_clip": "train.clip",
    "gradient_checkpointing": "train.checkpointing",
    "logging_steps": "train.log_every",
    "save_steps": "train.save_every",
    "r": "lora.rank",
    "rank": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "alpha": "lora.alpha",
    "lora_alpha": "lora.alpha",
    "dropout": "lora.dropout",
    "lora_dropout": "lora.dropout",
    "target_modules": "model.lora_targets",
    "lora_target": "model.lora_targets",
    "lora_target_modules": "model.lora_targets",
    "use_dora": "adapter",
    "use_rslora": "adapter",
    "peft_type": "adapter",
    "load_in_4bit": "compression.bits",
    "load_in_8bit": "compression.bits",
    "quantization": "compression.bits",
    "quantization_bit": "compression.bits",
    "bits": "compression.bits",
    "compression_ratio": "compression.ratio",
    "sparsity": "compression.ratio",
    "max_length": "model.max_length",
    "max_seq_len": "model.max_length",
    "max_seq_length": "model.max_length",
    "seq_len": "model.max_length",
    "sequence_len": "model.max_length",
    "cutoff_len": "model.max_length",
    "model_max_length": "model.max_length",
    "model_name": "model.id",
    "model_name_or_path": "model.source",
    "base_model": "model.source",
    "model_path": "model.source",
    "torch_dtype": "model.dtype",
    "dtype": "model.dtype",
    "precision": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "dataset": "task",
    "datasets": "task",
    "dataset_name": "task",
    "data_path": "task",
    "max_samples": "task.limit",
    "max_train_samples": "task.limit",
    "max_eval_samples": "eval.limit",
    "num_samples": "calibration.samples",
    "calibration_samples": "calibration.samples",
    "seed": "seed",
    "random_seed": "seed",
    "data_seed": "calibration.seed",
    "run_name": "name",
    "experiment_name": "name",
    "output_dir": "name",
    "wandb_project": "tracker.project",
    "wandb_entity": "tracker.entity",
    "report_to": "tracker",
}

# Name elsewhere -> what differs here.
_EPOCHS = (
    "train.steps counts optimizer steps; rows / (train.batch x train.accumulate) of them are one "
    "epoch"
)
DIFFERENCES = {
    **dict.fromkeys(("epoch", "epochs", "num_epochs", "max_epochs", "num_train_epochs"), _EPOCHS),
    "warmup_steps": "a share of the steps, not their number",
    "output_dir": "the folder is EMLOC_RUNS/<name>, by default runs/<name>",
    "load_in_4bit": "compression.bits=4 or method=qlora",
}


def own_name(key: str) -> str | None:
    """Return the setting that a dotted name from another tool stands for; None if none is known.

    The name that was typed is never returned.
    """
    own = FOREIGN_NAMES.get(_last_word(key))
    return None if own == key else own


def difference(key: str) -> str:
    """Return what differs from the setting elsewhere, as a clause; empty if nothing does."""
    return DIFFERENCES.get(_last_word(key), "")


def _last_word(key: str) -> str:
    return key.rpartition(".")[2].lower().replace("-", "_")
