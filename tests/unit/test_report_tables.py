"""What an experiment asks for, and the page on which all of them stand with what there is of it."""

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
def written(tmp_path):
    """Write an experiment called `mine` into a folder of its own."""
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
def shown(written):
    """Column -> word, of the lines of an experiment's table."""

    def show(rows, text: str = MINE, numbers: str = "", quantity: str = "score"):
        path = written(text, numbers)
        paper = paper_of(["mine"], path.parent)
        table, _ = task_table(Grid(experiment(path), rows), paper, QUANTITIES[quantity])
        return table.frame.to_dict("records")

    return show


# What is asked for -------------------------------------------------------------------------------


def test_the_points_are_every_combination_in_the_command_lines_words(written):
    found = points(written())
    assert len(found) == 12
    assert found[0] == {"task": "pmc_vqa", "seed": "0", "cell": "mine/lora"}
    assert found[-1] == {"task": "websrc", "seed": "2", "cell": "mine/emloc_r50"}


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_points_are_those_that_hydra_sweeps(path):
    """Whatever is done to an experiment before Hydra sees it."""
    register([path.stem])
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = [f"experiments={path.stem}"]
        params = hydra_compose("config", chosen, return_hydra_config=True).hydra.sweeper.params
    found = points(path)
    counts = [len(str(words).split(",")) for words in params.values()]
    assert len(found) == math.prod(counts)
    for key, words in params.items():
        assert {point[key] for point in found} == set(str(words).split(","))


def test_a_point_has_its_own_word_or_its_cells_or_the_experiments_or_the_defaults(written):
    asked = experiment(written())
    point = asked.points[-1]
    assert asked.word(point, "task") == "websrc"
    assert asked.word(point, "compression") == "r50"
    assert asked.word(point, "model") == EIGHT
    assert asked.word(point, "lora") == "r8"
    assert asked.word(asked.points[0], "compression") == "r50"
    assert asked.word(point, "train.steps") == ""


def test_an_experiment_is_told_by_its_first_sentence(written):
    assert experiment(written()).about == "What the .75 is for."
    assert experiment(written(SWEPT)).about == "A product"
    assert experiment(written(FIXED)).about == ""


def test_a_sweep_that_cannot_be_read_is_refused_with_the_file(written):
    with pytest.raises(ConfigError, match=r"mine.yaml: hydra.sweeper.params cannot be read"):
        points(written("hydra: {sweeper: {params: {seed: 'range(3'}}}"))


# The table of one experiment ---------------------------------------------------------------------


def test_a_grid_point_without_a_run_has_the_papers_number_alone(shown):
    assert shown([], numbers=f"lora,{EIGHT},websrc,score,87.4,percent\n") == [
        {"cell": "lora", "pmc_vqa": "", "websrc": "(87.4)"},
        {"cell": "emloc_r50", "pmc_vqa": "", "websrc": ""},
    ]


def test_seeds_are_one_word_and_missing_ones_are_counted(shown):
    runs = [row("lora", score, cell="lora", seed=s) for s, score in enumerate((0.5, 0.51, 0.52))]
    runs += [row(score=0.5, cell="emloc_r50", seed=seed) for seed in (0, 2)]
    runs.append(row(score=None, cell="emloc_r50", task="websrc", seed=1))
    lora, emloc = shown(runs, numbers=f"lora,{EIGHT},pmc_vqa,score,52.9,percent\n")
    assert lora == {"cell": "lora", "pmc_vqa": "51.0 ± 1.0 (52.9)", "websrc": ""}
    assert emloc == {"cell": "emloc_r50", "pmc_vqa": "50.0 ± 0.0 [2/3]", "websrc": "OOM"}


def test_a_seed_that_failed_is_said_beside_those_that_did_not(shown):
    runs = [row(cell="lora", seed=0), row(cell="lora", seed=2)]
    runs += [row(score=None, cell="lora", seed=1, state="failed(train)")]
    assert shown(runs)[0]["pmc_vqa"] == "50.0 ± 0.0 [2/3]; failed(train)"


def test_another_model_and_another_task_have_columns_of_their_own(shown):
    runs = [row(score=0.5, cell="lora", model="tiny", task="easy_vqa")]
    runs.append(row(score=0.25, cell="lora", task="docvqa"))
    lora, _ = shown(runs, numbers=f"lora,{EIGHT},pmc_vqa,score,52.9,percent\n")
    assert lora == {
        "cell": "lora",
        "pmc_vqa": "(52.9)",
        "websrc": "",
        "tiny·easy_vqa": "50.0",
        "docvqa": "25.0",
    }


