"""Four-bit matrices are exact as values, the same on every device, and linears to everybody."""

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

# QLoRA's table: the quantiles of a normal distribution, as its authors published them.
STEPS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)

# Widths that are no multiple of 64 among them, some of which bitsandbytes' CPU kernel gets wrong.
SHAPES = [(1, 1), (3, 5), (13, 37), (16, 32), (7, 48), (33, 100), (5, 112), (64, 64), (300, 192)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

IDS = torch.arange(24).reshape(2, 12) + 5


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    torch.manual_seed(0)
    # Rows of very different size, as factors have.
    return (torch.randn(rows, columns) * torch.logspace(1, -2, rows)[:, None]).to(dtype)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, but for the last place of float16 where bitsandbytes runs with its CUDA library.

    That one does not round every product to the nearest half, whichever device it is formed on.
    """
    assert found.dtype == expected.dtype
    if found.dtype == torch.float16 and torch.cuda.is_available():
        torch.testing.assert_close(found, expected, rtol=2**-10, atol=0)
    else:
        assert torch.equal(found, expected)


# The value ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_number_is_its_code_times_the_scale_of_its_block(shape, dtype):
    """Written out from the layout, which is the same on every device."""
    held = NF4.quantize(matrix(*shape, dtype))
    codes = torch.stack(
        [held.parts["codes"].view(-1) >> 4, held.parts["codes"].view(-1) & 15], 1
    ).view(-1, 64)
    groups = held.parts["scales"][1:].repeat_interleave(256)[: len(codes)]
    sizes = create_dynamic_map()[held.parts["absmax"].int()] * groups + held.parts["scales"][0]
    size = shape[0] * shape[1]
    expected = (STEPS[codes.int()] * sizes[:, None]).to(dtype).view(-1)[:size].view(shape)
    assert_same(held.dequantize(), expected)
    assert held.dequantize().dtype == dtype


@pytest.mark.parametrize("columns", range(16, 257, 16))
def test_a_tenth_of_the_size_is_lost_at_any_width(columns):
    torch.manual_seed(0)
    w = torch.randn(64, columns)
    lost = (NF4.quantize(w).dequantize() - w).norm() / w.norm()
    assert 0.07 < float(lost) < 0.11


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_file_gives_back_the_very_matrix(tmp_path, shape):
    held = NF4.quantize(matrix(*shape))
    parts = held.tensors("layer.v") | NF4.quantize(matrix(4, 4)).tensors("layer.ut")
    save_file(parts, tmp_path / "file.safetensors")
    found = NF4.from_tensors("layer.v", load_file(tmp_path / "file.safetensors"))
    assert (found.shape, found.dtype, found.nbytes) == (held.shape, held.dtype, held.nbytes)
    assert list(found.parts) == list(held.parts) == ["codes", "absmax", "scales"]
    for part, tensor in held.parts.items():
        assert torch.equal(found.parts[part], tensor)
    assert torch.equal(found.dequantize(), held.dequantize())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_its_bytes_are_known_without_it(shape):
    held = NF4.quantize(matrix(*shape))
    assert held.nbytes == NF4.nbytes(*shape)
    assert NF4.nbytes(4096, 4096) / 4096**2 == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256, abs=1e-6)


@pytest.mark.parametrize("shape", [(16, 32), (5, 37)], ids=str)
def test_it_is_written_on_top_of_a_taller_buffer(shape):
    held = NF4.quantize(matrix(*shape))
    buffer = torch.full((shape[0] + 3, shape[1]), 7.0, dtype=torch.bfloat16)
    top = buffer[: shape[0]]
    assert held.dequantize(top) is top
    assert torch.equal(buffer[: shape[0]], held.dequantize())
    assert (buffer[shape[0] :] == 7).all()


def test_a_buffer_that_does_not_fit_is_refused():
    held = NF4.quantize(matrix(4, 8))
    wrong = (
        torch.empty(5, 8, dtype=torch.bfloat16),
        torch.empty(4, 8),
        torch.empty(8, 4, dtype=torch.bfloat16).T,
    )
    for out in wrong:
        with pytest.raises(ValueError, match=r"out must be \(4, 8\), torch.bfloat16 and"):
            held.dequantize(out)
    with pytest.raises(ValueError, match="need a matrix"):
        NF4.quantize(torch.zeros(3))


def test_nothing_is_lost_of_zeros():
    assert not NF4.quantize(torch.zeros(3, 64)).dequantize().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_device_reads_what_a_cpu_wrote_and_the_other_way_round(shape, dtype):
    device, here = torch.device("cuda"), torch.device("cpu")
    w = matrix(*shape, dtype)
    for held in (NF4.quantize(w), NF4.quantize(w.to(device)).to(here)):
        there = held.to(device)
        assert_same(there.dequantize().cpu(), held.dequantize())
        buffer = torch.full((shape[0] + 3, shape[1]), 7.0, dtype=dtype, device=device)
        there.dequantize(buffer[: shape[0]])
        assert_same(buffer[: shape[0]].cpu(), held.dequantize())
        assert (buffer[shape[0] :] == 7).all()


# The layers --------------------------------------------------------------------------------------


def thin(out: int = 24, inside: int = 40, rank: int = 6, bias=None, dtype=torch.float32):
    torch.manual_seed(0)
    v, ut = (torch.randn(rank, size).to(dtype) / 4 for size in (inside, out))
    return PackedFactorized(NF4.quantize(v), NF4.quantize(ut), bias)


def whole(out: int = 24, inside: int = 40, bias=None, dtype=torch.float32):
    torch.manual_seed(0)
    return Nf4Linear(NF4.quantize(torch.randn(out, inside).to(dtype)), bias)


def dense(layer) -> torch.Tensor:
    """What the layer multiplies by, (out, in)."""
    if isinstance(layer, Nf4Linear):
        return layer.matrix.dequantize()
    return layer.ut.dequantize().T @ layer.v.dequantize()


@pytest.mark.parametrize("make", [thin, whole])
@pytest.mark.parametrize("bias", [None, torch.arange(24.0)], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40)])
def test_forward_and_backward_are_those_of_the_dense_weight(make, bias, shape):
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


@pytest.mark.parametrize("make", [thin, whole])
def test_nothing_is_kept_for_the_backward_pass(make):
    layer, kept = make(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one), lambda one: one):
        layer(torch.randn(3, 40, requires_grad=True))
    assert kept == []


@pytest.mark.parametrize("make", [thin, whole])
def test_the_input_is_taken_in_the_dtype_of_the_weight(make):
    layer = make(dtype=torch.bfloat16)
    x = torch.randn(3, 40, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), y)


def test_the_product_is_what_is_multiplied():
    layer = thin()
    assert layer.product().dtype == torch.float64
    u, v = layer.ut.dequantize().double().T, layer.v.dequantize().double()
    assert torch.equal(layer.product(), u @ v)
    assert (layer.in_features, layer.out_features, layer.rank) == (40, 24, 6)
    assert repr(layer) == "PackedFactorized(in_features=40, out_features=24, rank=6)"


def test_it_answers_for_its_weight_and_saves_none():
    layer = thin(dtype=torch.bfloat16, bias=torch.zeros(24))
    assert isinstance(layer, nn.Linear)
    assert (layer.weight.dtype, layer.weight.device.type) == (torch.bfloat16, "cpu")
    assert layer.weight.numel() == 0
    assert set(layer.state_dict()) == {"bias"}
    held = sum(buffer.nbytes for buffer in layer.buffers())
    assert held == NF4.nbytes(6, 40) + NF4.nbytes(6, 24)
    assert {buffer.device.type for buffer in layer.to("meta").buffers()} == {"meta"}


def test_a_cast_changes_the_type_it_computes_in_and_no_scale():
    layer = thin()
    twin = copy.deepcopy(layer).to(torch.bfloat16)
    x = torch.randn(3, 40)
    assert twin(x.bfloat16()).dtype == twin.weight.dtype == torch.bfloat16
    assert torch.equal(twin.to(torch.float32).product(), layer.product())


def test_the_product_with_a_turned_matrix_is_the_other_one():
    held = NF4.quantize(torch.randn(5, 7))
    x, full = torch.randn(2, 5), held.dequantize()
    torch.testing.assert_close(multiply(x, held, transposed=True), x @ full)
    torch.testing.assert_close(multiply(torch.eye(7), held), full.T)


# PEFT --------------------------------------------------------------------------------------------


@pytest.fixture(params=["thin", "whole"])
def model(request):
    llama = tiny_llama(tiny_tokenizer(chat=True))
    modules = {}
    for name, layer in llama.named_modules():
        if name.endswith("_proj"):
            if request.param == "thin":
                modules[name] = thin(layer.out_features, layer.in_features, 16)
            else:
                modules[name] = Nf4Linear(NF4.quantize(layer.weight))
    emulator = with_modules(llama, modules)
    emulator.is_loaded_in_4bit = request.param == "whole"
    return emulator


def adapted(emulator) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=r".*_proj", task_type="CAUSAL_LM")
    return get_peft_model(emulator, config)


def test_peft_trains_the_adapter_and_nothing_else(model):
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


def test_a_look_in_eval_mode_does_not_spoil_the_training(model):
    """bitsandbytes' own layer would repack the weight, which then has no gradient."""
    with torch.no_grad():
        first = model.eval()(input_ids=IDS).logits
        again = model.train()(input_ids=IDS).logits
    torch.testing.assert_close(first, again)
    tuned = adapted(model).train()
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    first_b = next(p for name, p in tuned.named_parameters() if "lora_B" in name)
    assert first_b.grad.abs().max() > 0


def test_folding_an_adapter_into_four_bit_factors_fails_aloud():
    layer = nn.Sequential(thin(bias=torch.zeros(24)))
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"])
    with pytest.raises(RuntimeError, match="size of tensor"):
        get_peft_model(layer, config).merge_and_unload()
