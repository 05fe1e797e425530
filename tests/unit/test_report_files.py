"""CSV files of results, of this version and of earlier ones, and what a published table holds."""

import html
import re

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from reported import row, write_run

from emloc.cli import VERBS
from emloc.config.paths import EXPERIMENTS
from emloc.config.run_folder import Run
from emloc.errors import ConfigError
from emloc.report.latex import latex
from emloc.report.markdown import table
from emloc.report.rows import rows_of, write_rows
from emloc.report.rows.csv_files import is_number, to_number
from emloc.report.run_table import notes_of, table_of
from emloc.report.summary import summary_of
from emloc.report.summary_file import read_summary, write_summary
from emloc.report.write import write_report
from emloc.runtime.atomic import write_json

RESULTS = [path for path in (EXPERIMENTS / "results").rglob("*.csv") if path.stem != "bench"]

# Lines of files that earlier versions wrote.
OLD_RUNS = (
    "experiment,run,state,cell,method,model,task,seed,metric,data,compression.ratio,=score,"
    "=scores/loss,=gain_kept,=bytes,=seconds/train\n"
    "table3_nlp,zero_shot-s1,done,zero_shot,zero_shot,smollm2_135m,stdlib_module,1,"
    "exact_match,69f34975359264fa,0.5,0.0,10.576369980852046,0.0,269030016.0,\n"
    "table3_nlp,lora-s0,done,lora,lora,smollm2_135m,stdlib_module,0,exact_match,"
    "69f34975359264fa,0.5,0.43359375,0.8662723172567561,1.0,269030016.0,15.411\n"
    "table3_nlp,emloc-s0,OOM,emloc,emloc,smollm2_135m,stdlib_module,0,,,0.5,,,,,\n"
)
OLD_MEANS = (
    "cell,method,train.learning_rate,seeds,token_accuracy,loss,gain kept,loss as trained,"
    "through MB,train GiB,step s,calibrate s,emulate s,train s,recover s,evaluate s\n"
    "zero_shot,zero_shot,0.0001,0 1 2,0.685 ± 0.000,1.426 ± 0.000,0.0% ± 0.0%,.,.,.,.,.,0,.,"
    ".,23\n"
    "svd_r90_nf4,emloc_uncorrected,0.0001,0 1 2,0.741 ± 0.000,1.077 ± 0.002,58.6% ± 0.3%,"
    "1.100 ± 0.001,106,2.96,0.370,6,9,165,0,23\n"
    "offsite_r50,offsite,0.0001,0 1 2,0.676 ± 0.001,1.445 ± 0.002,-3.1% ± 0.4%,.,163,1.44,"
    "0.111,.,0,55,0,35\n"
    "lora,lora,0.0004,0,0.798,0.743,100.0%,.,269,2.80,0.171,.,0,30,0,18\n"
)
OLD_TABLE = """\
cell,method,seeds,exact_match %,hard,paper,difference,peak GB,paper GB,difference GB,loss
emloc,emloc,0 1,31.0 ± 1.4,20.0 ± 0.5,29.8,+1.2,53.7,72.9,-19.2,0.690 ± 0.014
lora,lora,0,OOM,.,.,.,.,.,.,.
.,zero_shot,.,.,.,24.3,.,.,.,.,.
"""


def report(*arguments: object) -> None:
    verb = VERBS["report"]
    verb.run(verb.parser.parse_args([str(argument) for argument in arguments]))


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


@pytest.fixture
def file(tmp_path):
    def write(text: str):
        path = tmp_path / "old.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# Files of earlier versions -----------------------------------------------------------------------


def test_an_earlier_file_of_runs_has_the_same_numbers(file, tmp_path, capsys):
    zero_shot, lora, emloc = rows_of(file(OLD_RUNS))
    assert zero_shot.numbers["scores/loss"] == 10.576369980852046
    assert (lora.number("score"), lora.number("gain_kept")) == (0.43359375, 1.0)
    assert lora.settings["compression.ratio"] == "0.5"
    assert (emloc.state, dict(emloc.numbers)) == ("OOM", {})
    report(tmp_path / "old.csv", "--csv", tmp_path / "new.csv")
    assert "100.0%" in capsys.readouterr().out  # in words for a reader
    assert "=" not in (tmp_path / "new.csv").read_text()
    assert rows_of(tmp_path / "new.csv") == [zero_shot, lora, emloc]


