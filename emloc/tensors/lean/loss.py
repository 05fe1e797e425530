"""The loss of the answer tokens alone, without ever holding their logits together.

Shapes: N positions, hidden (N, d), head (V, d) the matrix of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Of the logits of one chunk, in float32.
CHUNK_BYTES = 64 * 2**20


class AnswerLoss(torch.autograd.Function):
    """Sum of the cross-entropies of `labels` under softmax(hidden head^T), over `count`.

    The gradient of `hidden` is formed chunk by chunk in the forward pass, where the logits are at
    hand; the head is frozen. Logits are rounded to the model's dtype and then taken to float32, as
    transformers does.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        """A float32 scalar; labels (N,) are indices of the vocabulary, count a scalar."""
        total = hidden.new_zeros((), dtype=torch.float32)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(1, CHUNK_BYTES // (4 * head.shape[0]))
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            logits = (hidden[rows] @ head.T).float()
            target = labels[rows, None]
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm - logits.gather(-1, target)).sum()
            if slope is not None:
                logits.sub_(norm).exp_()
                logits.scatter_add_(-1, target, torch.full_like(norm, -1.0))
                slope[rows] = logits.div_(count).to(head.dtype) @ head
        if slope is not None:
            ctx.save_for_backward(slope)
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of `hidden`."""
        (slope,) = ctx.saved_tensors
        return (slope.float() * grads[0]).to(slope.dtype), None, None, None
