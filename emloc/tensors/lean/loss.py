"""Chunked cross-entropy of the answer tokens: only one chunk of logits is in memory at a time.

Shapes: N answer tokens, hidden (N, d), head (V, d) the output matrix of a vocabulary of V tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Size of the float32 logits of one chunk.
CHUNK_BYTES = 64 * 2**20


def chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Yield slices of `tokens` whose float32 logits take `CHUNK_BYTES` at most, or one token."""
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    for start in range(0, tokens, size):
        yield slice(start, start + size)


class AnswerLoss(torch.autograd.Function):
    """Sum of the cross-entropies of `labels` under softmax(hidden head^T), divided by `count`.

    The forward pass also computes the gradient of `hidden`, chunk by chunk, while the logits are in
    memory; the head is frozen. As in transformers, logits are rounded to the model's dtype and then
    converted to float32. Tokens that `is_answer` (N,) leaves out have no loss; None: all have one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        count: Tensor,
        is_answer: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a float32 scalar; labels (N,) are token ids, `count` is a scalar."""
        weights = None if is_answer is None else is_answer.float()[:, None]
        labels = labels if is_answer is None else labels.where(is_answer, 0)
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in chunks(len(labels), head.shape[0]):
            logits = (hidden[rows] @ head.T).float()
            target = labels[rows, None]
            norm = logits.logsumexp(-1, keepdim=True)
            losses = norm - logits.gather(-1, target)
            total += (losses if weights is None else losses * weights[rows]).sum()
            if gradient is not None:
                logits.sub_(norm).exp_()
                logits.scatter_add_(-1, target, torch.full_like(norm, -1.0))
                logits.div_(count)
                if weights is not None:
                    logits.mul_(weights[rows])
                gradient[rows] = logits.to(head.dtype) @ head
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of `hidden`, which the forward pass computed; None for the other inputs."""
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * grads[0]).to(gradient.dtype), None, None, None, None
