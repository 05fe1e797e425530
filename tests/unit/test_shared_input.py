"""Layers that read the same input are computed together, with the results of single layers."""

import gc

import pytest
import torch
from packed import TOY
from peft import LoraConfig, get_peft_model
from test_lean import adapted, batch, close, factorised, gradients, linears, unchanged
from tiny import image_batch, tiny_internvl
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emloc.adapters import fused
from emloc.adapters.fused import fuse
from emloc.cost.plan.trace import trace
from emloc.models.shared_inputs import names_by_input
from emloc.tensors.lean.layers import FusedLora
from emloc.tensors.lean.model import recompute_layers
from emloc.tensors.lean.modules import fuse_modules
from emloc.tensors.nn.factorized import Factorized, PackedFactorized
from emloc.tensors.nn.operations import linear_operations


def packed(model):
    for name, layer in linears(model):
        model.set_submodule(name, TOY.linear(TOY.quantize(layer.weight)))


def packed_factors(model):
    for name, layer in linears(model):
        v, ut = (torch.randn(9, size).to(layer.weight) / 9 for size in layer.weight.T.shape)
        model.set_submodule(name, PackedFactorized(TOY.quantize(v), TOY.quantize(ut)))


def joint_factors(model):
    """Factorise all layers; those that read the same input have one v."""
    layers = dict(linears(model))
    for names in names_by_input(layers):
        v = nn.Parameter(torch.randn(9, layers[names[0]].in_features).to(layers[names[0]].weight))
        for name in names:
            u = torch.randn(layers[name].out_features, 9).to(v) / 9
            model.set_submodule(name, Factorized(u, v.requires_grad_(False), layers[name].bias))


def packed_joint_factors(model):
    joint_factors(model)
    packed_v = {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Factorized):
            v = packed_v.setdefault(layer.v_id, TOY.quantize(layer.v.data))
            model.set_submodule(name, PackedFactorized(v, TOY.quantize(layer.u.data.T), layer.bias))


def some_factorised(model):
    """Factorise all layers but the keys, so that only gate and up are of one kind."""
    factorised(model)
    for name, module in list(model.named_modules()):
        if name.endswith("k_proj"):
            model.set_submodule(name, nn.Linear(32, 16, dtype=module.v.dtype).requires_grad_(False))


JOINT = [joint_factors, packed_joint_factors]
KINDS = [unchanged, factorised, packed, packed_factors, some_factorised, *JOINT]
# Layers of a block that are computed together: query, key and value; gate and up; two alone.
GROUPS = [3, 1, 2, 1]


@pytest.fixture
def sizes(monkeypatch):
    """Numbers of the layers that are computed together, appended as they are computed."""
    sizes, apply = [], FusedLora.apply

    def counted(x, layers, *more):
        sizes.append(len(layers.loras))
        return apply(x, layers, *more)

    monkeypatch.setattr(FusedLora, "apply", counted)
    return sizes


def alone(names):
    return [[name] for name in names]


def test_names_are_grouped_by_their_module_and_their_role():
    layers = ["a.q_proj", "a.o_proj", "a.v_proj", "b.gate_proj", "b.down_proj", "b.up_proj"]
    assert names_by_input([*layers, "c.q_proj", "c.query_key_value", "q_proj", "k_proj"]) == [
        ["a.q_proj", "a.v_proj"],
        ["a.o_proj"],
        ["b.gate_proj", "b.up_proj"],
        ["b.down_proj"],
        ["c.q_proj"],
        ["c.query_key_value"],
        ["q_proj", "k_proj"],
    ]


