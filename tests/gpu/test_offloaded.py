"""Training with streamed blocks gives the results of resident blocks with less device memory.

Run by `make test-gpu`.
"""

import gc

import pytest
import torch
from packed import precision_of
from tiny import linears
from transformers import AutoModelForCausalLM

from emloc.adapters.lora import Lora
from emloc.config.compose import compose
from emloc.config.settings import LoraSettings
from emloc.emulators import BuildInputs
from emloc.emulators.full import Full
from emloc.emulators.offload import Offload
from emloc.models.checkpoint.source import Source
from emloc.models.objectives.tokens import Tokens
from emloc.pipeline import run
from emloc.runtime.stage_cache import Store
from emloc.stages.run_config import build
from emloc.stages.training.lean_setup import prepare_model
from emloc.tensors.lean.model import recompute_layers

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
BLOCKS = 9
SHAPE = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
BYTES = 2 * (4 * 2048**2 + 3 * 2048 * 4096)  # bytes of the matrices of one block, in bfloat16


@pytest.fixture(scope="module")
def source():
    """A model whose blocks take longer to copy than to compute on a few tokens."""
    auto = AutoModelForCausalLM
    return Source(None, "wide", "0", torch.bfloat16, auto, SHAPE, seed=0)


def train_three_passes(emulator, source, folder, bits, lean, recipe):
    """Losses and gradients of three passes, and the peak of allocated bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    emulator.build(folder, source, BuildInputs(None, None, None, precision_of(bits)), device=CUDA)
    model = emulator.open(folder, source, CUDA, precision=precision_of(bits))
    torch.manual_seed(0)
    adapter = Lora()
    tuned = adapter.attach(model, LoraSettings(8, 16.0, 0.0), linears(model, r".*_proj")).train()
    loss = prepare_model(tuned, adapter, recipe, Tokens())[1] if lean else None
    if not lean:
        recompute_layers(model)
    for name, one in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one, std=0.02)
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        ids = torch.randint(0, 512, (1, 64), device=CUDA)
        batch = {"input_ids": ids, "labels": ids}
        loss_value = (loss or Tokens().loss)(tuned, batch, Tokens().items(batch))
        loss_value.backward()
        losses.append(loss_value.item())
    gradients = {n: p.grad.cpu() for n, p in tuned.named_parameters() if p.requires_grad}
    with torch.no_grad():
        again = [float(tuned(input_ids=ids).logits.float().sum()) for _ in range(2)]
    peak = torch.cuda.max_memory_allocated() - before
    return losses + again, gradients, peak


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])
@pytest.mark.parametrize("bits", [16, 4])
def test_gradients_equal_those_of_resident_blocks_with_less_memory(
    source, tmp_path, tiny, bits, lean
):
    recipe = build(compose([*tiny, "method=offload"])).train
    runs = [
        train_three_passes(emulator, source, tmp_path, bits, lean, recipe)
        for emulator in (Full(), Offload())
    ]
    (true, expected, whole), (losses, gradients, ours) = runs
    assert losses == pytest.approx(true, rel=1e-5)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-3 * gradient.norm(), name
    # All but two blocks are in host memory, and there is no third copy on the device.
    size = BYTES if bits == 16 else BYTES / 4
    assert whole - ours > (BLOCKS - 3) * size


@pytest.mark.parametrize(
    "overrides",
    [(), ("train.lean=false",), ("compression.bits=4",), ("train.host_activations=true",)],
    ids=["lean", "plain", "nf4", "activations on the host"],
)
def test_a_run_has_the_losses_of_lora(tiny, tmp_path, overrides):
    curves = []
    for method in ("lora", "offload"):
        losses = []
        run_config = build(
            compose([*tiny, f"method={method}", "train.checkpointing=true", *overrides])
        )
        run(
            run_config,
            Store(tmp_path / method),
            lambda _, values, to=losses: to.append(values["loss"]),
        )
        curves.append(losses)
    assert len(curves[0]) == 5
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
