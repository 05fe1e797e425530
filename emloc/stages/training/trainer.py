"""A Trainer whose optimizer steps are the same for any number of processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer

from emloc.adapters import Adapter
from emloc.anchors.attached import AttachedOffsets
from emloc.anchors.batches import take_offsets
from emloc.errors import ConfigError
from emloc.models.objectives import Batch, Loss, Objective
from emloc.runtime.distributed import is_first, is_sharded
from emloc.runtime.manifest import flaw_of, seal, set_aside
from emloc.runtime.safetensors_file import write_safetensors
from emloc.stages.training.capture import Capture
from emloc.stages.training.finite import FiniteLosses
from emloc.stages.training.graph_inputs import Trained
from emloc.stages.training.graphed_passes import GraphedPasses, KeptPasses
from emloc.stages.training.order import RowOrder, WholeSteps
from emloc.tensors.lean.flat_parameters import FlatParameters
from emloc.tensors.nn.surgery import replace_tensor

log = logging.getLogger(__name__)

# File of a checkpoint that holds the state of the adapter.
STATE_FILE = "adapter_state.safetensors"


class FiniteTrainer(Trainer):
    """Trainer of an adapter for an objective, which fails at the first loss that is not finite.

    The adapter decides which state a checkpoint holds and may add a term to the loss. `loss` is the
    objective's chunked loss, if the model was prepared for it. With `anchors` every batch has
    offsets, which are handed to the model's hooks. `skipped` steps of rows were used by rejected
    rounds of an anchored training. With `restart` the optimizer forgets the averages of gradients
    of the checkpoint that the training goes on from. With `capture` the passes run as CUDA graphs;
    `kept_passes` are those of the round or training before, and keeps them for the next one.
    """

    def __init__(
        self,
        *,
        adapter: Adapter,
        objective: Objective,
        loss: Loss | None = None,
        anchors: AttachedOffsets | None = None,
        skipped: int = 0,
        restart: bool = False,
        capture: Capture | None = None,
        kept_passes: KeptPasses | None = None,
        **arguments: Any,
    ) -> None:
        self._adapter = adapter
        self._finite = FiniteLosses()
        self._capture, self._kept_passes = capture, kept_passes
        self._passes: GraphedPasses | None = None
        self._passes_before: GraphedPasses | None = None  # of the round before, until they go on
        self._flat: FlatParameters | None = None  # what is trained, if the passes are graphs
        self._graph_resources = ExitStack()
        self._anchors, self._skipped, self._restart = anchors, skipped, restart
        self._objective = objective
        self._loss = loss or objective.loss
        # This function is never called, since `compute_loss` is overridden. It tells the Trainer
        # that the loss is already divided by the items of all passes of a step, so that the Trainer
        # does not divide by the number of passes.
        super().__init__(compute_loss_func=self._loss, **arguments)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """Return the batches of one optimizer step and the number of items in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        items = sum(self._objective.items(batch).to(device) for batch in batches)
        return batches, self.accelerator.gather(items).sum()

    def floating_point_ops(self, inputs: Batch) -> int:
        """Return 0: runs count their own work, and the Trainer walks the whole model each step."""
        return 0

    @contextmanager
    def graphed(self) -> Iterator[None]:
        """Give back, when the block ends, what the passes of a training need as graphs."""
        with self._graph_resources:
            try:
                yield
            finally:
                if self._passes is not None and self._kept_passes is not None:
                    self._kept_passes.keep(self._passes, self.model, self.args.device)
                elif self._passes is not None:
                    self._passes.release()
                # What is kept refers to this trainer.
                self._passes = self._passes_before = self._flat = self._kept_passes = None

    def check_losses(self) -> None:
        """Check the losses of the last steps.

        Raises:
            FloatingPointError: one is not finite.
        """
        self._finite.check()

    def create_accelerator_and_postprocess(self) -> None:
        """Configure FSDP after the Trainer has created its accelerator."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if is_sharded() and state.distributed_type == DistributedType.MULTI_CPU:
            # On CPUs accelerate ignores FSDP and silently trains unsharded copies.
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            if state.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
            self.is_fsdp_enabled = True
        plugin = getattr(state, "fsdp_plugin", None)
        if plugin is not None and plugin.mixed_precision_policy is not None:
            # accelerate's own policy would also reduce gradients and round the loss in 16 bits.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
            )

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer; if the passes are graphs, it updates all parameters at once."""
        optimizer = super().create_optimizer(model)
        if self._capture is not None:
            if self._kept_passes is not None:
                self._passes_before = self._kept_passes.take(self.model, self._capture)
            groups = [group["params"] for group in optimizer.param_groups]
            before = self._passes_before
            self._flat = FlatParameters(groups) if before is None else before.flat
            self._flat.hand_to(optimizer)
        return optimizer

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, then its manifest; called by the Trainer every `save_steps`."""
        self._finite.check()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process may have written a part
        if is_first():
            seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _get_train_sampler(self, train_dataset: Any = None) -> WholeSteps:
        """Return the sampler of the training rows.

        Raises:
            ConfigError: several processes would share a step with more rows than there are.
        """
        rows = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if step > len(rows) and args.world_size > 1:
            raise ConfigError(
                f"train.batch x train.accumulate x {args.world_size} processes = {step} rows in "
                f"one step, but there are only {len(rows)} training rows; set train.batch lower"
            )
        order = RowOrder([row.length for row in rows], step, args.seed)
        return WholeSteps(order, lambda: self.state.global_step, self._skipped)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Write the state of the adapter only; the Trainer would write the whole model.

        Under FSDP this writes nothing, since accelerate writes the shards afterwards.
        """
        if not self.args.should_save or self.is_fsdp_enabled:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / STATE_FILE, self._adapter.state(self.model), {})

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: PreTrainedModel | None = None
    ) -> None:
        """Load the state of the adapter that `_save` wrote."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._adapter.restore(self.model, load_file(Path(resume_from_checkpoint) / STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both; the learning rate is the present one, not the checkpoint's.

        They differ if a round was rejected since, which halves the rate of the rounds behind it.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._restart:
            optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
            optimizer.state.clear()
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        rates = [self.args.learning_rate] * len(self.optimizer.param_groups)
        if checkpoint is None or scheduler.base_lrs == rates:
            return
        scheduler.base_lrs = rates
        groups = scheduler.optimizer.param_groups
        for group, share in zip(groups, scheduler.lr_lambdas, strict=True):
            group["initial_lr"] = self.args.learning_rate
            group["lr"] = self.args.learning_rate * share(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in groups]

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the loss of one forward pass: the objective's loss plus the adapter's term.

        The objective divides by the items of the whole step, so that its losses of all passes sum
        to a mean. The adapter's term is a mean over one pass, so it is divided by the passes of the
        step.
        """
        if self._anchors is not None:
            self._anchors.offsets = take_offsets(inputs, self.args.device)
        return self._loss_of(model, inputs, torch.as_tensor(num_items_in_batch))

    def _loss_of(self, model: Any, batch: Batch, count: Tensor) -> Tensor:
        """Return the loss of a batch whose offsets are set."""
        loss = self._loss(model, batch, count)
        # Each process divides by the items of all processes, and gradients are then averaged over
        # the processes. The factor undoes this second division.
        processes = self.accelerator.num_processes
        loss = loss * processes if processes > 1 else loss
        auxiliary = self._adapter.auxiliary_loss(self.model)
        if auxiliary is None:
            return loss
        return loss + auxiliary / self.current_gradient_accumulation_steps

    def training_step(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run one forward and backward pass and return its loss.

        Raises:
            FloatingPointError: the loss of any process is not finite.
        """
        if self._capture is not None:
            passes = self._passes or self._record_passes(model, self._capture)
            count = torch.as_tensor(num_items_in_batch)
            loss = passes.run(self._prepare_inputs(inputs), count)
            if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
                passes.flat.average(self.accelerator.num_processes)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        step = self.state.global_step + self._skipped + 1
        self._finite.add(step, self.accelerator.gather(loss))
        return loss

    def _record_passes(self, model: Any, capture: Capture) -> GraphedPasses:
        """Record the passes of all shapes, when the Trainer has put its wrapper around the model.

        A wrapper may give the parameters other gradients.
        """
        model.train()
        trained = Trained(
            self.model,
            self._adapter.base(self.model),
            self.args.device,
            self._anchors,
            partial(self._loss_of, self.model),
        )
        assert self._flat is not None
        passes = self._passes_before
        if passes is None:
            passes = GraphedPasses(trained, capture, self._flat)
        else:
            passes.go_on(trained)
        self._passes, self._passes_before = passes, None
        self._graph_resources.enter_context(self._flat.attached(model))
        dataset: Any = self.train_dataset

        def examples() -> Iterator[Batch]:
            for example in reversed(capture.shapes.examples):  # the longest first
                batch = self.data_collator([dataset[row] for row in example])
                yield self._prepare_inputs(batch)

        passes.prepare(examples)
        return passes

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the gradients, all at once if they are flat; called by the Trainer."""
        if self._flat is None:
            return super()._clip_grad_norm(model)
        return self._flat.clip(self.args.max_grad_norm)


def unshard_parameters(model: PreTrainedModel) -> None:
    """Gather sharded trainable parameters (FSDP), so that every process holds them unsharded."""
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad and isinstance(parameter, DTensor):
            replace_tensor(model, name, parameter.full_tensor())


def newest_intact_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint in `folder` whose files are all unchanged; None if none is.

    A damaged checkpoint is logged and moved aside. It may lack the state of the optimizer, and a
    training resumed from it would silently differ.
    """
    names = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    # A checkpoint that was moved aside ends with digits, too.
    checkpoints = {int(name): path for name, path in names.items() if name.isdigit()}
    for step in sorted(checkpoints, reverse=True):
        if (flaw := flaw_of(checkpoints[step])) is None:
            return checkpoints[step]
        if is_first():
            aside = set_aside(checkpoints[step])
            log.warning(
                "train: checkpoint %s is not whole: %s; moved to %s",
                *(checkpoints[step], flaw, aside.name),
            )
    return None
