"""A packed format is one class and one YAML: what it says, and what all others find out from it."""

import copy
from dataclasses import replace

import pytest
import torch
from packed import NF4, THREE_BITS, TOY
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from three_bits import ThreeBits
from tiny import tiny_llama, tiny_tokenizer
from torch import nn

from emloc.adapters.fused import fuse
from emloc.config.compose import compose
from emloc.config.formats import width_name, widths
from emloc.config.paths import CONF
from emloc.emulators import BuildInputs
from emloc.emulators.full import load_quantized
from emloc.errors import ConfigError
from emloc.precision import PackedLinear, Precision
from emloc.stages.run_config import build, formats, precision_of
from emloc.tensors.nn.factorized import PackedFactorized
from emloc.tensors.nn.surgery import with_modules

IDS = torch.arange(24).reshape(2, 12) + 5
SHAPES = [(1, 1), (3, 5), (13, 37), (16, 32), (64, 64)]
OTHER = "_target_: emloc.precision.nf4.Nf4\nname: other\nbits: 4\n"


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns).to(dtype)


@pytest.fixture
def folders(monkeypatch):
    """Have these folders searched for YAML files behind the package's own."""

    def also(*more):
        monkeypatch.setattr("emloc.config.paths.conf_folders", lambda: [CONF, *more])

    return also


@pytest.fixture
def two_of_four_bits(tmp_path, folders):
    (tmp_path / "precision").mkdir()
    (tmp_path / "precision" / "other.yaml").write_text(OTHER)
    folders(tmp_path)


# The value ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_number_is_at_most_half_a_step_from_what_it_was(shape):
    w = matrix(*shape, torch.float32)
    flat = nn.functional.pad(w.flatten(), (0, -w.numel() % 64)).view(-1, 64)
    steps = (flat.abs().amax(1, keepdim=True) / 3).expand_as(flat).flatten()[: w.numel()]
    apart = (TOY.quantize(w).dequantize() - w).abs().flatten()
    assert (apart <= 0.502 * steps).all()  # a scale is rounded to 16 bits
    assert apart.max() > 0.2 * steps.max() or w.numel() < 8