def test_an_earlier_table_of_means_becomes_numbers_and_prints_as_before(file, tmp_path, capsys):
    summary = read_summary(file(OLD_MEANS))
    nf4 = summary.set_index("cell").loc["svd_r90_nf4"]
    assert nf4[["score", "score_std", "scores/loss"]].to_list() == [0.741, 0.0, 1.077]
    assert nf4[["gain_kept", "gain_kept_std", "bytes"]].to_list() == [0.586, 0.003, 106e6]
    assert (nf4["as_trained/loss"], nf4["seconds/train"]) == (1.1, 165)
    report(tmp_path / "old.csv", "--csv", tmp_path / "new.csv")
    head, _, *lines = cells(capsys.readouterr().out)
    before = [line.split(",") for line in OLD_MEANS.splitlines()]
    assert head == before[0]
    assert lines == [["" if word == "." else word for word in line] for line in before[1:]]
    assert "%" not in (tmp_path / "new.csv").read_text()
    assert table(tmp_path / "new.csv") == table(tmp_path / "old.csv")
    with pytest.raises(ConfigError, match=r"old.csv holds means, and no runs to draw"):
        report(tmp_path / "old.csv", "--to", tmp_path / "there")


def test_an_earlier_table_beside_the_paper_keeps_both_and_the_words(file):
    summary = read_summary(file(OLD_TABLE))
    assert list(summary["state"]) == ["done", "OOM", "not run"]
    ours = summary.loc[0]
    assert ours[["score", "score_std", "scores/exact_match/hard"]].to_list() == [0.31, 0.014, 0.2]
    assert ours[["ours/peak", "paper/peak", "difference/peak"]].to_list() == [53.7, "72.9", -19.2]
    (_, _, emloc, lora, absent) = cells(table(file(OLD_TABLE)))
    assert emloc[3:7] == ["31.0 ± 1.4", "20.0 ± 0.5", "29.8", "+1.2"]
    assert (lora[3], absent[3:6]) == ("OOM", ["", "", "24.3"])


@pytest.mark.parametrize(
    ("word", "value"), [("94.3%", 0.943), ("4.4%", 0.044), ("-3.1%", -0.031), ("1.0", 1.0)]
)
def test_a_percentage_is_the_share_with_the_same_digits(word, value):
    assert to_number(word) == value


def test_a_cell_that_holds_no_number_is_named(file):
    text = OLD_MEANS.replace("1.077 ± 0.002", "low ± 0.002")
    with pytest.raises(ConfigError, match=r"old.csv: column scores/loss cannot be read: .*low"):
        table(file(text))


def test_a_table_without_a_score_is_refused(file):
    with pytest.raises(ConfigError, match=r"old.csv: no table of runs or means, it has no column"):
        report(file("cell,method\na,lora\n"))


# Files of this version ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_numbers_of_the_repository_are_numbers(path):
    frame = pd.read_csv(path)
    numbers = frame[[name for name in frame if is_number(name)]]
    assert {"score", "scores/loss", "gain_kept", "bytes"} <= {*numbers}
    assert all(map(pd.api.types.is_numeric_dtype, numbers.dtypes))
    assert frame["gain_kept"].abs().max() < 4


def test_a_summary_is_read_as_it_was_written(tmp_path):
    rows = [row("lora", score, seed=seed, gain_kept=1.0) for seed, score in ((0, 1 / 3), (1, 0.7))]
    rows += [
        row(score=0.1, gain_kept=1 / 7, settings={"emulator": "svd", "compression.ratio": "0.5"})
    ]
    rows += [row("offload", None)]
    summary = summary_of(rows)
    write_summary(summary, tmp_path / "table.csv")
    again = read_summary(tmp_path / "table.csv")
    assert list(again["seeds"]) == ["0 1", "0", "0"]
    assert list(again["compressed_to"]) == ["", "50%", ""]
    assert again["score"][0] == pytest.approx((1 / 3 + 0.7) / 2, rel=1e-15)
    assert_frame_equal(again[[*summary]], summary, check_dtype=False)
    assert_frame_equal(table_of(again).frame, table_of(summary).frame, check_dtype=False)


# Published tables --------------------------------------------------------------------------------


def test_a_note_explains_each_column_that_is_there_and_no_other():
    def notes(**numbers: float) -> str:
        return "\n".join(notes_of(table_of(summary_of([row("lora", 0.6, **numbers)]))))

    assert len(re.findall("^loss: mean negative log-likelihood", notes(), re.M)) == 1
    assert "gain kept" not in notes()
    assert len(re.findall("^gain kept: share of LoRA's", notes(gain_kept=1.0), re.M)) == 1
    assert "train GiB" not in notes(**{"seconds/train": 1.0})
    assert "train GiB: peak" in notes(**{"seconds/train": 1.0, "peak_gib/train": 2.0})


