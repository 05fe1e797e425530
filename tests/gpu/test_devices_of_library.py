"""The library's calls with the emulator on the GPU, and the original there or in host memory."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer

import emloc

CUDA = torch.device("cuda", 0)
BFLOAT16 = torch.bfloat16

pytestmark = pytest.mark.gpu


def trained_on(emulator, steps=5):
    torch.manual_seed(0)
    ids = torch.randint(5, 200, (4, 12), device=CUDA)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    tuned = get_peft_model(emulator, config, adapter_name="mine")
    optimizer = torch.optim.AdamW([one for one in tuned.parameters() if one.requires_grad], lr=0.01)
    for _ in range(steps):
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuned


@pytest.mark.parametrize("metric", ["identity", "covariance"])
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_the_original_may_wait_in_host_memory_while_the_emulator_trains(place, metric):
    torch.manual_seed(0)
    model = tiny_llama(tiny_tokenizer(chat=False)).to(CUDA)
    batches = [{"input_ids": torch.randint(5, 200, (6, 12))}]
    emulator = emloc.build_emulator(model, batches, ratio=0.5)
    before = copy.deepcopy(model).cpu().state_dict()
    model.to(place)
    assert {weight.device.type for weight in emulator.parameters()} == {"cuda"}
    tuned = trained_on(emulator)
    samples = batches if metric == "covariance" else None
    corrected = emloc.correct(tuned, model, emulator, metric=metric, batches=samples)
    expected = emloc.correct(tuned, model.cpu(), emulator.cpu(), metric=metric, batches=samples)
    assert corrected.pairs.keys() == expected.pairs.keys()
    for name, pair in corrected.pairs.items():
        torch.testing.assert_close(pair.b, expected.pairs[name].b, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(model.state_dict()[name], one) for name, one in before.items())


def test_casting_and_moving_the_emulator_leaves_the_original_on_the_gpu():
    model = tiny_llama(tiny_tokenizer(chat=False)).to(CUDA)
    emulator = emloc.build_emulator(model, [{"input_ids": torch.arange(5, 17)[None]}], ratio=0.5)
    emulator.to("cpu", BFLOAT16)
    assert {weight.dtype for weight in emulator.parameters()} == {BFLOAT16}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert {weight.device for weight in model.parameters()} == {CUDA}


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_anchors_run_the_original_from_host_memory(place):
    """The adapter is on the GPU, and a loop moves each batch there as it always does."""
    model = tiny_llama(tiny_tokenizer(chat=False)).to(CUDA)
    rows = [{"input_ids": ids} for ids in torch.randint(5, 200, (8, 12))]
    tuned = trained_on(emloc.build_emulator(model, [{"input_ids": torch.arange(5, 17)[None]}], 0.5))
    model.to(place)

    def collate(some):
        ids = torch.stack([row["input_ids"] for row in some])
        return {"input_ids": ids, "labels": ids}

    with emloc.anchor(model, tuned, rows, collate, dtype="float32") as anchors:
        assert {weight.device.type for weight in model.parameters()} == {place}
        settings = {"sampler": anchors.sampler, "collate_fn": anchors.collate}
        loader = torch.utils.data.DataLoader(rows, 2, pin_memory=True, **settings)
        losses = []
        for batch in loader:
            moved = {name: value.to(CUDA) for name, value in batch.items()}
            loss = tuned(**moved).loss
            loss.backward()
            losses.append(float(loss))
    assert sum(losses) / len(losses) == pytest.approx(anchors.loss, rel=1e-4)
