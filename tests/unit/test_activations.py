"""Inputs of layers in host memory come back in the reverse of their order."""

import torch

from emloc.tensors.lean.activations import HostCopy, LastFirst


def stored(order):
    """A copy whose event does not matter."""
    copy = HostCopy(torch.empty(1), torch.Size([1]), torch.uint8, torch.device("cpu"), None)
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
