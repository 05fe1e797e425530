"""The planned peak memory equals the measured peak on a device."""

from functools import partial

import pytest
import torch
from packed import precision_of

from emloc.adapters.training_inputs import TrainingInputs
from emloc.cost.bench.setting import BenchSetup, reset_memory
from emloc.cost.bench.training import (
    PreparedModel,
    open_factorized,
    open_original,
    open_packed,
    open_quantized,
)
from emloc.cost.plan.fit import layout_of, need_of
from emloc.cost.plan.layout import StepShape
from emloc.data.collate import collate
from emloc.data.examples import Examples
from emloc.data.prompts import EncodedExample
from emloc.stages.training.train import fit_rows

pytestmark = pytest.mark.gpu

STEPS, BATCH, LENGTH, ANSWER = 3, 2, 1024, 128
# With fewer than these blocks the rounding of the allocator would matter.
SHAPE = (
    *("hidden_size=2048", "intermediate_size=5632", "num_hidden_layers=8", "vocab_size=32000"),
    *("num_attention_heads=16", "num_key_value_heads=4", "bos_token_id=1", "eos_token_id=2"),
)


def peak_of(setup, opener, folder, device):
    """Return the peak of allocated bytes, from opening the model to the last of three steps."""
    run_config, source = setup.run_config, setup.source
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 32000, (STEPS * 2 * BATCH, LENGTH), generator=draw).tolist()
    rows = [EncodedExample("random", one, LENGTH - ANSWER) for one in ids]
    prepared = PreparedModel(source, partial(opener, setup))
    adapter, recipe, layers = (
        run_config.adapter,
        run_config.train,
        tuple(run_config.model.adapted_layers(source)),
    )
    training_inputs = TrainingInputs(
        adapter, run_config.lora, layers, Examples("random", ()), LENGTH, recipe, run_config.seed
    )
    reset_memory(device)
    before = torch.cuda.memory_allocated(device)
    facts = fit_rows(
        folder,
        prepared,
        training_inputs,
        rows,
        lambda some: collate(some, pad=0),
        device=device,
        report=lambda step, values: None,
    )
    assert facts["steps"] == STEPS
    return torch.cuda.max_memory_allocated(device) - before


@pytest.mark.parametrize(
    ("recipe", "accumulate"), [("kept", 1), ("recomputed", 1), ("on_host", 1), ("on_host", 2)]
)
@pytest.mark.parametrize(
    ("opener", "ratio", "bits"),
    [
        (open_original, None, 16),
        (open_quantized, None, 4),
        (partial(open_factorized, ratio=0.3), 0.3, 16),
        (partial(open_packed, ratio=0.3), 0.3, 4),
    ],
    ids=["lora", "qlora", "emloc", "emloc_nf4"],
)
def test_a_training_needs_the_planned_memory(
    tmp_path, opener, ratio, bits, recipe, accumulate, capsys
):
    checkpointing, host = recipe != "kept", recipe == "on_host"
    setup = BenchSetup(
        "llama3_8b",
        (
            *(f"model.shape.{one}" for one in SHAPE),
            *(f"train.steps={STEPS}", f"train.accumulate={accumulate}"),
            *(f"train.batch={BATCH}", f"train.checkpointing={str(checkpointing).lower()}"),
            f"train.host_activations={str(host).lower()}",
        ),
    )
    train, shape = setup.run_config.train, setup.source.config
    assert (train.batch, train.accumulate, shape.num_hidden_layers) == (BATCH, accumulate, 8)
    work = StepShape(LENGTH, BATCH, ANSWER, checkpointing, host, accumulate)
    planned = need_of(
        layout_of(setup.run_config, setup.source, ratio, precision_of(bits)), work
    ).peak
    measured = peak_of(setup, opener, tmp_path, setup.device)
    with capsys.disabled():
        print(f"\n{planned / 2**20:.0f} MiB planned, {measured / 2**20:.0f} MiB allocated")
    assert abs(planned - measured) <= 0.05 * measured + 64 * 2**20
