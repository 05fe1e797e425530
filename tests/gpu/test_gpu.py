"""The same runs on a CUDA device: `make test-gpu`."""

import json

import pytest
import torch
from safetensors.torch import load_file

from emloc.compose import compose
from emloc.config import build
from emloc.pipeline import run
from emloc.store import Store

pytestmark = pytest.mark.gpu


def result_of(tiny, root, *overrides):
    cell = build(compose([*tiny, *overrides]))
    return run(cell, Store(root), lambda step, values: None)


@pytest.mark.parametrize("method", ["zero_shot", "lora", "emloc", "emloc_covariance"])
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


def test_statistics_are_summed_without_tf32(tiny, tmp_path, monkeypatch):
    torch.backends.cuda.matmul.allow_tf32 = True
    there = result_of(tiny, tmp_path / "device", "method=emloc").statistics
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = result_of(tiny, tmp_path / "cpu", "method=emloc").statistics
    for name in ("model.layers.0.safetensors", "model.layers.1.safetensors"):
        ours, theirs = load_file(there.folder / name), load_file(here.folder / name)
        for site, gram in ours.items():
            assert float((gram - theirs[site]).norm() / theirs[site].norm()) < 1e-4, site
