"""Importance scores of a model's units, from gradients of the loss on the calibration answers.

Hooks add a vector with one entry per unit to each module. The vector does not change the forward
pass; its gradient is the score. Weights stay frozen: the backward pass computes the gradient of one
weight at a time, from the layer's input and output gradient, and drops it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from emloc.calibration.blockwise import Batch
from emloc.emulators.prune.units import Units
from emloc.errors import ConfigError
from emloc.models.objectives import Loss, Objective
from emloc.runtime.progress import tracked
from emloc.tensors.lean.model import recompute_layers
from emloc.tensors.nn.attention import without_cudnn
from emloc.tensors.nn.forward import accepts_use_cache

KINDS = ("upop", "taylor")

# Number of tokens that are multiplied at once.
PIECE = 2048


def importance(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    units: Mapping[str, Units],
    kind: str,
    objective: Objective,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Module name -> importance score of each unit (count,), on the CPU; higher scores are kept.

    With L the mean loss over all items of the objective, such as answer tokens or rows:

    * `upop`: minus dL/d(mask), signed, with a mask of ones on each unit's activations (UPop, which
      prunes the largest gradient first).
    * `taylor`: |w dL/dw| summed over the unit's weights without biases (LLM-Pruner, first order).
      Gradients are summed within a batch, and their magnitudes over batches; LLM-Pruner has one
      batch.

    Sums are in float32, or in the model's dtype if that is wider.

    Args:
        model: its linears have their weight when they run; in eval mode, or as
            `recompute_blocks` leaves it.
        batches: keyword arguments of the model's forward, and the targets.
        units: module name -> units to score.
        kind: upop | taylor.
        objective: the model's objective. Its random numbers are the same at every call.
        loss: the objective's memory-saving loss, if the model was prepared for it.

    Raises:
        ConfigError: no sample reaches a module, or a gradient is not finite.
    """
    leaves: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []
    for name, group in units.items():
        weight = model.get_submodule(group.layers[0]).get_parameter("weight")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        leaf = torch.ones(group.count, dtype=dtype, device=weight.device, requires_grad=True)
        hook = _hook_masks if kind == "upop" else _hook_importance
        handles += hook(model, group, leaf)
        leaves[name] = leaf
    items = sum(int(objective.items(dict(batch))) for batch in batches)
    no_cache = {"use_cache": False} if accepts_use_cache(model) else {}
    loss = loss or objective.plain_loss
    # The loss is summed, not averaged over all items: float16 gradients of a mean would underflow.
    one_item = torch.ones((), device=model.device)
    gpus = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus), without_cudnn():
            torch.manual_seed(0)
            for batch in tracked(batches, "emulate", len(batches), "batch"):
                moved = {key: value.to(model.device) for key, value in batch.items()} | no_cache
                loss(model, moved, one_item).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    sign = -1 if kind == "upop" else 1
    return {name: sign * _gradient(name, leaf) / items for name, leaf in leaves.items()}


def recompute_blocks(model: PreTrainedModel) -> None:
    """Enable activation checkpointing of every block, with dropout off."""
    recompute_layers(model.eval())
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            # `recompute_layers` disables checkpointing below the first trained layer; here no
            # layer is trained.
            module.gradient_checkpointing = True
            # A block is recomputed only in training mode. Its submodules stay in eval mode, so
            # dropout stays off.
            module.training = True


def _gradient(name: str, leaf: Tensor) -> Tensor:
    """The gradient of a module's vector, on the CPU; ConfigError if it is missing or not finite."""
    if leaf.grad is None:
        raise ConfigError(
            f"{name}: no calibration sample runs through it, so its units have no score; "
            "set emulator.importance=random, or model.emulator_targets without it"
        )
    if not leaf.grad.isfinite().all():
        raise ConfigError(
            f"{name}: gradients of the calibration loss are not finite; set model.dtype=bfloat16, "
            "or emulator.importance=random"
        )
    return leaf.grad.cpu()


def _hook_masks(model: nn.Module, units: Units, leaf: Tensor) -> Iterator[RemovableHandle]:
    """Multiply the inputs of layers that read the units by `leaf`, a mask of ones (count,)."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return UnitMask.apply(args[0], leaf)  # type: ignore[no-untyped-call]

    for layer in units.columns:
        yield model.get_submodule(layer).register_forward_pre_hook(hook)


def _hook_importance(model: nn.Module, units: Units, leaf: Tensor) -> Iterator[RemovableHandle]:
    """Make the backward pass add each weight's importance to the gradient of `leaf` (count,)."""

    def hook(dim: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def with_importance(linear: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x, weight = args[0].detach(), linear.get_parameter("weight").detach()
            return UnitImportance.apply(y, leaf, x, weight, dim)  # type: ignore[no-untyped-call]

        return with_importance

    for dim, layers in enumerate((units.rows, units.columns)):
        for layer in layers:
            yield model.get_submodule(layer).register_forward_hook(hook(dim))


class UnitMask(torch.autograd.Function):
    """Multiplies x (..., units * size) by a mask of ones (units,) to get the mask's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        """Return x unchanged, since the mask is all ones."""
        ctx.save_for_backward(x)
        ctx.mask = mask
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the mask: x dL/dx, summed over tokens and features of a unit."""
        (x,), (dy,) = ctx.saved_tensors, grads
        total = x.new_zeros(x.shape[-1], dtype=ctx.mask.dtype)
        for left, right in _pieces(total.dtype, x, dy):
            total += (left * right).sum(0)
        return dy, total.view(len(ctx.mask), -1).sum(1)


class UnitImportance(torch.autograd.Function):
    """Returns y (..., m) = x W^T; the gradient of `scores` (units,) is the units' importance.

    The units are rows of W (m, n) if `dim` is 0, columns if it is 1.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, scores: Tensor, x: Tensor, weight: Tensor, dim: int) -> Tensor:
        """Return y unchanged."""
        ctx.save_for_backward(x, weight)
        ctx.scores, ctx.dim = scores, dim
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Gradients of y and of the scores: |W dL/dW|, summed over the weights of each unit."""
        (x, weight), (dy,) = ctx.saved_tensors, grads
        total = torch.zeros_like(weight, dtype=ctx.scores.dtype)
        for left, right in _pieces(total.dtype, dy, x):
            total.addmm_(left.T, right)
        total = total.mul_(weight).abs_().sum(1 - ctx.dim)
        return dy, total.view(len(ctx.scores), -1).sum(1), None, None, None


def _pieces(dtype: torch.dtype, left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both tensors as matrices (tokens, features) of at most `PIECE` tokens, in `dtype`."""
    pieces = [torch.split(x.reshape(-1, x.shape[-1]), PIECE) for x in (left, right)]
    for left_piece, right_piece in zip(*pieces, strict=True):
        yield left_piece.to(dtype), right_piece.to(dtype)
