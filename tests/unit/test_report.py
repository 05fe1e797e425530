"""Run folders, and the table of results that is made of them."""

import gc
import json
import mmap
import re
import subprocess
import sys
import time
import weakref

import pytest
import torch
from omegaconf import OmegaConf
from pandas.testing import assert_frame_equal

from emloc.config.run_folder import Run, find_runs
from emloc.report.markdown import table
from emloc.report.rows import rows_of, write_rows
from emloc.report.summary import summary_of
from emloc.runtime import memory
from emloc.runtime import provenance as provenance_module
from emloc.runtime.memory import GIB, MemoryPeak, process_bytes
from emloc.runtime.provenance import PACKAGES, provenance
from emloc.sweeps.callbacks import FAILED, ResultsTable

CHOICES = {"method": "emloc", "model": "tiny", "lora": "r8", "emulator": "svd", "tracker": "none"}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "demo"


@pytest.fixture
def write_run(folder):
    """Function that writes a run folder as `emloc` does; without a loss the run is unfinished."""
    count = iter(range(100))

    def make(method: str, loss: float | None = None, *, seed: int = 0, **changed) -> Run:
        choices = CHOICES | {"method": method} | changed.pop("choices", {})
        sections = {name: {"value": 0} for name in ("model", "eval", "lora", "train")}
        sections["tracker"] = {"_target_": "emloc.report.tracking.trackers.Nothing"}
        config = (
            sections
            | {"name": "demo", "method": method, "seed": seed, "task": {"name": "sums"}}
            | changed
        )
        run = Run(folder / f"{next(count):02}-{method}")
        run.begin(OmegaConf.create(config), choices)
        if loss is not None:
            run.finish(metrics(loss, trains=method != "zero_shot"))
        return run

    return make


def metrics(loss: float, trains: bool = True, metric: str = "exact_match") -> dict:
    seconds = {"emulate": 1.4, "train": 12.6, "evaluate": 3.0}
    if not trains:
        del seconds["train"]
    return {
        "metric": metric,
        "score": 0.25,
        "scores": {"loss": loss, metric: 0.25},
        "data": {"name": "sums", "rows": "abc"},
        "emulator": {"bytes": 123_456_789},
        "seconds": seconds,
        "peak_gib": dict.fromkeys(seconds, 1.234),
    }


