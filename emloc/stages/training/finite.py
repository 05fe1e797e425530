"""Stop a training at the first loss that is not finite, without waiting for each loss."""

from __future__ import annotations

import torch
from torch import Tensor


class FiniteLosses:
    """Checks the loss of each step when the next step has been launched, or when it is asked to.

    A GPU computes a step while the host launches the next one. The host would wait for the GPU if
    it read the loss of a step at once.
    """

    def __init__(self) -> None:
        self._waiting: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def add(self, step: int, losses: Tensor) -> None:
        """Check the losses of the step before, and take those of a step.

        Raises:
            FloatingPointError: a loss of the step before is not finite.
        """
        host, copied = losses, None
        if losses.is_cuda:
            host = torch.empty_like(losses, device="cpu", pin_memory=True)
            host.copy_(losses, non_blocking=True)
            copied = torch.cuda.current_stream().record_event()
        waiting, self._waiting = self._waiting, (step, host, copied)
        _check(waiting)
        if not losses.is_cuda:  # there is nothing to wait for
            self.check()

    def check(self) -> None:
        """Check the losses that are not checked yet.

        Raises:
            FloatingPointError: one is not finite.
        """
        waiting, self._waiting = self._waiting, None
        _check(waiting)


def _check(waiting: tuple[int, Tensor, torch.cuda.Event | None] | None) -> None:
    if waiting is None:
        return
    step, losses, copied = waiting
    if copied is not None:
        copied.synchronize()
    if not torch.isfinite(losses).all():
        raise FloatingPointError(
            f"the loss is {losses.mean().item()} at step {step}; set train.learning_rate lower"
        )