def test_runs_that_differ_in_a_setting_besides_are_lines_apart(shown):
    rates = [{"train.learning_rate": rate} for rate in ("0.0001", "0.0004")]
    runs = [row(score=0.5, cell="lora", settings=rates[0], seed=seed) for seed in (0, 1, 2)]
    runs.append(row(score=0.6, cell="lora", settings=rates[1]))
    first, second, other = shown(runs)
    assert list(first) == ["cell", "train.learning_rate", "pmc_vqa", "websrc"]
    assert list(first.values()) == ["lora", "0.0001", "50.0 ± 0.0", ""]
    assert list(second.values()) == ["lora", "0.0004", "60.0", ""]
    assert list(other.values()) == ["emloc_r50", "", "", ""]


def test_a_product_is_matched_whatever_way_its_numbers_are_written(shown):
    """A run's settings are what became of the command line's words: 1.0 of 1."""
    runs = [
        row(score=0.6, settings={"recovery.clamp": "1.0", "emulator.sequential": "True"}),
        row(score=0.7, settings={"recovery.clamp": "null", "emulator.sequential": "True"}),
        row("lora", 0.8, settings={"recovery.clamp": "1.0", "emulator.sequential": "True"}),
    ]
    assert [list(line.values()) for line in shown(runs, SWEPT)] == [
        ["emloc", "1", "True", "60.0"],
        ["emloc", "null", "True", "70.0"],
        ["lora", "1", "True", "80.0"],
    ]


def test_a_run_that_is_of_no_cell_is_told_by_its_method(shown):
    *_, last = shown([row(cell="lora"), row("dora", 0.4)])
    assert (last["cell"], last["method"], last["pmc_vqa"]) == ("", "dora", "40.0")


def test_cells_that_fix_their_model_share_columns_and_say_which(shown):
    runs = [row(score=score, cell=cell, model=f"internvl2_5_{size}b") for score, cell, size in (
        (0.5, "small", 26), (0.6, "large", 38)
    )]  # fmt: skip
    runs.append(row(score=0.7, cell="large", model="tiny"))
    assert shown(runs, FIXED) == [
        {"cell": "small", "model": "internvl2_5_26b", "pmc_vqa": "50.0", "tiny·pmc_vqa": ""},
        {"cell": "large", "model": "internvl2_5_38b", "pmc_vqa": "60.0", "tiny·pmc_vqa": "70.0"},
    ]


def test_models_that_are_swept_are_columns(shown):
    text = "name: mine\nhydra: {sweeper: {params: {method: 'lora,emloc', model: 'a,b', task: t}}}"
    runs = [row("lora", 0.5, model="b", task="t")]
    assert shown(runs, text) == [
        {"method": "lora", "a·t": "", "b·t": "50.0"},
        {"method": "emloc", "a·t": "", "b·t": ""},
    ]


def test_what_only_the_paper_has_is_a_line_or_a_column_too(shown):
    numbers = f"dora,{EIGHT},pmc_vqa,score,53.5,percent\nlora,{EIGHT},wc_vqa,score,53.4,percent\n"
    lora, _, dora = shown([], numbers=numbers)
    assert lora == {"cell": "lora", "pmc_vqa": "", "websrc": "", "wc_vqa": "(53.4)"}
    assert dora == {"cell": "dora", "pmc_vqa": "(53.5)", "websrc": "", "wc_vqa": ""}


def test_a_number_of_no_task_in_particular_is_beside_every_task(shown):
    numbers = f"lora,{EIGHT},,peak,72.9,GB\nqlora,{EIGHT},,peak,38.1,GB\n"
    runs = [row("lora", cell="lora", **{"peak_gib/train": 50.0})]
    lora, _, qlora = shown(runs, numbers=numbers, quantity="peak")
    assert lora == {"cell": "lora", "pmc_vqa": "53.7 [1/3] (72.9)", "websrc": "(72.9)"}
    assert qlora == {"cell": "qlora", "pmc_vqa": "(38.1)", "websrc": "(38.1)"}


def test_a_run_without_the_quantity_keeps_its_line_and_a_failure_the_papers_number(shown):
    numbers = f"emloc_r50,{EIGHT},pmc_vqa,peak,72.9,GB\n"
    lora, emloc = shown([row("lora", cell="lora")], numbers=numbers, quantity="peak")
    assert lora == {"cell": "lora", "pmc_vqa": "", "websrc": ""}
    of_task = {"settings": {"task.metric": "accuracy"}}
    runs = [row(score=None, cell="emloc_r50", **of_task), row(cell="emloc_r50", task="websrc")]
    _, emloc = shown(runs, numbers=numbers.replace("peak,72.9,GB", "score,52.3,percent"))
    assert emloc == {"cell": "emloc_r50", "pmc_vqa": "OOM (52.3)", "websrc": "50.0 [1/3]"}


def test_the_best_of_a_column_is_the_best_score_of_ours(written):
    runs = [row("lora", 0.6, cell="lora"), row(score=0.5, cell="emloc_r50")]
    runs.append(row(score=0.5, cell="emloc_r50", task="websrc"))
    runs = [*runs, row("lora", 0.1, cell="lora", model="tiny")]
    table, _ = task_table(Grid(experiment(written()), runs), Paper(), QUANTITIES["score"])
    assert table.best == {(0, "pmc_vqa")}  # nothing is best where it is alone


