"""Data sets as prompts and answers, read from small files that the tests write."""

import json
import logging
import os
import shutil
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import datasets
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from emloc.errors import ConfigError
from emloc.tasks.generic import join_paragraphs
from emloc.tasks.mathqa import LETTERS, MathQA, options
from emloc.tasks.text import TextTask

CONF = Path(__file__).parents[2] / "conf" / "task"
TRAIN = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1\n#### {n + 1}"} for n in range(5)]
TEST = [{"question": f"What is {n} - 1?", "answer": f"{n} - 1\n#### {n - 1}"} for n in range(3)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    # `datasets` reads the environment variable only once, when it is imported.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    elif file.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=2))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def plain(folder: Path, extension: str = "jsonl", **splits: list[dict]) -> Path:
    for split, rows in (splits or {"train": TRAIN, "test": TEST}).items():
        write(folder / f"{split}.{extension}", rows)
    return folder


def hub_copy(folder: Path, extension: str = "parquet", config: str = "main") -> Path:
    """Write a folder like a repository on the hub, with a card that names the files."""
    card = {"license": "mit", "configs": []}
    for name, rows in ((config, (TRAIN, TEST)), ("other", (TEST, TRAIN))):
        files = []
        for split, content in zip(("train", "test"), rows, strict=True):
            write(folder / name / f"{split}-00000-of-00001.{extension}", content)
            files.append({"split": split, "path": f"{name}/{split}-00000-of-00001.{extension}"})
        card["configs"].append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n# A copy\n")
    return folder


def gsm8k(**overrides) -> TextTask:
    return build("gsm8k", **overrides)


def build(name: str, **overrides):
    """Build a task from its YAML file, as the package does."""
    values = OmegaConf.load(CONF / f"{name}.yaml")
    module, _, cls = values.pop("_target_").rpartition(".")
    schema = OmegaConf.structured(getattr(import_module(module), cls))
    return OmegaConf.to_object(OmegaConf.merge(schema, values, overrides))


def pairs(examples) -> list[tuple[str, str]]:
    return [(row.prompt, row.target) for row in examples]


def expected(rows: list[dict]) -> list[tuple[str, str]]:
    return [(f"Question: {row['question']}\nAnswer:", row["answer"]) for row in rows]


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "parquet"])
def test_folder_of_files(tmp_path, extension):
    task = gsm8k(path=str(plain(tmp_path / "copy", extension)))
    assert pairs(task.train()) == expected(TRAIN)
    assert pairs(task.held_out(None)) == expected(TEST)
    assert [row.id for row in task.held_out(2)] == ["test/0", "test/1"]


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_copy_of_a_hub_folder(tmp_path, extension):
    path = str(hub_copy(tmp_path / "openai__gsm8k", extension))
    assert pairs(gsm8k(path=path).train()) == expected(TRAIN)
    assert pairs(gsm8k(path=path, config="other").train()) == expected(TEST)


def test_two_folders_with_one_name_have_separate_rows(tmp_path):
    first = gsm8k(path=str(hub_copy(tmp_path / "a" / "gsm8k")))
    assert pairs(first.train()) == expected(TRAIN)
    folder = hub_copy(tmp_path / "b" / "gsm8k")
    changed = [row | {"answer": "other"} for row in TRAIN]
    write(folder / "main" / "train-00000-of-00001.parquet", changed)
    second = gsm8k(path=str(folder))
    assert pairs(second.train()) == expected(changed)
    assert first.key != second.key


def test_a_changed_file_is_read_again_even_with_the_same_size_and_time(tmp_path):
    folder = plain(tmp_path / "copy", train=[{"question": "a", "answer": "1"}], test=TEST)
    assert pairs(gsm8k(path=str(folder)).train()) == [("Question: a\nAnswer:", "1")]
    file = folder / "train.jsonl"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    write(file, [{"question": "a", "answer": "2"}])
    os.utime(file, ns=times)
    assert pairs(gsm8k(path=str(folder)).train()) == [("Question: a\nAnswer:", "2")]


def test_the_key_depends_on_content_and_templates_but_not_on_the_path(tmp_path):
    folder = plain(tmp_path / "a")
    task = gsm8k(path=str(folder))
    moved = gsm8k(path=str(shutil.copytree(folder, tmp_path / "elsewhere")))
    assert task.key == moved.key
    json.dumps(task.key)
    assert task.key == gsm8k(path=str(folder), limit=2).key  # training rows have a key of their own
    assert task.key != gsm8k(path=str(folder), prompt="{{question}}").key
    assert task.key != gsm8k(path=str(folder), shots=1).key
    (folder / ".cache").mkdir()
    (folder / ".cache" / "downloaded").write_text("yesterday")
    assert gsm8k(path=str(folder)).key == task.key
    assert gsm8k().key["id"] == "openai/gsm8k"
    assert gsm8k().key != gsm8k(revision="main").key


