"""Hidden states that wait in pinned memory, or to be written, are those of the computation.

Run by `make test-gpu`.
"""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from emloc.anchors.write_behind import WriteBehind
from emloc.calibration.blockwise import iterate_blocks
from emloc.calibration.offload import StateLimits
from emloc.models.checkpoint.source import Source

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
SHAPE = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize("looks", [0, 1])
@pytest.mark.parametrize("host_bytes", [None, 30 * 2**20, 0], ids=["memory", "both", "disk"])
def test_passes_that_wait_give_the_outputs_of_whole_passes(host_bytes, looks, tmp_path):
    source = Source(None, "s", "0", torch.bfloat16, AutoModelForCausalLM, SHAPE, seed=0)
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 512, (4, 256 + 64 * i))} for i in range(12)]
    whole, model = source.load(CUDA), source.load(CUDA)
    with torch.no_grad():
        expected = [whole(batch["input_ids"].to(CUDA)).logits for batch in batches]
    outputs = {}

    def call(index):
        def run(inputs):
            outputs[index] = model(**inputs).logits

        return run

    for block in iterate_blocks(
        model,
        batches,
        [f"model.layers.{index}" for index in range(8)],
        CUDA,
        limits=StateLimits(device=4 * 2**20, host=host_bytes),
        folder=tmp_path,
        calls=[call(index) for index in range(len(batches))],
        end=lambda: None,
    ):
        for _ in range(looks):
            block.peek(lambda _: None)
        block.run(lambda _: None)
    assert all(torch.equal(outputs[index], one) for index, one in enumerate(expected))


def test_copies_have_the_values_of_their_time():
    tensor, copies = torch.zeros(2**22, device=CUDA), []

    def keep(copy):
        copies.append(copy.complete().unique())

    with WriteBehind() as writer:
        for number in range(100):
            tensor.fill_(number)
            copy = writer.copy(tensor)
            writer.submit(partial(keep, copy), tensor.nbytes)
            del copy
    assert torch.cat(copies).tolist() == list(range(100))
