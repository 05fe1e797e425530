"""A packed format is one class and one YAML file; all other code uses its interface."""

import copy
from dataclasses import replace

import pytest
import torch
from five_bits import FiveBits
from packed import FIVE_BITS, NF4, TOY
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
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
    """Function that adds folders to the search path of YAML files, after those of the package."""

    def also(*more):
        monkeypatch.setattr("emloc.config.paths.conf_folders", lambda: [CONF, *more])
        monkeypatch.setattr("emloc.config.named_class.plugin_folders", lambda: [FIVE_BITS])

    return also


@pytest.fixture
def two_of_four_bits(tmp_path, folders):
    (tmp_path / "precision").mkdir()
    (tmp_path / "precision" / "other.yaml").write_text(OTHER)
    folders(tmp_path)


# The value ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rounding_error_is_at_most_half_a_step(shape):
    w = matrix(*shape, torch.float32)
    flat = nn.functional.pad(w.flatten(), (0, -w.numel() % 64)).view(-1, 64)
    steps = (flat.abs().amax(1, keepdim=True) / 15).expand_as(flat).flatten()[: w.numel()]
    apart = (TOY.quantize(w).dequantize() - w).abs().flatten()
    # A scale is rounded to 16 bits, hence a little more than half.
    assert (apart <= 0.502 * steps).all()
    assert apart.max() > 0.2 * steps.max() or w.numel() < 8


