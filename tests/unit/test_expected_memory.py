"""Device memory of a run before it starts: from earlier runs, from a plan, or not known."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from composed import compose_cached

from emloc.cost import expected_memory
from emloc.cost.expected_memory import (
    CONTEXT,
    MARGIN,
    PLAN_MARGIN,
    PeakRecords,
    expected_bytes,
    memory_key,
    planned_peak,
)
from emloc.errors import StageError
from emloc.runtime.memory import GIB
from emloc.stages.run_config import build
from emloc.sweeps import own_gpu
from emloc.sweeps.own_gpu import run_on_own_gpu


@pytest.fixture(scope="module")
def run_config():
    settings = build(compose_cached(["model.weights=random", "budget.jobs_per_gpu=auto"]))
    return replace(settings, task=SimpleNamespace(key="rows"))


def with_values(run_config, **values):
    """The run with other values of settings, named as `section__setting`."""
    for name, value in values.items():
        section, _, setting = name.partition("__")
        part = replace(getattr(run_config, section), **{setting: value}) if setting else value
        run_config = replace(run_config, **{section: part})
    return run_config


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 5, "name": "other", "method": "other"},
        {"train__learning_rate": 1.0, "train__clip": 0.5, "train__schedule": "linear"},
        {"train__warmup": 0.5, "train__weight_decay": 1.0},
        {"train__log_every": 7, "train__save_every": 7, "calibration__seed": 5},
        {"budget__host_gib": 1.0, "budget__disk_gib": 1.0, "budget__jobs_per_gpu": 3},
    ],
)
def test_seeds_and_learning_rates_leave_the_memory_as_it_is(run_config, values):
    assert memory_key(with_values(run_config, **values)) == memory_key(run_config)


@pytest.mark.parametrize(
    "values",
    [
        {"train__batch": 3},
        {"train__checkpointing": True},
        {"train__steps": 7},
        {"eval__batch": 3},
        {"lora__rank": 3},
        {"calibration__samples": 3},
        {"compression__ratio": 0.3},
        {"model__max_length": 64},
        {"budget__gpu_gib": 3.0},
        {"budget__gpu_states_gib": 3.0},
    ],
)
def test_sizes_change_the_memory(run_config, values):
    assert memory_key(with_values(run_config, **values)) != memory_key(run_config)


def test_another_version_of_a_stage_changes_the_memory(run_config, monkeypatch):
    former = memory_key(run_config)
    monkeypatch.setattr(type(run_config.stage["train"]), "version", 10**6)
    assert memory_key(run_config) != former


def test_the_largest_recorded_peak_counts_until_a_run_is_out_of_memory(tmp_path):
    records = PeakRecords(tmp_path / "devices/peaks")
    assert not records.has("a")
    values = []
    for peak in (5, 7, 6, None, 4, 3):
        records.add("a", peak)
        values.append(records.read("a"))
    assert values == [5, 7, 7, None, 4, 4]
    assert not records.has("b")


def test_a_recorded_peak_is_preferred_to_a_plan(run_config, tmp_path, monkeypatch):
    monkeypatch.setattr(expected_memory, "planned_peak", lambda _: 9 * GIB)
    records = PeakRecords(tmp_path)
    assert expected_bytes(run_config, records) == int(PLAN_MARGIN * 9 * GIB) + CONTEXT
    records.add(memory_key(run_config), 2 * GIB)
    other_seed = replace(run_config, seed=9)
    assert expected_bytes(other_seed, records) == int(MARGIN * 2 * GIB) + CONTEXT


def test_a_run_takes_no_more_than_its_budget(run_config, tmp_path, monkeypatch):
    small = with_values(run_config, budget__gpu_gib=3.0)
    for peak, expected in ((9 * GIB, 3 * GIB), (None, 3 * GIB), (GIB, int(PLAN_MARGIN * GIB))):
        monkeypatch.setattr(expected_memory, "planned_peak", lambda _, peak=peak: peak)
        assert expected_bytes(small, PeakRecords(tmp_path)) == expected + CONTEXT


def test_memory_that_cannot_be_planned_or_has_run_out_is_not_known(run_config, tmp_path):
    records = PeakRecords(tmp_path)
    records.add(memory_key(run_config), None)
    assert expected_bytes(run_config, records) is None
    unplanned = SimpleNamespace(unplanned="reads no text")
    emulator = SimpleNamespace(model=lambda model, compression: unplanned)
    assert planned_peak(replace(run_config, emulator=emulator)) is None


# The job -----------------------------------------------------------------------------------------


@pytest.fixture
def shared(monkeypatch):
    """The needs of the jobs, each of which gets its share at once."""
    needs = []

    @contextmanager
    def own_share(need, folder):
        needs.append((need(), folder))
        yield object()

    monkeypatch.setattr(own_gpu, "own_share", own_share)
    monkeypatch.setattr(expected_memory, "planned_peak", lambda _: None)
    return needs


def fails(cause):
    def work():
        raise StageError("train", str(cause)) from cause

    return work


def test_a_run_records_its_largest_peak_and_a_shortage(run_config, shared, tmp_path):
    peaks = {"calibrate": 1.5, "train": 2.0, "evaluate": 0.5}
    stages = {name: SimpleNamespace(facts={"peak_gib": gib}) for name, gib in peaks.items()}
    result = SimpleNamespace(stages=stages)
    assert run_on_own_gpu(run_config, tmp_path, lambda: result) is result
    for cause in (RuntimeError("else"), torch.cuda.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(StageError):
            run_on_own_gpu(run_config, tmp_path, fails(cause))
    run_on_own_gpu(run_config, tmp_path, lambda: result)
    needed = int(MARGIN * 2 * GIB) + CONTEXT
    assert shared == [(None, tmp_path), (needed, tmp_path), (needed, tmp_path), (None, tmp_path)]
    assert PeakRecords(tmp_path / "peaks").read(memory_key(run_config)) == 2 * GIB


def test_a_number_of_jobs_locks_a_slot_and_records_nothing(
    run_config, shared, tmp_path, monkeypatch
):
    slots = []

    @contextmanager
    def own_slot(count, folder):
        slots.append((count, folder))
        yield

    monkeypatch.setattr(own_gpu, "own_slot", own_slot)
    three = with_values(run_config, budget__jobs_per_gpu=3)
    assert run_on_own_gpu(three, tmp_path, lambda: "result") == "result"
    assert slots == [(3, tmp_path)]
    assert shared == []
    assert list(tmp_path.iterdir()) == []
