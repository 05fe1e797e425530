"""Sections of the configuration with fixed keys, and checks of their values.

The comment at a field is its explanation in `emloc --help`. This module imports no torch, so that
`--help` and `--cfg job` answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar

from omegaconf import MISSING, DictConfig, OmegaConf

from emloc.config.values import SEED, Checked, OneOf, Range
from emloc.errors import ConfigError
from emloc.runtime.keys import neutral

# Learning rate schedules of transformers that have no required parameters.
SCHEDULES = (
    *("cosine", "linear", "constant", "constant_with_warmup"),
    *("cosine_with_restarts", "polynomial", "inverse_sqrt"),
)

# Value of `compression.bits` that stands for the model's own dtype, without a packed format.
MODEL_BITS = 16

# Value of `budget.jobs_per_gpu` that stands for as many jobs as fit.
AUTO = "auto"


@dataclass(frozen=True)
class Calibration(Checked):
    """Calibration samples, from which the emulator is built (`calibration` group)."""

    section: ClassVar[str] = "calibration"

    # downstream: training rows of the task; generic: running text
    source: Annotated[str, OneOf("downstream", "generic")]
    # number of samples that the emulator is built from
    samples: Annotated[int, Range(least=1, usual=64)]
    # draws the samples; it is not the seed of the training
    seed: Annotated[int, SEED]


@dataclass(frozen=True)
class Compression(Checked):
    """Target size of the emulator (`compression` group)."""

    section: ClassVar[str] = "compression"

    # share of parameters kept, in (0, 1); null: the most that gpu_gib allows
    ratio: Annotated[float | None, Range(above=0, below=1, usual=0.5)]
    # linears: ratio counts the compressed layers; model: it counts all parameters
    of: Annotated[str, OneOf("linears", "model")]
    # 16: the model's dtype; fewer: packed, 4 is nf4; null: what gpu_gib allows
    bits: Annotated[int | None, Range(least=1, most=16, usual=16)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is None and self.ratio is not None:
            raise ConfigError(
                "compression.bits=null is only solved for together with compression.ratio=null; "
                f"set compression.bits={MODEL_BITS}"
            )


@dataclass(frozen=True)
class Budget(Checked):
    """Limits on memory, disk and GPUs (`budget` section), which by themselves change no results."""

    section: ClassVar[str] = "budget"

    # limit of device memory in GiB, which compression=auto solves for
    gpu_gib: Annotated[float | None, Range(above=0, usual=24)]
    # GiB of device memory for hidden states that wait at a block, and a 64th of the device
    # at most; more waits in host memory
    gpu_states_gib: Annotated[float, Range(least=0, usual=1)]
    # GiB of host memory for hidden states; the rest of them goes to disk
    host_gib: Annotated[float, Range(least=0, usual=4)]
    # GiB of second moments kept for other ratios; larger ones are not kept
    statistics_gib: Annotated[float, Range(least=0, usual=16)]
    # GiB of disk that the offsets of one round of an anchored training may take
    disk_gib: Annotated[float, Range(above=0, usual=100)]
    # runs of a sweep that may share a GPU, the others wait; auto: as many as its memory holds
    jobs_per_gpu: Annotated[int | str, Range(least=1, usual=1, word=AUTO)]

    def __post_init__(self) -> None:
        jobs = self.jobs_per_gpu
        if isinstance(jobs, str) and jobs.isdecimal():  # as variables of the environment are
            object.__setattr__(self, "jobs_per_gpu", int(jobs))
        super().__post_init__()


@dataclass(frozen=True)
class LoraSettings(Checked):
    """Size, scale and dropout of an adapter of any kind (`lora` group)."""

    section: ClassVar[str] = "lora"

    rank: Annotated[int, Range(least=1, usual=8)]  # columns of A and rows of B
    # the update is scaled by alpha / rank; alpha = rank is the paper's scale of 1
    alpha: Annotated[float, Range(above=0, usual=8)]
    # share of a layer's inputs that the adapter does not see in training
    dropout: Annotated[float, Range(least=0, below=1, usual=0)]


@dataclass(frozen=True)
class TrainSettings(Checked):
    """Training recipe: steps, batches, learning rate and memory savings (`train` group)."""

    section: ClassVar[str] = "train"

    steps: Annotated[int, Range(least=1, usual=500)]  # optimizer steps
    # samples of one forward pass on one device
    batch: Annotated[int, Range(least=1, usual=8)]
    accumulate: Annotated[int, Range(least=1, usual=1)]  # forward passes of one optimizer step
    # of AdamW, at the end of the warmup
    learning_rate: Annotated[float, Range(above=0, usual=4e-5)]
    # course of the learning rate: cosine, linear, constant or another
    schedule: Annotated[str, OneOf(*SCHEDULES)]
    # share of the steps in which the learning rate rises
    warmup: Annotated[float, Range(least=0, below=1, usual=0.03)]
    weight_decay: Annotated[float, Range(least=0, usual=0)]  # of AdamW
    # largest norm of the gradient; 0: no limit
    clip: Annotated[float, Range(least=0, usual=1)]
    checkpointing: bool  # compute activations again in the backward pass, to save memory
    host_activations: bool  # with checkpointing: keep layer inputs in host memory
    lean: bool  # the same training with less memory and time; false: PEFT's own modules
    # steps between two lines of the loss
    log_every: Annotated[int, Range(least=1, usual=10)]
    # steps between two checkpoints, from which a training is resumed
    save_every: Annotated[int, Range(least=1, usual=100)]
    capture: bool = neutral(False)  # run each forward and backward pass as one CUDA graph
    # stored: compute the features of all images once, before the training, by the original
    features: Annotated[str, OneOf("computed", "stored")] = neutral("computed")

    @property
    def stores_features(self) -> bool:
        """Whether the training reads stored features of images, and has no vision tower."""
        return self.features == "stored"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.host_activations and not (self.lean and self.checkpointing):
            raise ConfigError(
                "train.host_activations=true needs train.checkpointing=true and train.lean=true; "
                "set train.host_activations=false"
            )


@dataclass(frozen=True)
class EvalSettings(Checked):
    """Number of rows and batch size of the evaluation (`eval` group)."""

    section: ClassVar[str] = "eval"

    # number of held-out rows; null: all
    limit: Annotated[int | None, Range(least=1, usual=256)]
    batch: Annotated[int, Range(least=1, usual=16)]  # rows of one forward pass
    harness: bool  # also score with lm-eval: written answers, or lm-eval's own task


@dataclass
class Config:
    """Schema of the configuration of one run.

    A field of type `Any` holds a part. Its keys are checked against the class that it names.
    """

    name: str = MISSING  # folder of the run below runs/; an experiment names itself
    method: str = MISSING  # a row of the tables; it chooses emulator, adapter, recovery, anchor
    seed: Annotated[int, SEED] = MISSING  # seed of the training
    model: Any = MISSING  # the original model, which is fine-tuned in the end
    task: Any = MISSING  # data to train on and to score
    calibration: Calibration = MISSING  # samples that the emulator is built from
    compression: Compression = MISSING  # size of the emulator
    precision: Any = None  # packed format of the weights; null: the one of compression.bits
    lora: LoraSettings = MISSING  # size of the adapter
    emulator: Any = MISSING  # smaller stand-in for the model, through which is trained
    adapter: Any = MISSING  # what is trained
    recovery: Any = MISSING  # how the adapter is adapted to the original model
    anchor: Any = MISSING  # whether training is put back onto the original's hidden states
    polish: Any = MISSING  # how the adapter is improved on the original in the end
    stage: Any = MISSING  # stages of the run
    train: TrainSettings = MISSING  # training recipe
    eval: EvalSettings = MISSING  # how much is evaluated
    budget: Budget = MISSING  # what of the machine the run may use
    tracker: Any = MISSING  # where the numbers are also logged


# Sections that determine a run's results and therefore the name of its folder. The tracker, the
# name and paths do not.
DECISIVE = (
    *("model", "task", "calibration", "compression", "precision", "lora"),
    *("emulator", "adapter", "recovery", "anchor", "polish", "stage", "train", "eval", "seed"),
)

# Groups of which a method makes a choice each.
PARTS = ("emulator", "adapter", "recovery", "anchor", "polish")


# Sections with fixed keys. All other sections are parts, checked against the class that they name.
SECTIONS: dict[str, type] = {
    "calibration": Calibration,
    "compression": Compression,
    "lora": LoraSettings,
    "train": TrainSettings,
    "eval": EvalSettings,
    "budget": Budget,
}


@cache
def schema() -> DictConfig:
    """Return the schema of the configuration as a node that overrides can still write to.

    Hydra's store copies the node, so that it never changes.
    """
    sections = {name: OmegaConf.structured(cls) for name, cls in SECTIONS.items()}
    for section in sections.values():
        OmegaConf.set_readonly(
            section, None
        )  # OmegaConf makes the node of a frozen class read-only
    node: DictConfig = OmegaConf.structured(Config(**sections))
    return node
