"""Completion in a shell, asked for as the shell's script does."""

import pytest

from emloc.cli import main
from emloc.console.completion import complete


def completed(line: str, shell: str = "bash") -> list[str]:
    return complete(line, str(len(line)), shell).split()


def test_the_first_word_is_a_verb_a_group_or_a_setting():
    assert {"report", "merge", "method=", "train."} <= {*completed("emloc ")}
    assert completed("emloc mer") == ["merge"]
    assert "report" not in completed("emloc method=lora ")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("emloc tracker=", ["tracker=none", "tracker=wandb"]),
        ("emloc -m seed=0,1 tracker=n", ["tracker=none"]),
        ("emloc plan lora=r1", ["lora=r16"]),
        ("emloc -m lora=r4,r1", ["lora=r4,r16"]),
        ("emloc experiments=demo_", ["experiments=demo_vqa"]),
        ("emloc cell=demo_vqa/lo", ["cell=demo_vqa/lora"]),
        ("emloc hydra/launcher=j", ["hydra/launcher=joblib"]),
        ("emloc hydra.sweep.d", ["hydra.sweep.dir="]),
        ("emloc emulator=layer_drop emulator.fi", ["emulator.first="]),
        ("emloc +train.st", ["+train.steps="]),
        ("emloc train.steps=", ["train.steps=50"]),
        ("emloc train.st", ["train.steps="]),
        ("emloc --ver", ["--version"]),
        ("emloc merge --t", ["--to"]),
        ("emloc plan --a", ["--answer"]),
    ],
)
def test_choices_settings_and_options(line, offered):
    assert completed(line) == offered


def test_the_cursor_may_stand_within_the_line():
    line = "emloc tracker=w model=smollm2_135m"
    assert complete(line, str(len("emloc tracker=w")), "bash") == "tracker=wandb"
    assert complete("emloc tracker=w", "", "bash") == "tracker=wandb"


def test_reports_and_merges_are_offered_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo/one").mkdir(parents=True)
    (tmp_path / "runs/notes.txt").write_text("")
    (tmp_path / "runs/two.csv").write_text("")
    assert completed("emloc report ru") == ["runs/"]
    assert completed("emloc report runs/") == ["runs/demo/", "runs/two.csv"]
    assert completed("emloc merge runs/demo/") == ["runs/demo/one/"]


def test_fish_reads_lines_and_bash_words():
    assert complete("emloc tracker=", "", "fish") == "tracker=none\ntracker=wandb"
    assert complete("emloc tracker=", "", "bash") == "tracker=none tracker=wandb"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "emloc",
        "emloc '",
        'emloc "a b',
        "emloc --nonsense ",
        "emloc --cfg",
        "emloc nonsense=",
        "emloc model=nonsense ",
        "emloc model=_internvl ",
        "emloc cell=",
        "emloc experiments=nonsense cell=nonsense/",
        "emloc train.steps.",
        "emloc model.lora_targets=",
        "emloc report /nowhere/",
        "emloc bench ",
        "emloc +",
        "emloc ~",
        "emloc a=[1,2",
        "emloc train.steps=range( ",
        "emloc $HOME `ls",
        "emloc é=",
    ],
)
def test_whatever_is_typed_it_prints_no_error(line, monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["emloc", "-sc", "query=bash"])
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    main()
    said = capfd.readouterr()
    assert said.err == ""
    assert len(said.out.splitlines()) == 1
    assert not {*said.out} & {*"$`'\"\\(;|<>*"}
