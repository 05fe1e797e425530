"""A walk on a device holds one block and one pass there, and its sums keep the weak directions.

`make test-gpu`.
"""

import pytest
import torch
from torch import Tensor
from walked import MODELS, batches_of, model_and_blocks, record_block_tensors

from emloc.calibration.blockwise import iterate_blocks
from emloc.tensors.linalg.gram import FLOAT64_CHIPS, cross, gram, product

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


def on_device(kind: str):
    model, names = model_and_blocks(kind)
    return model.to(CUDA), names


@pytest.mark.parametrize("host_bytes", [None, 0, 9000])
@pytest.mark.parametrize("kind", MODELS)
def test_blocks_take_and_give_the_very_bits_of_a_whole_pass(kind, host_bytes, tmp_path):
    model, names = on_device(kind)
    expected = record_block_tensors(model, names)
    with torch.no_grad():
        for one in batches_of(kind):
            moved = {key: value.to(CUDA) for key, value in one.items()}
            model(**moved, use_cache=False)
    twin, _ = on_device(kind)
    found = record_block_tensors(twin, names)
    run = iterate_blocks(
        twin, batches_of(kind), names, CUDA, host_bytes=host_bytes, folder=tmp_path
    )
    for block in run:
        masks = []
        block.run(masks.append)
        # A block that sees no tokens, as of a vision tower, has no mask.
        assert all(mask is None or mask.device == CUDA for mask in masks)
    for name in names:
        assert len(found[name]) == len(expected[name]) > 0
        for ours, theirs in zip(found[name], expected[name], strict=True):
            assert len(ours) == len(theirs) >= 2
            assert all(map(torch.equal, ours, theirs))
    assert all(one.device == CUDA for one in (*twin.parameters(), *twin.buffers()))


@pytest.mark.parametrize("kind", MODELS)
def test_stopped_passes_hold_nothing_of_the_device(kind):
    """Beside the model: the masks, which are a few bytes, and no states."""
    model, names = on_device(kind)
    batches = batches_of(kind) * 20
    run = iterate_blocks(model, batches, names, CUDA)
    before = torch.cuda.memory_allocated()
    for block in run:
        masks = 512 * len(batches)  # the allocator's smallest piece
        assert torch.cuda.memory_allocated() - before <= masks
        block.run(lambda _: None)
    assert torch.cuda.memory_allocated() - before <= masks


def strong(dtype: torch.dtype) -> Tensor:
    """Activations of which four directions are a hundred times stronger than the rest."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(8192, 512, generator=generator, device=CUDA) + 0.1
    turn = torch.linalg.qr(torch.randn(512, 512, generator=generator, device=CUDA))[0]
    scale = torch.ones(512, device=CUDA)
    scale[:4] = 100
    return (x * scale @ turn).to(dtype)


@pytest.mark.parametrize("chips", [FLOAT64_CHIPS, set()], ids=["float64", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_keep_the_weak_directions_beside_the_strong(dtype, chips, monkeypatch):
    monkeypatch.setattr("emloc.tensors.linalg.gram.FLOAT64_CHIPS", chips)
    x = strong(dtype)
    exact = x.double().T @ x.double()
    weak = float(torch.linalg.eigvalsh(exact)[:-4].mean())

    def off(found: Tensor, true: Tensor) -> float:
        assert found.dtype == torch.float64
        return float(torch.linalg.matrix_norm(found - true, 2)) / weak

    assert off(gram(x), exact) < 1e-3
    total = gram(x[:3000])
    assert gram(x[3000:], total=total) is total
    assert off(total, exact) < 1e-3
    assert off(cross(x, x[:, :40].contiguous()), exact[:, :40]) < 1e-3
    w = torch.randn(512, 64, device=CUDA).to(dtype)
    found, true = product(x, w), x.double() @ w.double()
    assert found.dtype in (torch.float32, torch.float64)
    assert float((found - true).norm() / true.norm()) < 1e-6
