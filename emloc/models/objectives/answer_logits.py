"""Logits of a forward pass, computed for a few tokens at a time, at the tokens that are scored.

The logits of all tokens are the largest tensor of a forward pass: 64 tokens of a vocabulary of
150000 take as much memory as the hidden states of 10000 tokens of 896 features.

The pass runs the model's body, which is the model without its output head, and keeps the input of
the head. The logits of some tokens are the product with the head's weight, and whatever the model
does to its logits behind the head (a scale, a cap). For the latter the model's own forward runs
again, with stand-ins for body and head that compute nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from emloc.models.objectives import Batch
from emloc.models.objectives.output_head import IdentityHead, name_of_head
from emloc.tensors.nn.forward import accepts_use_cache, unwrap
from emloc.tensors.nn.near import is_near

# Tokens whose logits show that a model computes the logits of each token by themselves.
TRIAL_TOKENS = 8
# What a model raises that expects the logits of all tokens.
SHAPE_ERRORS = (RuntimeError, ValueError, IndexError)


@dataclass(frozen=True)
class Logits:
    """Logits (B, L, V) of a forward pass.

    `at(rows, positions)`: the logits (N, V) of tokens, by their indices (N,) in the batch.
    """

    shape: torch.Size  # (B, L)
    vocabulary: int
    at: Callable[[Tensor, Tensor], Tensor]


def without_labels(batch: Batch) -> Batch:
    """The batch without its labels, so that the model computes no loss of its own."""
    return {name: value for name, value in batch.items() if name != "labels"}


def forward_logits(model: Any, batch: Batch) -> Logits | None:
    """Run the model without gradients and return its logits; None if its output has no logits.

    The model does not get the labels of the batch. The logits of all tokens are computed at once
    if the model has an unusual head, or if the logits of a token depend on other tokens' logits.
    The model's body runs once in any case.
    """
    inner, inputs = unwrap(model), without_labels(batch)
    if "use_cache" not in inputs and accepts_use_cache(inner):
        inputs = inputs | {"use_cache": False}  # nothing is generated from these keys and values
    parts = _body_and_head(inner)
    if parts is None:
        return _whole(model(**inputs))
    forward = _Pass(model, inner, *parts, inputs)
    outputs = forward.run()
    if forward.hidden is None:  # the model does not call its head
        return _whole(outputs)
    if not forward.is_tokenwise(outputs):
        return _whole(forward.outputs_of_all())
    return Logits(forward.hidden.shape[:2], outputs.logits.shape[-1], forward.logits_at)


def _whole(outputs: Any) -> Logits | None:
    """Logits that the model has computed for all tokens."""
    logits = getattr(outputs, "logits", None)
    if logits is None:
        return None
    return Logits(logits.shape[:2], logits.shape[-1], lambda *indices: logits[indices])


def _body_and_head(model: Any) -> tuple[nn.Module, nn.Module] | None:
    """The two parts of a model that has no other weights; None if it is built differently."""
    if not isinstance(model, PreTrainedModel):
        return None
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        return None
    if head._forward_hooks:  # a hook on logits expects those of all tokens
        return None
    # OPT calls its decoder. Models with images call the body around tower and decoder.
    for body in (model.get_decoder(), model.base_model):
        inside = {id(parameter) for part in (body, head) for parameter in part.parameters()}
        if body is not model and all(id(parameter) in inside for parameter in model.parameters()):
            return body, head
    return None


class _Pass:
    """One forward pass whose logits are computed later.

    `hidden` (B, L, d): the input of the head, once the pass has run; L is the number of positions
    that the batch asks logits of.
    """

    def __init__(
        self, model: Any, inner: PreTrainedModel, body: nn.Module, head: nn.Module, inputs: Batch
    ) -> None:
        self.hidden: Tensor | None = None
        self._model, self._inner, self._body, self._head = model, inner, body, head
        self._head_name = name_of_head(inner, head)
        self._inputs = inputs
        self._body_output: Any = None
        self._trial: Tensor | None = None  # (1, T, V), as the head returned them

    def run(self) -> Any:
        """Run the model; the output has the logits (1, T, V) of the last few tokens only."""
        with ExitStack() as stack:

            def run_body(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                # Other passes may run while this one is suspended in the body, so the head is
                # replaced no earlier than now.
                self._body_output = own(*args, **kwargs)
                stack.enter_context(_replaced_once(self._head, self._run_head))
                return self._body_output

            stack.enter_context(_replaced_once(self._body, run_body))
            try:
                return self._model(**self._inputs)
            except SHAPE_ERRORS:
                if self.hidden is None:
                    raise
                return None  # what follows the head needs all tokens

    def _run_head(self, own: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Keep the input of the head and return the logits of the last few tokens."""
        if kwargs or len(args) != 1 or args[0].ndim != 3:
            return own(*args, **kwargs)
        self.hidden = args[0]
        logits = own(self.hidden.flatten(0, 1)[-TRIAL_TOKENS:][None])
        self._trial = logits.clone()
        return logits

    def is_tokenwise(self, outputs: Any) -> bool:
        """Whether the logits of the last few tokens are the same, put in a row or in a column."""
        logits = getattr(outputs, "logits", None)
        assert self._trial is not None
        if logits is None or logits.shape != self._trial.shape:
            return False
        try:
            column = self._finish(self._trial.transpose(0, 1))
        except SHAPE_ERRORS:
            return False
        if column.shape != (logits.shape[1], 1, logits.shape[2]):
            return False
        return is_near(column[:, 0], logits[0])

    def logits_at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Logits (N, V) of the tokens at some indices (N,)."""
        assert self.hidden is not None
        # Without the hooks of the head, which have run in the forward pass.
        return self._finish(self._head.forward(self.hidden[rows, positions][None]))[0]

    def outputs_of_all(self) -> Any:
        """Output of the model with the logits of all tokens."""
        assert self.hidden is not None
        logits = self._head.forward(self.hidden)
        return self._call_behind_head(self._body_output, logits, self._inputs)

    def _finish(self, logits: Tensor) -> Tensor:
        """Do to logits (B, L, V) of the head what the model does to them."""
        assert self.hidden is not None
        states = self.hidden.new_zeros(*logits.shape[:2], self.hidden.shape[-1])
        output = _with_hidden(self._body_output, states)
        inputs = {key: value for key, value in self._inputs.items() if key != "logits_to_keep"}
        finished: Tensor = self._call_behind_head(output, logits, inputs).logits
        return finished

    def _call_behind_head(self, body_output: Any, logits: Tensor, inputs: Batch) -> Any:
        """Call the model with the outputs that its body and its head have."""
        identity = IdentityHead(self._head.weight)  # type: ignore[arg-type]
        identity.logits = logits
        self._inner.set_submodule(self._head_name, identity)
        try:
            with _replaced_once(self._body, lambda *_, **__: body_output):
                return self._model(**inputs)
        finally:
            self._inner.set_submodule(self._head_name, self._head)


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """The output of a model's body with other hidden states of the last block."""
    if not isinstance(output, ModelOutput):
        return (hidden, *output[1:])
    return type(output)(**{n: hidden if n == "last_hidden_state" else v for n, v in output.items()})


@contextmanager
def _replaced_once(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let the next call of `module` run `forward`; its first argument is the module's own forward.

    The module has its own forward again as soon as `forward` begins, so that another pass may begin
    while this one is suspended.
    """
    own, stored = module.forward, vars(module).get("forward")

    def once(*args: Any, **kwargs: Any) -> Any:
        restore()
        return forward(own, *args, **kwargs)

    def restore() -> None:
        if vars(module).get("forward") is not once:
            return
        if stored is None:
            del module.forward
        else:
            module.forward = stored

    module.forward = once
    try:
        yield
    finally:
        restore()
