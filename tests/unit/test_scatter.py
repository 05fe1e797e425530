"""The LoRA of a pruned layer at full size: the trained values at kept indices, zero elsewhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emloc.tensors.linalg.correct import LoraPair
from emloc.tensors.linalg.prune import scatter, unit_indices


def draw_indices(data, count: int) -> torch.Tensor | None:
    """Draw ascending indices below `count`, at least one; None means not pruned."""
    if data.draw(st.booleans()):
        return None
    indices = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count))
    return torch.tensor(sorted(indices))


@given(data=st.data())
def test_the_update_is_the_trained_one_at_kept_indices_and_zero_elsewhere(data):
    out, into, rank = (data.draw(st.integers(1, n)) for n in (9, 7, 4))
    rows, columns = draw_indices(data, out), draw_indices(data, into)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    m = out if rows is None else len(rows)
    n = into if columns is None else len(columns)
    a = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    b = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    small = LoraPair(a, b, data.draw(st.sampled_from([0.5, 1.0, 2.0])))
    large = scatter(small, (out, into), rows, columns)
    assert large.scale == small.scale
    assert (large.a.shape, large.b.shape) == ((rank, into), (out, rank))
    rows = torch.arange(out) if rows is None else rows
    columns = torch.arange(into) if columns is None else columns
    kept_update = large.delta[rows[:, None], columns]
    torch.testing.assert_close(kept_update, small.delta, atol=1e-14, rtol=1e-14)
    elsewhere = large.delta.clone()
    elsewhere[rows[:, None], columns] = 0
    assert not elsewhere.any()
    assert (small.a.shape, small.b.shape) == ((rank, n), (m, rank))


def test_a_scattered_pair_keeps_its_dtype_and_values():
    pair = LoraPair(torch.tensor([[1.5, 2.5]]).half(), torch.tensor([[3.0]]).half(), 1.0)
    large = scatter(pair, (3, 4), torch.tensor([2]), torch.tensor([0, 3]))
    assert large.a.tolist() == [[1.5, 0, 0, 2.5]]
    assert large.b.tolist() == [[0], [0], [3]]
    assert large.a.dtype == large.b.dtype == torch.float16


def test_a_pair_that_does_not_fit_the_indices_is_refused():
    pair = LoraPair(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    with pytest.raises((IndexError, RuntimeError)):
        scatter(pair, (3, 4), None, torch.tensor([0, 1, 2]))


def test_a_unit_spans_consecutive_rows():
    assert unit_indices(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]
    assert unit_indices(torch.tensor([1, 4]), 1).tolist() == [1, 4]
