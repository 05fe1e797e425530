"""The least time of some work: its matrix operations alone, and its bytes over the disk's rate."""

import pytest
import torch

from emloc.cost.bench import bound
from emloc.cost.bench.bound import (
    MatrixOperation,
    TensorSpec,
    disk_rate,
    drop_cached,
    matrix_operations,
    seconds_alone,
)

CPU = torch.device("cpu")


def work():
    """Run three products of two shapes, a decomposition, and what is neither of both."""
    square = torch.eye(4, dtype=torch.float64)
    for _ in range(2):
        torch.ones(2, 3) @ torch.ones(3, 5)
    torch.ones(2, 3, dtype=torch.float64) @ torch.ones(5, 3, dtype=torch.float64).T
    torch.linalg.cholesky(square).add(1).sum()


def test_operations_on_matrices_are_counted_by_their_shapes():
    operations = matrix_operations(work)
    counts = {
        (operation.function.overloadpacket.__name__, operation.args[0].shape): count
        for operation, count in operations.items()
        if operation.args[0].dtype == torch.float64
    }
    assert counts == {("mm", (2, 3)): 1, ("linalg_cholesky_ex", (4, 4)): 1}
    (single,) = (one for one in operations if one.args[0].dtype == torch.float32)
    assert operations[single] == 2
    assert [spec.shape for spec in single.args] == [(2, 3), (3, 5)]
    (transposed,) = (
        one.args[1] for one in operations if one.args[0].shape == (2, 3) and one != single
    )
    assert transposed.stride == (1, 3)


def test_each_operation_is_timed_alone_and_counts_as_often_as_it_ran(monkeypatch):
    monkeypatch.setattr(MatrixOperation, "seconds", lambda self, _: float(self.args[0].shape[0]))
    assert seconds_alone(matrix_operations(work), CPU) == 2 * 2 + 2 + 4


def test_an_operation_runs_again_on_random_values_of_its_layout(monkeypatch):
    calls = []

    def time_call(function, device):
        function()
        return 6.0

    monkeypatch.setattr(bound, "time_call", time_call)
    spec = TensorSpec((2, 3), (1, 2), torch.bfloat16)
    operation = MatrixOperation(lambda *args, **o: calls.append((args, o)), (spec, 7), (("a", 1),))
    assert operation.seconds(CPU) == 6 / bound._REPEATS
    assert len(calls) == 1 + bound._REPEATS
    (tensor, number), options = calls[0]
    assert (tuple(tensor.shape), tensor.stride(), tensor.dtype) == ((2, 3), (1, 2), torch.bfloat16)
    assert tensor.float().std() > 0
    assert (number, options) == (7, {"a": 1})


@pytest.mark.parametrize("size", [1, 2, 40])
def test_a_square_matrix_can_be_decomposed(size):
    matrix = TensorSpec((size, size), (size, 1), torch.float64).random(CPU)
    assert torch.equal(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > 0


def test_the_rate_of_the_disk_counts_all_bytes_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bound, "_CHUNK", 1000)
    files = [tmp_path / "a", tmp_path / "b"]
    for path, size in zip(files, (2500, 999), strict=True):
        path.write_bytes(b"x" * size)
    read, chunks = bound._read, []
    monkeypatch.setattr(bound, "_read", lambda chunk: (chunks.append(chunk), read(chunk)))

    def time_call(function, device):
        function()
        return 2.0

    monkeypatch.setattr(bound, "time_call", time_call)
    assert disk_rate(files) == 3499 / 2
    assert sorted(chunks) == [(files[0], 0), (files[0], 1000), (files[0], 2000), (files[1], 0)]
    drop_cached(files)
    assert files[0].read_bytes() == b"x" * 2500
