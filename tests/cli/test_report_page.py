"""The files of a report: Markdown and LaTeX tables with the best in bold, an HTML page, figures."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from pandas import DataFrame, read_csv
from pandas.testing import assert_frame_equal
from reported import row

from emloc.cli import VERBS
from emloc.config.paths import EXPERIMENTS
from emloc.config.run_folder import Run
from emloc.errors import ConfigError
from emloc.report.glossary import column_meanings
from emloc.report.latex import escaped, latex
from emloc.report.lead import lead_sentence
from emloc.report.markdown import markdown, table, table_with_notes
from emloc.report.origin import origin
from emloc.report.page import PageFigure, Report, Section, page
from emloc.report.paper import paper_of
from emloc.report.rows import Row, rows_of, write_rows
from emloc.report.run_table import table_of
from emloc.report.summary import summary_of
from emloc.report.table import Table, best, number, split
from emloc.report.write import write_report

EIGHT = "internvl2_5_8b"
WORDS = Table(
    DataFrame(
        [
            {"cell": "zero_shot", "accuracy": "40.0", "loss": "1.50"},
            {"cell": "lora_r8", "accuracy": "52.0 ± 1.0 (52.9)", "loss": "1.25"},
            {"cell": "emloc & <b>", "accuracy": "OOM (51.0)", "loss": ""},
        ]
    ),
    {(1, "accuracy")},
)

# The best ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "up", "expected"),
    [
        (["0.3", "0.5 ± 0.1", "0.4"], True, [1]),
        (["0.3", "0.5", "0.4"], False, [0]),
        (["-10.0%", "9.0%", "100.0%"], True, [2]),
        (["0.5", "0.5", "0.4"], True, [0, 1]),  # equal after rounding
        (["0.5", "OOM", ""], True, []),
        (["0.5", "0.5"], True, []),
        (["failed(train)", ""], True, []),
    ],
)
def test_the_best_value_is_chosen_by_the_leading_number(words, up, expected):
    frame = DataFrame({"score": words})
    assert best(frame, [""] * len(words), {"score": up}) == {(i, "score") for i in expected}


def test_the_best_value_is_chosen_among_runs_with_equal_model_and_data():
    rows = [row("lora", 0.6, **{"scores/loss": 1.0}), row("emloc", 0.5, **{"scores/loss": 0.5})]
    rows += [row("lora", 0.1, task="websrc"), row("emloc", 0.2, task="websrc")]
    rows += [row("lora", 0.9, model="tiny")]
    assert table_of(summary_of(rows)).best == {(0, "accuracy"), (1, "loss"), (3, "accuracy")}


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("52.1 ± 0.3 (52.3)", 52.1),
        ("-14.1%", -14.1),
        ("+0.5", 0.5),
        ("1e-05", 1e-5),
        ("50.0 ± 0.0; OOM", 50.0),
        ("", None),
        ("OOM", None),
        ("nan", None),
        ("8b", None),
        ("r8", None),
    ],
)
def test_the_value_of_a_text_is_its_leading_number(word, value):
    assert number(word) == value


def test_our_result_is_split_from_the_number_in_brackets():
    assert split("52.1 ± 0.3 [2/3] (52.3)") == ("52.1 ± 0.3 [2/3]", "(52.3)")
    assert split("failed(train)") == ("failed(train)", "")
    assert split("(52.3)") == ("", "(52.3)")


# Markdown and LaTeX ------------------------------------------------------------------------------


def test_the_best_value_is_bold_on_request():
    assert "| **52.0 ± 1.0** (52.9) |" in markdown(WORDS, bold=True)
    assert "**" not in markdown(WORDS)
    assert len({len(line) for line in markdown(WORDS, bold=True).splitlines()}) == 1


def test_a_bar_in_a_text_is_escaped():
    assert markdown(Table(DataFrame({"a|b": ["c|d"]}))).splitlines()[2] == "| c\\|d |"


def test_latex_is_a_table_in_the_manner_of_booktabs_with_its_notes():
    assert latex(WORDS, "A & b", ["100% of it", "more"], "mine").splitlines() == [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
        r"\caption{A \& b}",
        r"\label{tab:mine}",
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"cell & accuracy & loss \\",
        r"\midrule",
        r"zero\_shot & 40.0 & 1.50 \\",
        r"lora\_r8 & \textbf{52.0 $\pm$ 1.0} (52.9) & 1.25 \\",
        r"emloc \& \textless{}b\textgreater{} & OOM (51.0) &  \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\smallskip",
        r"\parbox{\linewidth}{100\% of it. More.}",
        r"\end{table}",
    ]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("-14.1% ± 0.2%", r"$-$14.1\% $\pm$ 0.2\%"),
        ("(-3.0)", r"($-$3.0)"),
        ("1e-05", "1e-05"),
        ("lm-eval", "lm-eval"),
        ("tiny·vqa_1", r"tiny$\cdot$vqa\_1"),
        (r"a\b~c^d{e}#$&", r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\{e\}\#\$\&"),
    ],
)
def test_texts_are_escaped_for_latex(word, expected):
    assert escaped(word) == expected


# The page ----------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Parses HTML: start tags with attributes, unclosed tags, and the texts of table cells."""

    VOID = ("meta", "img", "link", "source", "wbr")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.cells, self.strange = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.strange.append(tag)

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def make_report(**changed) -> Report:
    fields = {
        "title": "mine <i>",
        "lead": ["3 runs"],
        "sections": [Section("Runs", WORDS, ["a & b"], ["table.md", "runs.csv"])],
        "meanings": {"loss": "Lower is <better>."},
        "figures": [PageFigure("score_memory", "It grows.", 'accuracy against "GiB"', 900)],
        "origin": {"commit": ["abc"], "versions": {"torch": ["2.13", "2.14"]}, "settings": {}},
    }
    return Report(**fields | changed)


