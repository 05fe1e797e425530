"""The runs of an experiment, its table, and the page with the tables of all experiments."""

import math
import shutil

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from reported import row

from emloc.config.compose import register
from emloc.config.experiments import experiment, points
from emloc.config.paths import CONF, EXPERIMENTS
from emloc.config.run_folder import Run
from emloc.errors import ConfigError
from emloc.report.all_experiments import tables
from emloc.report.grid import Grid
from emloc.report.paper import QUANTITIES, Paper, paper_of
from emloc.report.rows import rows_of, write_rows
from emloc.report.task_table import task_table

EIGHT = "internvl2_5_8b"
MINE = f"""\
# @package _global_
# What the .75 is for. More
# of it.
defaults:
  - override /model: {EIGHT}
name: mine
cells:
  lora: method=lora
  emloc_r50: method=emloc compression=r50
hydra:
  sweeper:
    params: {{task: "pmc_vqa,websrc", seed: "range(3)"}}
"""
SWEPT = f"""\
# A product
defaults: [override /model: {EIGHT}, override /task: pmc_vqa]
name: mine
hydra:
  sweeper:
    params: {{method: emloc, recovery.clamp: "1,null", emulator.sequential: "true"}}
"""
FIXED = """\
defaults: [override /task: pmc_vqa]
name: mine
cells:
  small: method=emloc model=internvl2_5_26b
  large: method=emloc model=internvl2_5_38b
"""


@pytest.fixture
def write_experiment(tmp_path):
    """Function that writes an experiment called `mine` into a folder of its own."""
    folder = tmp_path / "experiments"
    (folder / "results").mkdir(parents=True)

    def write(text: str = MINE, numbers: str = ""):
        path = folder / "mine.yaml"
        path.write_text(text)
        if numbers:
            head = "# The paper, Table 9\ncell,model,task,quantity,value,unit\n"
            (folder / "mine.csv").write_text(head + numbers)
        return path

    return write


@pytest.fixture
def table_rows(write_experiment):
    """Function that returns the rows of an experiment's table, column -> text."""

    def show(rows, text: str = MINE, numbers: str = "", quantity: str = "score"):
        path = write_experiment(text, numbers)
        paper = paper_of(["mine"], path.parent)
        table, _ = task_table(Grid(experiment(path), rows), paper, QUANTITIES[quantity])
        return table.frame.to_dict("records")

    return show


# What is asked for -------------------------------------------------------------------------------


def test_the_points_are_all_combinations_of_the_swept_values(write_experiment):
    grid_points = points(write_experiment())
    assert len(grid_points) == 12
    assert grid_points[0] == {"task": "pmc_vqa", "seed": "0", "cell": "mine/lora"}
    assert grid_points[-1] == {"task": "websrc", "seed": "2", "cell": "mine/emloc_r50"}


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_points_equal_the_runs_of_hydra(path):
    """Holds for all experiment files, also after the package has changed them for Hydra."""
    register([path.stem])
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = [f"experiments={path.stem}"]
        params = hydra_compose("config", chosen, return_hydra_config=True).hydra.sweeper.params
    grid_points = points(path)
    counts = [len(str(words).split(",")) for words in params.values()]
    assert len(grid_points) == math.prod(counts)
    for key, words in params.items():
        assert {point[key] for point in grid_points} == set(str(words).split(","))


def test_a_value_comes_from_the_point_or_its_cell_or_the_experiment_or_the_defaults(
    write_experiment,
):
    experiment_file = experiment(write_experiment())
    point = experiment_file.points[-1]
    assert experiment_file.word(point, "task") == "websrc"
    assert experiment_file.word(point, "compression") == "r50"
    assert experiment_file.word(point, "model") == EIGHT
    assert experiment_file.word(point, "lora") == "r8"
    assert experiment_file.word(experiment_file.points[0], "compression") == "r50"
    assert experiment_file.word(point, "train.steps") == ""


