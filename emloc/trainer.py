"""transformers' Trainer, with steps that do not depend on how many processes share them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from emloc.adapters import Adapter
from emloc.errors import ConfigError
from emloc.manifest import flaw_of, seal, set_aside
from emloc.nn.surgery import put
from emloc.ranks import first, sharded

log = logging.getLogger(__name__)

# What a checkpoint calls the state of the adapter.
STATE = "adapter_state.safetensors"


class WholeSteps(Sampler[int]):
    """The rows in a random order, similar lengths together, cut into whole optimizer steps.

    What is left over is not learnt in this pass: processes would get uneven shares of it, and fill
    them up with rows of other steps. Only where all rows are fewer than one step, it is smaller.

    The order depends on seed and pass alone. A generator that lives on would be at another place
    after an interruption, and in each process after dropout.
    """

    def __init__(
        self, lengths: list[int], step: int, seed: int, steps_done: Callable[[], int]
    ) -> None:
        self._lengths, self._step, self._seed = lengths, step, seed
        self._steps_done = steps_done
        self._steps = max(len(lengths) // step, 1)  # of one pass

    def __len__(self) -> int:
        return min(self._steps * self._step, len(self._lengths))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self._seed + self._steps_done() // self._steps)
        # A DataLoader draws one number first: with it the first pass is the Trainer's own.
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        order = get_length_grouped_indices(self._lengths, self._step, generator=generator)
        return iter(order[: len(self)])


class FiniteTrainer(Trainer):
    """A Trainer of an adapter: it stops before a loss that is not finite reaches the weights.

    The adapter says what a checkpoint holds of it and what it adds to the loss.
    """

    def __init__(self, *, adapter: Adapter, **arguments: Any) -> None:
        self._adapter = adapter
        super().__init__(**arguments)

    def create_accelerator_and_postprocess(self) -> None:
        """Called by the Trainer while it is made."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if sharded() and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate splits over GPUs only, and would train on whole copies without a word.
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            if state.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
            self.is_fsdp_enabled = True
        plugin = getattr(state, "fsdp_plugin", None)
        if plugin is not None and plugin.mixed_precision_policy is not None:
            # accelerate's own would also add up gradients, and round the loss, in 16 bits.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Called by the Trainer every `save_steps`; the list of files is written last."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process may have written a part
        if first():
            seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _get_train_sampler(self, train_dataset: Any = None) -> WholeSteps:
        rows = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if step > len(rows) and args.world_size > 1:
            raise ConfigError(
                f"train.batch x train.accumulate x {args.world_size} processes = {step} samples of "
                f"one step, and there are {len(rows)}; set train.batch lower"
            )
        lengths = [len(row["input_ids"]) for row in rows]
        return WholeSteps(lengths, step, args.seed, lambda: self.state.global_step)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Write the state of the adapter, in place of what the Trainer takes for the model.

        Shards of FSDP are written by accelerate, behind this.
        """
        if not self.args.should_save or self.is_fsdp_enabled:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = self._adapter.state(self.model)
        save_file({name: one.cpu().contiguous() for name, one in state.items()}, folder / STATE)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: PreTrainedModel | None = None
    ) -> None:
        """Put back what `_save` wrote."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._adapter.restore(self.model, load_file(Path(resume_from_checkpoint) / STATE))

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of the model's answers, and the one place where the adapter adds to it.

        A loss over the number of tokens in a whole step is a sum over its passes, which the Trainer
        leaves as it is; the adapter's, a mean over one pass, is divided here by their number. Over
        processes the Trainer takes the mean.
        """
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        added = self._adapter.auxiliary_loss(self.model)
        if added is not None:
            passes = self.current_gradient_accumulation_steps
            summed = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
            )
            loss = loss + added / (passes if summed else 1)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One forward and backward pass.

        Raises:
            FloatingPointError: the loss is not finite, in any of the processes.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        losses = self.accelerator.gather(loss)
        if not torch.isfinite(losses).all():
            raise FloatingPointError(
                f"the loss is {losses.mean().item()} at step {self.state.global_step + 1}; "
                "set train.learning_rate lower"
            )
        return loss


def make_whole(model: PreTrainedModel) -> None:
    """Give every process all of each trained parameter where they were split."""
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad and isinstance(parameter, DTensor):
            put(model, name, parameter.full_tensor())


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint below `folder` that has all its files as they were written.

    What is not whole is named and moved aside: it may lack the optimizer, and would go on from
    other numbers without a word.
    """
    found = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*[0-9]")}
    for step in sorted(found, reverse=True):
        if (flaw := flaw_of(found[step])) is None:
            return found[step]
        if first():
            aside = set_aside(found[step])
            log.warning("train: %s is not whole: %s; moved to %s", found[step], flaw, aside.name)
    return None
