"""Progress of a sweep, and the time it is said to take, from what its processes wrote."""

import pytest

from emloc.sweeps.progress import (
    Estimate,
    JobKind,
    JobProgress,
    SweepProgress,
    estimate,
    sweep_line,
)

SIZE = "0.5 of linears at 16 bits"
KIND = JobKind("lora", "Full", "Lora", "small", "gsm8k", SIZE, "NoAnchor", 800)


def kind(method: str, **changes: object) -> JobKind:
    """A kind whose emulator goes with its method."""
    values = {"emulator": f"of {method}", "adapter": "Lora", "model": "small", "task": "gsm8k"}
    values["extra"] = "NoAnchor"
    return JobKind(method=method, size="half", samples=800, **values | changes)


def done(start: float, end: float, of: JobKind = KIND, name: str = "x") -> JobProgress:
    return JobProgress(0, name, of, start, False, end, "done")


def running(start: float, of: JobKind = KIND, name: str = "y") -> JobProgress:
    return JobProgress(1, name, of, start, False)


def test_methods_that_differ_tenfold_are_predicted_each_by_its_own():
    """The mean of all jobs would say 4 x 55 s: the slow method has three jobs to come."""
    fast, slow = kind("zero_shot"), kind("emloc")
    jobs = [done(0, 10, fast), done(10, 110, slow)]
    assert estimate(jobs, [slow, slow, slow, fast], now=110) == Estimate(310, 0)


def test_a_running_job_is_predicted_by_its_method_and_its_seconds_so_far_are_taken_off():
    fast, slow = kind("zero_shot"), kind("emloc")
    jobs = [done(0, 10, fast), done(10, 110, slow), running(110, slow)]
    assert estimate(jobs, [fast], now=140).seconds == pytest.approx(70 + 10)


def test_of_one_method_the_jobs_on_the_same_model_count_first():
    small, large = kind("lora"), kind("lora", model="large")
    jobs = [done(0, 10, small), done(10, 500, large)]
    assert estimate(jobs, [large], now=500).seconds == 490
    assert estimate(jobs, [small], now=500).seconds == 10
    other_rank = [done(0, 10, small)]
    assert estimate(other_rank, [large], now=10) == Estimate(10, 0)


def test_an_unknown_method_takes_what_its_emulator_took():
    plain = kind("emloc_uncorrected", emulator="Svd")
    corrected = kind("emloc", emulator="Svd")
    jobs = [done(0, 10, kind("zero_shot")), done(10, 110, plain)]
    assert estimate(jobs, [corrected], now=110) == Estimate(100, 0)


def test_a_method_that_trains_nothing_does_not_predict_one_that_trains():
    zero_shot = kind("zero_shot", emulator="Full", adapter="None")
    lora = kind("lora", emulator="Full")
    assert estimate([done(0, 10, zero_shot)], [lora], now=10) == Estimate(10, 1)


def test_a_training_with_anchors_is_not_predicted_by_one_without():
    plain = kind("emloc_uncorrected", emulator="Svd")
    anchored = kind("emloc_uncorrected", emulator="Svd", extra="Blocks")
    assert estimate([done(0, 10, plain)], [anchored], now=10) == Estimate(10, 1)
    other = kind("emloc_anchored", emulator="Svd", extra="Blocks")
    jobs = [done(0, 10, plain), done(10, 60, anchored)]
    assert estimate(jobs, [other], now=60) == Estimate(50, 0)


def test_unknown_methods_take_the_mean_over_kinds_and_the_line_says_so():
    """Three fast jobs are one kind: they do not outvote the slow one."""
    fast, slow = kind("zero_shot"), kind("lora")
    jobs = [done(0, 20, fast), done(20, 40, fast), done(40, 60, fast), done(60, 280, slow)]
    waiting = [kind("emloc"), kind("qlora"), kind("qlora")]
    assert estimate(jobs, waiting, now=280) == Estimate(3 * 120, 2)
    assert sweep_line(jobs, 7, 280, waiting) == (
        "4 of 7 jobs done, roughly 6 min left, 2 methods not yet timed"
    )


def test_jobs_that_were_skipped_or_failed_say_nothing_of_the_time_left():
    skipped = JobProgress(0, "a", KIND, 0, True, 0.1, "done")
    failed = JobProgress(1, "b", KIND, 1, False, 1.1, "failed")
    assert estimate([skipped, failed], [KIND, KIND], now=2) is None
    assert estimate([skipped, failed, done(2, 62)], [KIND, KIND], now=62).seconds == 120


def test_jobs_side_by_side_are_predicted_side_by_side():
    """Two workers: one has ended, the other one is half way, and two jobs wait."""
    jobs = [done(0, 20), running(10)]
    assert estimate(jobs, [KIND, KIND], now=20).seconds == pytest.approx((10 + 2 * 20) / 2)


def test_the_longest_job_is_waited_for_however_many_workers_there_are():
    slow = kind("emloc")
    jobs = [done(0, 100, slow), done(0, 10, name="z"), running(95, name="y")]
    assert estimate(jobs, [slow], now=100).seconds == 100


def test_nothing_is_said_of_a_job_that_takes_longer_than_those_before_it():
    assert estimate([done(0, 10), running(10)], [], now=50) is None


@pytest.mark.parametrize(
    ("jobs", "total", "waiting", "words"),
    [
        ([done(0, 600)], 2, [KIND], "1 of 2 jobs done, about 10 min left"),
        ([done(0, 9000)], 2, [None], "1 of 2 jobs done, about 2 h 30 min left"),
        (
            [done(0, 40), JobProgress(1, "b", KIND, 40, False, 41, "oom")],
            3,
            [KIND],
            "1 of 3 jobs done, 1 failed, about 40 s left",
        ),
        ([done(0, 5), done(5, 8)], 2, [], "2 of 2 jobs done"),
        ([JobProgress(1, "b", KIND, 0, False, 1, "failed")], 1, [], "0 of 1 jobs done, 1 failed"),
        ([done(0, 5)], None, [], "1 ended"),
    ],
)
def test_the_line_is_one_of_numbers(jobs, total, waiting, words):
    assert sweep_line(jobs, total, jobs[-1].end, waiting) == words


def test_a_job_that_was_killed_and_started_again_counts_once(tmp_path):
    progress = SweepProgress(tmp_path)
    progress.start(0, "a", KIND, was_done=False)
    progress.start(1, "b", KIND, was_done=True)
    progress.end(1, "b", KIND, "done")
    progress.start(2, "a", KIND, was_done=False)
    jobs = [(job.name, job.end is None, job.kind) for job in progress.jobs()]
    assert jobs == [("b", False, KIND), ("a", True, KIND)]
    progress.end(2, "a", KIND, "failed")
    progress.end(3, "c", KIND, "failed")  # killed before it could start
    assert sweep_line(progress.jobs(), 3, now=0) == "1 of 3 jobs done, 2 failed"