def lines(folder) -> list[dict[str, str]]:
    """The rows of the table as dictionaries, column -> text."""
    rows = [line for line in table(folder).splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    head, rule, *body = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert all(re.fullmatch("-+", cell) for cell in rule)
    return [dict(zip(head, row, strict=True)) for row in body]


def column(folder, name: str) -> list[str]:
    return [line[name] for line in lines(folder)]


# The share of the gain ---------------------------------------------------------------------------


def test_gain_kept_is_the_share_of_the_gain_of_lora_over_zero_shot(write_run, folder):
    write_run("zero_shot", 2.0)
    write_run("lora", 1.0)
    write_run("emloc", 1.25)
    write_run("emloc_uncorrected", 2.5)
    write_run("emloc_covariance", 0.75)
    rows = rows_of(folder)
    assert [row.number("gain_kept") for row in rows] == [0.0, 1.0, 0.75, -0.5, 1.25]
    assert column(folder, "gain kept") == ["0.0%", "100.0%", "75.0%", "-50.0%", "125.0%"]


@pytest.mark.parametrize("absent", ["zero_shot", "lora"])
def test_without_lora_or_zero_shot_there_is_no_gain(write_run, folder, absent):
    for method, loss in (("zero_shot", 2.0), ("lora", 1.0), ("emloc", 1.25)):
        write_run(method, None if method == absent else loss)
    rows = rows_of(folder)
    assert [row.number("gain_kept") for row in rows if row.done] == [None, None]
    assert all("gain kept" not in line for line in lines(folder))


@pytest.mark.parametrize("best", [2.0, 2.1])
def test_there_is_no_gain_kept_if_lora_gains_nothing(write_run, folder, best):
    write_run("zero_shot", 2.0)
    write_run("lora", best)
    write_run("emloc", 1.25)
    assert all("gain kept" not in line for line in lines(folder))


@pytest.mark.parametrize("section", ["model", "task", "eval"])
def test_runs_on_other_data_are_no_reference_for_the_gain(write_run, folder, section):
    other = {section: {"name": "sums", "value": 1}}
    write_run("zero_shot", 2.0, **other)
    write_run("lora", 1.0, **other)
    write_run("emloc", 1.25)
    assert column(folder, "gain kept") == ["0.0%", "100.0%", ""]


def test_a_lora_of_another_rank_is_no_reference_but_zero_shot_is(write_run, folder):
    write_run("zero_shot", 2.0)
    write_run("lora", 1.0, lora={"value": 1})
    write_run("lora", 1.5)
    write_run("emloc", 1.75)
    assert column(folder, "gain kept")[1:] == ["100.0%", "100.0%", "50.0%"]


def test_the_reference_is_the_best_lora_whatever_its_training(write_run, folder):
    """A method is measured by LoRA at LoRA's own best rate; a shorter LoRA keeps a share."""
    write_run("zero_shot", 2.0)
    write_run("lora", 1.5, train={"steps": 20})
    write_run("lora", 1.0, train={"steps": 400})
    write_run("lora", 1.2, train={"steps": 900})
    write_run("emloc", 1.25, train={"steps": 400})
    assert column(folder, "gain kept")[1:] == ["50.0%", "100.0%", "80.0%", "75.0%"]


def test_the_reference_of_a_seed_is_the_lora_of_this_seed(write_run, folder):
    write_run("zero_shot", 2.0)
    for seed, best in ((0, 1.0), (1, 1.5)):
        write_run("lora", best, seed=seed)
        write_run("emloc", 1.75, seed=seed)
    rows = rows_of(folder)
    assert [row.number("gain_kept") for row in rows] == [0.0, 1.0, 0.25, 1.0, 0.5]


def test_seeds_are_joined_to_one_line_with_mean_and_deviation(write_run, folder):
    write_run("zero_shot", 2.0)
    for seed, best in ((0, 1.0), (1, 1.5)):
        write_run("lora", best, seed=seed)
        write_run("emloc", 1.75, seed=seed)
    assert column(folder, "seeds") == ["0", "0 1", "0 1"]
    assert column(folder, "loss") == ["2.000", "1.250 ± 0.354", "1.750 ± 0.000"]
    assert column(folder, "gain kept") == ["0.0%", "100.0% ± 0.0%", "37.5% ± 17.7%"]
    assert column(folder, "train s") == ["", "13", "13"]
    assert "±: standard deviation over seeds" in table(folder)


def test_failed_and_repeated_seeds_have_separate_lines(write_run, folder):
    write_run("emloc", 1.0)
    write_run("emloc", seed=1).mark("failed", stage="train", error="?")
    write_run("emloc", 1.5, seed=2)
    write_run("emloc", 1.25, seed=2)
    assert column(folder, "seeds") == ["0 2", "1", "2"]
    assert column(folder, "exact_match") == ["0.250 ± 0.000", "failed(train)", "0.250"]


def test_scores_as_trained_have_a_column_of_their_own(write_run, folder):
    write_run("lora", 1.0)
    run = write_run("qlora", 1.25)
    run.finish(run.metrics | {"scores_as_trained": {"loss": 1.5}, "step_seconds": 0.1234})
    assert column(folder, "loss as trained") == ["", "1.500"]
    assert column(folder, "step s") == ["", "0.123"]


def test_cells_are_labelled_by_name_and_by_other_settings_that_differ(write_run, folder):
    """The settings that define a cell have no columns."""
    for name, value in (("one", 1), ("two", 2)):
        for rate in (3, 4):
            cell = {"method": "emloc", "cell": f"mine/{name}"}
            write_run("emloc", 1.5, eval={"value": value}, train={"value": rate}, choices=cell)
    assert column(folder, "cell") == ["one", "one", "two", "two"]
    assert column(folder, "train.value") == ["3", "4", "3", "4"]
    assert "eval.value" not in lines(folder)[0]


def test_a_run_of_another_launch_does_not_fail_this_one(write_run, folder, capsys):
    write_run("emloc", 1.0)
    running = write_run("lora")
    sweep = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}})
    ResultsTable().on_multirun_end(sweep)
    assert "| running" in capsys.readouterr().out
    running.mark("interrupted")
    with pytest.raises(SystemExit) as ended:
        ResultsTable().on_multirun_end(sweep)
    assert ended.value.code == FAILED
    assert capsys.readouterr().err == f"{running.folder.name}: interrupted\n"


