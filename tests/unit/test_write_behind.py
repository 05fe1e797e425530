"""Work behind a pass is done in order, within a limit of memory, and its errors are raised."""

import threading

import pytest
import torch

from emloc.anchors import write_behind
from emloc.anchors.write_behind import WriteBehind


def test_work_is_done_in_order_and_before_the_end():
    done = []
    with WriteBehind() as writer:
        for number in range(50):
            writer.submit(lambda number=number: done.append(number))
    assert done == list(range(50))


def test_a_copy_is_not_changed_with_its_tensor():
    with WriteBehind() as writer:
        tensor = torch.arange(6.0).view(2, 3).T
        copy = writer.copy(tensor)
        tensor.zero_()
        assert torch.equal(copy.complete(), torch.arange(6.0).view(2, 3).T)


def test_work_waits_for_room(monkeypatch):
    monkeypatch.setattr(write_behind, "MOST_WAITING", 1000)
    opened, waiting = threading.Event(), []

    def submit(writer):
        for number in range(3):
            writer.submit(opened.wait, 400)
            waiting.append(number)
        writer.copy(torch.zeros(1000))  # larger than the limit, but nothing waits before it

    with WriteBehind() as writer:
        thread = threading.Thread(target=submit, args=(writer,))
        thread.start()
        thread.join(0.3)
        assert waiting == [0, 1]
        opened.set()
        thread.join(20)
        assert waiting == [0, 1, 2]
        assert not thread.is_alive()


def fail():
    raise OSError("No space left on device")


def write(*works, error=None):
    """Do some work behind a pass that ends with an error, or without one."""
    with WriteBehind() as writer:
        for work in works:
            writer.submit(work)
        if error is not None:
            raise error


def test_an_error_is_raised_by_the_next_call_and_ends_the_work():
    done, begun, writer = [], threading.Event(), WriteBehind()
    writer.submit(begun.wait)
    writer.submit(fail)
    writer.submit(lambda: done.append(1))
    begun.set()
    with pytest.raises(OSError, match="No space"):
        writer.wait()
    assert done == []


def test_an_error_at_the_end_is_raised_unless_the_pass_has_one():
    with pytest.raises(OSError, match="No space"):
        write(fail)
    with pytest.raises(ValueError, match="of the pass"):
        write(fail, error=ValueError("of the pass"))


def test_work_before_an_error_of_the_pass_is_done():
    done = []
    with pytest.raises(ValueError, match="of the pass"):
        write(lambda: done.append(1), error=ValueError("of the pass"))
    assert done == [1]