@pytest.mark.parametrize("precision", [NF4, TOY], ids=["nf4", "three_bits"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_file_and_place_follow_from_the_layout(tmp_path, shape, precision):
    held = precision.quantize(matrix(*shape))
    assert held.nbytes == precision.nbytes(*shape)
    nowhere = precision.meta_matrix(*shape, torch.bfloat16)
    assert nowhere.nbytes == held.nbytes
    assert {one.device.type for one in nowhere.parts.values()} == {"meta"}
    assert {one.device.type for one in held.to(torch.device("meta")).parts.values()} == {"meta"}
    save_file(held.tensors("layer.v"), tmp_path / "file.safetensors")
    found = precision.from_tensors("layer.v", load_file(tmp_path / "file.safetensors"))
    assert (found.shape, found.dtype) == (held.shape, held.dtype) == (shape, torch.bfloat16)
    assert torch.equal(found.dequantize(), held.dequantize())
    buffer = torch.full((shape[0] + 3, shape[1]), 7.0, dtype=torch.bfloat16)
    top = buffer[: shape[0]]
    assert held.dequantize(top) is top
    assert torch.equal(top, held.dequantize())
    assert (buffer[shape[0] :] == 7).all()


def test_three_bits_are_packed_tightly():
    assert TOY.nbytes(64, 64) == 64 * 64 * 3 // 8 + 64 * 2
    assert TOY.nbytes(1, 1) == 24 + 2


def test_a_matrix_of_other_settings_is_refused():
    held = TOY.quantize(matrix(16, 32)).tensors("v")
    other = replace(TOY, group=32)
    with pytest.raises(ValueError, match=r"precision=three_bits: a matrix \(16, 32\) is packed as"):
        other.from_tensors("v", held)
    with pytest.raises(KeyError):
        NF4.from_tensors("v", held)


def test_a_format_that_contradicts_its_layout_is_found_out():
    class Wrong(ThreeBits):
        def pack(self, matrix):
            return super().pack(matrix) | {"scales": torch.zeros(1)}

    with pytest.raises(ValueError, match="the layout of the format says"):
        Wrong(name="wrong", bits=3, group=64).quantize(matrix(16, 32))


def test_a_format_without_one_of_its_methods_cannot_be_made():
    class Half(Precision):
        def layout(self, rows, columns):
            return {}

    with pytest.raises(ConfigError, match=r"Half does not define pack, unpack, which every"):
        Half(name="half", bits=3)


def test_the_key_holds_name_bits_and_settings_and_no_place_of_the_class():
    assert TOY.key == {"name": "three_bits", "bits": 3, "group": 64}
    keys = [
        BuildInputs(None, None, None, held).key for held in (None, NF4, TOY, replace(TOY, group=32))
    ]
    assert keys[0][-1] == 16
    assert len({str(key) for key in keys}) == 4
    assert [BuildInputs(None, None, None, held).bits for held in (None, NF4, TOY)] == [16, 4, 3]


# The layers --------------------------------------------------------------------------------------


def whole(bias=None, dtype=torch.float32) -> PackedLinear:
    return TOY.linear(TOY.quantize(matrix(24, 40, dtype)), bias)


@pytest.mark.parametrize("bias", [None, torch.arange(24.0)], ids=["no bias", "bias"])
def test_a_layer_multiplies_by_its_matrix_and_keeps_nothing(bias):
    layer, kept = whole(bias), []
    x = torch.randn(2, 3, 40, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one), lambda one: one):
        y = layer(x)
    expected = nn.functional.linear(twin, layer.matrix.dequantize(), bias)
    torch.testing.assert_close(y, expected)
    slope = torch.randn_like(y)
    y.backward(slope)
    expected.backward(slope)
    torch.testing.assert_close(x.grad, twin.grad)
    assert kept == []
    assert set(layer.state_dict()) == ({"bias"} if bias is not None else set())
    assert repr(layer) == "PackedLinear(in_features=40, out_features=24, precision=three_bits)"


def test_a_cast_rounds_no_scale():
    layer = whole()
    twin = copy.deepcopy(layer).to(torch.bfloat16)
    assert twin(torch.randn(3, 40).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(twin.float().matrix.dequantize(), layer.matrix.dequantize())
    held = sum(buffer.nbytes for buffer in layer.buffers())
    assert held == TOY.nbytes(24, 40)


@pytest.fixture(params=["thin", "whole"])
def tuned(request):
    """A tiny Llama of three bits under PEFT's LoRA, whose B is not zero."""
    llama, modules = tiny_llama(tiny_tokenizer(chat=True)), {}
    for name, layer in llama.named_modules():
        if name.endswith("_proj") and request.param == "thin":
            pair = (torch.randn(16, size) / 8 for size in (layer.in_features, layer.out_features))
            modules[name] = PackedFactorized(*(TOY.quantize(one) for one in pair))
        elif name.endswith("_proj"):
            modules[name] = TOY.linear(TOY.quantize(layer.weight))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=r".*_proj", task_type="CAUSAL_LM")
    model = get_peft_model(with_modules(llama, modules), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def test_a_fused_layer_computes_and_learns_as_peft_does(tuned):
    results = []
    for model in (copy.deepcopy(tuned), tuned):
        if model is tuned:
            assert fuse(model) == 14
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((loss.detach(), grads))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    assert len(results[0][1]) == 28
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-4, atol=1e-6)


def test_folding_an_adapter_into_packed_weights_fails_aloud():
    layer = nn.Sequential(whole(torch.zeros(24)))
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"])
    with pytest.raises(RuntimeError, match="size of tensor"):
        get_peft_model(layer, config).merge_and_unload()


def test_packed_layers_are_never_opened_without_their_format():
    with pytest.raises(ValueError, match="but precision is None"):
        load_quantized(None, ["model.layers.0.mlp.up_proj"], torch.device("cpu"), None)


# The choice --------------------------------------------------------------------------------------


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        build(compose(overrides))
    return str(refused.value)


def test_the_bits_choose_the_format_of_that_width(folders):
    assert build(compose()).precision is None
    assert build(compose(["compression.bits=4"])).precision == NF4
    folders(THREE_BITS / "conf")
    assert build(compose(["compression.bits=3"])).precision == TOY
    assert build(compose(["compression=auto"])).precision is None
    assert formats() == [NF4, TOY]
    assert widths() == {"nf4": 4, "three_bits": 3}


def test_a_width_that_no_format_has_is_refused_with_those_there_are(folders):
    said = "compression.bits=3: there is no format of that width, but of"
    assert refusal("compression.bits=3") == f"{said} 16, 4; set compression.bits=16"
    folders(THREE_BITS / "conf")
    said = said.replace("=3", "=5")
    assert refusal("compression.bits=5") == f"{said} 16, 4, 3; set compression.bits=16"


def test_of_two_formats_of_one_width_one_has_to_be_named(two_of_four_bits):
    assert refusal("compression.bits=4") == (
        "compression.bits=4: nf4 and other have that width; set precision=nf4"
    )
    assert build(compose(["compression.bits=4", "precision=nf4"])).precision == NF4
    with pytest.raises(ConfigError, match=r"set precision=nf4$"):
        formats()
    other = replace(NF4, name="other")
    assert formats(other) == [other]
    assert precision_of(4, other) == other


def test_a_format_of_other_bits_than_the_compression_is_refused():
    assert refusal("precision=nf4") == (
        "precision=nf4 is a format of 4 bits, and compression.bits=16; set compression.bits=4, or "
        "precision=null"
    )
    assert build(compose(["precision=nf4", "compression.bits=4"])).precision == NF4
    assert build(compose(["precision=nf4", "compression=auto"])).precision == NF4


def test_bits_that_a_format_has_not_are_refused():
    assert refusal("precision=nf4", "precision.bits=5", "compression.bits=5") == (
        "precision.bits=5: precision=nf4 has 4 bits; set precision.bits=4"
    )
    with pytest.raises(ConfigError, match=r"bits must be at least 1 and below 16, got 16"):
        replace(TOY, bits=16)


def test_a_yaml_that_says_no_bits_is_named(tmp_path, folders):
    (tmp_path / "precision").mkdir()
    file = tmp_path / "precision" / "mute.yaml"
    file.write_text("_target_: three_bits.ThreeBits\nname: mute\n")
    folders(tmp_path)
    assert refusal("compression.bits=4").startswith(f"{file}: says no bits of a number")


def test_a_width_is_called_by_its_format_where_that_is_plain(folders, tmp_path):
    assert [width_name(4), width_name(3)] == ["nf4", "3 bit"]
    folders(THREE_BITS / "conf")
    assert width_name(3) == "three_bits"
