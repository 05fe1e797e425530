"""Sections of the configuration with fixed keys, and checks of their values.

The comment at a field is its explanation in `emloc --help`. This module imports no torch, so that
`--help` and `--cfg job` answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from emloc.errors import ConfigError

# Learning rate schedules of transformers that have no required parameters.
SCHEDULES = (
    *("cosine", "linear", "constant", "constant_with_warmup"),
    *("cosine_with_restarts", "polynomial", "inverse_sqrt"),
)

# Value of `compression.bits` that stands for the model's own dtype, without a packed format.
MODEL_BITS = 16

# Settings of `train` that count something, with the value that an error message suggests.
_SUGGESTED_COUNTS = {"steps": 500, "batch": 8, "accumulate": 1, "log_every": 10, "save_every": 100}


@dataclass(frozen=True)
class Calibration:
    """Calibration samples, from which the emulator is built (`calibration` group)."""

    source: str  # downstream: training rows of the task; generic: running text
    samples: int  # number of samples that the emulator is built from
    seed: int  # draws the samples; it is not the seed of the training

    def __post_init__(self) -> None:
        if self.source not in ("downstream", "generic"):
            raise ConfigError(
                f"calibration.source={self.source}: set calibration.source=downstream or generic"
            )
        if self.samples < 1:
            raise ConfigError(
                f"calibration.samples must be at least 1, got {self.samples}; "
                "set calibration.samples=64"
            )


@dataclass(frozen=True)
class Compression:
    """Target size of the emulator (`compression` group)."""

    ratio: float | None  # share of parameters kept, in (0, 1); null: the most that gpu_gib allows
    of: str  # linears: ratio counts the compressed layers; model: it counts all parameters
    bits: int | None  # 16: the model's dtype; fewer: packed, 4 is nf4; null: what gpu_gib allows

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ConfigError(
                f"compression.ratio must lie between 0 and 1, got {self.ratio:g}; "
                "set compression.ratio=0.5"
            )
        if self.of not in ("linears", "model"):
            raise ConfigError(f"compression.of={self.of}: set compression.of=linears or model")
        if self.bits is None and self.ratio is not None:
            raise ConfigError(
                "compression.bits=null is only solved for together with compression.ratio=null; "
                f"set compression.bits={MODEL_BITS}"
            )


@dataclass(frozen=True)
class Budget:
    """Limits on memory and GPUs (`budget` section), which by themselves change no results."""

    gpu_gib: float | None  # limit of device memory in GiB, which compression=auto solves for
    host_gib: float  # GiB of host memory for hidden states; the rest of them goes to disk
    statistics_gib: float  # GiB of second moments kept for other ratios; larger ones are not kept
    jobs_per_gpu: int  # runs of a sweep that may share a GPU; the others wait

    def __post_init__(self) -> None:
        if self.gpu_gib is not None and self.gpu_gib <= 0:
            raise ConfigError(
                f"budget.gpu_gib must be above 0 or null, got {self.gpu_gib:g}; "
                "set budget.gpu_gib=24"
            )
        for name, usual in (("host_gib", 4), ("statistics_gib", 16)):
            if (size := getattr(self, name)) < 0:
                raise ConfigError(
                    f"budget.{name} must be at least 0, got {size:g}; set budget.{name}={usual}"
                )
        if self.jobs_per_gpu < 1:
            raise ConfigError(
                f"budget.jobs_per_gpu must be at least 1, got {self.jobs_per_gpu}; "
                "set budget.jobs_per_gpu=1"
            )


@dataclass(frozen=True)
class LoraSettings:
    """Size, scale and dropout of an adapter of any kind (`lora` group)."""

    rank: int  # columns of A and rows of B
    alpha: float  # the update is scaled by alpha / rank; alpha = rank is the paper's scale of 1
    dropout: float  # share of a layer's inputs that the adapter does not see in training

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank must be at least 1, got {self.rank}; set lora.rank=8")
        if self.alpha <= 0:
            raise ConfigError(
                f"lora.alpha must be above 0, got {self.alpha:g}; set lora.alpha={self.rank}"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"lora.dropout must be in [0, 1), got {self.dropout:g}; set lora.dropout=0"
            )


@dataclass(frozen=True)
class TrainSettings:
    """Training recipe: steps, batches, learning rate and memory savings (`train` group)."""

    steps: int  # optimizer steps
    batch: int  # samples of one forward pass on one device
    accumulate: int  # forward passes of one optimizer step
    learning_rate: float  # of AdamW, at the end of the warmup
    schedule: str  # course of the learning rate: cosine, linear, constant or another
    warmup: float  # share of the steps in which the learning rate rises
    weight_decay: float  # of AdamW
    clip: float  # largest norm of the gradient
    checkpointing: bool  # compute activations again in the backward pass, to save memory
    host_activations: bool  # with checkpointing: keep layer inputs in host memory
    lean: bool  # the same training with less memory and time; false: PEFT's own modules
    log_every: int  # steps between two lines of the loss
    save_every: int  # steps between two checkpoints, from which a training is resumed

    def __post_init__(self) -> None:
        for name, usual in _SUGGESTED_COUNTS.items():
            if (count := getattr(self, name)) < 1:
                raise ConfigError(
                    f"train.{name} must be at least 1, got {count}; set train.{name}={usual}"
                )
        if self.learning_rate <= 0:
            raise ConfigError(
                f"train.learning_rate must be above 0, got {self.learning_rate:g}; "
                "set train.learning_rate=4e-5"
            )
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f"train.schedule={self.schedule}: there is no such schedule, only "
                f"{', '.join(SCHEDULES)}; "
                "set train.schedule=cosine"
            )
        if self.host_activations and not (self.lean and self.checkpointing):
            raise ConfigError(
                "train.host_activations=true needs train.checkpointing=true and train.lean=true; "
                "set train.host_activations=false"
            )
        if not 0 <= self.warmup < 1:
            raise ConfigError(
                f"train.warmup is a share of the steps in [0, 1), got {self.warmup:g}; "
                "set train.warmup=0.03"
            )


@dataclass(frozen=True)
class EvalSettings:
    """Number of rows and batch size of the evaluation (`eval` group)."""

    limit: int | None  # number of held-out rows; null: all
    batch: int  # rows of one forward pass
    harness: bool  # also score with lm-eval: written answers, or lm-eval's own task

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(
                f"eval.limit must be at least 1 or null, got {self.limit}; set eval.limit=256"
            )
        if self.batch < 1:
            raise ConfigError(f"eval.batch must be at least 1, got {self.batch}; set eval.batch=16")


@dataclass
class Config:
    """Schema of the configuration of one run.

    A field of type `Any` holds a part. Its keys are checked against the class that it names.
    """

    name: str = MISSING  # folder of the run below runs/; an experiment names itself
    method: str = MISSING  # a row of the tables; it chooses emulator, adapter and recovery
    seed: int = MISSING  # seed of the training
    model: Any = MISSING  # the original model, which is fine-tuned in the end
    task: Any = MISSING  # data to train on and to score
    calibration: Calibration = MISSING  # samples that the emulator is built from
    compression: Compression = MISSING  # size of the emulator
    precision: Any = None  # packed format of the weights; null: the one of compression.bits
    lora: LoraSettings = MISSING  # size of the adapter
    emulator: Any = MISSING  # smaller stand-in for the model, through which is trained
    adapter: Any = MISSING  # what is trained
    recovery: Any = MISSING  # how the adapter is adapted to the original model
    stage: Any = MISSING  # stages of the run
    train: TrainSettings = MISSING  # training recipe
    eval: EvalSettings = MISSING  # how much is evaluated
    budget: Budget = MISSING  # memory that the run may use
    tracker: Any = MISSING  # where the numbers are also logged


# Sections that determine a run's results and therefore the name of its folder. The tracker, the
# name and paths do not.
DECISIVE = (
    *("model", "task", "calibration", "compression", "precision", "lora"),
    *("emulator", "adapter", "recovery", "stage", "train", "eval", "seed"),
)


# Sections with fixed keys. All other sections are parts, checked against the class that they name.
SECTIONS: dict[str, type] = {
    "calibration": Calibration,
    "compression": Compression,
    "lora": LoraSettings,
    "train": TrainSettings,
    "eval": EvalSettings,
    "budget": Budget,
}


def schema() -> DictConfig:
    """Return the schema of the configuration as a node that overrides can still write to."""
    sections = {name: OmegaConf.structured(cls) for name, cls in SECTIONS.items()}
    for section in sections.values():
        OmegaConf.set_readonly(
            section, None
        )  # OmegaConf makes the node of a frozen class read-only
    node: DictConfig = OmegaConf.structured(Config(**sections))
    return node