def test_limit_takes_the_first_training_rows(tmp_path):
    task = gsm8k(path=str(plain(tmp_path / "copy")), limit=2)
    assert pairs(task.train()) == expected(TRAIN[:2])
    assert len(task.held_out(None)) == 3


def test_training_rows_that_are_held_out_are_dropped_and_counted(tmp_path, caplog):
    folder = plain(tmp_path / "copy", train=[*TRAIN[:2], *TEST[:2], *TRAIN[2:]], test=TEST)
    with caplog.at_level(logging.INFO):
        rows = gsm8k(path=str(folder), limit=3).train()
    assert pairs(rows) == expected(TRAIN[:3])
    assert "dropped 2 of 7 training rows whose prompt is also an evaluation prompt" in caplog.text


def test_no_training_rows_left_is_refused(tmp_path):
    task = gsm8k(path=str(plain(tmp_path / "copy", train=TEST, test=TEST)))
    with pytest.raises(ConfigError, match=r"every row of task.train_split=train is also in"):
        task.train()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"limit": 0}, "task.limit must be at least 1 or null, got 0; set task.limit=null"),
        ({"shots": -1}, "task.shots must be at least 0, got -1; set task.shots=0"),
        (
            {"shots": 2, "lm_eval": None},
            "task.shots=2 needs lm-eval, but task.lm_eval is null; set task.shots=0",
        ),
        (
            {"id": None},
            "task.id and task.path are both null; set task.path=/path/to/copy",
        ),
        (
            {"train_split": "test"},
            "task.train_split and task.eval_split are both test: evaluation rows would be trained "
            "on; set task.train_split=train",
        ),
        (
            {"prompt": "{{question"},
            "task.prompt: unexpected end of template, expected 'end of print statement'. in "
            "'{{question'; correct task.prompt",
        ),
        (
            {"target": "{{answer | nonsense}}"},
            "task.target: No filter named 'nonsense'. in '{{answer | nonsense}}'; "
            "correct task.target",
        ),
    ],
)
def test_refused_without_reading_data(overrides, message):
    with pytest.raises(ConfigError) as caught:
        gsm8k(**overrides)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"prompt": "{{quesion}}"},
            "task.prompt: 'quesion' is undefined; the columns are question, answer; "
            "correct task.prompt",
        ),
        (
            {"target": "{{label}}"},
            "task.target: 'label' is undefined; the columns are question, answer; "
            "correct task.target",
        ),
        (
            {"train_split": "dev"},
            "task.train_split: gsm8k has no split dev; set task.train_split to one of: test, train",
        ),
        (
            {"eval_split": "validation"},
            "task.eval_split: gsm8k has no split validation; "
            "set task.eval_split to one of: test, train",
        ),
    ],
)
def test_refused_when_read(tmp_path, overrides, message):
    task = gsm8k(path=str(plain(tmp_path / "copy")), **overrides)
    with pytest.raises(ConfigError) as caught:
        task.train()
    assert str(caught.value) == message


def test_missing_folder(tmp_path):
    with pytest.raises(ConfigError) as caught:
        gsm8k(path=str(tmp_path / "no")).train()
    assert str(caught.value) == (
        f"task.path: no folder {tmp_path / 'no'}; set task.path=/path/to/copy or null"
    )


def test_unknown_split_and_config_of_a_hub_copy(tmp_path):
    path = str(hub_copy(tmp_path / "copy"))
    with pytest.raises(
        ConfigError, match=r"no split dev; set task.train_split to one of: train, test$"
    ):
        gsm8k(path=path, train_split="dev").train()
    with pytest.raises(ConfigError) as caught:
        gsm8k(path=path, config="socratic").train()
    assert str(caught.value) == (
        f"task gsm8k: cannot load {path}: BuilderConfig 'socratic' not found. Available: "
        "['main', 'other']; correct task.path or task.config"
    )


def test_empty_and_broken_files(tmp_path):
    folder = plain(tmp_path / "copy")
    (folder / "train.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"task.path: .*train.jsonl is empty; set task.path="):
        gsm8k(path=str(folder)).train()
    (folder / "train.jsonl").write_text('{"question": \n')
    with pytest.raises(ConfigError, match=r"cannot load .*: JSON parse error") as caught:
        gsm8k(path=str(folder)).train()
    assert "\n" not in str(caught.value)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match="doesn't contain any data files"):
        gsm8k(path=str(tmp_path / "nothing")).train()


def test_splits_of_two_formats(tmp_path):
    folder = plain(tmp_path / "copy", test=TEST)
    write(folder / "train.parquet", TRAIN)
    with pytest.raises(
        ConfigError, match=r"train.parquet and test.jsonl in .* must have the same format"
    ):
        gsm8k(path=str(folder)).train()


