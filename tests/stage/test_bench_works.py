"""Works of the benchmark on the small shapes they have without a GPU, and what one measured."""

import csv
import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from emloc.cost.bench.rows import BenchRow, read
from emloc.cost.bench.run import WORKS, one

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "bench.csv"
# What a work's rows are called, where it is not as the work.
SEVERAL = {
    name: [name, f"{name}_nf4", name.replace("train", "plan")] for name in ("train_8b", "train_38b")
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run at full size")
@pytest.mark.parametrize(
    "work", ["factorise_38b", "train_8b", "cap12_38b_nf4", "offload_8b", "host_memory"]
)
def test_a_work_runs_on_small_shapes_where_there_is_no_gpu(tmp_path, work):
    path = tmp_path / "bench.csv"
    one(work, path)
    rows = read(path)
    assert {found.work for found in rows} == set(SEVERAL.get(work, [work]))
    for found in rows:
        assert (found.target, found.holds) == ("", "")  # nothing is promised of a CPU
        if "reserved" in found.what:  # there is no device whose memory could be asked for
            assert (found.ours, found.peer) == ("", "")
            continue
        if found.unit == "nats":  # the same operations in the same order
            assert (found.ours, found.peer) == ("0", "0")
            continue
        exact = found.what.startswith("relative error")  # so small a layer is solved exactly
        assert math.isfinite(float(found.ours)), found
        assert float(found.ours) > 0 or exact, found
        if found.peer:
            assert 0 < float(found.peer) < math.inf
            assert float(found.ratio) == pytest.approx(
                float(found.peer) / float(found.ours), rel=2e-3
            )
    facts = json.loads((tmp_path / "bench.json").read_text())[work]
    assert facts["device"] == "cpu, reduced shapes"
    assert facts["command"] == f"emloc bench {work}"
    assert facts["seconds"] > 0
    assert {"commit", "versions"} <= set(facts["provenance"])
    # Rows are called as those of full size, but for what the reduced shape itself says.
    committed = {(found.work, found.what) for found in read(RESULTS)}
    for found in rows:
        at_full_size = (found.work, found.what) in committed
        assert at_full_size or found.what.startswith(("all ", "anonymous, at most, of "))
    assert len(rows) == sum(found.work in SEVERAL.get(work, [work]) for found in read(RESULTS))


def test_every_target_of_the_committed_results_holds():
    with RESULTS.open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == [field.name for field in fields(BenchRow)]
    assert {len(line) for line in lines} == {len(fields(BenchRow))}
    rows = read(RESULTS)
    assert {found.holds for found in rows} == {"yes", ""}
    assert all((found.holds == "yes") == bool(found.target) for found in rows)
    assert {found.work for found in rows} == {
        part for name in WORKS for part in SEVERAL.get(name, [name])
    }
    for found in rows:
        assert float(found.ours) > 0 or found.unit == "nats"
        if found.ratio:
            apart = float(found.ratio) / (float(found.peer) / float(found.ours))
            assert apart == pytest.approx(1, rel=2e-3)
        if found.target.startswith("<= "):
            assert float(found.ours) <= float(found.target[3:])
        elif found.target.startswith("ratio >= "):
            assert float(found.ratio) >= float(found.target[9:])
        elif found.target:
            assert found.target == "ratio within 5% of 1"
            assert abs(float(found.ratio) - 1) <= 0.05
    facts = json.loads(RESULTS.with_suffix(".json").read_text())
    assert set(WORKS) <= set(facts)
    assert all(one["device"].startswith("NVIDIA") for one in facts.values())