def test_the_tracker_does_not_distinguish_runs(write_run, folder):
    write_run("emloc", 1.0)
    write_run("emloc", 1.5, seed=1, choices={"tracker": "wandb", "local": "mine"})
    assert column(folder, "seeds") == ["0 1"]


def test_only_one_process_at_a_time_works_on_a_run(tmp_path):
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from emloc.config.run_folder import Run\n"
        "with Run(Path(sys.argv[1])).exclusive():\n"
        "    print(time.time(), flush=True)\n"
        "    time.sleep(0.5)\n"
        "    print(time.time(), flush=True)\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "run")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    times = sorted([float(word) for word in one.communicate()[0].split()] for one in both)
    (_, first_ends), (second_begins, _) = times
    assert second_begins >= first_ends


def test_a_number_that_was_not_measured_has_no_column(write_run, folder, tmp_path):
    write_run("emloc", 1.5)
    write_rows(rows_of(folder), tmp_path / "rows.csv")
    text = (tmp_path / "rows.csv").read_text()
    (tmp_path / "rows.csv").write_text(text.replace(",bytes", ",other"))
    (line,) = lines(tmp_path / "rows.csv")
    assert "through MB" not in line
    assert line["train GiB"] == "1.23"


def test_the_table_can_be_rebuilt_from_the_tidy_file(write_run, folder, tmp_path):
    write_run("zero_shot", 2.0)
    for seed in (0, 1):
        write_run("lora", 1.0, seed=seed, recovery={"clamp": None})
        write_run("emloc", 1.5, seed=seed, recovery={"clamp": 3.0})
    write_run("qlora").mark("failed", stage="train", error="x")
    rows = rows_of(folder)
    write_rows(rows, tmp_path / "rows.csv")
    again = rows_of(tmp_path / "rows.csv")
    assert len(again) == 6
    assert_frame_equal(summary_of(again), summary_of(rows))
    assert [row.numbers for row in again] == [row.numbers for row in rows]


# The table ---------------------------------------------------------------------------------------


def test_a_line_of_the_table(write_run, folder):
    write_run("emloc", 1.2345)
    write_run("zero_shot", 2.0)
    trained, plain = lines(folder)
    assert trained == {
        "method": "emloc",
        "exact_match": "0.250",
        "loss": "1.234",
        "through MB": "123",
        "train GiB": "1.23",
        "emulate s": "1",
        "train s": "13",
        "evaluate s": "3",
    }
    assert plain["through MB"] == plain["train GiB"] == plain["train s"] == ""


def test_a_single_seed_has_no_column(write_run, folder):
    write_run("emloc", 1.0)
    write_run("lora", 1.0)
    assert "seed" not in lines(folder)[0]


def test_differing_groups_have_columns_except_those_that_the_method_selects(write_run, folder):
    write_run("emloc", 1.0, choices={"lora": "r4"})
    write_run("lora", 1.0, choices={"lora": "r8", "emulator": "full", "tracker": "wandb"})
    write_run("lora", 1.0, choices={"lora": "r8", "emulator": "full", "compression": "r25"})
    rows = lines(folder)
    assert list(rows[0])[:3] == ["method", "compression", "lora"]
    assert [line["lora"] for line in rows] == ["r4", "r8", "r8"]
    assert [line["compression"] for line in rows] == ["", "", "r25"]
    assert not {"emulator", "tracker", "model"} & set(rows[0])


