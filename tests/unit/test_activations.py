"""Inputs of layers in host memory come back in the reverse of their order."""

from contextlib import nullcontext

import pytest
import torch

from emloc.tensors.lean.activations import HostCopies, HostCopy, LastFirst

CPU = torch.device("cpu")


class Stream:
    """Stands for a stream of a CPU, on which everything is complete at once."""

    waits: int = 0

    def wait_stream(self, other):
        self.waits += 1

    def wait_event(self, event):
        assert event.is_recorded
        self.waits += 1


class Event:
    is_recorded = False

    def record(self, stream):
        self.is_recorded = True


@pytest.fixture
def copies(monkeypatch):
    main, empty = Stream(), torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    unpinned = lambda *sizes, pin_memory=False, **options: empty(*sizes, **options)  # noqa: E731
    monkeypatch.setattr(torch, "empty", unpinned)
    return HostCopies(CPU)


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [3, 0, 2, 1], [0, 1, 2, 3]])
def test_every_tensor_comes_back_in_any_order(copies, order):
    torch.manual_seed(0)
    for _ in range(2):  # the second time in the same buffers
        tensors = [torch.randn(4, 5) for _ in order]
        stored_tensors = [copies.store(tensor.clone()) for tensor in tensors]
        for index in order:
            assert torch.equal(copies.load(stored_tensors[index]), tensors[index])
    assert len(copies._free) == len(order)


def test_the_one_before_is_on_its_way_when_one_is_read(copies):
    first, last = copies.store(torch.ones(2)), copies.store(torch.ones(3))
    copies.load(last)
    assert first.back is not None
    assert torch.equal(copies.load(first), torch.ones(2))
    assert first.back is None


def stored(order):
    """A copy whose event does not matter."""
    copy = HostCopy(torch.empty(1), torch.Size([1]), torch.uint8, CPU, None)
    order.add(copy)
    return copy


def test_the_one_before_comes_next():
    order = LastFirst()
    copies = [stored(order) for _ in range(3)]
    assert order.take(copies[2]) is copies[1]
    assert order.take(copies[1]) is copies[0]
    assert order.take(copies[0]) is None


def test_another_order_forgets_nothing():
    order = LastFirst()
    copies = [stored(order) for _ in range(3)]
    assert order.take(copies[0]) is None
    assert order.take(copies[2]) is copies[1]


def test_what_nobody_needs_any_more_does_not_come():
    order = LastFirst()
    first, dropped, last = (stored(order) for _ in range(3))
    del dropped
    assert order.take(last) is first


def test_what_is_on_its_way_does_not_come_twice():
    order = LastFirst()
    first, last = stored(order), stored(order)
    first.buffer = None
    assert order.take(last) is None
