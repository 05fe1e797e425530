"""What a long stage says while it works, by a clock that the tests move."""

import logging
import threading
import time
from unittest.mock import Mock

import pytest

from emloc.runtime.progress import BesideBarFilter, StageProgress, duration, tracked


class HandClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="emloc.runtime.progress")
    return lambda: [record.getMessage() for record in caplog.records]


def work(progress: StageProgress, clock: HandClock, steps: int, seconds: float) -> None:
    for _ in range(steps):
        clock.now += seconds
        progress.update()


def test_a_line_at_most_every_30_seconds_and_none_before(clock, lines):
    with StageProgress("train", 100, "step", clock=clock) as progress:
        work(progress, clock, 29, 1.0)
        assert lines() == []
        progress.show(loss=1.2341)
        work(progress, clock, 31, 1.0)
        assert lines() == [
            "train: step 30 of 100, loss 1.234, 1 s a step, 70 s left",
            "train: step 60 of 100, loss 1.234, 1 s a step, 40 s left",
        ]


def test_a_slow_unit_has_a_line_of_its_own(clock, lines):
    with StageProgress("calibrate", 4, "block", clock=clock) as progress:
        work(progress, clock, 4, 95.0)
    assert lines() == [
        "calibrate: block 1 of 4, 95 s a block, 5 min left",
        "calibrate: block 2 of 4, 95 s a block, 3 min left",
        "calibrate: block 3 of 4, 95 s a block, 2 min left",
        "calibrate: block 4 of 4, 95 s a block",
    ]


def test_the_speed_soon_forgets_units_that_a_resumed_stage_skips(clock, lines):
    """The first line counts 60 skipped blocks, each later one halves what is left of that."""
    with StageProgress("emulate", 84, "block", clock=clock) as progress:
        work(progress, clock, 57, 0.0)
        work(progress, clock, 12, 10.0)
    speeds = [line.split(", ")[1] for line in lines()]
    assert speeds == ["0.5 s a block", "5.2 s a block", "7.6 s a block", "8.8 s a block"]


def test_a_resumed_stage_counts_from_where_it_was(clock, lines):
    with StageProgress("train", 400, "step", done=200, clock=clock) as progress:
        work(progress, clock, 60, 0.52)
    assert lines() == ["train: step 258 of 400, 0.52 s a step, 74 s left"]


def test_rows_are_counted_by_the_batch(clock, lines):
    with StageProgress("evaluate", 256, "row", clock=clock) as progress:
        for _ in range(4):
            clock.now += 16
            progress.update(64)
    assert lines()[0] == "evaluate: row 128 of 256, 0.25 s a row, 32 s left"


def test_a_unit_that_takes_long_is_logged_before_it_ends(clock, lines):
    progress = StageProgress("train", 4, "step", clock=clock)
    for _ in range(2):
        clock.now += 40
        progress.log_if_due()
    assert lines() == [
        "train: step 0 of 4, step 1 has taken 40 s so far",
        "train: step 0 of 4, step 1 has taken 80 s so far",
    ]
    clock.now += 20
    progress.update()
    clock.now += 10
    progress.log_if_due()  # its speed is that of the step, and not of the 10 seconds since
    assert lines()[2:] == ["train: step 1 of 4, 100 s a step, 5 min left"]
    progress.close()
    clock.now += 60
    progress.log_if_due()
    assert len(lines()) == 3


def test_a_thread_looks_at_a_unit_that_takes_long_until_the_stage_ends(lines, monkeypatch):
    monkeypatch.setattr("emloc.runtime.progress.POLL_SECONDS", 0.01)
    monkeypatch.setattr("emloc.runtime.progress.SECONDS_BETWEEN_LINES", 0.02)
    before = {*threading.enumerate()}
    with StageProgress("train", 4, "step"):
        (watcher,) = watchers_since(before)
        while not lines():
            time.sleep(0.01)
        assert watcher.is_alive()
    assert lines()[0] == "train: step 0 of 4, step 1 has taken 1 s so far"
    watcher.join()  # a thread that hangs would hang this test


def test_the_thread_ends_with_a_stage_that_nobody_closed(monkeypatch):
    monkeypatch.setattr("emloc.runtime.progress.POLL_SECONDS", 0.01)
    before = {*threading.enumerate()}
    progress = StageProgress("train", 4, "step")
    (watcher,) = watchers_since(before)
    del progress
    watcher.join()


def watchers_since(before):
    """The threads that watch a stage and are not among the threads of `before`."""
    return [one for one in {*threading.enumerate()} - before if "_watch" in one.name]


def test_the_items_pass_through_and_their_loop_is_timed(clock, lines):
    passed = []
    for item in tracked("abc", "merge", 3, "file", clock=clock):
        passed.append(item)
        clock.now += 40
    assert passed == ["a", "b", "c"]
    assert lines()[0] == "merge: file 1 of 3, 40 s a file, 80 s left"


def test_only_the_first_of_several_processes_speaks(clock, lines, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with StageProgress("train", 10, "step", clock=clock) as progress:
        work(progress, clock, 10, 60.0)
    assert lines() == []


@pytest.mark.parametrize("drawn", [True, False])
def test_beside_a_bar_the_line_is_in_the_file_alone(clock, caplog, drawn):
    caplog.set_level(logging.INFO, logger="emloc.runtime.progress")
    progress = StageProgress("train", 10, "step", clock=clock)
    progress._bar = Mock(disable=not drawn)  # another test may forbid tqdm to draw any bar
    work(progress, clock, 1, 60.0)
    progress.close()
    (record,) = caplog.records
    assert BesideBarFilter().filter(record) is not drawn


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (3000, "50 min"), (9000, "2 h 30 min")],
)
def test_times_in_words(seconds, words):
    assert duration(seconds) == words