def test_the_caption_of_an_experiment_is_its_first_sentence(write_experiment):
    assert experiment(write_experiment()).about == "What the .75 is for."
    assert experiment(write_experiment(SWEPT)).about == "A product"
    assert experiment(write_experiment(FIXED)).about == ""


def test_a_sweep_that_cannot_be_read_is_refused_with_the_file(write_experiment):
    with pytest.raises(ConfigError, match=r"mine.yaml: hydra.sweeper.params cannot be read"):
        points(write_experiment("hydra: {sweeper: {params: {seed: 'range(3'}}}"))


# The table of one experiment ---------------------------------------------------------------------


def test_a_grid_point_without_a_run_has_the_papers_number_alone(table_rows):
    assert table_rows([], numbers=f"lora,{EIGHT},websrc,score,87.4,percent\n") == [
        {"cell": "lora", "pmc_vqa": "", "websrc": "(87.4)"},
        {"cell": "emloc_r50", "pmc_vqa": "", "websrc": ""},
    ]


def test_seeds_are_joined_and_missing_seeds_are_counted(table_rows):
    runs = [row("lora", score, cell="lora", seed=s) for s, score in enumerate((0.5, 0.51, 0.52))]
    runs += [row(score=0.5, cell="emloc_r50", seed=seed) for seed in (0, 2)]
    runs.append(row(score=None, cell="emloc_r50", task="websrc", seed=1))
    lora, emloc = table_rows(runs, numbers=f"lora,{EIGHT},pmc_vqa,score,52.9,percent\n")
    assert lora == {"cell": "lora", "pmc_vqa": "51.0 ± 1.0 (52.9)", "websrc": ""}
    assert emloc == {"cell": "emloc_r50", "pmc_vqa": "50.0 ± 0.0 [2/3]", "websrc": "OOM"}


def test_a_failed_seed_is_shown_beside_the_finished_ones(table_rows):
    runs = [row(cell="lora", seed=0), row(cell="lora", seed=2)]
    runs += [row(score=None, cell="lora", seed=1, state="failed(train)")]
    assert table_rows(runs)[0]["pmc_vqa"] == "50.0 ± 0.0 [2/3]; failed(train)"


def test_other_models_and_tasks_have_columns_of_their_own(table_rows):
    runs = [row(score=0.5, cell="lora", model="tiny", task="easy_vqa")]
    runs.append(row(score=0.25, cell="lora", task="docvqa"))
    lora, _ = table_rows(runs, numbers=f"lora,{EIGHT},pmc_vqa,score,52.9,percent\n")
    assert lora == {
        "cell": "lora",
        "pmc_vqa": "(52.9)",
        "websrc": "",
        "tiny·easy_vqa": "50.0",
        "docvqa": "25.0",
    }


def test_runs_that_differ_in_a_further_setting_have_separate_lines(table_rows):
    rates = [{"train.learning_rate": rate} for rate in ("0.0001", "0.0004")]
    runs = [row(score=0.5, cell="lora", settings=rates[0], seed=seed) for seed in (0, 1, 2)]
    runs.append(row(score=0.6, cell="lora", settings=rates[1]))
    first, second, other = table_rows(runs)
    assert list(first) == ["cell", "train.learning_rate", "pmc_vqa", "websrc"]
    assert list(first.values()) == ["lora", "0.0001", "50.0 ± 0.0", ""]
    assert list(second.values()) == ["lora", "0.0004", "60.0", ""]
    assert list(other.values()) == ["emloc_r50", "", "", ""]


def test_runs_match_points_although_numbers_are_written_differently(table_rows):
    """The settings of a run are parsed values: 1.0 for the word 1."""
    runs = [
        row(score=0.6, settings={"recovery.clamp": "1.0", "emulator.sequential": "True"}),
        row(score=0.7, settings={"recovery.clamp": "null", "emulator.sequential": "True"}),
        row("lora", 0.8, settings={"recovery.clamp": "1.0", "emulator.sequential": "True"}),
    ]
    assert [list(line.values()) for line in table_rows(runs, SWEPT)] == [
        ["emloc", "1", "True", "60.0"],
        ["emloc", "null", "True", "70.0"],
        ["lora", "1", "True", "80.0"],
    ]


