"""How much each unit of a model matters to the loss of the calibration answers.

A vector with one number for each unit stands in the way of the module's layers, and its gradient is
the score. It changes nothing in the forward pass. No weight needs a gradient of its own: what comes
in and what goes out of a layer is at hand where the backward pass reaches it, so the gradient of a
weight exists for the moment, and that of no two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from emloc.calibration.blockwise import Batch, accepts_use_cache
from emloc.emulators.prune.units import Units
from emloc.errors import ConfigError
from emloc.models.objectives import Loss, Objective
from emloc.runtime.progress import tracked
from emloc.tensors.lean.model import recompute_layers
from emloc.tensors.nn.attention import without_cudnn

KINDS = ("upop", "taylor")

# Tokens whose products are formed at one time.
PIECE = 2048


def importance(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    units: Mapping[str, Units],
    kind: str,
    objective: Objective,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Module name -> a score for each unit (count,), the higher the longer it is kept; on the CPU.

    With L the mean loss of all that is learnt, as answer tokens or rows:

    * `upop`: minus dL/d(mask), the mask being 1 on each unit's activations, signed (UPop, which
      prunes the largest gradient first).
    * `taylor`: |w dL/dw| summed over the unit's weights (LLM-Pruner, first order), biases not
      counted. Gradients are summed within a batch and their magnitudes over batches; LLM-Pruner has
      one batch.

    Sums are in float32, or in the model's dtype where that is wider.

    Args:
        model: any whose linears have their weight when they are run; in eval mode, or as
            `recompute_blocks` leaves it.
        batches: keyword arguments of its forward, and the targets.
        units: of the modules to score.
        kind: upop | taylor.
        objective: of the model. What it draws at random is the same at every call.
        loss: its leaner one, if `model` was made ready for it.

    Raises:
        ConfigError: a module is reached by no sample, or a gradient is not finite.
    """
    leaves: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []
    for name, one in units.items():
        weight = model.get_submodule(one.layers[0]).get_parameter("weight")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        leaf = torch.ones(one.count, dtype=dtype, device=weight.device, requires_grad=True)
        handles += _mask(model, one, leaf) if kind == "upop" else _weigh(model, one, leaf)
        leaves[name] = leaf
    items = sum(int(objective.items(dict(batch))) for batch in batches)
    still = {"use_cache": False} if accepts_use_cache(model) else {}
    loss = loss or objective.plain_loss
    # By all items, gradients in float16 would underflow.
    one_item = torch.ones((), device=model.device)
    gpus = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus), without_cudnn():
            torch.manual_seed(0)
            for batch in tracked(batches, "emulate", len(batches), "batch"):
                moved = {key: value.to(model.device) for key, value in batch.items()} | still
                loss(model, moved, one_item).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    sign = -1 if kind == "upop" else 1
    return {name: sign * _gradient(name, leaf) / items for name, leaf in leaves.items()}


def recompute_blocks(model: PreTrainedModel) -> None:
    """Hold the activations of one block at a time while gradients are taken. Dropout stays off."""
    recompute_layers(model.eval())
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True  # taken off again, since nothing in it is trained
            module.training = True  # a block is recomputed in training only; what it holds is not


def _gradient(name: str, leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise ConfigError(
            f"{name}: no calibration sample runs through it, so that its units have no score; "
            "set emulator.importance=random, or model.emulator_targets without it"
        )
    if not leaf.grad.isfinite().all():
        raise ConfigError(
            f"{name}: gradients of the calibration loss are not finite; set model.dtype=bfloat16, "
            "or emulator.importance=random"
        )
    return leaf.grad.cpu()


def _mask(model: nn.Module, units: Units, leaf: Tensor) -> Iterator[RemovableHandle]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return UnitMask.apply(args[0], leaf)  # type: ignore[no-untyped-call]

    for layer in units.columns:
        yield model.get_submodule(layer).register_forward_pre_hook(hook)


def _weigh(model: nn.Module, units: Units, leaf: Tensor) -> Iterator[RemovableHandle]:
    def hook(dim: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def weighed(linear: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x, weight = args[0].detach(), linear.get_parameter("weight").detach()
            return UnitImportance.apply(y, leaf, x, weight, dim)  # type: ignore[no-untyped-call]

        return weighed

    for dim, layers in enumerate((units.rows, units.columns)):
        for layer in layers:
            yield model.get_submodule(layer).register_forward_hook(hook(dim))


class UnitMask(torch.autograd.Function):
    """x (..., units * size) times a mask of ones (units,), which has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        """x as it is."""
        ctx.save_for_backward(x)
        ctx.mask = mask
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of x, and the sum of x dL/dx over tokens and the features of a unit."""
        (x,), (dy,) = ctx.saved_tensors, grads
        total = x.new_zeros(x.shape[-1], dtype=ctx.mask.dtype)
        for left, right in _pieces(total.dtype, x, dy):
            total += (left * right).sum(0)
        return dy, total.view(len(ctx.mask), -1).sum(1)


class UnitImportance(torch.autograd.Function):
    """y (..., m) = x W^T with a vector (units,) whose gradient is the importance of W's units.

    `dim`: 0 if they are rows of W (m, n), 1 if they are columns.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, scores: Tensor, x: Tensor, weight: Tensor, dim: int) -> Tensor:
        """y as it is."""
        ctx.save_for_backward(x, weight)
        ctx.scores, ctx.dim = scores, dim
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """The gradient of y, and the sum of |W dL/dW| over the weights of each unit."""
        (x, weight), (dy,) = ctx.saved_tensors, grads
        total = torch.zeros_like(weight, dtype=ctx.scores.dtype)
        for left, right in _pieces(total.dtype, dy, x):
            total.addmm_(left.T, right)
        total = total.mul_(weight).abs_().sum(1 - ctx.dim)
        return dy, total.view(len(ctx.scores), -1).sum(1), None, None, None


def _pieces(dtype: torch.dtype, left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens of both, (some, features), few at a time and widened."""
    parts = [torch.split(one.reshape(-1, one.shape[-1]), PIECE) for one in (left, right)]
    for some, others in zip(*parts, strict=True):
        yield some.to(dtype), others.to(dtype)
