"""How far a sweep is said to be, from what its processes wrote."""

import pytest

from emloc.sweeps.progress import Stint, Tally, line, seconds_left


def done(begun: float, ended: float, cell: str = "x") -> Stint:
    return Stint(cell, begun, False, ended, "done")


def test_what_is_left_takes_the_mean_of_what_was_done():
    assert seconds_left([done(0, 10), done(10, 30)], 4, now=30) == pytest.approx(30)


def test_cells_done_before_or_failed_at_once_say_nothing_of_the_time_left():
    known = [Stint("a", 0, True, 0.1, "done"), Stint("b", 1, False, 1.1, "failed")]
    assert seconds_left(known, 4, now=2) is None
    assert seconds_left([*known, done(2, 62)], 5, now=62) == pytest.approx(120)


def test_cells_side_by_side_are_left_side_by_side():
    """Two workers: the one that has ended leaves a running one, half way, and two that wait."""
    known = [done(0, 20), Stint("b", 10, False)]
    assert seconds_left(known, 4, now=20) == pytest.approx((10 + 2 * 20) / 2)


def test_nothing_is_said_of_a_cell_that_takes_longer_than_those_before_it():
    assert seconds_left([done(0, 10), Stint("b", 10, False)], 2, now=50) is None


@pytest.mark.parametrize(
    ("stints", "total", "words"),
    [
        ([done(0, 600)], 2, "1 of 2 cells done, about 10 min left"),
        ([done(0, 9000)], 2, "1 of 2 cells done, about 2 h 30 min left"),
        (
            [done(0, 40), Stint("b", 40, False, 41, "oom")],
            3,
            "1 of 3 cells done, 1 failed, about 40 s left",
        ),
        ([done(0, 5), done(5, 8)], 2, "2 of 2 cells done"),
        ([Stint("b", 0, False, 1, "failed")], 1, "0 of 1 cells done, 1 failed"),
        ([done(0, 5)], None, "1 cells done"),
    ],
)
def test_the_line_is_one_of_numbers(stints, total, words):
    assert line(stints, total, now=stints[-1].ended) == words


def test_a_cell_that_was_killed_and_begun_anew_counts_once(tmp_path):
    tally = Tally(tmp_path)
    tally.begin(0, "a", before=False)
    tally.begin(1, "b", before=True)
    tally.end(1, "b", "done")
    tally.begin(2, "a", before=False)
    assert [(one.cell, one.ended is None) for one in tally.stints()] == [("b", False), ("a", True)]
    tally.end(2, "a", "failed")
    tally.end(3, "c", "failed")  # killed before it could begin
    assert line(tally.stints(), 3, now=0) == "1 of 3 cells done, 2 failed"