def test_only_the_files_of_splits_are_read(tmp_path):
    folder = plain(tmp_path / "copy", dev=TRAIN, test=TEST, challenge_test=[{"unlike": 1}])
    (folder / "LICENSE").write_text("MIT")
    task = gsm8k(path=str(folder), train_split="dev")
    assert pairs(task.train()) == expected(TRAIN)
    assert pairs(task.held_out(None)) == expected(TEST)


def test_hub_out_of_reach():
    with pytest.raises(ConfigError) as caught:
        gsm8k().train()
    assert str(caught.value) == (
        "task.id: cannot reach the hub for openai/gsm8k; set task.path=/path/to/copy"
    )


MATHQA = [
    {"Problem": "count ?", "options": "a ) 24 , b ) 120 , c ) 625 , d ) 720 , e ) 1024"},
    {"Problem": "pay ?", "options": "a ) rs . 1 , 000 , b ) 2 , c ) 3 , d ) none , e ) 5 , 5 ,"},
]


def test_mathqa_target_is_the_text_of_the_right_option(tmp_path):
    rows = [row | {"correct": letter} for row in MATHQA for letter in LETTERS]
    test = [row | {"Problem": row["Problem"] + "?"} for row in rows]
    task = build("mathqa", path=str(plain(tmp_path / "copy", train=rows, test=test)))
    first = ["24", "120", "625", "720", "1024"]
    second = ["rs . 1", "2", "3", "none", "5 , 5"]  # options are split where lm-eval splits them
    assert [row.target for row in task.train()] == [*first, *second]
    assert task.train().rows[0].prompt == "Question: count ?\nAnswer:"


def test_mathqa_skips_and_counts_rows_without_five_options(tmp_path, caplog):
    rows = [row | {"correct": "a"} for row in MATHQA]
    rows.insert(1, {"Problem": "lost ?", "options": "a ) 1 , b ) 2 , e ) 3", "correct": "e"})
    test = [{"Problem": "new ?", "options": MATHQA[0]["options"], "correct": "b"}]
    task = build("mathqa", path=str(plain(tmp_path / "copy", train=rows, test=test)))
    with caplog.at_level(logging.INFO):
        assert [row.target for row in task.train()] == ["24", "rs . 1"]
    assert "left out 1 of 3 rows of train that have no usable answer" in caplog.text


def test_a_mathqa_prompt_with_columns_that_lm_eval_lacks_is_refused(tmp_path):
    rows = [row | {"correct": "a"} for row in MATHQA]
    folder = plain(tmp_path / "copy", train=rows, test=[rows[0] | {"Problem": "new"}])
    with pytest.raises(ConfigError, match=r"task.prompt: 'answer' is undefined"):
        build("mathqa", path=str(folder), prompt="{{answer}}").train()


@given(st.lists(st.text("0123456789abe ,.)%/-", max_size=8), min_size=5, max_size=5))
def test_mathqa_options_equal_those_of_lm_eval(texts):
    from lm_eval.tasks.mathqa.utils import doc_to_choice

    joined = " , ".join(f"{letter} ) {text}" for letter, text in zip(LETTERS, texts, strict=True))
    assert options(joined) == doc_to_choice({"options": joined})


@pytest.mark.parametrize("name", ["gsm8k", "mathqa", "stdlib_module"])
def test_yaml_spells_out_every_field_and_is_named_after_itself(name):
    values = OmegaConf.load(CONF / f"{name}.yaml")
    task = build(name)
    assert set(values) - {"_target_"} == {field.name for field in fields(task)}
    assert task.name == name


@pytest.mark.parametrize("name", ["gsm8k", "mathqa"])
def test_prompts_equal_those_of_lm_eval(name):
    from lm_eval.tasks import TaskManager

    from emloc.stages.evaluation.harness.lm_eval_tasks import own_yaml

    index = TaskManager(include_path=str(own_yaml(name).parent), include_defaults=False).task_index
    own = index[name].cfg
    task = build(name)
    assert task.prompt == own["doc_to_text"]
    assert task.id == own["dataset_path"]
    assert task.config == own.get("dataset_name")
    assert task.eval_split == own["test_split"]
    assert task.train_split == own["training_split"]
    if name == "gsm8k":
        assert task.target == own["doc_to_target"]
    else:
        assert isinstance(task, MathQA)


def test_short_paragraphs_are_joined_to_longer_pieces():
    texts = ["a" * 4000, "", "b" * 1999, "c\n", "d" * 6000, "left over"]
    joined = list(join_paragraphs(texts))
    assert [(one.id, one.prompt) for one in joined] == [("0", ""), ("4", "")]
    assert joined[0].target == "a" * 4000 + "b" * 1999 + "c"
    assert joined[1].target == "d" * 6000
