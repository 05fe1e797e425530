"""The nf4 format: exact values on all devices, and layers that behave as linear layers."""

import copy

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from packed import NF4
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from torch import nn

from emloc.precision import multiply
from emloc.precision.nf4 import Nf4Linear
from emloc.tensors.nn.factorized import PackedFactorized
from emloc.tensors.nn.surgery import with_modules

# The table of QLoRA: quantiles of a normal distribution, as published by its authors.
STEPS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)

# Some widths are no multiple of 64; the CPU kernel of bitsandbytes is wrong for some of them.
SHAPES = [(1, 1), (3, 5), (13, 37), (16, 32), (7, 48), (33, 100), (5, 112), (64, 64), (300, 192)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

IDS = torch.arange(24).reshape(2, 12) + 5


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    torch.manual_seed(0)
    # Rows of very different magnitude, as low-rank factors have.
    return (torch.randn(rows, columns) * torch.logspace(1, -2, rows)[:, None]).to(dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert equality, with a tolerance for float16 and the CUDA library of bitsandbytes.

    That library does not round each product to the nearest float16, on any device.
    """
    assert actual.dtype == expected.dtype
    if actual.dtype == torch.float16 and torch.cuda.is_available():
        torch.testing.assert_close(actual, expected, rtol=2**-10, atol=0)
    else:
        assert torch.equal(actual, expected)


# The value ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_value_is_its_code_times_the_scale_of_its_block(shape, dtype):
    """Computed from the stored layout, which is the same on every device."""
    matrix_nf4 = NF4.quantize(matrix(*shape, dtype))
    codes = torch.stack(
        [matrix_nf4.parts["codes"].view(-1) >> 4, matrix_nf4.parts["codes"].view(-1) & 15], 1
    ).view(-1, 64)
    groups = matrix_nf4.parts["scales"][1:].repeat_interleave(256)[: len(codes)]
    sizes = (
        create_dynamic_map()[matrix_nf4.parts["absmax"].int()] * groups
        + matrix_nf4.parts["scales"][0]
    )
    size = shape[0] * shape[1]
    expected = (STEPS[codes.int()] * sizes[:, None]).to(dtype).view(-1)[:size].view(shape)
    assert_same(matrix_nf4.dequantize(), expected)
    assert matrix_nf4.dequantize().dtype == dtype


@pytest.mark.parametrize("columns", range(16, 257, 16))
def test_the_relative_error_is_about_a_tenth_at_each_width(columns):
    torch.manual_seed(0)
    w = torch.randn(64, columns)
    lost = (NF4.quantize(w).dequantize() - w).norm() / w.norm()
    assert 0.07 < float(lost) < 0.11


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_saved_matrix_is_read_back_exactly(tmp_path, shape):
    matrix_nf4 = NF4.quantize(matrix(*shape))
    parts = matrix_nf4.tensors("layer.v") | NF4.quantize(matrix(4, 4)).tensors("layer.ut")
    save_file(parts, tmp_path / "file.safetensors")
    restored = NF4.from_tensors("layer.v", load_file(tmp_path / "file.safetensors"))
    assert (restored.shape, restored.dtype, restored.nbytes) == (
        matrix_nf4.shape,
        matrix_nf4.dtype,
        matrix_nf4.nbytes,
    )
    assert list(restored.parts) == list(matrix_nf4.parts) == ["codes", "absmax", "scales"]
    for part, tensor in matrix_nf4.parts.items():
        assert torch.equal(restored.parts[part], tensor)
    assert torch.equal(restored.dequantize(), matrix_nf4.dequantize())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_number_of_bytes_follows_from_the_shape(shape):
    matrix_nf4 = NF4.quantize(matrix(*shape))
    assert matrix_nf4.nbytes == NF4.nbytes(*shape)
    assert NF4.nbytes(4096, 4096) / 4096**2 == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256, abs=1e-6)


@pytest.mark.parametrize("shape", [(16, 32), (5, 37)], ids=str)
def test_a_matrix_is_dequantised_into_the_top_of_a_taller_buffer(shape):
    matrix_nf4 = NF4.quantize(matrix(*shape))
    buffer = torch.full((shape[0] + 3, shape[1]), 7.0, dtype=torch.bfloat16)
    top = buffer[: shape[0]]
    assert matrix_nf4.dequantize(top) is top
    assert torch.equal(buffer[: shape[0]], matrix_nf4.dequantize())
    assert (buffer[shape[0] :] == 7).all()


def test_a_buffer_of_another_shape_is_refused():
    matrix_nf4 = NF4.quantize(matrix(4, 8))
    wrong = (
        torch.empty(5, 8, dtype=torch.bfloat16),
        torch.empty(4, 8),
        torch.empty(8, 4, dtype=torch.bfloat16).T,
    )
    for out in wrong:
        with pytest.raises(ValueError, match=r"out must be \(4, 8\), torch.bfloat16 and"):
            matrix_nf4.dequantize(out)
    with pytest.raises(ValueError, match="need a matrix"):
        NF4.quantize(torch.zeros(3))


def test_zeros_are_exact():
    assert not NF4.quantize(torch.zeros(3, 64)).dequantize().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_and_gpu_read_matrices_of_each_other(shape, dtype):
    device, here = torch.device("cuda"), torch.device("cpu")
    w = matrix(*shape, dtype)
    for matrix_nf4 in (NF4.quantize(w), NF4.quantize(w.to(device)).to(here)):
        there = matrix_nf4.to(device)
        assert_same(there.dequantize().cpu(), matrix_nf4.dequantize())
        buffer = torch.full((shape[0] + 3, shape[1]), 7.0, dtype=dtype, device=device)
        there.dequantize(buffer[: shape[0]])
        assert_same(buffer[: shape[0]].cpu(), matrix_nf4.dequantize())
        assert (buffer[shape[0] :] == 7).all()


# The layers --------------------------------------------------------------------------------------


def factorised_layer(
    out: int = 24, inside: int = 40, rank: int = 6, bias=None, dtype=torch.float32
):
    torch.manual_seed(0)
    v, ut = (torch.randn(rank, size).to(dtype) / 4 for size in (inside, out))
    return PackedFactorized(NF4.quantize(v), NF4.quantize(ut), bias)


def dense_layer(out: int = 24, inside: int = 40, bias=None, dtype=torch.float32):
    torch.manual_seed(0)
    return Nf4Linear(NF4.quantize(torch.randn(out, inside).to(dtype)), bias)


def dense(layer) -> torch.Tensor:
    """Return the weight (out, in) that the layer multiplies by."""
    if isinstance(layer, Nf4Linear):
        return layer.matrix.dequantize()
    return layer.ut.dequantize().T @ layer.v.dequantize()


@pytest.mark.parametrize("make", [factorised_layer, dense_layer])
@pytest.mark.parametrize("bias", [None, torch.arange(24.0)], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40)])
def test_forward_and_backward_equal_those_of_the_dense_weight(make, bias, shape):
    layer = make(bias=bias)
    x = torch.randn(shape, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, expected = layer(x), nn.functional.linear(twin, dense(layer), bias)
    torch.testing.assert_close(y, expected)
    slope = torch.randn_like(y)
    y.backward(slope)
    expected.backward(slope)
    torch.testing.assert_close(x.grad, twin.grad)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("make", [factorised_layer, dense_layer])
def test_no_tensor_is_saved_for_the_backward_pass(make):
    layer, saved_tensors = make(), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda one: saved_tensors.append(one), lambda one: one
    ):
        layer(torch.randn(3, 40, requires_grad=True))
    assert saved_tensors == []


@pytest.mark.parametrize("make", [factorised_layer, dense_layer])
def test_the_input_is_cast_to_the_dtype_of_the_weight(make):
    layer = make(dtype=torch.bfloat16)
    x = torch.randn(3, 40, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), y)


def test_the_product_of_the_factors_is_the_multiplied_weight():
    layer = factorised_layer()
    assert layer.product().dtype == torch.float64
    u, v = layer.ut.dequantize().double().T, layer.v.dequantize().double()
    assert torch.equal(layer.product(), u @ v)
    assert (layer.in_features, layer.out_features, layer.rank) == (40, 24, 6)
    assert repr(layer) == "PackedFactorized(in_features=40, out_features=24, rank=6)"


def test_a_packed_layer_reports_an_empty_weight_and_saves_only_its_bias():
    layer = factorised_layer(dtype=torch.bfloat16, bias=torch.zeros(24))
    assert isinstance(layer, nn.Linear)
    assert (layer.weight.dtype, layer.weight.device.type) == (torch.bfloat16, "cpu")
    assert layer.weight.numel() == 0
    assert set(layer.state_dict()) == {"bias"}
    matrix_nf4 = sum(buffer.nbytes for buffer in layer.buffers())
    assert matrix_nf4 == NF4.nbytes(6, 40) + NF4.nbytes(6, 24)
    assert {buffer.device.type for buffer in layer.to("meta").buffers()} == {"meta"}


def test_a_cast_changes_the_dtype_of_the_computation_but_not_the_scales():
    layer = factorised_layer()
    twin = copy.deepcopy(layer).to(torch.bfloat16)
    x = torch.randn(3, 40)
    assert twin(x.bfloat16()).dtype == twin.weight.dtype == torch.bfloat16
    assert torch.equal(twin.to(torch.float32).product(), layer.product())


def test_multiplication_with_the_transposed_matrix():
    matrix_nf4 = NF4.quantize(torch.randn(5, 7))
    x, full = torch.randn(2, 5), matrix_nf4.dequantize()
    torch.testing.assert_close(multiply(x, matrix_nf4, transposed=True), x @ full)
    torch.testing.assert_close(multiply(torch.eye(7), matrix_nf4), full.T)


# PEFT --------------------------------------------------------------------------------------------


@pytest.fixture(params=["thin", "whole"])
def model(request):
    llama = tiny_llama(tiny_tokenizer(chat=True))
    modules = {}
    for name, layer in llama.named_modules():
        if name.endswith("_proj"):
            if request.param == "thin":
                modules[name] = factorised_layer(layer.out_features, layer.in_features, 16)
            else:
                modules[name] = Nf4Linear(NF4.quantize(layer.weight))
    emulator = with_modules(llama, modules)
    emulator.is_loaded_in_4bit = request.param == "whole"
    return emulator


def adapted(emulator) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=r".*_proj", task_type="CAUSAL_LM")
    return get_peft_model(emulator, config)


def test_peft_trains_only_the_adapter(model):
    quantized = {n for n, m in model.named_modules() if isinstance(m, PackedFactorized | Nf4Linear)}
    assert len(quantized) == 14
    four_bits = model.is_loaded_in_4bit
    tuned = adapted(model).train()
    layers = [m for m in tuned.modules() if isinstance(m, LoraLayer)]
    assert [isinstance(layer, Linear4bit) for layer in layers] == [four_bits] * 14
    assert all(p.dtype == torch.float32 for p in tuned.parameters() if p.requires_grad)
    before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(15):
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    changed = {name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    assert len(changed) == 28


def test_training_works_after_a_forward_in_eval_mode(model):
    """The layer of bitsandbytes would repack the weight, which then has no gradient."""
    with torch.no_grad():
        first = model.eval()(input_ids=IDS).logits
        again = model.train()(input_ids=IDS).logits
    torch.testing.assert_close(first, again)
    tuned = adapted(model).train()
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    first_b = next(p for name, p in tuned.named_parameters() if "lora_B" in name)
    assert first_b.grad.abs().max() > 0


def test_merging_an_adapter_into_four_bit_factors_is_refused():
    layer = nn.Sequential(factorised_layer(bias=torch.zeros(24)))
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"])
    with pytest.raises(RuntimeError, match="size of tensor"):
        get_peft_model(layer, config).merge_and_unload()
