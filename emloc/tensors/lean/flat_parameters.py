"""Trained parameters and their gradients as views of a few flat tensors.

An adapter has hundreds of small parameters. To update, clip and zero each on its own takes the host
longer than the GPU. An optimizer that treats all numbers alike, such as AdamW, can update the flat
tensors instead, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class FlatParameters:
    """Parameters whose numbers and gradients stay at one address, and change all at once.

    There is one flat tensor for each group, dtype and device of the parameters.

    Args:
        groups: the parameters of each group of an optimizer.
    """

    def __init__(self, groups: Iterable[Iterable[nn.Parameter]]) -> None:
        self._groups = [list(group) for group in groups]
        self._flats = [[_Flat(some) for some in _alike(group)] for group in self._groups]

    @property
    def gradients(self) -> list[Tensor]:
        """The flat gradients."""
        return [flat.gradient for flat in self._all]

    @property
    def _all(self) -> list[_Flat]:
        return [*chain.from_iterable(self._flats)]

    def hand_to(self, optimizer: Optimizer) -> None:
        """Let an optimizer of the same groups, which has no state yet, update the flat tensors.

        What it saves and loads has a state for each parameter, as if it updated them one by one.
        """
        for group, flats in zip(optimizer.param_groups, self._flats, strict=True):
            group["params"] = [flat.parameter for flat in flats]
        optimizer.register_state_dict_post_hook(lambda _, state: self._split(state))
        optimizer.register_load_state_dict_pre_hook(lambda _, state: self._join(state))

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
            for flat in self._all:
                flat.detach()

    def attach(self) -> None:
        """Let the parameters have these gradients, set to zero, unless they have them already."""
        if not all(flat.is_attached for flat in self._all):
            self.zero()
            for flat in self._all:
                flat.attach()

    def zero(self) -> None:
        """Set all gradients to zero."""
        torch._foreach_zero_(self.gradients)

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        """Scale the gradients down to a norm of at most `limit`; return the norm before, a scalar.

        The factor is that of `torch.nn.utils.clip_grad_norm_`.
        """
        norms = [gradient.norm().float() for gradient in self.gradients]
        norm = torch.stack([one.to(norms[0].device) for one in norms]).norm()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in self.gradients:
            gradient.mul_(factor.to(gradient.device))
        return norm

    def average(self, processes: int) -> None:
        """Average the gradients over all processes."""
        for gradient in self.gradients:
            torch.distributed.all_reduce(gradient)
            gradient.div_(processes)

    def _split(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the state of an optimizer of the flat tensors as one of the parameters."""
        states, groups, first = {}, [], 0
        for group, parameters, flats in zip(
            state_dict["param_groups"], self._groups, self._flats, strict=True
        ):
            numbers = {id(parameter): number for number, parameter in enumerate(parameters, first)}
            for index, flat in zip(group["params"], flats, strict=True):
                for parameter, state in flat.split(state_dict["state"].get(index, {})):
                    states[numbers[id(parameter)]] = state
            groups.append(group | {"params": [*numbers.values()]})
            first += len(parameters)
        return state_dict | {"state": states, "param_groups": groups}

    def _join(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the state of an optimizer of the parameters as one of the flat tensors."""
        states, groups, first = {}, [], 0
        for group, parameters, flats in zip(
            state_dict["param_groups"], self._groups, self._flats, strict=True
        ):
            of_parameter = {
                id(parameter): state_dict["state"].get(number, {})
                for parameter, number in zip(parameters, group["params"], strict=True)
            }
            indices = [*range(first, first + len(flats))]
            for index, flat in zip(indices, flats, strict=True):
                if state := flat.join([of_parameter[id(p)] for p in flat.parameters]):
                    states[index] = state
            groups.append(group | {"params": indices})
            first += len(flats)
        return state_dict | {"state": states, "param_groups": groups}


class _Flat:
    """Parameters of one dtype and device as views of one parameter."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self._sizes = [parameter.numel() for parameter in parameters]
        with torch.no_grad():
            self.parameter = nn.Parameter(torch.cat([p.flatten() for p in parameters]))
        self.gradient = torch.zeros_like(self.parameter)
        self._gradients = self._pieces(self.gradient)
        for parameter, piece in zip(parameters, self._pieces(self.parameter.data), strict=True):
            parameter.data = piece

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        """Return a view of a flat tensor for each parameter, in its shape."""
        pieces = torch.split(flat, self._sizes)
        return [piece.view_as(p) for p, piece in zip(self.parameters, pieces, strict=True)]

    @property
    def is_attached(self) -> bool:
        """Whether the parameters have these gradients."""
        return self.parameters[0].grad is self._gradients[0]

    def attach(self) -> None:
        """Let the parameters have these gradients."""
        self.parameter.grad = self.gradient
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def detach(self) -> None:
        """Let the parameters have no gradients."""
        for parameter in (self.parameter, *self.parameters):
            parameter.grad = None

    def split(self, state: dict[str, Any]) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        """Yield each parameter with its part of an optimizer's state of all, if there is one."""
        if not state:
            return
        parts = {
            name: (
                self._pieces(value)
                if _is_flat(value, self.parameter)
                else [deepcopy(value) for _ in self.parameters]  # each counts its own steps
            )
            for name, value in state.items()
        }
        for index, parameter in enumerate(self.parameters):
            yield parameter, {name: values[index] for name, values in parts.items()}

    def join(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return an optimizer's state of all parameters, from that of each."""
        return {
            name: (
                torch.cat([state[name].flatten() for state in states])
                if _is_flat(value, self.parameters[0])
                else value
            )
            for name, value in states[0].items()
        }


def _is_flat(value: Any, like: Tensor) -> bool:
    """Return whether a value of an optimizer's state has a number for each one of a tensor."""
    return isinstance(value, Tensor) and value.shape == like.shape


def _alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the parameters of each dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    return [*groups.values()]