def test_a_setting_swept_under_one_choice_has_a_column(write_run, folder):
    for clamp in (0, 3, None):
        write_run("emloc", 1.0, recovery={"_target_": "x", "clamp": clamp, "metric": "identity"})
    write_run("lora", 1.0, recovery={"_target_": "y"})
    rows = lines(folder)
    assert list(rows[0])[:2] == ["method", "recovery.clamp"]
    assert [line["recovery.clamp"] for line in rows] == ["0", "3", "null", ""]


def test_a_method_with_two_recoveries_has_a_column_for_the_recovery(write_run, folder):
    write_run("emloc", 1.0, choices={"recovery": "correction"})
    write_run("emloc", 1.0, choices={"recovery": "none"})
    write_run("lora", 1.0, choices={"recovery": "none"})
    assert [line["recovery"] for line in lines(folder)] == ["correction", "none", "none"]


@pytest.mark.parametrize(
    ("state", "more", "word"),
    [
        ("oom", {"stage": "train", "error": "x"}, "OOM"),
        ("failed", {"stage": "train", "error": "x"}, "failed(train)"),
        ("failed", {"stage": "config", "error": "x"}, "failed(config)"),
        ("running", {}, "running"),
        ("interrupted", {}, "interrupted"),
    ],
)
def test_a_run_without_results_shows_its_state(write_run, folder, state, more, word):
    write_run("zero_shot", 2.0)
    write_run("lora", 1.0)
    write_run("emloc").mark(state, **more)
    line = lines(folder)[-1]
    assert line.pop("method") == "emloc"
    assert line.pop("exact_match") == word
    assert set(line.values()) == {""}


def test_a_single_unfinished_run_gives_a_table(write_run, folder):
    write_run("emloc")
    assert lines(folder) == [{"method": "emloc", "score": "running"}]


def test_the_column_of_two_different_metrics_is_called_score(write_run, folder):
    write_run("emloc", 1.0)
    write_run("lora").finish(metrics(1.0, metric="acc,none"))
    assert column(folder, "score") == ["0.250", "0.250"]


def test_runs_are_listed_in_the_order_they_ended(write_run, folder):
    first, second = write_run("emloc"), write_run("lora", 1.0)
    time.sleep(0.01)
    first.finish(metrics(1.0))
    assert column(folder, "method") == ["lora", "emloc"]
    assert [row.run for row in rows_of(folder)] == [second.folder.name, first.folder.name]


def test_an_empty_folder_is_reported(folder):
    assert table(folder) == f"no runs in {folder}"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("no run")
    assert table(folder) == f"no runs in {folder}"


def test_the_folder_of_a_single_run_gives_a_table(write_run, folder):
    run = write_run("emloc", 1.0)
    write_run("lora", 1.0)
    assert find_runs(run.folder) == [run]
    assert [line["method"] for line in lines(run.folder)] == ["emloc"]
    assert len(find_runs(folder)) == 2


def test_the_table_names_the_adapter_folders_and_the_data(write_run, folder):
    run = write_run("emloc", 1.0)
    (run.folder / "adapter").mkdir()
    write_run("lora", 1.0)
    text = table(folder)
    assert str(run.folder / "adapter") in text
    assert len(re.findall("^adapter of", text, re.M)) == 1
    assert re.search(r"^data of sums: [0-9a-f]{16}$", text, re.M)


# A run's folder ----------------------------------------------------------------------------------


