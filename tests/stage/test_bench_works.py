"""The benchmarks with the small shapes for machines without a GPU, and the committed results."""

import csv
import json
import math
import multiprocessing
import os
import re
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from emloc.cost.bench import jobs, training
from emloc.cost.bench.rows import BenchRow, read_rows
from emloc.cost.bench.run import BENCHMARKS, run_benchmark
from emloc.cost.bench.workers import JobFigures, Workers

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "bench.csv"
# Names of the rows of a benchmark that differ from its own name.
SEVERAL = {
    name: [name, f"{name}_nf4", name.replace("train", "plan")] for name in ("train_8b", "train_38b")
}


# Beginnings of rows whose names hold a size that is smaller here.
REDUCED = ("all ", "anonymous, at most, of ", "the pass, ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run at full size")
@pytest.mark.parametrize(
    "work",
    [
        "factorise_38b",
        "train_8b",
        "cap12_38b_nf4",
        "offload_8b",
        "host_memory",
        "rounds4_8b_nf4",
        "rounds24_38b",
        "stored_38b",
    ],
)
def test_a_benchmark_runs_with_small_shapes_without_a_gpu(tmp_path, work, monkeypatch, fork_server):
    monkeypatch.setattr(sys, "executable", str(fork_server.python))  # of FSDP2's process
    monkeypatch.setattr(training, "shared_core", nullcontext)  # busy loops would delay other tests
    path = tmp_path / "bench.csv"
    run_benchmark(work, path)
    rows = read_rows(path)
    assert {result.work for result in rows} == set(SEVERAL.get(work, [work]))
    for result in rows:
        assert (result.target, result.holds) == ("", "")  # there are no targets for a CPU
        if "reserved" in result.what or "allocated" in result.what:  # only a GPU has these
            assert (result.ours, result.peer) == ("", "")
            continue
        if result.unit == "nats":  # the same operations in the same order give equal losses
            assert (result.ours, result.peer) == ("0", "0")
            continue
        exact = result.what.startswith("relative error")  # such a small layer is solved exactly
        assert math.isfinite(float(result.ours)), result
        assert float(result.ours) > 0 or exact, result
        if result.peer:
            assert 0 < float(result.peer) < math.inf
            assert float(result.ratio) == pytest.approx(
                float(result.peer) / float(result.ours), rel=2e-3
            )
    facts = json.loads((tmp_path / "bench.json").read_text())[work]
    assert facts["device"] == "cpu, reduced shapes"
    assert facts["command"] == f"emloc bench {work}"
    assert facts["seconds"] > 0
    assert {"commit", "versions"} <= set(facts["provenance"])
    if work in MISSED | UNMEASURED:  # no row of theirs is committed
        return
    # Rows have the names of the full-size rows, except for the reduced shape in them.
    committed = {(result.work, result.what) for result in read_rows(RESULTS)}
    for result in rows:
        at_full_size = (result.work, result.what) in committed
        assert at_full_size or result.what.startswith(REDUCED)
    assert len(rows) == sum(
        result.work in SEVERAL.get(work, [work]) for result in read_rows(RESULTS)
    )


# Benchmarks whose target is missed; the README of experiments has their numbers.
MISSED = {"rounds4_8b_nf4", "rounds24_38b"}
# Benchmarks that have not run on a GPU yet.
UNMEASURED = {"rounds16_78b_int2", "rounds24_78b_nf4"}


def test_every_target_of_the_committed_results_holds():
    with RESULTS.open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == [field.name for field in fields(BenchRow)]
    assert {len(line) for line in lines} == {len(fields(BenchRow))}
    rows = read_rows(RESULTS)
    assert {result.holds for result in rows} == {"yes", ""}
    assert all((result.holds == "yes") == bool(result.target) for result in rows)
    names = {*BENCHMARKS} - MISSED - UNMEASURED
    assert {result.work for result in rows} == {
        part for name in names for part in SEVERAL.get(name, [name])
    }
    for result in rows:
        assert float(result.ours) > 0 or result.unit == "nats"
        if result.ratio:
            apart = float(result.ratio) / (float(result.peer) / float(result.ours))
            assert apart == pytest.approx(1, rel=2e-3)
        if result.target.startswith("<= "):
            assert float(result.ours) <= float(result.target[3:])
        elif result.target.startswith("ratio >= "):
            assert float(result.ratio) >= float(result.target[9:])
        elif result.target:
            near = re.fullmatch(r"ratio within (\d+)% of 1", result.target)
            assert abs(float(result.ratio) - 1) <= int(near[1]) / 100
    facts = json.loads(RESULTS.with_suffix(".json").read_text())
    assert names <= set(facts)
    assert all(one["device"].startswith("NVIDIA") for one in facts.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run at full size")
def test_a_build_is_compared_with_its_bytes_and_its_operations_alone(monkeypatch):
    monkeypatch.setattr("emloc.cost.bench.host.LENGTH", 32)
    rows = [*BENCHMARKS["build_8b"]()]
    assert {(result.work, result.target) for result in rows} == {("build_8b", "")}
    assert len(rows) == 2 * 4
    for rate, disk, alone, largest in (rows[:4], rows[4:]):
        assert float(rate.ours) > 0
        assert 0 < float(disk.ours) == float(alone.ours) == float(largest.ours)
        assert float(disk.peer) > 0
        assert float(alone.peer) > 0
        assert float(largest.peer) == max(float(disk.peer), float(alone.peer))
    # Twice the blocks have twice the operations.
    assert float(rows[6].peer) == pytest.approx(2 * float(rows[2].peer), rel=2e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run at full size")
def test_small_jobs_run_one_at_a_time_and_side_by_side_without_a_gpu():
    rows = {result.what: result for result in BENCHMARKS["jobs_smollm2"]()}
    assert {(result.work, result.target) for result in rows.values()} == {("jobs_smollm2", "")}
    alone, beside = (float(rows[what].ours) for what in ("one at a time", "side by side"))
    ratio = float(rows["side by side, over one at a time"].ours)
    assert ratio == pytest.approx(beside / alone, rel=2e-3)
    assert rows["jobs that run side by side"].ours == "2"
    assert rows["side by side with MPS"].ours == "no MPS"
    assert rows["a job: peak reserved"].ours == ""  # without a GPU there is no reserved memory


def test_a_small_step_is_compared_with_one_on_a_shared_core_and_one_without_graphs(monkeypatch):
    seconds = {"train_random": [0.01, 0.1], "train_on_shared_core": [0.02]}

    def train_alone(train, warm_up, steps):
        return JobFigures(0, seconds[train.func.__name__].pop(0))

    monkeypatch.setattr(jobs, "train_alone", train_alone)
    plain, shared = BENCHMARKS["step_smollm2"]()
    assert (plain.ours, plain.peer, shared.ours, shared.peer) == ("0.01", "0.1", "0.01", "0.02")


def no_training(steps: int) -> JobFigures:
    """Stand for a training that takes seven bytes, and for a worker that is killed."""
    if steps == 9:
        os._exit(3)
    return JobFigures(peak=7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run on the GPU")
def test_a_worker_that_is_killed_is_named_and_the_others_end(tmp_path):
    with Workers(no_training, tmp_path, {"OWN_VARIABLE": "1"}) as workers:
        assert "OWN_VARIABLE" not in os.environ
        workers.start(2)
        assert workers.run(1, None)[1].peak == 7
        with pytest.raises(RuntimeError, match="a worker ended with exit code 3"):
            workers.run(9, None)
    assert multiprocessing.active_children() == []
