"""Kernels of a library replace operations only where their results are equal."""

import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from torch.nn import functional
from transformers.models.llama import modeling_llama

from emloc.precision import nf4
from emloc.tensors.lean import kernels, modules
from emloc.tensors.lean.kernels import CheckedRotary, fused_rotary, liger
from emloc.tensors.lean.modules import fuse_modules

OWN = modeling_llama.apply_rotary_pos_emb


def silu_mul(gate, up):
    return functional.silu(gate) * up


@pytest.fixture
def library(monkeypatch):
    """Stands for the library: a CPU has its kernels; yields the calls of each."""
    calls = SimpleNamespace(unit=0, rotary=0)

    def unit(gate, up):
        calls.unit += 1
        return silu_mul(gate, up)

    def rotary(*tensors):
        calls.rotary += 1
        return OWN(*tensors)

    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
    for module in (kernels, modules):
        monkeypatch.setattr(module, "liger", lambda: (unit, rotary))
    return calls


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_llama(tiny_tokenizer(chat=False))


def test_a_model_computes_the_same_with_kernels(library, model):
    ids = torch.arange(20).view(2, 10)
    expected = model(ids).logits
    fuse_modules(model, torch.float32, kernels=True)
    with fused_rotary(model):
        logits = model(ids).logits
    torch.testing.assert_close(logits, expected)
    blocks = model.config.num_hidden_layers
    assert library.unit == blocks + 1  # one call is the trial
    assert library.rotary == blocks + 1
    assert modeling_llama.apply_rotary_pos_emb is OWN


def test_kernels_are_only_used_on_request(library, model):
    fuse_modules(model, torch.float32)
    model(torch.arange(6)[None])
    assert (library.unit, library.rotary) == (0, 0)


@pytest.mark.parametrize("fault", ["value", "error"])
def test_a_gated_unit_with_other_results_is_not_used(library, model, monkeypatch, fault):
    calls = []

    def unit(gate, up):
        calls.append(gate.shape)
        if fault == "error":
            raise RuntimeError("no compiler")
        return gate * up

    monkeypatch.setattr(modules, "liger", lambda: (unit, OWN))
    assert "LlamaMLP" in fuse_modules(model, torch.float32, kernels=True)
    model(torch.arange(6)[None])
    assert len(calls) == 1


def tensors():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8)
    angle = torch.randn(1, 5, 4).repeat(1, 1, 2)
    return q, k, angle.cos(), angle.sin()


@pytest.mark.parametrize("fault", ["value", "error"])
def test_a_rotation_with_other_results_is_not_used(library, fault):
    calls = []

    def kernel(q, k, cos, sin):
        calls.append(q)
        if fault == "error":
            raise RuntimeError("no compiler")
        return q, k

    rotary = CheckedRotary(OWN, kernel)
    for _ in range(2):
        for actual, expected in zip(rotary(*tensors()), OWN(*tensors()), strict=True):
            assert torch.equal(actual, expected)
    assert len(calls) == 1


def test_a_call_with_options_and_another_device_use_the_own_rotation(library, monkeypatch):
    rotary = CheckedRotary(OWN, lambda *_: pytest.fail("the kernel was called"))
    q, k, cos, sin = tensors()
    rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    monkeypatch.setattr(kernels, "DEVICES", ("cuda",))
    rotary(q, k, cos, sin)


def test_a_missing_library_is_said(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert liger.__wrapped__() is None
    assert "more operations than with Liger's kernels" in caplog.text
    monkeypatch.setattr(kernels, "liger", lambda: None)
    with fused_rotary(torch.nn.Linear(1, 1)):
        assert modeling_llama.apply_rotary_pos_emb is OWN


def test_a_device_without_triton_uses_bitsandbytes(caplog):
    caplog.set_level("INFO")
    assert nf4._kernel.__wrapped__(torch.device("cpu")) is None
    assert "bitsandbytes dequantises, since Triton does not work here" in caplog.text
