"""Rows of a user's own loop: digests of their content, and the order in which they are drawn."""

from dataclasses import dataclass
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emloc.errors import ConfigError
from emloc.library.draw_order import DrawOrder, FixedOrder
from emloc.library.row_content import content_digest


@dataclass
class Answer:
    text: str


def content(change: str = "") -> dict:
    """A row with items of all kinds; `change` names the item that differs from the usual row."""

    def one(name: str, usual, other):
        return other if change == name else usual

    return {
        "ids": one("ids", torch.arange(6), torch.arange(6).flip(0)),
        "shape": one("shape", torch.zeros(2, 3), torch.zeros(3, 2)),
        "dtype": one("dtype", torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        "bits": one("bits", torch.ones(2).bfloat16(), torch.full((2,), 1.0078125).bfloat16()),
        "column": one("column", torch.arange(6).view(2, 3).T, torch.arange(6).view(3, 2)),
        "list": one("list", [1, 2, 3], [1, 23]),
        "text": one("text", "a", "b"),
        "nested": [{"answers": one("nested", [Answer("yes"), None], [Answer("no"), None])}],
        "array": one("array", np.arange(4), np.arange(4.0)),
        "image": Image.new("RGB", (4, 3), one("image", "red", "blue")),
        "wide": Image.new("L", one("wide", (4, 3), (3, 4))),
        "empty": one("empty", torch.zeros(0), torch.zeros(0, 2)),
        "kind": one("kind", (1, 2), [1, 2]),
        "truth": one("truth", 1, True),
    }


def test_equal_rows_have_equal_digests():
    shuffled = [*content().items()]
    Random(0).shuffle(shuffled)
    assert content_digest(content()) == content_digest(dict(shuffled))


@pytest.mark.parametrize("item", content())
def test_every_item_of_a_row_is_part_of_its_digest(item):
    assert content_digest(content(item)) != content_digest(content())
    without = {name: value for name, value in content().items() if name != item}
    assert content_digest(without) != content_digest(content())


def test_an_item_without_content_is_refused():
    with pytest.raises(ConfigError, match="an item of the type object, whose content cannot"):
        content_digest({"a": [object()]})


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 5), st.booleans())
def test_rows_in_their_order_are_accepted_epoch_by_epoch(numbers, size, drops_last):
    """Rows may repeat. Where they do not, an epoch may end early."""
    if drops_last:
        numbers = [*range(len(numbers))]
    order, window = DrawOrder(numbers), range(len(numbers))
    drawn = [*FixedOrder(len(numbers))]
    for _ in range(3):
        for start in range(0, len(drawn), size):
            batch = [numbers[position] for position in drawn[start : start + size]]
            if not drops_last or len(batch) == size:
                order.advance(batch, window, 0)
                assert order.next == min(start + size, len(numbers))


@given(st.integers(2, 9), st.data())
def test_distinct_rows_in_another_order_are_refused(count, data):
    drawn = data.draw(st.permutations(range(count)).filter(lambda one: one != [*range(count)]))
    order = DrawOrder(range(count))
    with pytest.raises(ConfigError, match="rows come in another order"):
        order.advance(drawn, range(count), 0)
    assert order.next is None  # a refused batch is not drawn


@pytest.mark.parametrize("shard", ["batches", "rows"])
@pytest.mark.parametrize("rank", range(3))
def test_each_of_three_processes_draws_its_own_rows(rank, shard):
    """Whole batches in turn, as accelerate cuts them, or every third row."""
    order, size = DrawOrder(range(24)), 4
    batches = [[*range(start, start + size)] for start in range(0, 24, size)][rank::3]
    if shard == "rows":
        own = [*range(rank, 24, 3)]
        batches = [own[:size], own[size:]]
    for _ in range(2):
        for batch in batches:
            order.advance(batch, range(24), 2 * size)
    with pytest.raises(ConfigError, match="rows come in another order"):
        order.advance([batches[-1][-1] - 2], range(24), 2)


def test_a_row_of_another_round_is_refused():
    order = DrawOrder(range(8))
    order.advance([0, 1, 2, 3], range(4), 0)
    with pytest.raises(ConfigError, match=r"row 4 is not in this round, .* 0 to 3; call anchors"):
        order.advance([4, 5], range(4), 0)
    order.advance([4, 5, 6, 7], range(4, 8), 0)
    with pytest.raises(ConfigError, match="row 0 is not in this round, which has the rows 4 to 7"):
        order.advance([0], range(4, 8), 0)
