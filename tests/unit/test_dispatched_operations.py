"""The host dispatches few operations in a training step, since a small step waits for them."""

from types import SimpleNamespace

import pytest
from test_lean import adapted, batch, factorised, nf4, nf4_factorised, unchanged

from emloc.adapters.lora import Lora
from emloc.cost.plan.trace import trace
from emloc.models.objectives.tokens import Tokens
from emloc.stages.training.lean_setup import prepare_model

# Operations of the forward and the backward pass of a Llama with two blocks and a LoRA on each of
# their layers, without and with recomputed blocks. These numbers may only fall. Write the new
# number here where a change lets one fall.
OPERATIONS = {
    unchanged: (446, 633),
    factorised: (437, 604),
    nf4: (671, 984),
    nf4_factorised: (1166, 1717),
}
# Share by which a count may be below its number until the number has to be updated.
SLACK = 0.02


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", OPERATIONS)
def test_a_step_dispatches_no_more_operations_than_before(kind, checkpointing):
    model, objective = adapted(kind, lora_alpha=8).train(), Tokens()
    recipe = SimpleNamespace(checkpointing=checkpointing, host_activations=False, capture=False)
    fused, loss, _ = prepare_model(model, Lora(), recipe, objective)
    assert fused
    assert loss is not None
    ids, labels = batch()
    rows = {"input_ids": ids, "labels": labels}
    count = objective.items(rows)

    def step():
        loss(model, rows, count).backward()

    step()  # packed formats prepare their layers in the first pass
    model.zero_grad()
    operations, limit = trace(step).operations, OPERATIONS[kind][checkpointing]
    assert operations <= limit, "a step dispatches more operations than before"
    assert operations >= (1 - SLACK) * limit, f"write {operations} for {limit} in OPERATIONS"
