"""Arithmetic and weights of runs in tables and CSV files: shared, counted, and empty if unknown."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from reported import row

from emloc.config.run_folder import Run
from emloc.report.markdown import table
from emloc.report.rows import rows_of, write_rows
from emloc.report.run_table import notes_of, table_of
from emloc.report.summary import summary_of
from emloc.report.summary_file import read_summary, write_summary

TRAINED = {"seconds/train": 1.0, "trained_rows": 100, "weights_read/train": 2e9}
LORA = TRAINED | {"row_forwards/train": 300.0, "weights_read/emulate": 0, "seconds/emulate": 1.0}


def write_run(folder: Path, method: str, work: dict, **keys: str) -> None:
    """Write a run that is done; `work` goes to its results, `keys` are those of its stages."""
    run = Run(folder / f"{method}-{len([*folder.iterdir()]) if folder.exists() else 0}")
    config = {"method": method, "seed": 0, "model": {"name": "m"}, "task": {"name": "t"}}
    run.begin(OmegaConf.create(config), {"method": method})
    scores = {"metric": "accuracy", "score": 0.5, "scores": {"loss": 1.0}, "data": 1}
    seconds = dict.fromkeys(keys, 1.0)
    run.finish({**scores, "seconds": seconds, "peak_gib": seconds, "stages": keys, **work})


def lines(folder: Path) -> dict[str, dict[str, str]]:
    """Method -> column -> word, for all lines of the table."""
    head, _, *rows = [
        [word.strip() for word in text.strip("|").split("|")]
        for text in table(folder).splitlines()
        if text.startswith("|")
    ]
    return {one["method"]: one for one in (dict(zip(head, words, strict=True)) for words in rows)}


# One run -----------------------------------------------------------------------------------------


def test_forwards_are_those_of_all_counted_stages_for_a_trained_row():
    assert row("lora", **LORA).forwards == 3
    more = {"seconds/calibrate": 1.0, "row_forwards/calibrate": 64.0, "weights_read/calibrate": 5e9}
    emloc = row("emloc", **LORA, **more)
    assert emloc.forwards == 3.64
    assert emloc.weights_read == 7e9
    assert row("emloc", **LORA, **more, **{"row_forwards/evaluate": 9.0}).forwards == 3.64


@pytest.mark.parametrize("absent", ["trained_rows", "row_forwards/train", "weights_read/emulate"])
def test_a_run_of_an_earlier_version_has_no_forwards(absent):
    assert row("lora", **{k: v for k, v in LORA.items() if k != absent}).forwards is None


def test_the_table_has_forwards_and_gigabytes_and_says_what_they_are():
    runs = table_of(summary_of([row("lora", **LORA), row("emloc"), row("zero_shot")]))
    assert list(runs.frame["forwards"]) == ["3.00", "", ""]
    assert list(runs.frame["read GB"]) == ["2.00", "", ""]
    notes = "\n".join(notes_of(runs))
    assert "forwards: arithmetic in forwards of the original model per training sample" in notes
    assert "LoRA with recomputation: 3" in notes
    without = table_of(summary_of([row("lora"), row("emloc")]))
    assert not {"forwards", "read GB"} & {*without.columns}


# Runs of a folder --------------------------------------------------------------------------------


def test_runs_share_a_pass_but_each_has_its_training(tmp_path):
    def work(rows: int, passes: float) -> dict:
        return {
            "row_forwards": {"calibrate": 60.0, "train": rows * passes},
            "weights_read": {"calibrate": 6e9, "train": 1e9},
            "trained_rows": rows,
        }

    write_run(tmp_path, "emloc", work(30, 0.5), calibrate="a", train="x")
    write_run(tmp_path, "emloc_uncorrected", work(30, 0.5), calibrate="a", train="x")
    write_run(tmp_path, "emloc_covariance", work(20, 1.5), calibrate="a", train="y")
    write_run(tmp_path, "upop", work(30, 0.5), calibrate="b", train="z")
    words = lines(tmp_path)
    forwards = {method: one["forwards"] for method, one in words.items()}
    assert forwards["emloc"] == forwards["emloc_uncorrected"] == f"{60 / 3 / 30 + 0.5:.2f}"
    assert forwards["emloc_covariance"] == f"{60 / 3 / 20 + 1.5:.2f}"
    assert forwards["upop"] == f"{60 / 30 + 0.5:.2f}"
    assert words["emloc"]["read GB"] == "3.00"
    assert words["upop"]["read GB"] == "7.00"
    alone = rows_of(tmp_path / "emloc-0")
    assert alone[0].number("row_forwards/calibrate") == 60


def test_a_csv_file_of_runs_and_of_means_keeps_the_numbers(tmp_path):
    runs = tmp_path / "runs"
    work = {"row_forwards": {"train": 60.0}, "weights_read": {"train": 1e9}, "trained_rows": 20}
    write_run(runs, "lora", work, train="x")
    write_run(runs, "zero_shot", {"row_forwards": {}, "weights_read": {"emulate": 0}}, emulate="e")
    write_run(runs, "emloc", {}, train="y")  # of an earlier version
    rows, file = rows_of(runs), tmp_path / "runs.csv"
    write_rows(rows, file)
    head, *texts = file.read_text().splitlines()
    cells = [dict(zip(head.split(","), text.split(","), strict=True)) for text in texts]
    assert [one["row_forwards/train"] for one in cells] == ["60.0", "", ""]
    assert [one["weights_read/train"] for one in cells] == ["1000000000.0", "", ""]
    assert [one["trained_rows"] for one in cells] == ["20.0", "", ""]
    assert [one.numbers for one in rows_of(file)] == [one.numbers for one in rows]
    assert [one.forwards for one in rows_of(file)] == [3.0, None, None]
    write_summary(summary_of(rows), tmp_path / "table.csv")
    again = read_summary(tmp_path / "table.csv").set_index("method")
    assert again.loc["lora", "forwards"] == 3
    assert again.loc["lora", "weights_read"] == 1e9
    assert again.loc[["emloc", "zero_shot"], "forwards"].isna().all()