def test_the_page_is_whole_and_refers_only_to_files_of_its_folder():
    text = page(make_report())
    read = Reader(text)
    assert read.open == read.strange == []
    links = re.findall(r"""(?:src|srcset|href)=["']([^"']*)""", text)
    assert {link for link in links if not link.startswith(("#", "data:"))} == {
        *("table.md", "runs.csv", "figures/narrow/score_memory.svg"),
        *(f"figures/score_memory.{suffix}" for suffix in ("svg", "png", "pdf", "csv")),
    }
    assert not re.search(r"@import|url\(", text)
    assert [one["lang"] for one in read.named("html")] == ["en"]
    assert "prefers-color-scheme: dark" in text


def test_the_page_has_the_texts_of_the_table_and_their_sort_values():
    read = Reader(page(make_report()))
    head, *lines = [[cell.strip() for cell in line] for line in read.cells]
    assert head == WORDS.columns
    assert lines == WORDS.frame.to_numpy().tolist()
    values = [one.get("data-value") for one in read.named("td")]
    assert values == ["40.0", "1.5", "52.0", "1.25", None, None]
    kinds = [one["class"].split()[0] for one in read.named("td")]
    assert kinds == ["number", "number", "number", "number", "bad", "empty"]
    assert len(read.named("button")) == 3
    assert len(read.named("b")) == 1


def test_each_cell_names_its_column_and_each_head_its_scope():
    read = Reader(page(make_report()))
    assert [one["data-column"] for one in read.named("td")] == WORDS.columns[1:] * 3
    assert [one["scope"] for one in read.named("th")] == ["col"] * 3 + ["row"] * 3


def test_a_figure_has_a_caption_a_text_and_a_link_to_its_largest_form():
    text = page(make_report())
    (image,) = Reader(text).named("img")
    assert image["alt"] == 'accuracy against "GiB"'
    assert image["src"] == "figures/score_memory.svg"
    assert "<strong>Figure 1.</strong> It grows." in text
    assert re.search(r'<a href="figures/score_memory.svg">\s*<picture>', text)


def test_the_page_says_what_each_column_means():
    assert "<dt>loss</dt><dd>Lower is &lt;better&gt;.</dd>" in page(make_report())


def test_the_page_shows_its_provenance_with_escaped_texts():
    text = page(make_report())
    assert "<title>mine &lt;i&gt;</title>" in text
    assert "<li>a &amp; b</li>" in text
    assert "<dt>versions.torch</dt><dd>2.13, 2.14</dd>" in text
    assert "<dt>commit</dt><dd>abc</dd>" in text


# The files ---------------------------------------------------------------------------------------


def make_runs(place: Path) -> Path:
    """A folder with runs of table3_nlp: two seeds of a cell, an OOM run, and another model."""

    def make(cell: str, score: float | None, seed: int = 0, model: str = "llama3_8b") -> None:
        choices = {"cell": f"table3_nlp/{cell}", "model": model, "task": "gsm8k", "lora": "r8"}
        config = {"method": cell, "seed": seed, "model": {"name": model}, "task": {"name": "gsm8k"}}
        run = Run(place / f"{cell}-{model}-s{seed}")
        run.begin(OmegaConf.create(config), choices)
        if score is None:
            return run.mark("oom", stage="train", error="x")
        run.finish(
            {
                "metric": "exact_match",
                "score": score,
                "scores": {"loss": 1 - score, "exact_match": score},
                "data": {"name": "gsm8k"},
                "emulator": {"bytes": 8e9},
                "seconds": {"emulate": 60.0, "train": 600.0},
                "peak_gib": {"emulate": 3.0, "train": 10.0},
                "provenance": {"commit": "abc", "versions": {"torch": f"2.{seed}"}, "dirty": None},
            }
        )

    make("emloc", 0.3)
    make("emloc", 0.32, seed=1)
    make("lora", None)
    make("loram_rand", 0.272)
    make("emloc", 0.1, model="smollm2_135m")
    return place


