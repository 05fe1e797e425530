"""Gradients of all trained parameters as views of a few flat tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class FlatGradients:
    """Gradients that stay at one address, and are zeroed, scaled and averaged all at once.

    There is one flat tensor for each dtype and device of the parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in parameters:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        self.flat: list[Tensor] = []
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        for (dtype, device), some in groups.items():
            flat = torch.zeros(sum(p.numel() for p in some), dtype=dtype, device=device)
            self.flat.append(flat)
            pieces = torch.split(flat, [p.numel() for p in some])
            self._views += [(p, piece.view_as(p)) for p, piece in zip(some, pieces, strict=True)]

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Let the parameters have these gradients, and `model.zero_grad` keep them, for a while."""
        self.attach()

        def zero_grad(set_to_none: bool = True) -> None:
            self.zero()

        model.__dict__["zero_grad"] = zero_grad
        try:
            yield
        finally:
            del model.__dict__["zero_grad"]
            for parameter, _ in self._views:
                parameter.grad = None

    def attach(self) -> None:
        """Let the parameters have these gradients, set to zero, unless they have them already."""
        if all(parameter.grad is view for parameter, view in self._views[:1]):
            return
        self.zero()
        for parameter, view in self._views:
            parameter.grad = view

    def zero(self) -> None:
        """Set all gradients to zero."""
        torch._foreach_zero_(self.flat)

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        """Scale the gradients down to a norm of at most `limit`; return the norm before, a scalar.

        The factor is that of `torch.nn.utils.clip_grad_norm_`.
        """
        norms = [flat.norm().float() for flat in self.flat]
        norm = torch.stack([one.to(norms[0].device) for one in norms]).norm()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for flat in self.flat:
            flat.mul_(factor.to(flat.device))
        return norm

    def average(self, processes: int) -> None:
        """Average the gradients over all processes."""
        for flat in self.flat:
            torch.distributed.all_reduce(flat)
            flat.div_(processes)
