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
from emloc.models.objectives import Batch, Loss, Objective
from emloc.runtime.distributed import is_first, sharded
from emloc.runtime.manifest import flaw_of, seal, set_aside
from emloc.tensors.nn.surgery import replace_parameter

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
    """A Trainer of an adapter for an objective: it stops before a loss that is not finite.

    The adapter says what a checkpoint holds of it and what it adds to the loss. `loss`: the
    objective's leaner one, if the model was made ready for it.
    """

    def __init__(
        self, *, adapter: Adapter, objective: Objective, loss: Loss | None = None, **arguments: Any
    ) -> None:
        self._adapter = adapter
        self._objective = objective
        self._loss = loss or objective.loss
        # Never called, as `compute_loss` is overridden. With one the Trainer knows that a loss is
        # divided by the items of all passes already, and does not divide it by their number.
        super().__init__(compute_loss_func=self._loss, **arguments)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """The batches of one optimizer step, and the items in them and in other processes'."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        items = sum(self._objective.items(batch).to(device) for batch in batches)
        return batches, self.accelerator.gather(items).sum()

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
        if is_first():
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
        lengths = [row.length for row in rows]
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
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of one pass: the one place where objective and adapter add to it.

        The objective's is divided by the items of the whole step, so that passes sum up to a mean;
        the adapter's, a mean over one pass, is divided here by their number.
        """
        loss = self._loss(model, inputs, torch.as_tensor(num_items_in_batch))
        # Gradients are averaged over processes, each of which has divided by the items of all.
        processes = self.accelerator.num_processes
        loss = loss * processes if processes > 1 else loss
        added = self._adapter.auxiliary_loss(self.model)
        return loss if added is None else loss + added / self.current_gradient_accumulation_steps

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
            replace_parameter(model, name, parameter.full_tensor())


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint below `folder` that has all its files as they were written.

    What is not whole is named and moved aside: it may lack the optimizer, and would go on from
    other numbers without a word.
    """
    found = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*[0-9]")}
    for step in sorted(found, reverse=True):
        if (flaw := flaw_of(found[step])) is None:
            return found[step]
        if is_first():
            aside = set_aside(found[step])
            log.warning(
                "train: checkpoint %s is not whole: %s; moved to %s", found[step], flaw, aside.name
            )
    return None
