"""Exact steps behind the recovery are steps of PEFT on the original, on the rows that follow."""

import pytest
import torch
from composed import compose_cached
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_scheduler

from emloc.config.run_folder import folder_name
from emloc.data.reader import encode_all
from emloc.errors import ConfigError
from emloc.pipeline import run
from emloc.stages import polish
from emloc.stages.polish import next_rows
from emloc.stages.polishing import exact_steps
from emloc.stages.polishing.exact_steps import ExactSteps
from emloc.stages.run_config import build
from emloc.stages.training.order import RowOrder

POLISH = ("polish=exact_steps", "polish.steps=2", "train.learning_rate=0.05")


def adapter_of(artifact):
    return load_file(artifact.folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def polished_rows(monkeypatch):
    """The rows of each polishing."""
    polishings = []

    def note(context, steps):
        polishings.append(next_rows(context, steps))
        return polishings[-1]

    monkeypatch.setattr(polish, "next_rows", note)
    return polishings


@pytest.mark.parametrize("method", ["emloc", "emloc_nf4", "emloc_anchored"])
def test_exact_steps_are_those_of_peft_by_hand(
    run_uncached, tiny, checkpoint, polished_rows, method
):
    lines = []
    overrides = [f"method={method}", *POLISH]
    result = run_uncached(*overrides, report=lambda step, values: lines.append((step, values)))
    run_config = build(compose_cached([*tiny, *overrides]))
    (rows,) = polished_rows
    assert len(rows) == 2 * 4
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    recovered = result.stages["recover"].folder / "adapter"
    model = PeftModel.from_pretrained(model, recovered, is_trainable=True).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.025, weight_decay=0.01)
    scheduler = get_scheduler("cosine", optimizer, 0, 2)
    order = RowOrder([row.length for row in rows], 4, 0).of_steps(0, 2)
    reader, by_hand = run_config.model.open().reader(), []
    for step in (order[:4], order[4:]):
        loss = model(**reader.collate([rows[index] for index in step])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        by_hand.append(loss.item())
    losses = {step: values["loss"] for step, values in lines if "loss" in values}
    assert [losses[6], losses[7]] == pytest.approx(by_hand, abs=1e-3)
    state = model.state_dict()
    for name, tensor in adapter_of(result.recovered).items():
        expected = state[name.replace("lora_A.", "lora_A.default.").replace("_B.", "_B.default.")]
        torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=1e-3)
    facts = result.stages["polish"].facts
    assert facts["trained_rows"] == 8
    assert facts["row_forwards"] == pytest.approx(3 * 8)
    assert facts["weights_read"] > 0
    assert result.recovered == result.stages["polish"]


def test_the_rows_are_those_that_the_training_would_draw_next(run_cached, polished_rows, tiny):
    run_cached("method=lora", *POLISH, "seed=3")
    run_config = build(compose_cached([*tiny, "seed=3"]))
    rows = encode_all(run_config.model.open().reader(), run_config.task.train(), 2048)
    order = RowOrder([row.length for row in rows], 4, 3)
    drawn, ahead = order.of_steps(0, 5), order.of_steps(5, 7)
    assert [row.id for row in polished_rows[0]] == [rows[index].id for index in ahead]
    if order.steps >= 7:
        assert not {*drawn} & {*ahead}


def test_rows_of_the_guard_are_never_trained_on(run_cached, monkeypatch):
    contexts = []
    monkeypatch.setattr(
        polish, "next_rows", lambda *given: contexts.append(given) or next_rows(*given)
    )
    run_cached("method=emloc_anchored", *POLISH, "anchor.guard=4", "polish.steps=20")
    ((context, steps),) = contexts
    guard = {keyed.key for keyed in context.anchored_rows.guard}
    assert guard
    assert not guard & {row.key for row in next_rows(context, steps)}


def test_a_killed_polishing_goes_on_from_its_checkpoint(tiny, store, monkeypatch):
    overrides = [*tiny, "method=emloc", *POLISH, "polish.steps=4", "train.save_every=1"]

    def stop(step, _):
        if step == 5 + 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(build(compose_cached(overrides)), store, stop)
    steps = []
    run(build(compose_cached(overrides)), store, lambda step, values: steps.append(step))
    assert 5 + 1 not in steps
    assert 5 + 4 in steps


def test_without_polishing_nothing_changes(run_cached):
    result = run_cached("method=emloc", "polish=none")
    assert "polish" not in result.stages
    assert result.recovered == result.stages["recover"]
    assert folder_name(compose_cached(["polish=none"])) == folder_name(compose_cached([]))


def test_nothing_is_polished_where_nothing_is_trained(run_cached):
    assert "polish" not in run_cached("method=zero_shot", "polish=exact_steps").stages


def test_polishing_under_fsdp_is_refused(run_uncached, monkeypatch):
    monkeypatch.setattr(exact_steps, "is_sharded", lambda: True)
    with pytest.raises(ConfigError, match=r"launch without FSDP, or set polish=none"):
        run_uncached("method=lora", "polish=exact_steps")


def test_an_adapter_that_needs_a_weight_is_refused(run_uncached):
    with pytest.raises(ConfigError, match=r"adapter=dora .*; set adapter=lora, or polish=none"):
        run_uncached("method=lora", "adapter=dora", "polish=exact_steps")


@pytest.mark.parametrize("setting", ["steps", "rate"])
def test_a_wrong_number_is_refused(setting):
    values = {"steps": 20, "rate": 0.5} | {setting: 0}
    with pytest.raises(ConfigError, match=rf"polish\.{setting} must be .*; set polish\.{setting}="):
        ExactSteps(**values)


def test_a_merged_model_has_the_polished_adapter(run_cached):
    result = run_cached("method=emloc", *POLISH)
    folder = result.recovered.folder / "adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    before = load_file(result.stages["recover"].folder / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == before.keys()
    assert any(not torch.equal(tensors[name], before[name]) for name in tensors)
    for name in ("carried.json", "adapter_config.json"):
        assert (folder / name).exists()
