"""The numbers of the paper: how they are read, and how they are compared with our results."""

import pytest
from reported import row

from emloc.config.experiments import experiment
from emloc.config.paths import EXPERIMENTS
from emloc.errors import ConfigError
from emloc.report.paper import QUANTITIES, paper_of
from emloc.report.run_table import table_of
from emloc.report.summary import summary_of

HEAD = "cell,model,task,quantity,value,unit\n"
EIGHT = "internvl2_5_8b"


@pytest.fixture
def paper(tmp_path):
    """Function that writes the paper's numbers of an experiment called `mine` and reads them."""

    def write(lines: str, head: str = HEAD):
        (tmp_path / "mine.csv").write_text(f"# The paper, Table 9\n{head}{lines}")
        return paper_of(["mine"], tmp_path)

    return write


def words(rows, paper, **more) -> list[dict[str, str]]:
    return table_of(summary_of(rows, paper, **more)).frame.to_dict("records")


# Reading -----------------------------------------------------------------------------------------


def test_a_number_belongs_to_its_experiment_and_to_the_given_keys(paper):
    (one,) = paper(f"emloc,{EIGHT},,score,52.30,percent\n").numbers
    assert one.keys == {"experiment": "mine", "cell": "emloc", "model": EIGHT}
    assert one.word == "52.30"
    assert one.source == "The paper, Table 9"
    assert one.where.endswith("mine.csv:3")


def test_an_experiment_without_a_file_has_no_numbers(tmp_path):
    assert paper_of(["mine"], tmp_path).numbers == []


@pytest.mark.parametrize(
    ("head", "line", "message"),
    [
        (
            HEAD,
            f"a,{EIGHT},t,f1,1,percent",
            r"mine.csv:3: quantity f1 is not known; it takes",
        ),
        (HEAD, f"a,{EIGHT},t,peak,1,GiB", r"mine.csv:3: peak is given in GB, not in GiB"),
        (HEAD, f"a,{EIGHT},t,score,high,percent", r"mine.csv:3: value 'high' is no number"),
        (HEAD, "a,,t,score,1,percent", r"mine.csv:3: .* fill in model"),
        (HEAD, f"a,{EIGHT},score,1,percent", r"mine.csv:3: 5 values in 6 columns"),
        ("model,quantity,value\n", "", r"mine.csv:2: no column unit; it takes cell, method, model"),
        ("model,rank,quantity,value,unit\n", "", r"mine.csv:2: unknown column rank; it takes"),
        ("", "", r"mine.csv:2: no column model, quantity, value, unit"),
    ],
)
def test_an_invalid_file_is_refused_with_the_line_number(paper, head, line, message):
    with pytest.raises(ConfigError, match=message):
        paper(line, head)


def test_a_file_without_a_source_is_refused(tmp_path):
    for text in (HEAD, ""):
        (tmp_path / "mine.csv").write_text(text)
        with pytest.raises(ConfigError, match=r"mine.csv:1: say where the numbers are from"):
            paper_of(["mine"], tmp_path)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.csv")), ids=lambda path: path.stem)
def test_numbers_in_the_repository_are_of_models_of_their_experiment(path):
    experiment_file = experiment(path.with_suffix(".yaml"))
    models = {experiment_file.word(point, "model") for point in experiment_file.points}
    numbers = paper_of([path.stem], EXPERIMENTS).numbers
    assert len(numbers) >= 6
    assert {one.keys["model"] for one in numbers} <= models


# Ours in the paper's units -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantity", "numbers", "ours"),
    [
        ("score", {}, 52.0),
        ("peak", {"peak_gib/train": 10.0}, 10.73741824),
        ("peak", {}, None),
        ("gpu_hours", {"seconds/calibrate": 1800.0, "seconds/emulate": 5400.0}, 2.0),
        ("gpu_hours", {"seconds/emulate": 5400.0}, 1.5),
        ("gpu_hours", {"seconds/calibrate": 1800.0}, None),
    ],
)
def test_our_numbers_use_the_units_of_the_paper(quantity, numbers, ours):
    assert QUANTITIES[quantity].ours(row(score=0.52, **numbers)) == ours


def test_a_run_without_results_has_no_number():
    assert [each.ours(row(score=None)) for each in QUANTITIES.values()] == [None, None, None]


# Side by side ------------------------------------------------------------------------------------