def test_a_run_from_start_to_end(tmp_path):
    run = Run(tmp_path / "a" / "run")
    assert run.status == run.metrics == run.choices == {}
    assert not run.done
    before = time.time()
    run.begin(OmegaConf.create({"seed": 1, "twice": "${seed}"}), {"lora": "r8"})
    assert run.config == {"seed": 1, "twice": 1}
    assert run.choices == {"lora": "r8"}
    assert run.status["state"] == "running"
    assert before <= run.status["time"] <= time.time()
    assert not run.done
    run.finish({"score": 0.5})
    assert run.done
    assert run.metrics == {"score": 0.5}
    assert {path.name for path in run.folder.iterdir()} == {
        *("config.yaml", "choices.json", "status.json", "metrics.json")
    }
    assert Run(run.folder).done


def test_a_restarted_run_clears_its_earlier_failure(tmp_path):
    run = Run(tmp_path)
    run.begin(OmegaConf.create({"seed": 1}), {})
    run.mark("failed", stage="train", error="x")
    run.begin(OmegaConf.create({"seed": 1}), {})
    assert set(run.status) == {"state", "time"}


def test_a_file_is_never_half_written(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.mark("running")
    whole = run.status
    with pytest.raises(TypeError):
        run.mark("failed", error=object())
    assert run.status == whole
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", _power_cut)
        with pytest.raises(OSError, match="cut"):
            run.mark("failed", error="x")
    assert run.status == whole
    run.mark("failed", error="x")
    assert run.status["error"] == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def _power_cut(*_):
    raise OSError("cut")


def test_results_are_written_before_the_state_done(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.mark("running")
    states = []
    mark = Run.mark
    monkeypatch.setattr(Run, "mark", lambda self, *a: states.append(self.metrics) or mark(self, *a))
    run.finish({"score": 1})
    assert states == [{"score": 1}]


# Memory and provenance ---------------------------------------------------------------------------


def _await_measurement(peak: MemoryPeak, expected_bytes: int) -> None:
    """Wait until the peak has reached `held` bytes; a busy machine measures late."""
    for _ in range(200):
        if peak._host.bytes >= expected_bytes - 5e6:
            return
        time.sleep(0.05)


def test_the_peak_includes_memory_that_was_freed():
    with MemoryPeak() as peak:
        before = process_bytes()
        # Allocated from the system directly, since an allocator may keep freed memory.
        block = mmap.mmap(-1, 200_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        bytes_with_block = process_bytes()
        _await_measurement(peak, bytes_with_block)
        block.close()
    assert bytes_with_block - before > 180e6
    assert peak.bytes >= bytes_with_block - 5e6
    assert process_bytes() < bytes_with_block - 180e6
    assert peak.gib == round(peak.bytes / GIB, 3) > 0.2


class _Node:
    """An object that can be part of a cycle."""


def test_garbage_of_earlier_work_is_freed_before_the_peak_is_measured(monkeypatch):
    monkeypatch.setattr(memory, "gc", gc)  # the other tests leave garbage to Python
    node = _Node()
    node.itself = node  # only a collection frees it
    freed = weakref.ref(node)
    del node
    with MemoryPeak():
        assert freed() is None


def test_work_shorter_than_the_measuring_interval_has_a_peak():
    peak = MemoryPeak()
    peak._host._stop.set()  # ends before the first measurement
    with peak:
        pass
    assert peak.bytes > 50e6


def test_the_peak_survives_a_failure():
    peak = MemoryPeak()

    def fail():
        with peak:
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert peak.bytes > 50e6
    assert not peak._host._poller.is_alive()


def test_provenance_names_code_packages_and_machine():
    actual = provenance()
    assert set(actual) == {"commit", "dirty", "versions", "python", "device"}
    assert set(actual["versions"]) == set(PACKAGES)
    assert actual["versions"]["torch"] == torch.__version__
    assert actual["commit"] is None or re.fullmatch("[0-9a-f]{40}", actual["commit"])
    assert isinstance(actual["dirty"], bool)
    assert actual["device"]
    assert json.loads(json.dumps(actual)) == actual


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.CalledProcessError(128, "git")])
def test_outside_a_git_repository_there_is_no_commit(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(provenance_module.subprocess, "run", fail)
    actual = provenance()
    assert actual["commit"] is None
    assert actual["dirty"] is False
