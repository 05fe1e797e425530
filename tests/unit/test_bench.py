"""The table of the benchmark: measured values, comparisons and targets."""

import csv
import json
import math
import stat
import sys
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch

from emloc.cost.bench import run
from emloc.cost.bench.rows import BenchRow, read_rows, replace_rows, row, table, write_facts
from emloc.cost.bench.run import BENCHMARKS, bench, main, run_benchmark
from emloc.cost.bench.setting import BenchSetup
from emloc.cost.bench.training import (
    OUT_OF_MEMORY,
    Target,
    TrainingFigures,
    comparison_rows,
    measure_or_oom,
    measure_our_training,
)
from emloc.errors import ConfigError, StageError
from emloc.runtime.memory import is_out_of_memory

COLUMNS = ["work", "what", "unit", "ours", "peer", "ratio", "target", "holds"]
NAMES = [
    *("factorise_8b", "factorise_38b", "train_8b", "train_38b"),
    *(
        "stored_38b",
        "anchored_8b",
        *("rounds4_8b_nf4", "rounds24_38b", "rounds16_78b_int2", "rounds24_78b_nf4"),
        "cap24_38b",
        "cap12_38b_nf4",
        "cap24_78b_nf4",
        "offload_8b",
        "step_smollm2",
        "jobs_smollm2",
        "answer_8b",
        "answer_38b",
    ),
    "build_8b",
    "host_memory",
]


# Rows --------------------------------------------------------------------------------------------


def test_the_columns_of_the_table():
    assert [field.name for field in fields(BenchRow)] == COLUMNS


@pytest.mark.parametrize(
    ("ours", "arguments", "ratio", "target", "holds"),
    [
        (2.0, {}, "", "", ""),
        (2.0, {"peer": 9.0}, "4.5", "", ""),
        (2.0, {"most": 2}, "", "<= 2", "yes"),
        (2.001, {"most": 2}, "", "<= 2", "no"),
        (2.0, {"peer": 40.0, "least_ratio": 20}, "20", "ratio >= 20", "yes"),
        (2.0, {"peer": 39.9, "least_ratio": 20}, "19.95", "ratio >= 20", "no"),
        (2.0, {"peer": 2.09, "near": 0.05}, "1.045", "ratio within 5% of 1", "yes"),
        (2.0, {"peer": 1.91, "near": 0.05}, "0.955", "ratio within 5% of 1", "yes"),
        (2.0, {"peer": 2.102, "near": 0.05}, "1.051", "ratio within 5% of 1", "no"),
        (2.0, {"peer": 1.898, "near": 0.05}, "0.949", "ratio within 5% of 1", "no"),
        (0.0, {"peer": 2.0, "least_ratio": 20}, "", "ratio >= 20", "no"),
        (2.0, {"least_ratio": 20}, "", "ratio >= 20", "no"),
        (math.nan, {"most": 2}, "", "<= 2", "no"),
        (math.nan, {"peer": math.nan, "near": 0.05}, "", "ratio within 5% of 1", "no"),
        ("OOM", {"peer": 9.0, "most": 2}, "", "<= 2", "no"),
        (2.0, {"peer": "OOM", "most": 2}, "", "<= 2", "yes"),
    ],
)
def test_a_target_holds_only_for_a_number_that_meets_it(ours, arguments, ratio, target, holds):
    result = row("work", "what", "s", ours, **arguments)
    assert (result.ratio, result.target, result.holds) == (ratio, target, holds)


@pytest.mark.parametrize(
    ("figure", "text"),
    [(31.2149, "31.21"), (0.0359149, "0.03591"), (0.0, "0"), (math.nan, ""), ("OOM", "OOM")],
)
def test_numbers_have_four_digits_and_nan_is_empty(figure, text):
    result = row("work", "what", "s", figure, peer=figure)
    assert (result.ours, result.peer) == (text, text)


def test_rows_of_repeated_benchmarks_are_replaced_in_order(tmp_path):
    path = tmp_path / "deep" / "bench.csv"
    assert read_rows(path) == []
    rows = [row(work, what, "s", 1.0) for work in ("b", "a", "c") for what in ("z", "y", "x")]
    merged_rows = replace_rows(path, rows)
    assert [(one.work, one.what) for one in merged_rows] == [(w, x) for w in "abc" for x in "zyx"]
    new = [row("c", "w", "s", 2.0), row("a_nf4", "v, with a comma", "GB", 3.0, most=2)]
    assert replace_rows(path, new) == [*merged_rows[:3], new[1], *merged_rows[3:6], new[0]]
    assert read_rows(path) == [*merged_rows[:3], new[1], *merged_rows[3:6], new[0]]
    assert next(csv.reader(path.open())) == COLUMNS
    lines = table(read_rows(path)).splitlines()
    assert lines[0].split() == ["|", *" | ".join(COLUMNS).split(), "|"]
    assert len(lines) == 2 + 8
    assert len({len(line) for line in lines}) == 1


def test_the_provenance_is_stored_for_each_benchmark(tmp_path):
    path = tmp_path / "bench.csv"
    write_facts(path, "a", {"seconds": 1})
    write_facts(path, "b", {"seconds": 2})
    write_facts(path, "a", {"seconds": 3})
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result == {"a": {"seconds": 3}, "b": {"seconds": 2}}


