"""Whole runs on a CUDA device give the results of a CPU (`make test-gpu`)."""

import json
import math

import pytest
import torch
from packed import INT2, NF4
from transformers import AutoModelForCausalLM

from emloc.adapters.training_inputs import TrainingInputs
from emloc.calibration.moments import Statistics
from emloc.config.compose import compose
from emloc.data.collate import collate
from emloc.data.examples import Examples
from emloc.data.prompts import EncodedExample
from emloc.emulators.svd.factor_file import stored_tensors
from emloc.emulators.svd.factors import factorize
from emloc.models.checkpoint.source import Source
from emloc.pipeline import run
from emloc.runtime.gpu_ledger import gpu_memory, hold_share, own_share
from emloc.runtime.gpu_queue import Job, Wait, share_for
from emloc.runtime.stage_cache import Store
from emloc.stages.run_config import build
from emloc.stages.training.train import fit_rows
from emloc.tensors.side_by_side import one_after_another

pytestmark = pytest.mark.gpu


def result_of(tiny, root, *overrides):
    run_config = build(compose([*tiny, *overrides]))
    return run(run_config, Store(root), lambda step, values: None)


@pytest.mark.parametrize(
    "chosen",
    [
        *("zero_shot", "lora", "emloc", "emloc_covariance", "qlora", "emloc_nf4", "offload"),
        *("rslora", "dora", "svd_llm"),
        *("emloc emulator.sequential=true", "emloc emulator.allocation=greedy"),
        *("upop compression=r75", "loram_stru emulator.first=0 emulator.last=0"),
        "loram_rand emulator.first=0 emulator.last=0 compression.bits=4",
    ],
)
def test_a_gpu_gives_the_results_of_a_cpu(tiny, tmp_path, monkeypatch, chosen):
    overrides = f"method={chosen}".split()
    there = result_of(tiny, tmp_path / "device", *overrides)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = result_of(tiny, tmp_path / "cpu", *overrides)
    scores = [one.evaluated.facts["scores"]["loss"] for one in (there, here)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    if there.statistics:
        tables = [
            json.loads((one.emulated.folder / "layers.json").read_text()) for one in (there, here)
        ]
        for name, layer in tables[0].items():
            assert layer["kept"] == pytest.approx(tables[1][name]["kept"], abs=1e-5)


def test_padding_causes_no_nan_gradients_at_any_length(tmp_path):
    """The attention of cuDNN did so at lengths of 64 beyond a multiple of 128."""
    shape = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    device = torch.device("cuda", 0)
    source = Source(None, "x", "0", torch.bfloat16, AutoModelForCausalLM, shape, seed=0)
    run_config = build(compose(["train.steps=4", "train.batch=8", "train.log_every=1"]))
    layers = tuple(name for name in source.linears if name.endswith("_proj"))
    training_inputs = TrainingInputs(
        run_config.adapter, run_config.lora, layers, Examples("x", ()), 512, run_config.train, 0
    )
    draw = torch.Generator().manual_seed(0)

    def row(index: int) -> EncodedExample:
        ids = torch.randint(9, 300, (192 - index % 8,), generator=draw).tolist()
        return EncodedExample(str(index), ids, len(ids) // 2)

    class Whole:
        def open(self, device):
            return source.load(device)

        def targets(self, layers):
            return list(layers)

        source = None

    whole = Whole()
    whole.source = source
    rows = [row(index) for index in range(32)]
    losses = []
    fit_rows(
        tmp_path,
        whole,
        training_inputs,
        rows,
        lambda some: collate(some, 0),
        device=device,
        report=lambda step, values: losses.append(values["loss"]),
    )
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (64, 96)])
def test_statistics_are_summed_without_tf32(monkeypatch, rows, columns):
    """Input and output Gram matrices of the same activations are exact although TF32 is allowed."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    torch.manual_seed(0)
    x = torch.randn(1000, columns, device="cuda")
    weight = torch.randn(rows, columns, device="cuda")
    statistics = Statistics()
    statistics.add({"layer": x}, {"layer": weight}, inputs_only=False)
    ((kind, gram),) = statistics.of("layer").items()
    exact = x.double() if kind == "input_gram" else x.double() @ weight.double().T
    true = exact.T @ exact
    assert kind == ("input_gram" if columns < rows else "output_gram")
    assert float((gram - true).norm() / true.norm()) < 1e-6
    assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("precision", [None, NF4, INT2])
def test_layers_factorised_side_by_side_have_the_factors_of_one_after_another(precision):
    """Two streams give the same bits as one, several times, as a race would not show each time."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = {"a": (1024, 768), "b": (768, 1024), "c": (2048, 768), "d": (640, 640)}
    weights = {
        name: torch.randn(shape, device="cuda", generator=generator)
        for name, shape in shapes.items()
    }
    statistics = Statistics()
    for weight in weights.values():
        inputs = torch.randn(3000, weight.shape[1], device="cuda", generator=generator)
        names = [name for name, other in weights.items() if other is weight]
        statistics.add(dict.fromkeys(names, inputs), weights, inputs_only=True)
    ranks = dict.fromkeys(weights, 128)
    with one_after_another():
        alone = factorize(weights, ranks, statistics, "subspace", precision)
    for _ in range(4):
        beside = factorize(weights, ranks, statistics, "subspace", precision)
        assert list(beside) == list(alone)
        for name, layer in alone.items():
            for stored, other in zip(
                stored_tensors({name: layer}).values(),
                stored_tensors({name: beside[name]}).values(),
                strict=True,
            ):
                assert torch.equal(stored, other)


def test_jobs_reserve_memory_of_the_gpu_and_a_third_one_waits(tmp_path):
    total = torch.cuda.get_device_properties(0).total_memory
    gpus = [gpu_memory("first", 0)]
    half = int(total * 0.4)
    with hold_share(gpus, half, 9, tmp_path) as one:
        assert (one.reserved, one.jobs) == (half, 1)
        assert 0 < one.foreign < total  # the context of this process
        third = share_for(Job(9, ("first",), half), gpus, [Job(1, ("first",), half, one)] * 2, 9)
        assert isinstance(third, Wait)
    with own_share(lambda: half, tmp_path) as share:
        assert share.index == torch.cuda.current_device()
        assert share.reserved == half
