"""Factorised layers behave as linear layers; replacing layers leaves the original unchanged."""

import copy

import pytest
import torch
from peft import LoftQConfig, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import tiny_llama, tiny_tokenizer
from torch import nn

from emloc.errors import ConfigError
from emloc.tensors.nn.factorized import Factorized
from emloc.tensors.nn.surgery import replace_tensor, with_modules

IDS = torch.arange(24).reshape(2, 12) + 5
LAYER = "model.layers.0.mlp.up_proj"


def factors(out: int = 6, inside: int = 5, rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(out, rank), torch.randn(rank, inside)


def replace_by_factors(model: nn.Module, name: str, rank: int = 3) -> Factorized:
    layer = model.get_submodule(name)
    return Factorized(*factors(layer.out_features, layer.in_features, rank))


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def llama(request):
    return tiny_llama(tiny_tokenizer(chat=True), tie_word_embeddings=request.param)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# Factorized --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [None, torch.arange(6.0)], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_a_factorised_layer_is_a_linear_with_the_product_as_weight(bias, shape):
    u, v = factors()
    layer = Factorized(u, v, bias)
    dense = nn.Linear(5, 6, bias=bias is not None)
    with torch.no_grad():
        dense.weight.copy_(u @ v)
        if bias is not None:
            dense.bias.copy_(bias)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), dense(x))
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.rank) == (5, 6, 2)
    assert layer.product().dtype == torch.float64
    assert torch.equal(layer.product(), u.double() @ v.double())


def test_a_factorised_layer_stores_only_its_factors():
    u, v = factors()
    layer = Factorized(u, v, torch.zeros(6))
    assert set(layer.state_dict()) == {"u", "v", "bias"}
    assert sum(p.numel() for p in layer.parameters()) == 6 * 2 + 2 * 5 + 6
    assert not any(p.requires_grad for p in layer.parameters())
    assert set(Factorized(u, v).state_dict()) == {"u", "v"}
    assert repr(Factorized(u, v)) == "Factorized(in_features=5, out_features=6, rank=2)"


def test_copies_states_and_casts():
    layer = Factorized(*factors(), torch.ones(6))
    x = torch.randn(4, 5)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    twin.u.data.zero_()
    assert not torch.equal(twin(x), layer(x))
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.weight.dtype == torch.bfloat16
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.fixture
def emulator(llama):
    names = [name for name, module in llama.named_modules() if name.endswith("_proj")]
    return with_modules(llama, {name: replace_by_factors(llama, name) for name in names})


def adapted(emulator) -> nn.Module:
    config = LoraConfig(r=2, lora_alpha=2, target_modules=r".*_proj", task_type="CAUSAL_LM")
    return get_peft_model(emulator, config)


def test_peft_adapts_all_factorised_layers(emulator):
    model = adapted(emulator)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == 14
    assert all(isinstance(layer.get_base_layer(), Factorized) for layer in layers)
    for layer in layers:
        base = layer.get_base_layer()
        assert layer.lora_A["default"].weight.shape == (2, base.in_features)
        assert layer.lora_B["default"].weight.shape == (base.out_features, 2)


def test_peft_trains_only_the_adapter(emulator):
    model = adapted(emulator).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(15):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    assert len(changed) == 28


