"""The same runs on a CUDA device: `make test-gpu`."""

import json

import pytest
import torch

from emloc.compose import compose
from emloc.config import build
from emloc.pipeline import run
from emloc.statistics import Statistics
from emloc.store import Store

pytestmark = pytest.mark.gpu


def result_of(tiny, root, *overrides):
    cell = build(compose([*tiny, *overrides]))
    return run(cell, Store(root), lambda step, values: None)


@pytest.mark.parametrize(
    "method", ["zero_shot", "lora", "emloc", "emloc_covariance", "qlora", "emloc_nf4"]
)
def test_a_device_gives_what_a_cpu_gives(tiny, tmp_path, monkeypatch, method):
    there = result_of(tiny, tmp_path / "device", f"method={method}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = result_of(tiny, tmp_path / "cpu", f"method={method}")
    scores = [one.evaluated.facts["scores"]["loss"] for one in (there, here)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    if there.statistics:
        tables = [
            json.loads((one.emulated.folder / "layers.json").read_text()) for one in (there, here)
        ]
        for name, layer in tables[0].items():
            assert layer["kept"] == pytest.approx(tables[1][name]["kept"], abs=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (64, 96)])
def test_statistics_are_summed_without_tf32(monkeypatch, rows, columns):
    """Input and output Grams of the very same activations, whatever the process is set to."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    torch.manual_seed(0)
    x = torch.randn(1000, columns, device="cuda")
    weight = torch.randn(rows, columns, device="cuda")
    statistics = Statistics()
    statistics.add({"layer": x}, {"layer": weight}, whole=False)
    ((kind, gram),) = statistics.of("layer").items()
    exact = x.double() if kind == "input_gram" else x.double() @ weight.double().T
    true = exact.T @ exact
    assert kind == ("input_gram" if columns < rows else "output_gram")
    assert float((gram - true).norm() / true.norm()) < 1e-6
    assert torch.backends.cuda.matmul.allow_tf32
