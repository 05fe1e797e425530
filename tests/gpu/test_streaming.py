"""A blockwise forward holds one block and one pass on the device, and its sums are exact.

Run by `make test-gpu`.
"""

import pytest
import torch
from tiny import save_checkpoint
from torch import Tensor
from walked import MODELS, batches_of, model_and_blocks, record_block_tensors

from emloc.calibration.blockwise import iterate_blocks, iterate_checkpoint
from emloc.calibration.offload import StateLimits
from emloc.data.pending import PendingBatch, pin
from emloc.models.checkpoint.source import Source
from emloc.tensors.linalg.gram import FLOAT64_CHIPS, cross, gram, product

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


def on_device(kind: str):
    model, names = model_and_blocks(kind)
    return model.to(CUDA), names


@pytest.mark.parametrize("device_bytes", [0, 9000, 10**9])
@pytest.mark.parametrize("host_bytes", [None, 0, 9000])
@pytest.mark.parametrize("kind", MODELS)
def test_inputs_and_outputs_of_blocks_equal_those_of_a_whole_pass(
    kind, host_bytes, device_bytes, tmp_path
):
    model, names = on_device(kind)
    expected = record_block_tensors(model, names)
    with torch.no_grad():
        for one in batches_of(kind):
            moved = {key: value.to(CUDA) for key, value in one.items()}
            model(**moved, use_cache=False)
    twin, _ = on_device(kind)
    recorded = record_block_tensors(twin, names)
    limits = StateLimits(device_bytes, host_bytes)
    run = iterate_blocks(twin, batches_of(kind), names, CUDA, limits=limits, folder=tmp_path)
    for block in run:
        masks = []
        block.run(masks.append)
        # A block without tokens, as in a vision tower, has no mask.
        assert all(mask is None or mask.is_real.device == CUDA for mask in masks)
    for name in names:
        assert len(recorded[name]) == len(expected[name]) > 0
        for ours, theirs in zip(recorded[name], expected[name], strict=True):
            assert len(ours) == len(theirs) >= 2
            assert all(map(torch.equal, ours, theirs))
    assert all(one.device == CUDA for one in (*twin.parameters(), *twin.buffers()))


@pytest.mark.parametrize("kind", MODELS)
def test_suspended_passes_hold_no_device_memory(kind):
    """Only the model and the masks of a few bytes are on the device, but no hidden states."""
    model, names = on_device(kind)
    batches = batches_of(kind) * 20
    for block in iterate_blocks(model, batches, names, CUDA):
        block.run(lambda _: None)  # libraries allocate memory of their own at their first use
    run = iterate_blocks(model, batches, names, CUDA)
    before = torch.cuda.memory_allocated()
    for block in run:
        masks = 512 * len(batches)  # the smallest allocation
        assert torch.cuda.memory_allocated() - before <= masks
        block.run(lambda _: None)
    assert torch.cuda.memory_allocated() - before <= masks


def strong(dtype: torch.dtype) -> Tensor:
    """Return activations with four directions a hundred times stronger than the rest."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(8192, 512, generator=generator, device=CUDA) + 0.1
    turn = torch.linalg.qr(torch.randn(512, 512, generator=generator, device=CUDA))[0]
    scale = torch.ones(512, device=CUDA)
    scale[:4] = 100
    return (x * scale @ turn).to(dtype)


@pytest.mark.parametrize("chips", [FLOAT64_CHIPS, set()], ids=["float64", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_exact_in_weak_directions_beside_strong_ones(dtype, chips, monkeypatch):
    monkeypatch.setattr("emloc.tensors.linalg.gram.FLOAT64_CHIPS", chips)
    x = strong(dtype)
    exact = x.double().T @ x.double()
    weak = float(torch.linalg.eigvalsh(exact)[:-4].mean())

    def relative_error(actual: Tensor, true: Tensor) -> float:
        assert actual.dtype == torch.float64
        return float(torch.linalg.matrix_norm(actual - true, 2)) / weak

    assert relative_error(gram(x), exact) < 1e-3
    total = gram(x[:3000])
    assert gram(x[3000:], total=total) is total
    assert relative_error(total, exact) < 1e-3
    assert relative_error(cross(x, x[:, :40].contiguous()), exact[:, :40]) < 1e-3
    w = torch.randn(512, 64, device=CUDA).to(dtype)
    actual, true = product(x, w), x.double() @ w.double()
    assert actual.dtype in (torch.float32, torch.float64)
    assert float((actual - true).norm() / true.norm()) < 1e-6


def test_blocks_that_are_read_ahead_equal_those_that_are_read_at_once(tmp_path):
    source = Source(save_checkpoint(tmp_path, num_hidden_layers=3), "tiny", "tiny", torch.bfloat16)
    names = [f"model.layers.{index}" for index in range(3)]
    leaves = [name for name in source.sizes if name.startswith(names[1])]
    ahead = dict(source.read_ahead(leaves, pinned=True))
    assert ahead.keys() == set(leaves)
    assert all(tensor.is_pinned() for tensor in ahead.values())
    expected = dict(source.read(list(source.sizes), CUDA))
    batches = [{"input_ids": torch.arange(5, 12).reshape(1, 7)}]
    count = 0
    for block in iterate_checkpoint(source, batches, names, CUDA):
        for name, parameter in block.module.named_parameters():
            assert parameter.device == CUDA
            assert torch.equal(parameter, expected[f"{block.name}.{name}"])
            count += 1
    assert count == 3 * 9


def test_pending_images_are_pinned_and_arrive_on_the_device():
    torch.zeros(1, device=CUDA)
    tensor = pin(torch.ones(3))
    assert tensor.is_pinned()
    ready, names = {"labels": torch.zeros(2)}, ["pixel_values"]
    batch = PendingBatch(ready, lambda: {"pixel_values": tensor}, names)
    moved = batch.pin_memory().to(CUDA, non_blocking=True)
    assert moved["labels"].device == moved["pixel_values"].device == CUDA
    assert moved["pixel_values"].tolist() == [1, 1, 1]
