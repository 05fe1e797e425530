"""A run, a sweep or a verb that fails says in one line what failed, where, and what mends it."""

import json
import shutil
from pathlib import Path

import pytest

from emloc.errors import FailedWorkError
from emloc.sweeps import job


@pytest.fixture
def broken(checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "broken")


def error_lines(ran) -> list[str]:
    """The lines that say what is wrong: all but the one about the start."""
    return [line for line in ran.output.splitlines() if line and "started" not in line]


def crash(*_, **__):
    raise KeyError("rope_theta")


def test_an_unexpected_error_of_a_single_run_is_a_line_and_its_traceback_is_in_run_log(
    emloc, tiny, one_run, monkeypatch
):
    monkeypatch.setattr(job, "_pipeline", crash)
    ran = emloc(*tiny)
    assert ran.code == 1, ran.output
    (line,) = error_lines(ran)
    run = one_run()
    assert line.endswith(f"KeyError: 'rope_theta' (more in {run / 'run.log'})")
    text = (run / "run.log").read_text()
    assert line in text
    assert "Traceback" in text
    assert "in crash" in text
    assert json.loads((run / "status.json").read_text())["stage"] == "start"


def test_a_sweep_goes_on_after_each_failure_and_counts_them_at_its_end(
    emloc, tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(job, "_pipeline", crash)
    ran = emloc("-m", *tiny, "seed=0,1", "name=grid")
    assert ran.code == 1, ran.output
    assert "Traceback" not in ran.output
    assert ran.out.count("KeyError: 'rope_theta' (more in ") == 2
    assert "0 of 2 jobs done, 2 failed" in ran.out
    assert ran.err.count("KeyError: 'rope_theta'") == 2
    for log in (tmp_path / "runs/grid").glob("*/run.log"):
        assert "Traceback" in log.read_text()
    # A job that cannot start does not end the sweep either.
    first, second = sorted((tmp_path / "runs/grid").glob("*-s?-*"))
    shutil.rmtree(first)
    first.write_text("a file in the place of the folder")
    shutil.rmtree(second)
    ran = emloc("-m", *tiny, "seed=0,1", "name=grid")
    assert ran.code == 1, ran.output
    assert "Traceback" not in ran.output
    assert f"could not start: {first}: " in ran.output
    assert "0 of 2 jobs done, 2 failed" in ran.out
    assert "1 failed without a record" in ran.err
    assert json.loads((second / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("words", [[], ["-m", "seed=0,1"]], ids=["run", "sweep"])
@pytest.mark.parametrize("place", ["a file", "/proc/runs"])
def test_a_runs_folder_that_cannot_be_written_is_one_line(emloc, tiny, tmp_path, words, place):
    (tmp_path / "a file").write_text("")
    runs = str(tmp_path / place)  # an absolute second path counts alone
    ran = emloc(*words, *tiny, EMLOC_RUNS=runs)
    assert ran.code == 2, ran.output
    (line,) = error_lines(ran)
    assert line.startswith(f"emloc: {runs}")
    assert line.endswith("; set EMLOC_RUNS=/another/folder that can be written")


@pytest.mark.parametrize("place", ["a file", "/proc/cache"])
def test_a_cache_that_cannot_be_written_is_one_line(emloc, tiny, tmp_path, place):
    (tmp_path / "a file").write_text("")
    ran = emloc(*tiny, "method=lora", EMLOC_CACHE=str(tmp_path / place))
    assert ran.code == 2, ran.output
    assert "Traceback" not in ran.output
    line = error_lines(ran)[-1]
    assert f"{tmp_path / place}" in line
    assert line.endswith("; set EMLOC_CACHE=/another/folder that can be written")


def test_a_run_that_cannot_be_recorded_is_said_and_fails(emloc, tiny, monkeypatch):
    def mark(self, state, **more):
        raise OSError(28, "No space left on device", str(self.folder / "status.json"))

    monkeypatch.setattr("emloc.config.run_folder.Run.mark", mark)
    ran = emloc(*tiny)
    assert ran.code == 1, ran.output
    assert "Traceback" not in ran.output
    assert "No space left on device; make room on this disk" in ran.output


def test_an_unexpected_error_of_a_verb_is_one_line_that_says_how_to_see_more(
    emloc, tmp_path, monkeypatch
):
    monkeypatch.setattr("emloc.report.rows.find_runs", crash)
    (tmp_path / "runs").mkdir()
    for words in (["report", "runs"], ["tables"]):
        ran = emloc(*words)
        assert ran.code == 1
        assert ran.output == (
            f"emloc {words[0]}: KeyError: 'rope_theta'; HYDRA_FULL_ERROR=1 shows where in the "
            "code\n"
        )
    ran = emloc("report", "runs", HYDRA_FULL_ERROR="1")
    assert ran.code == 1
    assert "in crash" in ran.err
    assert ran.err.splitlines()[-1] == "emloc report: KeyError: 'rope_theta'"


def test_a_folder_that_a_merge_or_report_cannot_write_is_one_line(emloc, tiny, one_run, tmp_path):
    assert emloc(*tiny, "method=lora").code == 0
    (tmp_path / "file").write_text("")
    for words in (["merge", str(one_run())], ["report", str(one_run().parent)]):
        ran = emloc(*words, "--to", str(tmp_path / "file" / "folder"))
        assert ran.code in (1, 2)
        assert "Traceback" not in ran.output
        assert f"{tmp_path / 'file' / 'folder'}" in ran.err.splitlines()[-1]


def test_a_damaged_file_of_a_run_folder_is_named(emloc, tmp_path):
    run = tmp_path / "runs/demo/one"
    run.mkdir(parents=True)
    (run / "status.json").write_text('{"state": "done", "time": 1')
    ran = emloc("report", "runs/demo")
    assert ran.code == 2
    assert ran.err.startswith("emloc: runs/demo/one/status.json: the file is damaged: ")
    (run / "status.json").write_text('{"state": "done", "time": 1}')
    (run / "config.yaml").write_text("model: [")
    ran = emloc("report", "runs/demo")
    assert ran.err.startswith("emloc: runs/demo/one/config.yaml: the file is damaged: ")
    assert len(ran.err.splitlines()) == 1


def test_a_benchmark_that_failed_is_a_failure_and_not_a_wrong_setting(emloc, monkeypatch):
    def bench(*_):
        raise FailedWorkError("failed: train_8b; see the error messages above")

    monkeypatch.setattr("emloc.cost.bench.run.bench", bench)
    ran = emloc("bench", "train_8b")
    assert (ran.code, ran.output) == (
        1,
        "emloc: failed: train_8b; see the error messages above\n",
    )