@pytest.mark.parametrize("alpha", [4, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_give_the_results_of_single_layers_in_float64(kind, alpha, sizes, monkeypatch):
    ids, labels = batch()
    results = []
    for grouping in (alone, names_by_input):
        monkeypatch.setattr(fused, "names_by_input", grouping)
        for checkpointing in (False, True):
            lean = adapted(kind, dtype=torch.float64, lora_alpha=alpha).train()
            assert fuse(lean) == 14
            fuse_modules(lean.get_base_model(), torch.float64)
            if checkpointing:
                recompute_layers(lean.get_base_model())
            sizes.clear()
            loss = lean(input_ids=ids, labels=labels).loss
            loss.backward()
            expected = [1] * 7 if grouping is alone else GROUPS
            if kind is some_factorised and grouping is not alone:
                expected = [1, 1, 1, 1, 2, 1]
            assert sizes == expected * (4 if checkpointing else 2)
            results.append({"loss": loss.detach()} | gradients(lean))
    assert len(results[0]) == 29
    for one in results[1:]:
        close(results[0], one, tolerance=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_need_no_more_memory_and_fewer_operations(kind, checkpointing, monkeypatch):
    (ids, _), traces = batch(), []
    for grouping in (alone, names_by_input):
        monkeypatch.setattr(fused, "names_by_input", grouping)
        lean = adapted(kind).train()
        fuse(lean)
        fuse_modules(lean.get_base_model(), torch.float32)
        if checkpointing:
            recompute_layers(lean.get_base_model())
        decoder = lean.get_base_model().model

        def step(decoder=decoder):
            decoder(input_ids=ids).last_hidden_state.sum().backward()

        step()  # packed formats allocate their buffer
        lean.zero_grad()
        traces.append(trace(step))
    single, grouped = traces
    assert grouped.peak <= single.peak
    assert grouped.operations < single.operations


@pytest.mark.parametrize("kind", KINDS)
def test_several_passes_before_one_backward_pass_and_passes_without_gradients(kind):
    ids, labels = batch()
    plain, lean = adapted(kind, torch.float64), adapted(kind, torch.float64)
    fuse(lean)
    for model in (plain, lean):
        one = model(input_ids=ids, labels=labels).loss
        with torch.inference_mode():
            model(input_ids=ids[:1])
        other = model(input_ids=ids + 1, labels=labels).loss
        (one + 2 * other).backward()
    close(gradients(plain), gradients(lean), tolerance=1e-9)
    with torch.inference_mode():
        logits = [model(input_ids=ids).logits for model in (plain, lean)]
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


def test_a_vision_tower_and_a_decoder_with_biases_are_grouped(sizes):
    results = []
    for is_fused in (False, True):
        model = tiny_internvl().requires_grad_(False).double()
        tuned = get_peft_model(
            model, LoraConfig(r=2, target_modules=r".*(proj|projection_layer|fc\d)")
        )
        torch.manual_seed(0)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        assert not is_fused or fuse(tuned) > 0
        inputs = image_batch()
        inputs["pixel_values"] = inputs["pixel_values"].double()
        tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
        results.append(gradients(tuned))
    close(*results, tolerance=1e-9)
    assert sizes == [3, 1, 1, 1] * 2 + GROUPS * 2


@pytest.mark.parametrize("kind", JOINT)
def test_layers_with_one_v_multiply_by_it_once(kind):
    """Also where only some of them have a LoRA, and v is in memory once."""
    lean = adapted(kind, torch.float64)
    blocks, tied = lean.get_base_model().model.layers, {}
    for name, module in blocks.named_modules():
        if isinstance(module, Factorized | PackedFactorized):
            tied.setdefault(module.v_id, []).append(name)
    assert sorted(map(len, tied.values())) == [1, 1, 1, 1, 2, 2, 3, 3]
    before = linear_operations(blocks)
    assert before == sum(
        module.rank * (module.out_features + module.in_features / len(tied[module.v_id]))
        for module in blocks.modules()
        if isinstance(module, Factorized | PackedFactorized)
    )
    fuse(lean)
    assert linear_operations(blocks) == before


def test_a_layer_without_a_lora_has_the_v_of_its_group():
    ids, labels = batch()
    results = []
    for is_fused in (False, True):
        lean = adapted(joint_factors, torch.float64, target_modules=r".*(q_proj|v_proj|up_proj)")
        assert not is_fused or fuse(lean) == 6
        loss = lean(input_ids=ids, labels=labels).loss
        loss.backward()
        results.append({"loss": loss.detach()} | gradients(lean))
    close(*results, tolerance=1e-12)


# Models that call the layers of a group otherwise ------------------------------------------------


class Attention(nn.Module):
    """Calls query, key and value as `calls` says, which returns its output."""

    def __init__(self, calls):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, n) for n in (8, 5, 5))
        self.calls = calls

    def forward(self, x):
        return self.calls(self, x)


def only_query(one, x):
    return one.q_proj(x)


def value_first(one, x):
    return one.v_proj(x).sum() + one.q_proj(x).square().sum() * one.k_proj(x).sum()


def cross_attention(one, x):
    other = x.flip(0)
    return one.q_proj(x).square().sum() * one.k_proj(other).sum() + one.v_proj(other).sum()


def twice(one, x):
    return one.q_proj(x).sum() + one.q_proj(x).square().sum() + one.k_proj(x).square().sum()


def changed_in_place(one, x):
    x = x.detach().clone()
    with torch.no_grad():
        query = one.q_proj(x)
        x += 1
        return query.sum() + one.k_proj(x).square().sum()


def keys_without_gradient(one, x):
    with torch.no_grad():
        key = one.k_proj(x)
    return one.v_proj(x).square().sum() * key.sum()


def changed_outputs(one, x):
    query = one.q_proj(x)
    query *= 2
    key = one.k_proj(x)
    key += 1
    return query.sum() * key.square().sum()


def small(calls):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Attention(calls)).double().requires_grad_(False)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=r"(0|.*proj)"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return tuned


def of_shape(*shape):
    """Number of tensors of a shape that are alive."""
    gc.collect()
    return sum(type(one) is Tensor and one.shape == shape for one in gc.get_objects())


CALLS = [only_query, value_first, cross_attention, twice]
CALLS += [changed_in_place, keys_without_gradient, changed_outputs]


@pytest.mark.parametrize("is_factorised", [False, True])
@pytest.mark.parametrize("calls", CALLS)
def test_any_order_and_any_input_of_the_calls_gives_the_results_of_peft(calls, is_factorised):
    results = []
    for is_fused in (False, True):
        tuned = small(calls)
        if is_factorised:
            for module in tuned.modules():
                base = getattr(module, "base_layer", None)
                if base is not None:
                    factors = base.weight[:, :3].clone(), base.weight[:3].clone()
                    module.base_layer = Factorized(*factors, base.bias)
        assert not is_fused or fuse(tuned) == 4
        x = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(2, 3, 8).requires_grad_()
        output = tuned(x).sum()
        if output.requires_grad:
            output.backward()
        grads = {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}
        if x.grad is not None:
            grads["x"] = x.grad
        results.append({"output": output.detach()} | grads)
    close(*results, tolerance=1e-12)


def only_query_recomputed(one, x):
    return checkpoint(lambda y: one.q_proj(y).square(), x, use_reentrant=False)


@pytest.mark.parametrize("calls", [only_query, only_query_recomputed])
def test_an_output_that_no_layer_is_called_for_is_freed(calls):
    tuned = small(calls)
    fuse(tuned)
    before = of_shape(4, 7, 5)
    output = tuned(torch.zeros(4, 7, 8, dtype=torch.float64))
    assert of_shape(4, 7, 5) == before
    output.sum().backward()
    assert of_shape(4, 7, 5) == before