def test_an_experiment_that_sweeps_anchors_keeps_the_words_of_its_grid(table_rows):
    text = SWEPT[: SWEPT.index("    params")]
    text += '    params: {method: emloc_uncorrected, anchor: "none,blocks"}\n'
    choices = {"emulator": "svd", "adapter": "lora", "recovery": "none"}
    runs = [
        row("emloc_uncorrected", score, settings=choices | {"anchor": anchor})
        for anchor, score in (("none", 0.4), ("blocks", 0.7))
    ]
    assert [row.named_method for row in runs] == ["emloc_uncorrected", "emloc_anchored"]
    assert [list(line.values()) for line in table_rows(runs, text)] == [
        ["emloc_uncorrected", "none", "40.0"],
        ["emloc_uncorrected", "blocks", "70.0"],
    ]


def test_a_run_outside_all_cells_is_labelled_by_its_method(table_rows):
    *_, last = table_rows([row(cell="lora"), row("dora", 0.4)])
    assert (last["cell"], last["method"], last["pmc_vqa"]) == ("", "dora", "40.0")


def test_cells_that_set_their_model_share_columns_and_name_the_model(table_rows):
    runs = [row(score=score, cell=cell, model=f"internvl2_5_{size}b") for score, cell, size in (
        (0.5, "small", 26), (0.6, "large", 38)
    )]  # fmt: skip
    runs.append(row(score=0.7, cell="large", model="tiny"))
    assert table_rows(runs, FIXED) == [
        {"cell": "small", "model": "internvl2_5_26b", "pmc_vqa": "50.0", "tiny·pmc_vqa": ""},
        {"cell": "large", "model": "internvl2_5_38b", "pmc_vqa": "60.0", "tiny·pmc_vqa": "70.0"},
    ]


def test_swept_models_have_one_column_each(table_rows):
    text = "name: mine\nhydra: {sweeper: {params: {method: 'lora,emloc', model: 'a,b', task: t}}}"
    runs = [row("lora", 0.5, model="b", task="t")]
    assert table_rows(runs, text) == [
        {"method": "lora", "a·t": "", "b·t": "50.0"},
        {"method": "emloc", "a·t": "", "b·t": ""},
    ]


def test_results_of_the_paper_alone_have_lines_and_columns(table_rows):
    numbers = f"dora,{EIGHT},pmc_vqa,score,53.5,percent\nlora,{EIGHT},wc_vqa,score,53.4,percent\n"
    lora, _, dora = table_rows([], numbers=numbers)
    assert lora == {"cell": "lora", "pmc_vqa": "", "websrc": "", "wc_vqa": "(53.4)"}
    assert dora == {"cell": "dora", "pmc_vqa": "(53.5)", "websrc": "", "wc_vqa": ""}


def test_a_number_without_a_task_is_shown_for_each_task(table_rows):
    numbers = f"lora,{EIGHT},,peak,72.9,GB\nqlora,{EIGHT},,peak,38.1,GB\n"
    runs = [row("lora", cell="lora", **{"peak_gib/train": 50.0})]
    lora, _, qlora = table_rows(runs, numbers=numbers, quantity="peak")
    assert lora == {"cell": "lora", "pmc_vqa": "53.7 [1/3] (72.9)", "websrc": "(72.9)"}
    assert qlora == {"cell": "qlora", "pmc_vqa": "(38.1)", "websrc": "(38.1)"}


def test_a_run_without_the_quantity_keeps_its_line_and_a_failure_the_papers_number(table_rows):
    numbers = f"emloc_r50,{EIGHT},pmc_vqa,peak,72.9,GB\n"
    lora, emloc = table_rows([row("lora", cell="lora")], numbers=numbers, quantity="peak")
    assert lora == {"cell": "lora", "pmc_vqa": "", "websrc": ""}
    of_task = {"settings": {"task.metric": "accuracy"}}
    runs = [row(score=None, cell="emloc_r50", **of_task), row(cell="emloc_r50", task="websrc")]
    _, emloc = table_rows(runs, numbers=numbers.replace("peak,72.9,GB", "score,52.3,percent"))
    assert emloc == {"cell": "emloc_r50", "pmc_vqa": "OOM (52.3)", "websrc": "50.0 [1/3]"}