@pytest.fixture
def folder(tmp_path) -> Path:
    """The runs, for a test that writes beside them."""
    return make_runs(tmp_path / "runs" / "table3_nlp")


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    """The runs with their report, which is written once for all tests that only read it."""
    place = make_runs(tmp_path_factory.mktemp("runs") / "table3_nlp")
    write_report(place, rows_of(place), place / "report")
    return place


def report(*arguments: object) -> None:
    verb = VERBS["report"]
    verb.run(verb.parser.parse_args([str(argument) for argument in arguments]))


def test_a_report_of_a_folder_is_written_into_the_folder(folder, capsys):
    report(folder)
    said = capsys.readouterr().out
    written = re.findall(r"^wrote (\S+)$", said, re.M)
    assert {
        *("table.md", "table.tex", "table.csv", "by_task_score.md", "by_task_score.tex"),
        *("runs.csv", "report.html", "provenance.json"),
    } == {path.removeprefix(f"{folder}/report/") for path in written}
    assert sorted(map(str, (folder / "report").glob("*.*"))) == sorted(written)
    figures = list((folder / "report" / "figures").rglob("*.*"))
    assert f"wrote {len(figures)} files in {folder}/report/figures\n" in said
    assert len(rows_of(folder)) == 5  # the written files do not count as runs


def test_all_forms_of_the_table_contain_the_numbers_of_the_paper(reported):
    lines = read_csv(reported / "report" / "table.csv").set_index("seeds")
    ours = lines.loc["0 1"]
    assert list(ours[["score", "score_std"]].round(6)) == [0.31, 0.014142]
    assert (ours["paper/score"], round(ours["difference/score"], 6)) == (29.8, 1.2)
    absent = lines[lines["state"] == "not run"]
    assert {*absent["paper/score"]} == {32.6, 24.3, 33.8, 24.6, 33.9}
    assert absent["score"].isna().all()
    by_task = (reported / "report" / "by_task_score.tex").read_text()
    assert r"emloc & (33.9) & \textbf{31.0 $\pm$ 1.4} (29.8) & 10.0 \\" in by_task
    assert "| **31.0 ± 1.4** |" in (reported / "report" / "table.md").read_text()
    html = (reported / "report" / "report.html").read_text()
    assert '<b>31.0 ± 1.4</b> <span class="aside">(29.8)</span>' in html
    assert Reader(html).strange == []


def test_the_tidy_file_of_a_report_gives_the_same_table(reported):
    again = rows_of(reported / "report" / "runs.csv")
    assert_frame_equal(summary_of(again), summary_of(rows_of(reported)))


def test_the_provenance_that_runs_share_is_listed_once(folder):
    shared_origin = origin(folder, rows_of(folder))
    assert json.loads(json.dumps(shared_origin)) == shared_origin
    assert shared_origin["commit"] == ["abc"]
    assert shared_origin["versions"] == {"torch": ["2.0", "2.1"]}
    assert shared_origin["dirty"] == []
    assert shared_origin["experiments"] == ["table3_nlp"]
    assert shared_origin["settings"]["lora"] == "r8"
    assert "model" not in shared_origin["settings"]
    assert shared_origin["runs"] == 5


def test_equal_runs_give_identical_files(reported, tmp_path):
    again = write_report(reported, rows_of(reported), tmp_path)
    assert len(again) > 10
    for path in again:
        name = path.relative_to(tmp_path)
        assert path.read_bytes() == (reported / "report" / name).read_bytes(), name


def test_the_printed_table_is_plain_and_lists_missing_runs(folder):
    said = table_with_notes(folder, rows_of(folder), unrun=True)
    assert "zero_shot" not in table(folder)  # the table at the end of a sweep omits missing runs
    assert "**" not in said
    assert re.search(r"^\|  +\| zero_shot +\| .*\| 24\.3 +\|  ", said, re.M)
    assert "paper: EMLoC, Table 3" in said