@pytest.mark.parametrize("precision", [NF4, TOY], ids=["nf4", "five_bits"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_file_and_empty_matrix_follow_from_the_layout(tmp_path, shape, precision):
    packed = precision.quantize(matrix(*shape))
    assert packed.nbytes == precision.nbytes(*shape)
    nowhere = precision.meta_matrix(*shape, torch.bfloat16)
    assert nowhere.nbytes == packed.nbytes
    assert {one.device.type for one in nowhere.parts.values()} == {"meta"}
    assert {one.device.type for one in packed.to(torch.device("meta")).parts.values()} == {"meta"}
    save_file(packed.tensors("layer.v"), tmp_path / "file.safetensors")
    restored = precision.from_tensors("layer.v", load_file(tmp_path / "file.safetensors"))
    assert (
        (restored.shape, restored.dtype) == (packed.shape, packed.dtype) == (shape, torch.bfloat16)
    )
    assert torch.equal(restored.dequantize(), packed.dequantize())
    buffer = torch.full((shape[0] + 3, shape[1]), 7.0, dtype=torch.bfloat16)
    top = buffer[: shape[0]]
    assert packed.dequantize(top) is top
    assert torch.equal(top, packed.dequantize())
    assert (buffer[shape[0] :] == 7).all()


def test_five_bits_are_packed_tightly():
    assert TOY.nbytes(64, 64) == 64 * 64 * 5 // 8 + 64 * 2
    assert TOY.nbytes(1, 1) == 40 + 2


def test_a_matrix_of_other_settings_is_refused():
    tensors = TOY.quantize(matrix(16, 32)).tensors("v")
    other = replace(TOY, group=32)
    with pytest.raises(ValueError, match=r"precision=five_bits: a matrix \(16, 32\) is packed as"):
        other.from_tensors("v", tensors)
    with pytest.raises(KeyError):
        NF4.from_tensors("v", tensors)


def test_a_format_that_contradicts_its_layout_is_refused():
    class Wrong(FiveBits):
        def pack(self, matrix):
            return super().pack(matrix) | {"scales": torch.zeros(1)}

    with pytest.raises(ValueError, match="the layout of the format says"):
        Wrong(name="wrong", bits=5, group=64).quantize(matrix(16, 32))


def test_a_format_with_missing_methods_is_refused():
    class Half(Precision):
        def layout(self, rows, columns):
            return {}

    with pytest.raises(ConfigError, match=r"Half does not define pack, unpack, which every"):
        Half(name="half", bits=3)


def test_the_key_contains_name_bits_and_settings_but_no_module():
    assert TOY.key == {"name": "five_bits", "bits": 5, "group": 64}
    keys = [
        BuildInputs(None, None, None, precision).key
        for precision in (None, NF4, TOY, replace(TOY, group=32))
    ]
    assert keys[0][-1] == 16
    assert len({str(key) for key in keys}) == 4
    assert [BuildInputs(None, None, None, precision).bits for precision in (None, NF4, TOY)] == [
        16,
        4,
        5,
    ]


# The layers --------------------------------------------------------------------------------------


def packed_layer(bias=None, dtype=torch.float32) -> PackedLinear:
    return TOY.linear(TOY.quantize(matrix(24, 40, dtype)), bias)


@pytest.mark.parametrize("bias", [None, torch.arange(24.0)], ids=["no bias", "bias"])
def test_a_layer_multiplies_by_its_matrix_and_saves_no_tensor(bias):
    layer, saved_tensors = packed_layer(bias), []
    x = torch.randn(2, 3, 40, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda one: saved_tensors.append(one), lambda one: one
    ):
        y = layer(x)
    expected = nn.functional.linear(twin, layer.matrix.dequantize(), bias)
    torch.testing.assert_close(y, expected)
    slope = torch.randn_like(y)
    y.backward(slope)
    expected.backward(slope)
    torch.testing.assert_close(x.grad, twin.grad)
    assert saved_tensors == []
    assert set(layer.state_dict()) == ({"bias"} if bias is not None else set())
    assert repr(layer) == "PackedLinear(in_features=40, out_features=24, precision=five_bits)"


def test_a_cast_keeps_the_scales():
    layer = packed_layer()
    twin = copy.deepcopy(layer).to(torch.bfloat16)
    assert twin(torch.randn(3, 40).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(twin.float().matrix.dequantize(), layer.matrix.dequantize())
    nbytes = sum(buffer.nbytes for buffer in layer.buffers())
    assert nbytes == TOY.nbytes(24, 40)


@pytest.fixture(params=["thin", "whole"])
def tuned(request):
    """A tiny Llama in five bits with a PEFT LoRA whose B is not zero."""
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


def test_a_fused_layer_gives_the_outputs_and_gradients_of_peft(tuned):
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


def test_merging_an_adapter_into_packed_weights_is_refused():
    layer = nn.Sequential(packed_layer(torch.zeros(24)))
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"])
    with pytest.raises(RuntimeError, match="size of tensor"):
        get_peft_model(layer, config).merge_and_unload()


def test_packed_layers_are_not_opened_without_their_format():
    with pytest.raises(ValueError, match="but precision is None"):
        load_quantized(None, ["model.layers.0.mlp.up_proj"], torch.device("cpu"), None)


# The choice --------------------------------------------------------------------------------------


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        build(compose(overrides))
    return str(refused.value)


def test_compression_bits_select_the_format(folders):
    assert build(compose()).precision is None
    assert build(compose(["compression.bits=4"])).precision == NF4
    folders(FIVE_BITS / "conf")
    assert build(compose(["compression.bits=5"])).precision == TOY
    assert build(compose(["compression=auto"])).precision is None
    assert [one.name for one in formats()] == ["five_bits", "nf4", "int3", "int2"]
    assert widths() == {"five_bits": 5, "nf4": 4, "int3": 3, "int2": 2}


def test_bits_without_a_format_are_refused_with_the_available_bits(folders):
    message = "compression.bits=5: there is no format of that width, only of"
    assert refusal("compression.bits=5") == f"{message} 16, 4, 3, 2; set compression.bits=16"
    folders(FIVE_BITS / "conf")
    message = message.replace("=5", "=6")
    assert refusal("compression.bits=6") == f"{message} 16, 5, 4, 3, 2; set compression.bits=16"


def test_two_formats_with_equal_bits_need_a_name(two_of_four_bits):
    assert refusal("compression.bits=4") == (
        "compression.bits=4: nf4 and other have that width; set precision=nf4"
    )
    assert build(compose(["compression.bits=4", "precision=nf4"])).precision == NF4
    with pytest.raises(ConfigError, match=r"set precision=nf4$"):
        formats()
    other = replace(NF4, name="other")
    assert formats(other)[0] == other
    assert precision_of(4, other) == other


def test_a_format_with_other_bits_than_the_compression_is_refused():
    assert refusal("precision=nf4") == (
        "precision=nf4 is a format of 4 bits, and compression.bits=16; set compression.bits=4, or "
        "precision=null"
    )
    assert build(compose(["precision=nf4", "compression.bits=4"])).precision == NF4
    assert build(compose(["precision=nf4", "compression=auto"])).precision == NF4


def test_bits_that_a_format_does_not_support_are_refused():
    assert refusal("precision=nf4", "precision.bits=5", "compression.bits=5") == (
        "precision.bits=5: precision=nf4 has 4 bits; set precision.bits=4"
    )
    with pytest.raises(ConfigError, match=r"bits must be in \[1, 16\), got 16"):
        replace(TOY, bits=16)


def test_a_yaml_without_bits_is_refused_by_name(tmp_path, folders):
    (tmp_path / "precision").mkdir()
    file = tmp_path / "precision" / "mute.yaml"
    file.write_text("_target_: five_bits.FiveBits\nname: mute\n")
    folders(tmp_path)
    assert refusal("compression.bits=4").startswith(f"{file}: `bits` is not set to a whole number")


def test_bits_are_labelled_by_their_format_if_it_is_unique(folders, tmp_path):
    assert [width_name(4), width_name(5)] == ["nf4", "5 bit"]
    folders(FIVE_BITS / "conf")
    assert width_name(5) == "five_bits"