# The page of all ---------------------------------------------------------------------------------


@pytest.fixture
def page(written, tmp_path):
    """The page over one experiment, and how it is written."""

    def make(numbers: str = "") -> str:
        return tables(written(numbers=numbers).parent, tmp_path / "runs")

    return make


def results(tmp_path, name: str):
    return tmp_path / "experiments" / "results" / name


def line(page: str, start: str) -> list[str]:
    (found,) = [line for line in page.splitlines() if line.startswith(f"| {start} ")]
    return [word.strip() for word in found.strip("|").split("|")]


def test_an_experiment_without_results_stands_on_the_page(page):
    said = page()
    assert (
        "## mine\n\nWhat the .75 is for.\n\ninternvl2_5_8b: 0 of 12 runs done, 12 not run.\n"
        in said
    )
    assert line(said, "lora") == ["lora", "", ""]


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
    said = page()
    assert line(said, "lora") == ["lora", "60.0 [1/3]", "OOM"]
    assert "| emloc_r50" not in said
    assert "\nLeft out, without results: failed(config): emloc_r50." in said
    with_paper = page(f"emloc_r50,{EIGHT},pmc_vqa,score,52.9,percent\n")
    assert line(with_paper, "emloc_r50") == ["emloc_r50", "(52.9)", ""]


def test_experiments_stand_tables_first_then_ablations(tmp_path, written):
    path = written()
    for name in ("another", "ablate_b", "table2", "table1"):
        shutil.copy(path, path.with_name(f"{name}.yaml"))
    heads = [line for line in tables(path.parent, tmp_path).splitlines() if line.startswith("## ")]
    assert heads == ["## table1", "## table2", "## ablate_b", "## another", "## mine"]


def test_results_are_taken_from_the_tidy_file_where_no_run_is_there(page, tmp_path):
    page()
    stored = [row("lora", 0.6, cell="lora", seed=seed) for seed in (0, 1, 2)]
    stored.append(row("lora", 0.1, cell="lora", experiment="mine_small", model="tiny"))
    write_rows(stored, results(tmp_path, "mine_small.csv"))
    said = page(f"lora,{EIGHT},pmc_vqa,score,52.9,percent\n")
    assert (
        "internvl2_5_8b: 3 of 12 runs done, 9 not run; besides these runs: 1 of tiny on pmc_vqa."
        in said
    )
    assert line(said, "lora") == ["lora", "60.0 ± 0.0 (52.9)", "", "10.0"]
    assert "Scores: pmc_vqa accuracy." in said
    assert "Paper: The paper, Table 9." in said


def test_a_run_that_is_there_takes_the_place_of_the_one_in_the_file(page, tmp_path):
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
    said = page()
    assert line(said, "lora") == ["lora", "60.0 ± 0.0 [2/3]; running", ""]
    assert "internvl2_5_8b: 2 of 12 runs done, 1 running, 9 not run." in said
    shutil.rmtree(folder)
    make_run(tmp_path, 7, score=0.9)  # as far as the file says, of another recipe
    assert line(page(), "lora") == ["lora", "90.0 [1/3]; 60.0 ± 0.0", ""]


def make_run(tmp_path, seed: int, score: float | None) -> None:
    run = Run(tmp_path / "runs" / "mine" / f"lora-s{seed}")
    named = {"model": {"name": EIGHT}, "task": {"name": "pmc_vqa"}, "train": {"steps": 9}}
    choices = {"cell": "mine/lora", "model": EIGHT, "task": "pmc_vqa"}
    run.begin(OmegaConf.create({"method": "lora", "seed": seed, **named}), choices)
    if score is not None:
        scores = {"metric": "accuracy", "score": score, "scores": {"loss": 1.0}, "data": 1}
        run.finish({**scores, "seconds": {}, "peak_gib": {}})


def test_a_file_is_of_the_experiment_with_the_longest_name_that_it_starts_with(page, tmp_path):
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


def test_a_file_of_results_that_is_not_tidy_is_said_and_the_page_goes_on(page, tmp_path):
    page()
    results(tmp_path, "mine.csv").write_text("cell,loss\nlora,1.0\n")
    said = page()
    assert line(said, "lora") == ["lora", "", ""]
    assert "mine.csv: no table of runs, it has no column experiment, run, state" in said


def test_memory_has_a_table_of_its_own_where_the_paper_has_it(page):
    said = page(f"lora,{EIGHT},,peak,72.9,GB\n")
    assert "peak GB:\n\n| cell " in said
    assert line(said, "lora") == ["lora", "(72.9)", "(72.9)"]


def test_the_page_of_the_shipped_experiments_has_a_line_for_each(tmp_path):
    said = tables(EXPERIMENTS, tmp_path)
    for path in EXPERIMENTS.glob("*.yaml"):
        assert f"\n## {path.stem}\n\n" in said
