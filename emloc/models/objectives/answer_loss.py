"""Loss of the answer tokens in chunks, so that the logits of all tokens are never in memory.

The values are those of `Tokens.loss`; only the memory differs (setting `train.lean`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.data.collate import IGNORE
from emloc.data.fixed_shapes import ANSWERS, PREDICTING
from emloc.models.objectives import Batch, Loss
from emloc.models.objectives.answer_logits import without_labels
from emloc.models.objectives.output_head import IdentityHead, name_of_head
from emloc.tensors.lean.loss import AnswerLoss
from emloc.tensors.nn.near import is_near

# A value above every cap on logits in use.
LARGE = 1e3


def install_answer_loss(model: PreTrainedModel) -> Loss | None:
    """Replace the model's output head by `IdentityHead` and return the chunked loss.

    The model then returns hidden states instead of logits. The model is left unchanged and None is
    returned if the chunked loss would differ: if the model does more to its logits than scale them
    (for one, cap them), or if its loss has another term (a router's load balance).
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return None
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return None
    weight = head.weight
    identity = IdentityHead(weight)
    name = name_of_head(model, head)
    model.set_submodule(name, identity)
    if not _only_scales_logits(model, identity):
        model.set_submodule(name, head)
        return None
    return partial(_answer_loss, weight)


def _only_scales_logits(model: PreTrainedModel, head: IdentityHead) -> bool:
    """Whether the model does nothing to its logits but multiply them by a constant.

    A scale may be applied to the hidden states instead, other functions may not. The test logits
    are far larger than real logits, so that a cap would change them.
    """
    weight = head.weight
    logits = torch.linspace(-LARGE, LARGE, len(weight), device=weight.device, dtype=weight.dtype)
    head.logits = logits
    ids = torch.arange(8, device=weight.device)[None]
    with torch.no_grad():
        outputs = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    head.logits = None
    inputs = logits.float()
    scale = (outputs @ inputs) / (inputs @ inputs)
    return is_near(scale * inputs, outputs)


def _answer_loss(weight: Tensor, model: Any, batch: Batch, count: Tensor) -> Tensor:
    """Sum of the answer tokens' cross-entropies over `count`; `weight` (V, d) is the head's."""
    if PREDICTING in batch:
        inputs = {name: value for name, value in batch.items() if name not in (PREDICTING, ANSWERS)}
        hidden, labels = model(**inputs).logits, batch[ANSWERS]
        rows = hidden.flatten(0, 1).index_select(0, batch[PREDICTING])
        is_answer = labels != IGNORE
    else:
        # The hidden state at one position predicts the token at the next position.
        hidden, all_labels = model(**without_labels(batch)).logits[:, :-1], batch["labels"][:, 1:]
        mask = all_labels != IGNORE
        rows, labels, is_answer = hidden[mask], all_labels[mask], None
    count = torch.as_tensor(count, device=hidden.device)
    # Under autocast, accelerate converts the output to float32; the conversion back is exact.
    rows = rows.to(weight.dtype)
    total: Tensor = AnswerLoss.apply(rows, weight, labels, count, is_answer)  # type: ignore[no-untyped-call]
    return total