@pytest.mark.parametrize("safe", [False, True])
def test_merging_an_adapter_into_factors_is_refused(emulator, safe):
    """Added to a temporary product, the adapter would be lost silently."""
    model = adapted(emulator)
    factors = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    with pytest.raises(ConfigError, match="no weight to compute with: train a plain LoRA"):
        model.merge_and_unload(safe_merge=safe)
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in factors.items())


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "loftq", "loftq_config": LoftQConfig()},
    ],
    ids=lambda options: str(next(iter(options.values()))),
)
def test_an_option_that_reads_the_weight_is_refused_while_peft_wraps_the_model(emulator, options):
    before = {name: p.clone() for name, p in emulator.named_parameters()}
    config = LoraConfig(r=2, target_modules=r".*_proj", **options)
    with pytest.raises(ConfigError) as refused:
        get_peft_model(emulator, config)
    assert "plain LoRA (no use_dora; init_lora_weights=True)" in str(refused.value)
    assert "\n" not in str(refused.value)
    after = dict(emulator.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_the_weight_of_a_factorised_layer_describes_itself_only():
    layer = Factorized(*factors())
    assert layer.weight.device == layer.v.device
    assert layer.weight.dtype == torch.float32
    assert layer.weight.is_floating_point()
    for use in (lambda w: w.data, lambda w: w.float(), lambda w: w @ w.T, lambda w: w.add_(1)):
        with pytest.raises(ConfigError, match="has no weight to compute with"):
            use(layer.weight)


# Surgery -----------------------------------------------------------------------------------------


def test_a_copy_shares_the_memory_of_all_parameters_except_replaced_ones(llama):
    before, own = logits(llama), dict(llama.named_modules())
    replacement = replace_by_factors(llama, LAYER)
    twin = with_modules(llama, {LAYER: replacement})
    assert type(twin) is type(llama)
    assert twin.get_submodule(LAYER) is replacement
    assert dict(llama.named_modules()) == own
    assert torch.equal(logits(llama), before)
    assert not torch.allclose(logits(twin), before, atol=1e-4)
    theirs = dict(llama.named_parameters(remove_duplicate=False))
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        if name.startswith(LAYER):
            assert name in (f"{LAYER}.u", f"{LAYER}.v")
        else:
            assert parameter is not theirs[name]
            assert parameter.data_ptr() == theirs[name].data_ptr()
            assert not parameter.requires_grad
            assert theirs[name].requires_grad
    buffers = dict(llama.named_buffers())
    assert len(buffers) > 0
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffer, buffers[name])
        assert buffer.data_ptr() != buffers[name].data_ptr()
    tied = twin.lm_head.weight is twin.model.embed_tokens.weight
    assert tied == llama.config.tie_word_embeddings
    assert not {id(module) for module in twin.modules()} & {id(m) for m in llama.modules()}


def test_changes_of_the_copy_do_not_change_the_original(llama):
    before, names = logits(llama), [name for name, _ in llama.named_modules()]
    twin = adapted(with_modules(llama, {LAYER: replace_by_factors(llama, LAYER)}))
    twin.train()
    assert [name for name, _ in llama.named_modules()] == names
    assert not llama.training
    assert torch.equal(logits(llama), before)


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to("meta")])
def test_to_cast_or_move_the_copy_does_not_change_the_original(llama, change):
    before, types = logits(llama), {p.dtype for p in llama.parameters()}
    change(with_modules(llama, {LAYER: replace_by_factors(llama, LAYER)}))
    assert {p.dtype for p in llama.parameters()} == types == {torch.float32}
    assert torch.equal(logits(llama), before)


def test_a_copy_of_its_own_shares_no_memory(llama):
    replacement = replace_by_factors(llama, LAYER)
    twin = with_modules(llama, {LAYER: replacement}, share=False)
    assert twin.get_submodule(LAYER) is replacement
    theirs = {p.data_ptr() for p in llama.parameters()}
    assert not {p.data_ptr() for p in twin.parameters()} & theirs
    tied = twin.lm_head.weight is twin.model.embed_tokens.weight
    assert tied == llama.config.tie_word_embeddings


def test_a_module_with_two_parents_is_replaced_at_both():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))
    new = Factorized(*factors(4, 4))
    twin = with_modules(model, {"0.0": new})
    assert twin[0][0] is twin[1][0] is new


def test_a_copy_without_replacements_gives_equal_outputs(llama):
    twin = with_modules(llama, {})
    assert twin is not llama
    assert torch.equal(logits(twin), logits(llama))


def test_put_stores_a_tensor_of_the_right_shape_without_a_copy(llama):
    old = llama.get_submodule(LAYER).weight
    new = torch.randn(old.shape)
    replace_tensor(llama, f"{LAYER}.weight", new)
    weight = llama.get_submodule(LAYER).weight
    assert weight.data_ptr() == new.data_ptr()
    assert not weight.requires_grad
    with pytest.raises(ValueError, match=r"weight has shape \(64, 32\) in .* \(32, 64\) in the"):
        replace_tensor(llama, f"{LAYER}.weight", new.T)
    assert llama.get_submodule(LAYER).weight is weight