def test_a_score_is_compared_in_percent(paper):
    paper_numbers = paper(
        f"a,{EIGHT},pmc_vqa,score,52.3,percent\na,{EIGHT},websrc,score,85.2,percent\n"
    )
    runs = [row(score=score, cell="a", seed=seed) for seed, score in enumerate((0.51, 0.52, 0.53))]
    runs.append(row(score=0.86, cell="a", task="websrc"))
    first, second = words(runs, paper_numbers)
    assert list(first)[:4] == ["cell", "method", "task", "seeds"]
    beside = {"accuracy %": "52.0 ± 1.0", "paper": "52.3", "difference": "-0.3"}
    assert list(first.items())[4:7] == list(beside.items())
    assert list(second.values())[4:7] == ["86.0", "85.2", "+0.8"]


def test_a_score_of_another_metric_is_not_compared(paper):
    numbers = paper(f"emloc,{EIGHT},pmc_vqa,score,52.3,percent\n")
    # The paper's metric of this task; our run was scored by accuracy.
    rows = [row(cell="emloc", settings={"task.metric": "anls"})]
    (line,) = words(rows, numbers)
    assert not {"paper", "difference"} & set(line)


def test_a_zero_difference_has_no_minus_sign(paper):
    paper_numbers = paper(f"a,{EIGHT},pmc_vqa,score,52.3,percent\n")
    (line,) = words([row(score=0.52299, cell="a")], paper_numbers)
    assert line["difference"] == "+0.0"


def test_a_failed_run_is_shown_beside_the_paper_without_a_difference(paper):
    paper_numbers = paper(f"a,{EIGHT},pmc_vqa,score,52.3,percent\n")
    (line,) = words([row(score=None, cell="a")], paper_numbers)
    assert line == {
        "cell": "a",
        "method": "emloc",
        "score %": "OOM",
        "paper": "52.3",
    }


def test_another_model_is_not_compared_with_the_paper(paper):
    paper_numbers = paper(f"a,{EIGHT},pmc_vqa,score,52.3,percent\n")
    (line,) = words([row(score=0.5, cell="a", model="tiny")], paper_numbers)
    assert line["accuracy"] == "0.500"
    assert not {"paper", "difference"} & set(line)
    small, large = words([row(cell="a", model="tiny"), row(cell="a")], paper_numbers)
    assert (small["paper"], small["difference"]) == ("", "")
    assert (large["paper"], large["difference"]) == ("52.3", "-2.3")


def test_numbers_of_one_experiment_are_not_used_for_another(paper):
    paper_numbers = paper(f"a,{EIGHT},pmc_vqa,score,52.3,percent\n")
    (line,) = words([row(cell="a", experiment="other")], paper_numbers, unrun=False)
    assert "paper" not in line


def test_memory_has_its_own_columns_with_its_unit(paper):
    paper_numbers = paper(f"a,{EIGHT},peak,72.9,GB\n", "cell,model,quantity,value,unit\n")
    (line,) = words([row(cell="a", **{"peak_gib/train": 60.0})], paper_numbers)
    assert line["accuracy"] == "0.500"
    assert line == line | {"peak GB": "64.4", "paper GB": "72.9", "difference GB": "-8.5"}


def test_what_the_paper_has_and_was_not_run_is_an_empty_line(paper):
    paper_numbers = paper(
        f"a,{EIGHT},pmc_vqa,score,52.3,percent\n"
        f"b,{EIGHT},pmc_vqa,score,50.1,percent\n"
        f"a,{EIGHT},websrc,score,85.2,percent\n"
        "a,larger,pmc_vqa,score,60.0,percent\n"
    )
    runs = [row(cell="a")]
    finished, *absent = words(runs, paper_numbers)
    assert (finished["cell"], finished["task"], finished["paper"]) == ("a", "pmc_vqa", "52.3")
    empty = {"method": "", "accuracy %": "", "difference": "", "loss": ""}
    assert absent == [
        {"cell": "b", "task": "pmc_vqa", "paper": "50.1"} | empty,
        {"cell": "a", "task": "websrc", "paper": "85.2"} | empty,
    ]
    assert len(words(runs, paper_numbers, unrun=False)) == 1


def test_two_numbers_for_one_run_are_refused(paper):
    paper_numbers = paper(
        f"a,,{EIGHT},score,52.3,percent\n,emloc,{EIGHT},score,50.1,percent\n",
        "cell,method,model,quantity,value,unit\n",
    )
    with pytest.raises(ConfigError, match=r"mine.csv:4: a second score of what .*mine.csv:3 is"):
        words([row(cell="a")], paper_numbers)