# Works -------------------------------------------------------------------------------------------


def test_the_names_of_the_benchmarks():
    assert list(BENCHMARKS) == NAMES


def test_an_unknown_benchmark_is_refused_before_any_is_run(tmp_path):
    with pytest.raises(ConfigError) as refused:
        bench(["host_memory", "train_9b"], tmp_path / "bench.csv")
    names = ", ".join(NAMES)
    assert str(refused.value) == f"train_9b: there is no such benchmark; choose from {names}"
    assert list(tmp_path.iterdir()) == []


def test_a_failed_benchmark_is_named_after_the_others_have_run(tmp_path, monkeypatch):
    """A fake program whose second process fails."""
    program = tmp_path / "program"
    program.write_text(
        "#!/bin/sh\n"
        'if [ "$3" = train_8b ]; then exit 1; fi\n'
        'if [ ! -e "$4" ]; then echo work,what,unit,ours > "$4"; fi\n'
        'echo "$3,time,s,1" >> "$4"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(program))
    path = tmp_path / "bench.csv"
    with pytest.raises(ConfigError, match=r"^failed: train_8b; see the error messages above$"):
        bench(["factorise_8b", "train_8b", "host_memory"], path)
    assert [result.work for result in read_rows(path)] == ["factorise_8b", "host_memory"]
    assert "| host_memory  | time |" in bench(["host_memory"], path)


def test_a_benchmark_that_fails_says_why_in_one_line(tmp_path, monkeypatch, capsys):
    def breaks() -> Iterator[BenchRow]:
        raise ArithmeticError("half way")

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setitem(run.BENCHMARKS, "cap24_38b", breaks)
    with pytest.raises(SystemExit) as ended:
        main("cap24_38b", tmp_path / "bench.csv")
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "emloc bench cap24_38b: ArithmeticError: half way; HYDRA_FULL_ERROR=1 shows where in the "
        "code\n"
    )


def test_a_failed_benchmark_leaves_the_table_unchanged(tmp_path, monkeypatch):
    def breaks() -> Iterator[BenchRow]:
        yield row("cap24_38b", "what", "s", 1.0)
        raise ArithmeticError("half way")

    path = tmp_path / "bench.csv"
    before = replace_rows(
        path, [row(work, "what", "s", 2.0) for work in ("cap24_38b", "host_memory")]
    )
    monkeypatch.setitem(run.BENCHMARKS, "cap24_38b", breaks)
    with pytest.raises(ArithmeticError):
        run_benchmark("cap24_38b", path)
    assert read_rows(path) == before
    assert not (tmp_path / "bench.json").exists()


# Settings and peers ------------------------------------------------------------------------------


def test_a_sample_is_image_tiles_and_a_text_with_labels_on_its_second_half():
    setup = BenchSetup("internvl2_5_8b")
    sample, learnt = setup.batch(3), setup.labelled_batch(3)
    config = setup.source.config
    places = int((sample["input_ids"] == config.image_token_id).sum())
    assert sample["input_ids"].shape == (1, setup.length)
    assert places == setup.length - setup.text
    assert learnt["labels"].shape == (1, setup.answer + 1)
    assert int((learnt["labels"] != -100).sum()) == setup.answer
    assert all(torch.equal(sample[name], learnt[name]) for name in sample)
    assert not torch.equal(setup.batch(4)["input_ids"], sample["input_ids"])


# No room -----------------------------------------------------------------------------------------


def test_a_training_out_of_memory_misses_its_target():
    def opener(setup, device):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    setup = BenchSetup("internvl2_5_8b", ("train.steps=8",))
    assert measure_or_oom(lambda: measure_our_training(setup, opener)) is OUT_OF_MEMORY
    lora, qlora = TrainingFigures(70.0, 77.4, 1.0), TrainingFigures(22.0, 23.4, 1.2)
    rows = list(comparison_rows("train_38b", OUT_OF_MEMORY, lora, qlora, Target(20, 0.55)))
    assert [(result.ours, result.peer, result.ratio) for result in rows] == [
        ("OOM", "77.4", ""),
        ("OOM", "23.4", ""),
        ("OOM", "1", ""),
        ("OOM", "1.2", ""),
    ]
    assert [(result.target, result.holds) for result in rows] == [
        ("<= 20", "no"),
        ("", ""),
        ("<= 0.55", "no"),
        ("", ""),
    ]


def test_a_comparison_out_of_memory_does_not_miss_a_target():
    ours = TrainingFigures(18.5, 19.1, 0.48)
    rows = list(
        comparison_rows(
            "train_38b", ours, OUT_OF_MEMORY, TrainingFigures(22.0, 23.4, 1.2), Target(20, 0.55)
        )
    )
    assert [(result.peer, result.ratio, result.holds) for result in rows] == [
        ("OOM", "", "yes"),
        ("23.4", "1.225", ""),
        ("OOM", "", "yes"),
        ("1.2", "2.5", ""),
    ]


def test_only_an_out_of_memory_error_counts_as_out_of_memory():
    def fail():
        raise StageError("train", "RuntimeError: something else") from RuntimeError("else")

    with pytest.raises(StageError) as raised:
        measure_or_oom(fail)
    assert not is_out_of_memory(raised.value)
    raised.value.__cause__.__cause__ = torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(raised.value)
    assert not is_out_of_memory(MemoryError())