def test_the_best_score_of_a_column_ignores_the_paper(write_experiment):
    runs = [row("lora", 0.6, cell="lora"), row(score=0.5, cell="emloc_r50")]
    runs.append(row(score=0.5, cell="emloc_r50", task="websrc"))
    runs = [*runs, row("lora", 0.1, cell="lora", model="tiny")]
    table, _ = task_table(Grid(experiment(write_experiment()), runs), Paper(), QUANTITIES["score"])
    assert table.best == {(0, "pmc_vqa")}  # a single value is never marked as best


# The page of all ---------------------------------------------------------------------------------


@pytest.fixture
def page(write_experiment, tmp_path):
    """Function that writes the page for one experiment and returns its text."""

    def make(numbers: str = "") -> str:
        return tables(write_experiment(numbers=numbers).parent, tmp_path / "runs")

    return make


def results(tmp_path, name: str):
    return tmp_path / "experiments" / "results" / name


def line(page: str, start: str) -> list[str]:
    (row_text,) = [line for line in page.splitlines() if line.startswith(f"| {start} ")]
    return [word.strip() for word in row_text.strip("|").split("|")]


def test_an_experiment_without_results_is_on_the_page(page):
    text = page()
    assert (
        "## mine\n\nWhat the .75 is for.\n\ninternvl2_5_8b: 0 of 12 runs done, 12 not run.\n"
        in text
    )
    assert line(text, "lora") == ["lora", "", ""]


def test_the_states_of_the_requested_runs_add_up(page, tmp_path):
    page()
    runs = [row("lora", 0.6, cell="lora"), row("lora", None, cell="lora", seed=1)]
    runs += [row("lora", None, cell="lora", seed=2, state="failed(train)")]
    runs += [
        row(score=None, cell="emloc_r50", seed=seed, state="failed(config)") for seed in (0, 1)
    ]
    runs += [row(score=0.5, cell="emloc_r50", seed=1)]  # run again with another setting
    write_rows(runs, results(tmp_path, "mine.csv"))
    assert "internvl2_5_8b: 2 of 12 runs done, 2 failed, 1 OOM, 7 not run.\n" in page()


def test_a_line_without_any_result_is_named_below_the_table(page, tmp_path):
    page()
    runs = [row("lora", 0.6, cell="lora"), row("lora", None, cell="lora", task="websrc")]
    runs += [row(score=None, cell="emloc_r50", state="failed(config)", seed=s) for s in (0, 1)]
    write_rows(runs, results(tmp_path, "mine.csv"))
    text = page()
    assert line(text, "lora") == ["lora", "60.0 [1/3]", "OOM"]
    assert "| emloc_r50" not in text
    assert "\nLeft out, without results: failed(config): emloc_r50." in text
    with_paper = page(f"emloc_r50,{EIGHT},pmc_vqa,score,52.9,percent\n")
    assert line(with_paper, "emloc_r50") == ["emloc_r50", "(52.9)", ""]


def test_the_page_lists_tables_before_ablations(tmp_path, write_experiment):
    path = write_experiment()
    for name in ("another", "ablate_b", "table2", "table1"):
        shutil.copy(path, path.with_name(f"{name}.yaml"))
    heads = [line for line in tables(path.parent, tmp_path).splitlines() if line.startswith("## ")]
    assert heads == ["## table1", "## table2", "## ablate_b", "## another", "## mine"]


