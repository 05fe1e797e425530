"""The memory-saving training path gives the losses, gradients and adapters of the plain path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import NF4
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from torch.nn import functional

from emloc.adapters.fused import fuse
from emloc.models.objectives.answer_loss import install_answer_loss
from emloc.models.objectives.tokens import Tokens
from emloc.precision.nf4 import Nf4Linear
from emloc.tensors.lean.embedding import HostEmbedding
from emloc.tensors.lean.loss import AnswerLoss
from emloc.tensors.lean.model import offload_embedding, recompute_layers
from emloc.tensors.lean.modules import GatedUnit, fuse_modules
from emloc.tensors.nn.factorized import Factorized, PackedFactorized

BLOCKS = r".*layers.*proj"


def linears(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]


def unchanged(model):
    pass


def factors(layer, rank=9):
    rows, columns = layer.weight.shape
    u, v = 0.1 * torch.randn(rows, rank), 0.3 * torch.randn(rank, columns)
    return u.bfloat16().to(layer.weight.dtype), v.bfloat16().to(layer.weight.dtype)


def factorised(model):
    for name, layer in linears(model):
        model.set_submodule(name, Factorized(*factors(layer)))


def nf4_factorised(model):
    for name, layer in linears(model):
        u, v = factors(layer)
        model.set_submodule(name, PackedFactorized(NF4.quantize(v), NF4.quantize(u.T)))


def nf4(model):
    for name, layer in linears(model):
        model.set_submodule(name, Nf4Linear(NF4.quantize(layer.weight)))
    model.is_loaded_in_4bit = True


def adapted(kind, dtype=torch.float32, **lora):
    torch.manual_seed(0)
    model = tiny_llama(tiny_tokenizer(True)).requires_grad_(False)
    for parameter in model.parameters():  # buffers stay float32, as the rotary tables of any model
        parameter.data = parameter.data.bfloat16().to(dtype)
    kind(model)
    tuned = get_peft_model(model, LoraConfig(**({"r": 4, "target_modules": BLOCKS} | lora)))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return tuned


def batch():
    torch.manual_seed(1)
    ids = torch.randint(5, 200, (3, 17))
    labels = ids.clone()
    labels[:, :6] = -100
    return ids, labels


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def close(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value - other[name]).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("alpha", [4, 12])
@pytest.mark.parametrize("kind", [unchanged, factorised, nf4_factorised, nf4])
def test_both_paths_give_equal_losses_and_gradients(kind, alpha):
    plain, (ids, labels) = adapted(kind, lora_alpha=alpha), batch()
    lean = adapted(kind, lora_alpha=alpha)
    expected = plain(input_ids=ids, labels=labels).loss
    expected.backward()
    inner = lean.get_base_model()
    assert fuse(lean) == 14
    assert offload_embedding(inner) > 0
    assert fuse_modules(inner, torch.float32) == ["LlamaMLP", "LlamaRMSNorm"]
    loss = install_answer_loss(inner)
    rows = {"input_ids": ids, "labels": labels}
    actual = loss(lean, rows, Tokens().items(rows))
    actual.backward()
    assert float(actual) == pytest.approx(float(expected), rel=1e-6)
    close(gradients(plain), gradients(lean))


@pytest.mark.parametrize("kind", [unchanged, factorised, nf4_factorised, nf4])
def test_in_16_bits_both_paths_have_similar_rounding_errors(kind):
    """Compares the plain path under autocast, as in the Trainer, with the memory-saving path."""
    ids, labels = batch()
    exact = adapted(kind)
    exact(input_ids=ids, labels=labels).loss.backward()
    plain, lean = (adapted(kind, dtype=torch.bfloat16) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain(input_ids=ids, labels=labels).loss.backward()
    inner = lean.get_base_model()
    assert fuse(lean) == 14
    fuse_modules(inner, torch.bfloat16)
    rows = {"input_ids": ids, "labels": labels}
    install_answer_loss(inner)(lean, rows, Tokens().items(rows)).backward()
    true = gradients(exact)

    def apart(model):
        actual = gradients(model)
        assert all(one.dtype == torch.float32 for one in actual.values())
        gap = sum((actual[name] - value).square().sum() for name, value in true.items())
        return float((gap / sum(value.square().sum() for value in true.values())).sqrt())

    assert apart(lean) < 0.03
    assert apart(lean) < 1.5 * apart(plain)


@pytest.mark.parametrize("kind", [unchanged, factorised, nf4_factorised, nf4])
def test_recomputing_layers_changes_no_gradient(kind):
    ids, labels = batch()
    actual = []
    for checkpointing in (False, True):
        lean = adapted(kind).train()
        fuse(lean)
        if checkpointing:
            model = lean.get_base_model()
            recompute_layers(model)
        lean(input_ids=ids, labels=labels).loss.backward()
        actual.append(gradients(lean))
    close(*actual, tolerance=1e-6)


@pytest.mark.parametrize("kind", [unchanged, factorised, nf4, nf4_factorised])
def test_a_model_may_change_the_output_of_a_fused_layer_in_place(kind):
    """Falcon adds the output of its attention to that of its MLP in this way."""
    results = []
    for is_fused in (False, True):
        tuned = adapted(kind)
        if is_fused:
            fuse(tuned)
        layer = tuned.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
        x = torch.linspace(-1, 1, 2 * 5 * layer.in_features).reshape(2, 5, -1).requires_grad_()
        output = layer(x)
        output += 1
        output.square().sum().backward()
        results.append([output.detach(), x.grad, layer.lora_A["default"].weight.grad])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def test_updated_parameters_are_used_in_the_next_forward():
    ids, _ = batch()
    lean = adapted(factorised)
    fuse(lean)
    before = lean(input_ids=ids).logits
    for name, parameter in lean.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    after = lean(input_ids=ids).logits
    torch.manual_seed(0)
    original = tiny_llama(tiny_tokenizer(True))
    for parameter in original.parameters():
        parameter.data = parameter.data.bfloat16().float()
    factorised(original)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, original(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_the_saved_adapter_equals_that_of_peft(tmp_path):
    lean = adapted(factorised)
    names = {n for n, p in lean.named_parameters() if p.requires_grad}
    fuse(lean)
    assert {n for n, p in lean.named_parameters() if p.requires_grad} == names
    lean.save_pretrained(tmp_path / "one", save_embedding_layers=False)
    adapted(factorised).save_pretrained(tmp_path / "two", save_embedding_layers=False)
    one, two = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_a_layer_that_cannot_be_fused_leaves_all_layers_unchanged(lora):
    model = adapted(unchanged, **lora)
    assert fuse(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


def test_only_the_hidden_features_of_the_adapter_are_saved_for_the_backward_pass():
    lean = adapted(factorised)
    fuse(lean)
    saved_tensors = []

    def keep(tensor):
        saved_tensors.append(tensor)
        return tensor

    layer = lean.get_base_model().model.layers[0].mlp.down_proj
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(10, 64, requires_grad=True))
    own = [one for one in saved_tensors if one.shape == (10, 4)]
    assert [one.untyped_storage().nbytes() for one in own] == [4 * 10 * 4]


def test_packed_layers_without_an_adapter_can_be_fused():
    torch.manual_seed(0)
    model = tiny_llama(tiny_tokenizer(True)).requires_grad_(False)
    nf4_factorised(model)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=r".*self_attn.*proj"))
    assert fuse(tuned) == 8
    assert fuse_modules(model, torch.float32) == ["LlamaMLP", "LlamaRMSNorm"]


def test_fused_factors_are_in_memory_once():
    lean = adapted(factorised)
    mlp = lean.get_base_model().model.layers[0].mlp
    fuse(lean)
    bases = [layer.base_layer for layer in (mlp.gate_proj, mlp.up_proj)]
    bytes_of = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for base in bases
        for t in (base.u, base.v)
    }
    height = 16  # rank 9 of the factors and 4 of the adapter, rounded up to a multiple of 8
    assert sum(bytes_of.values()) == 2 * 4 * height * (64 + 32)
    assert len(bytes_of) == 3  # both v are in one matrix


def test_a_tied_embedding_is_not_offloaded():
    model = tiny_llama(tiny_tokenizer(True), tie_word_embeddings=True).requires_grad_(False)
    assert offload_embedding(model) == 0
    assert type(model.get_input_embeddings()) is nn.Embedding


def test_a_host_embedding_has_no_parameters_and_returns_the_same_rows():
    table = nn.Embedding(50, 8)
    host = HostEmbedding(table.weight)
    ids = torch.randint(0, 50, (2, 7))
    assert list(host.parameters()) == list(host.buffers()) == []
    assert torch.equal(host(ids), table(ids))


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(2, 90), st.integers(1, 5), st.integers(0, 10**6))
def test_the_answer_loss_equals_cross_entropy_for_each_chunk_size(rows, words, chunk, seed):
    from emloc.tensors.lean import loss

    torch.manual_seed(seed)
    hidden = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    head = torch.randn(words, 6, dtype=torch.float64)
    labels, count = torch.randint(0, words, (rows,)), torch.tensor(float(rows + 3))
    before, loss.CHUNK_BYTES = loss.CHUNK_BYTES, 4 * words * chunk
    try:
        actual = AnswerLoss.apply(hidden, head, labels, count)
    finally:
        loss.CHUNK_BYTES = before
    (slope,) = torch.autograd.grad(actual, hidden)
    expected = functional.cross_entropy(hidden @ head.T, labels, reduction="sum") / count
    (true,) = torch.autograd.grad(expected, hidden)
    # The logits are computed in float32; with a loss near zero only their rounding error is left.
    assert float(actual) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(slope, true, rtol=1e-4, atol=1e-6)


def test_the_gated_unit_has_the_gradients_of_silu_times_up():
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    slope = torch.randn(5, 7, dtype=torch.float64)
    expected = functional.silu(gate) * up
    true = torch.autograd.grad(expected, (gate, up), slope)
    actual = GatedUnit.apply(1 * gate, 1 * up)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, (gate, up), slope), true)


class OddRMSNorm(nn.Module):
    """Has the name of a norm, but scales by 1 + weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.variance_epsilon = 1e-6

    def forward(self, x):
        return functional.rms_norm(x, (8,), 1 + self.weight, self.variance_epsilon)


def test_a_norm_with_another_formula_is_not_fused():
    model = nn.Sequential(OddRMSNorm())
    assert fuse_modules(model, torch.float32) == []
    assert "forward" not in vars(model[0])
