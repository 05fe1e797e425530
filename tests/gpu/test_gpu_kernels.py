"""Kernels on a GPU compute what the operations of torch and bitsandbytes compute.

Run by `make test-gpu`.
"""

import pytest
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from emloc.precision import Packed, error_feedback, uniform
from emloc.precision.nf4 import BITS, Nf4, _kernel
from emloc.tensors.lean.kernels import liger
from emloc.tensors.nn.attention import with_cudnn, without_cudnn

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


@pytest.fixture
def library():
    pytest.importorskip("liger_kernel")
    found = liger()
    assert found is not None
    return found


def leaves(*shapes):
    torch.manual_seed(0)
    return [
        torch.randn(shape, device=CUDA, dtype=torch.bfloat16).requires_grad_() for shape in shapes
    ]


def outputs_and_gradients(function, inputs):
    fresh = [one.detach().clone().requires_grad_() for one in inputs]
    outputs = function(*[one * 1 for one in fresh])  # kernels overwrite their inputs
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((one.float() * 0.5).square().sum() for one in outputs).backward()
    return [*outputs, *(one.grad for one in fresh)]


def assert_near(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert (one.float() - other.float()).norm() <= 0.01 * other.float().norm()


@pytest.mark.parametrize("shape", [(2, 33, 96), (5, 14336)])
def test_the_gated_unit(library, shape):
    inputs = leaves(shape, shape)
    expected = outputs_and_gradients(lambda gate, up: functional.silu(gate) * up, inputs)
    assert_near(outputs_and_gradients(library[0], inputs), expected)


@pytest.mark.parametrize("heads", [(32, 8), (9, 3)])
def test_the_rotation(library, heads):
    q, k = leaves((2, 40, heads[0], 64), (2, 40, heads[1], 64))
    angle = torch.randn(2, 40, 32, device=CUDA).repeat(1, 1, 2)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()

    def by(rotate):
        return lambda q, k: rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    expected = outputs_and_gradients(by(apply_rotary_pos_emb), (q, k))
    assert_near(outputs_and_gradients(by(library[1]), (q, k)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 7), (64, 96), (33, 130), (1024, 4096)])
def test_nf4_is_dequantised_as_by_bitsandbytes(shape, dtype):
    kernel, precision = _kernel(CUDA), Nf4(name="nf4", bits=BITS)
    assert kernel is not None
    matrix = torch.randn(shape, device=CUDA).to(dtype)
    packed = Packed(precision, precision.pack(matrix), shape, dtype)
    out = torch.full(shape, float("nan"), device=CUDA, dtype=dtype)
    assert packed.dequantize(out) is out
    on_cpu = packed.to(torch.device("cpu")).dequantize().to(CUDA)
    # A GPU rounds the product and sum of a magnitude once, or twice.
    torch.testing.assert_close(out, on_cpu, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=1e-6)
    assert torch.equal(packed.dequantize(), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (64, 96), (33, 130), (1024, 4096)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_evenly_spaced_levels_are_dequantised_as_on_a_cpu(bits, shape, dtype):
    kernel, precision = uniform._kernel(CUDA), uniform.Uniform(name="small", bits=bits)
    assert kernel is not None
    matrix = torch.randn(shape, device=CUDA).to(dtype)
    inputs = torch.randn(64, shape[1], device=CUDA)
    packed = precision.quantize(matrix, columns=inputs.T @ inputs)
    out = torch.full(shape, float("nan"), device=CUDA, dtype=dtype)
    assert packed.dequantize(out) is out
    on_cpu = packed.to(torch.device("cpu")).dequantize().to(CUDA)
    torch.testing.assert_close(out, on_cpu, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=1e-6)
    assert torch.equal(packed.dequantize(), out)


@pytest.mark.parametrize("shape", [(5, 7), (64, 96), (200, 130), (896, 1000)])
def test_error_feedback_is_that_of_the_cpu(shape):
    assert error_feedback._kernel(CUDA) is not None
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    inputs = torch.randn(2000, shape[0], generator=generator)
    inputs *= torch.logspace(0, -1, shape[0])
    steps, zeros = torch.full(shape, 0.5), torch.full(shape, 3.4)
    on_cpu, on_gpu = (
        error_feedback.round_rows(
            *(one.to(device) for one in (matrix, inputs.T @ inputs, steps, zeros)), levels=7
        ).cpu()
        for device in ("cpu", CUDA)
    )

    def error(codes):
        return (inputs @ ((codes - zeros) * steps - matrix)).square().sum()

    # A rounding error decides between two codes here and there, and all later ones follow.
    assert (on_cpu != on_gpu).float().mean() < 0.05
    assert error(on_gpu) == pytest.approx(error(on_cpu), rel=0.02)


@pytest.mark.parametrize("length", [64, 320, 704, 768])
def test_attention_by_cudnn_has_finite_gradients_where_all_scores_are_very_low(length):
    q, k, v = leaves(*[(1, 2, length, 64)] * 3)
    with torch.no_grad():
        q.mul_(0.1)[..., 0] = 1.0
        k.mul_(0.1)[..., 0] = -120 * 8.0  # all scores are near -120

    def attention(q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with without_cudnn():
        expected = outputs_and_gradients(attention, (q, k, v))
        with with_cudnn():
            actual = outputs_and_gradients(attention, (q, k, v))
    assert all(one.isfinite().all() for one in actual)
    # The gradients of q and k are mostly rounding.
    assert_near([actual[0], actual[3]], [expected[0], expected[3]])