def test_results_come_from_the_tidy_file_if_there_are_no_runs(page, tmp_path):
    page()
    stored = [row("lora", 0.6, cell="lora", seed=seed) for seed in (0, 1, 2)]
    stored.append(row("lora", 0.1, cell="lora", experiment="mine_small", model="tiny"))
    write_rows(stored, results(tmp_path, "mine_small.csv"))
    text = page(f"lora,{EIGHT},pmc_vqa,score,52.9,percent\n")
    assert (
        "internvl2_5_8b: 3 of 12 runs done, 9 not run; besides these runs: 1 of tiny on pmc_vqa."
        in text
    )
    assert line(text, "lora") == ["lora", "60.0 ± 0.0 (52.9)", "", "10.0"]
    assert "Scores: pmc_vqa accuracy." in text
    assert "Paper: The paper, Table 9." in text


def test_a_run_replaces_its_row_in_the_tidy_file(page, tmp_path):
    page()
    for seed in (0, 1, 2):
        make_run(tmp_path, seed, score=0.6)
    folder = tmp_path / "runs" / "mine"
    write_rows(rows_of(folder), results(tmp_path, "mine.csv"))
    assert "train.steps" not in results(tmp_path, "mine.csv").read_text()
    assert line(page(), "lora") == ["lora", "60.0 ± 0.0", ""]
    shutil.rmtree(folder)
    assert line(page(), "lora") == ["lora", "60.0 ± 0.0", ""]
    make_run(tmp_path, 0, score=0.9)
    assert line(page(), "lora") == ["lora", "70.0 ± 17.3", ""]
    make_run(tmp_path, 0, score=None)
    text = page()
    assert line(text, "lora") == ["lora", "60.0 ± 0.0 [2/3]; running", ""]
    assert "internvl2_5_8b: 2 of 12 runs done, 1 running, 9 not run." in text
    shutil.rmtree(folder)
    make_run(tmp_path, 7, score=0.9)  # the file does not show that the recipes are equal
    assert line(page(), "lora") == ["lora", "90.0 [1/3]; 60.0 ± 0.0", ""]


def make_run(tmp_path, seed: int, score: float | None) -> None:
    run = Run(tmp_path / "runs" / "mine" / f"lora-s{seed}")
    named = {"model": {"name": EIGHT}, "task": {"name": "pmc_vqa"}, "train": {"steps": 9}}
    choices = {"cell": "mine/lora", "model": EIGHT, "task": "pmc_vqa"}
    run.begin(OmegaConf.create({"method": "lora", "seed": seed, **named}), choices)
    if score is not None:
        scores = {"metric": "accuracy", "score": score, "scores": {"loss": 1.0}, "data": 1}
        run.finish({**scores, "seconds": {}, "peak_gib": {}})


def test_a_file_belongs_to_the_experiment_with_the_longest_matching_name(page, tmp_path):
    page()
    more = tmp_path / "experiments" / "mine_small.yaml"
    more.write_text("name: mine_small\ncells: {lora: method=lora}\n")
    write_rows([row("lora", cell="lora")], results(tmp_path, "mine_small_1.csv"))
    states = [line for line in page().splitlines() if "runs done" in line]
    assert states == [
        "internvl2_5_8b: 0 of 12 runs done, 12 not run.",
        "smollm2_135m: 0 of 1 runs done, 1 not run; "
        "besides these runs: 1 of internvl2_5_8b on pmc_vqa.",
    ]


def test_an_invalid_file_of_results_is_reported_on_the_page(page, tmp_path):
    page()
    results(tmp_path, "mine.csv").write_text("cell,loss\nlora,1.0\n")
    text = page()
    assert line(text, "lora") == ["lora", "", ""]
    assert "mine.csv: no table of runs, it has no column experiment, run, state" in text


def test_memory_has_its_own_table_if_the_paper_reports_it(page):
    text = page(f"lora,{EIGHT},,peak,72.9,GB\n")
    assert "peak GB:\n\n| cell " in text
    assert line(text, "lora") == ["lora", "(72.9)", "(72.9)"]


def test_the_page_contains_all_experiments_of_the_repository(tmp_path):
    text = tables(EXPERIMENTS, tmp_path)
    for path in EXPERIMENTS.glob("*.yaml"):
        assert f"\n## {path.stem}\n\n" in text