def test_a_report_of_a_run_or_file_is_written_only_on_request(folder, tmp_path, capsys):
    file = tmp_path / "rows.csv"
    write_rows(rows_of(folder), file)
    before = sorted(tmp_path.rglob("*"))
    report(folder / "emloc-llama3_8b-s0")
    assert "zero_shot" not in capsys.readouterr().out  # the report of one run lists no missing runs
    report(file)
    assert "31.0 ± 1.4" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    report(file, "--to", tmp_path / "there")
    assert (tmp_path / "there" / "report.html").exists()
    assert json.loads((tmp_path / "there" / "provenance.json").read_text())["runs"] == 5


def test_the_option_csv_writes_a_file_of_rows(folder, tmp_path, capsys):
    report(folder, "--csv", tmp_path / "rows.csv")
    assert f"wrote {tmp_path / 'rows.csv'}\n" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "rows.csv")) == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cell,loss\na,1\n", "no table of runs, it has no column experiment, run, state"),
        ("", "no table of runs, it has no column experiment"),
    ],
)
def test_a_file_without_the_columns_of_runs_is_refused(tmp_path, text, said):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ConfigError, match=rf"rows.csv: {said}"):
        report(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("old", "new"), [(",0,accuracy", ",zero,accuracy"), (",1.0\n", ",low\n"), (",1.0\n", "\n")]
)
def test_an_invalid_line_is_refused_with_its_number(tmp_path, old, new):
    file = tmp_path / "rows.csv"
    write_rows([row(), row("lora")], file)
    text = file.read_text()
    assert old in text
    file.write_text(text[::-1].replace(old[::-1], new[::-1], 1)[::-1])
    with pytest.raises(ConfigError, match=r"rows.csv:3: cannot be read: "):
        report(file)


def test_a_missing_or_unwritable_folder_is_refused_in_one_line(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no folder or file .*nowhere; give one such as"):
        report(tmp_path / "nowhere")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot write .*taken.*; give another folder, --to"):
        report(folder, "--to", tmp_path / "taken")


def test_a_folder_without_runs_is_refused_and_unchanged(tmp_path):
    with pytest.raises(ConfigError, match=f"no runs in {tmp_path}; give one such as runs/demo"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_each_figure_of_a_report_has_its_files_and_a_text(reported):
    place = reported / "report"
    stems = {path.stem for path in (place / "figures").glob("*.png")}
    images = Reader((place / "report.html").read_text()).named("img")
    assert {one["src"] for one in images} == {f"figures/{stem}.svg" for stem in stems}
    assert len(images) == len(stems) >= 1
    assert all("exact_match against " in one["alt"] for one in images)
    for stem in stems:
        for name in (*(f"{stem}.{suffix}" for suffix in ("pdf", "csv")), f"narrow/{stem}.svg"):
            assert (place / "figures" / name).stat().st_size > 0


def test_the_page_says_in_one_sentence_what_was_run(folder):
    for run, count in ((folder / "emloc-llama3_8b-s0", 4), (folder / "emloc-llama3_8b-s1", 4)):
        (run / "predictions.jsonl").write_text("{}\n" * count)
    rows = rows_of(folder)
    assert lead_sentence(rows, origin(folder, rows), folder) == (
        "5 runs (4 done, 1 OOM) of llama3_8b and smollm2_135m on gsm8k, "
        "scored on 4 held-out rows, seeds 0 and 1, commit abc."
    )


# What columns mean -------------------------------------------------------------------------------


def meanings_of(rows: list[Row], experiment: str = "") -> dict[str, str]:
    paper = paper_of([experiment], EXPERIMENTS)
    summary = summary_of(rows, paper)
    return column_meanings(summary, table_of(summary))


def test_every_column_of_a_report_has_a_meaning(folder):
    meanings = meanings_of(rows_of(folder), "table3_nlp")
    assert (
        list(meanings)
        == table_of(summary_of(rows_of(folder), paper_of(["table3_nlp"], EXPERIMENTS))).columns
    )
    assert meanings["paper"] == "The paper's number for the same model, task and method."
    assert meanings["exact_match %"].startswith("Score of the held-out rows in percent;")
    assert meanings["loss"].startswith("Mean negative log-likelihood")
    assert meanings["train s"].startswith("Seconds of the stage")
    assert [name for name, text in meanings.items() if text.startswith("Setting ")] == []


def test_settings_and_kinds_of_rows_have_meanings_of_their_own():
    rows = [
        row("lora", settings={"lora.rank": rank}, **{"scores/accuracy/colour": 0.5})
        for rank in ("4", "8")
    ]
    meanings = meanings_of(rows)
    assert meanings["accuracy"] == "Score of the held-out rows; higher is better."
    assert meanings["colour"] == "The same score, of the held-out rows of the kind colour."
    assert meanings["lora.rank"] == "Setting lora.rank, in which the runs differ."