def test_a_paper_prints_method_compression_scores_gain_and_memory():
    measured = {"gain_kept": 0.5, "seconds/train": 9.0, "peak_gib/train": 2.0, "bytes": 8e6}
    half = {"emulator": "svd", "compression.ratio": "0.5", "compression.bits": "4"}
    rows = [row("lora", 0.6, seed=seed, cell="lora", **measured) for seed in (0, 1)]
    rows += [row("emloc", 0.5, cell="emloc", settings=half, **measured)]
    summary = summary_of(rows)
    printed = table_of(summary, printed=True)
    assert printed.columns == [
        *("method", "compression", "accuracy", "gain kept", "through MB", "train GiB")
    ]
    assert list(printed.frame["compression"]) == ["", "50% nf4"]
    assert printed.frame["accuracy"][0] == "0.600 ± 0.000"
    assert {"seeds", "loss", "train s"} <= {*table_of(summary).columns}
    text = latex(printed, "Mine", notes_of(printed), "mine")
    assert r"emloc & 50\% nf4 & 0.500" in text
    assert "Gain kept: share of LoRA's" in text


def test_a_run_without_results_is_named_below_published_tables_and_is_in_the_csv(tmp_path):
    rows = [row("lora", 0.6), row("emloc", 0.5), row("offload", None)]
    rows += [row("upop", None, state="failed(config)", seed=seed) for seed in (0, 1)]
    file = tmp_path / "runs.csv"
    write_rows(rows, file)
    write_report(file, rows, tmp_path / "there")
    note = "eft out, without results: OOM: offload. failed(config): upop"
    for name in ("table.md", "table.tex", "report.html"):
        text = (tmp_path / "there" / name).read_text()
        lines = [line for line in text.splitlines() if re.search("offload|upop", line)]
        assert len(lines) == 1, name
        assert note in lines[0]
    stored = pd.read_csv(tmp_path / "there" / "table.csv")
    assert list(stored["state"]) == ["done", "done", "OOM", *["failed(config)"] * 2]
    assert stored["score"].isna().sum() == 3
    assert "| offload | 0 | OOM" in re.sub(" +", " ", table(file))  # who asks is told


def test_a_report_says_that_an_adapter_beside_the_authors_format_is_merged_to_serve(
    tmp_path, monkeypatch
):
    """Only for runs that have an adapter and recorded the format."""
    monkeypatch.setattr("emloc.report.write.write_figures", lambda *_: ([], []))
    formats = {"emloc": "internvl_chat", "lora": None, "zero_shot": "internvl_chat"}
    for seed, (cell, authors_format) in enumerate(formats.items()):
        write_run(tmp_path, cell, 0.5, seed)
        path = tmp_path / f"{cell}-llama3_8b-gsm8k-s{seed}"
        facts = {"authors_format": authors_format} if authors_format else {}
        write_json(path / "metrics.json", Run(path).metrics | facts)
        if cell != "zero_shot":
            (path / "adapter").mkdir()
    rows = rows_of(tmp_path)
    write_report(tmp_path, rows, tmp_path / "report")
    note = (
        "o serve llama3_8b, merge first (emloc merge RUN): its checkpoint has the authors' layers"
    )
    page = html.unescape((tmp_path / "report/report.html").read_text())
    for text in (page, (tmp_path / "report/table.md").read_text(), table(tmp_path)):
        assert text.count(note) == 1
    (tmp_path / "emloc-llama3_8b-gsm8k-s0/adapter").rmdir()
    assert "to serve" not in table(tmp_path)


def test_a_table_of_which_nothing_is_done_is_published_without_lines(tmp_path):
    rows = [row("lora", None), row("emloc", None, task="websrc")]
    written = write_report(tmp_path / "no.csv", rows, tmp_path / "there")
    text = (tmp_path / "there" / "table.tex").read_text()
    assert "Left out, without results: OOM: lora on internvl2" in text
    assert tmp_path / "there" / "report.html" in written


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_latex_of_the_repositorys_results_is_well_formed(path):
    summary = read_summary(path) if path.parent.name == "means" else summary_of(rows_of(path))
    printed = table_of(summary, printed=True)
    text = latex(printed, path.stem, notes_of(printed), path.stem)
    bare = re.sub(r"\\[{}&%$#_\\]", "", text.partition("\n")[2].replace("\\\\\n", "\n"))
    depth = 0
    for sign in bare:
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0
    assert bare.count("$") % 2 == 0
    assert not re.search(r"[%#^~<>|±·]", bare)
    body = bare.partition("\\toprule")[2].partition("\\bottomrule")[0]
    lines = [line for line in body.splitlines() if "&" in line]
    assert {line.count("&") for line in lines} == {len(printed.columns) - 1}
    assert len(lines) == len(printed.frame) + 1
    opened = re.findall(r"\\begin{(\w+)}", text)
    assert opened == re.findall(r"\\end{(\w+)}", text)[::-1] == ["table", "tabular"]
