"""The lengths that batches are padded to are the best ones."""

from itertools import combinations
from random import Random

import pytest

from emloc.data.lengths import best_lengths, padded_to


def padding(lengths: list[int], chosen: list[int]) -> int:
    return sum(padded_to(length, chosen) - length for length in lengths)


@pytest.mark.parametrize("seed", range(40))
def test_no_other_lengths_pad_less(seed):
    random = Random(seed)
    lengths = [random.randint(1, 12) for _ in range(random.randint(1, 15))]
    most = random.randint(1, 4)
    different = sorted({*lengths})
    others = [
        [*some, different[-1]]
        for size in range(most)
        for some in combinations(different[:-1], min(size, len(different) - 1))
    ]
    chosen = best_lengths(lengths, most)
    assert chosen == sorted({*chosen})
    assert len(chosen) <= most
    assert padding(lengths, chosen) == min(padding(lengths, other) for other in others)


def test_few_lengths_are_all_chosen():
    assert best_lengths([7, 3, 3, 5], 8) == [3, 5, 7]
    assert [padded_to(length, [3, 5, 7]) for length in (1, 3, 4, 7)] == [3, 3, 5, 7]


def test_eight_lengths_pad_less_than_powers_of_two():
    random = Random(0)
    lengths = [int(random.lognormvariate(5.2, 0.35)) for _ in range(2000)]
    share = padding(lengths, best_lengths(lengths, 8)) / sum(lengths)
    powers = padding(lengths, [2**n for n in range(4, 12)]) / sum(lengths)
    assert share < 0.1 < powers
