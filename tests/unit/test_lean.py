"""The lean path computes what the plain path computes: losses, gradients, adapters."""

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
from emloc.models.objectives.answer_loss import answer_loss
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


def as_is(model):
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
    for parameter in model.parameters():  # buffers stay: rotary tables are float32 in any model
        parameter.data = parameter.data.bfloat16().to(dtype)
    kind(model)
    tuned = get_peft_model(model, LoraConfig(target_modules=BLOCKS, **({"r": 4} | lora)))
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
@pytest.mark.parametrize("kind", [as_is, factorised, nf4_factorised, nf4])
def test_the_lean_path_gives_the_loss_and_the_gradients_of_the_plain_one(kind, alpha):
    plain, (ids, labels) = adapted(kind, lora_alpha=alpha), batch()
    lean = adapted(kind, lora_alpha=alpha)
    expected = plain(input_ids=ids, labels=labels).loss
    expected.backward()
    inner = lean.get_base_model()
    assert fuse(lean) == 14
    assert offload_embedding(inner) > 0
    assert fuse_modules(inner, torch.float32) == ["LlamaMLP", "LlamaRMSNorm"]
    loss = answer_loss(inner)
    rows = {"input_ids": ids, "labels": labels}
    found = loss(lean, rows, Tokens().items(rows))
    found.backward()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    close(gradients(plain), gradients(lean))


@pytest.mark.parametrize("kind", [as_is, factorised, nf4_factorised, nf4])
def test_in_16_bits_both_paths_are_as_far_from_32_bits_as_rounding_goes(kind):
    """The plain path under autocast, as the Trainer runs it, and the lean one as it is."""
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
    answer_loss(inner)(lean, rows, Tokens().items(rows)).backward()
    true = gradients(exact)

    def apart(model):
        found = gradients(model)
        assert all(one.dtype == torch.float32 for one in found.values())
        gap = sum((found[name] - value).square().sum() for name, value in true.items())
        return float((gap / sum(value.square().sum() for value in true.values())).sqrt())

    assert apart(lean) < 0.03
    assert apart(lean) < 1.5 * apart(plain)


@pytest.mark.parametrize("kind", [as_is, factorised, nf4_factorised, nf4])
def test_recomputing_layers_changes_no_gradient(kind):
    ids, labels = batch()
    found = []
    for checkpointing in (False, True):
        lean = adapted(kind).train()
        fuse(lean)
        if checkpointing:
            model = lean.get_base_model()
            recompute_layers(model)
        lean(input_ids=ids, labels=labels).loss.backward()
        found.append(gradients(lean))
    close(*found, tolerance=1e-6)


def test_what_the_optimizer_changes_is_multiplied_by_in_the_next_pass():
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


def test_the_adapter_that_is_saved_is_peft_s_own(tmp_path):
    lean = adapted(factorised)
    names = {n for n, p in lean.named_parameters() if p.requires_grad}
    fuse(lean)
    assert {n for n, p in lean.named_parameters() if p.requires_grad} == names
    lean.save_pretrained(tmp_path / "one", save_embedding_layers=False)
    adapted(factorised).save_pretrained(tmp_path / "two", save_embedding_layers=False)
    one, two = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_a_layer_that_computes_something_else_leaves_all_as_they_are(lora):
    model = adapted(as_is, **lora)
    assert fuse(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


def test_of_the_hidden_features_only_the_adapter_s_are_kept_for_the_backward_pass():
    lean = adapted(factorised)
    fuse(lean)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    layer = lean.get_base_model().model.layers[0].mlp.up_proj
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(10, 32, requires_grad=True))
    own = [one for one in kept if one.shape == (10, 4)]
    assert [one.untyped_storage().nbytes() for one in own] == [4 * 10 * 4]


def test_packed_layers_without_an_adapter_have_their_device_in_buffers():
    torch.manual_seed(0)
    model = tiny_llama(tiny_tokenizer(True)).requires_grad_(False)
    nf4_factorised(model)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=r".*self_attn.*proj"))
    assert fuse(tuned) == 8
    assert fuse_modules(model, torch.float32) == ["LlamaMLP", "LlamaRMSNorm"]


def test_factors_are_held_once():
    lean = adapted(factorised)
    layer = lean.get_base_model().model.layers[0].mlp.up_proj
    fuse(lean)
    base = layer.base_layer
    bytes_of = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (base.u, base.v)
    }
    height = 16  # rank 9 and 4 of the adapter, up to a multiple of 8
    assert sum(bytes_of.values()) == 4 * height * (64 + 32)


def test_an_embedding_that_is_also_the_head_stays():
    model = tiny_llama(tiny_tokenizer(True), tie_word_embeddings=True).requires_grad_(False)
    assert offload_embedding(model) == 0
    assert type(model.get_input_embeddings()) is nn.Embedding


def test_an_embedding_on_the_host_is_no_parameter_and_looks_up_the_same():
    table = nn.Embedding(50, 8)
    host = HostEmbedding(table.weight)
    ids = torch.randint(0, 50, (2, 7))
    assert list(host.parameters()) == list(host.buffers()) == []
    assert torch.equal(host(ids), table(ids))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(2, 90), st.integers(1, 5), st.integers(0, 10**6))
def test_the_answer_loss_is_cross_entropy_whatever_the_chunk(rows, words, chunk, seed):
    from emloc.tensors.lean import loss

    torch.manual_seed(seed)
    hidden = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    head = torch.randn(words, 6, dtype=torch.float64)
    labels, count = torch.randint(0, words, (rows,)), torch.tensor(float(rows + 3))
    before, loss.CHUNK_BYTES = loss.CHUNK_BYTES, 4 * words * chunk
    try:
        found = AnswerLoss.apply(hidden, head, labels, count)
    finally:
        loss.CHUNK_BYTES = before
    (slope,) = torch.autograd.grad(found, hidden)
    expected = functional.cross_entropy(hidden @ head.T, labels, reduction="sum") / count
    (true,) = torch.autograd.grad(expected, hidden)
    # Formed in float32, whose rounding of logits is all there is of a loss next to none.
    assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(slope, true, rtol=1e-4, atol=1e-6)


def test_the_gated_unit_has_the_derivatives_of_silu_times_up():
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    slope = torch.randn(5, 7, dtype=torch.float64)
    expected = functional.silu(gate) * up
    true = torch.autograd.grad(expected, (gate, up), slope)
    found = GatedUnit.apply(1 * gate, 1 * up)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (gate, up), slope), true)


class OddRMSNorm(nn.Module):
    """Called a norm, but scales by 1 + weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.variance_epsilon = 1e-6

    def forward(self, x):
        return functional.rms_norm(x, (8,), 1 + self.weight, self.variance_epsilon)


def test_a_norm_that_computes_something_else_stays():
    model = nn.Sequential(OddRMSNorm())
    assert fuse_modules(model, torch.float32) == []
    assert "forward" not in vars(model[0])
