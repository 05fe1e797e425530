"""Rows that lack a value: no template writes one, and each is named or left out by a setting."""

import json
import logging
from pathlib import Path

import datasets
import pytest
from pictured import image_bytes, lazy_image

from emloc.data.examples import Example, Examples
from emloc.errors import ConfigError
from emloc.tasks.marked_rows import MissingValueError
from emloc.tasks.mathqa import MathQA
from emloc.tasks.overlap import refuse_overlap
from emloc.tasks.templates import text_expression, value_expression
from emloc.tasks.text import TextTask
from emloc.tasks.vqa import VqaTask

HELD_OUT = [{"q": "Which?", "label": 5}, {"q": "Who?", "label": 6}]
GAPS = [{"q": "one", "label": 1}, {"q": "two", "label": None}, {"q": "three", "label": 3}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(file: Path, rows: list[dict]) -> None:
    if file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    elif file.suffix == ".csv":
        cells = [["" if value is None else str(value) for value in row.values()] for row in rows]
        lines = [list(rows[0]), *cells]
        file.write_text("".join(",".join(line) + "\n" for line in lines))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def task(folder: Path, train: list[dict], kind: str = "jsonl", test=HELD_OUT, **settings):
    folder.mkdir(exist_ok=True)
    write(folder / f"train.{kind}", train)
    write(folder / f"test.{kind}", test)
    values = {"prompt": "{{q}}", "target": "{{label}}", "metric": "exact_match"}
    splits = {"train_split": "train", "eval_split": "test"}
    return TextTask(name="rows", path=str(folder), **splits, **(values | settings))


def pairs(examples) -> list[tuple[str, str]]:
    return [(row.prompt, row.target) for row in examples]


def refusal(call, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_missing_label_is_refused_with_column_row_and_count(tmp_path, kind):
    assert refusal(task(tmp_path / "a", GAPS, kind).train) == (
        "task rows: 1 of 3 rows of train have no value in the column label, which task.target "
        "writes (the first is train/1); correct the rows, or set task.missing=skip to leave them "
        "out"
    )


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_rows_without_a_label_are_skipped_by_a_setting(tmp_path, kind, caplog):
    """The other labels stay as they are written: 1, not 1.0."""
    with caplog.at_level(logging.WARNING):
        rows = task(tmp_path / "a", GAPS, kind, missing="skip").train()
    assert pairs(rows) == [("one", "1"), ("three", "3")]
    assert [row.id for row in rows] == ["train/0", "train/2"]
    assert (
        "task rows: left out: 1 of 3 rows of train have no value in the column label, which "
        "task.target writes (the first is train/1)" in caplog.messages
    )


def test_a_number_that_is_none_is_missing(tmp_path):
    rows = [{"q": "one", "label": 1.5}, {"q": "two", "label": float("nan")}]
    for kind in ("parquet", "jsonl"):
        message = refusal(task(tmp_path / kind, rows, kind).train)
        assert "1 of 2 rows of train have no value in the column label" in message


def test_evaluation_rows_without_a_label_are_refused(tmp_path):
    rows = [*HELD_OUT, {"q": "x", "label": None}, {"q": "y", "label": None}]
    gapped = task(tmp_path / "a", GAPS[:1], test=rows)
    assert "2 of 4 rows of test have no value in the column label" in refusal(gapped.held_out, None)
    assert len(task(tmp_path / "a", GAPS[:1], test=rows, missing="skip").held_out(None)) == 2


def test_lm_eval_would_score_the_rows_that_we_skip(tmp_path):
    rows = [*HELD_OUT, {"q": "x", "label": None}]
    gapped = task(tmp_path / "a", GAPS[:1], test=rows, missing="skip", lm_eval="gsm8k")
    assert refusal(gapped.held_out, None).startswith("task.missing=skip: lm-eval reads test itself")
    settings = {"missing": "skip", "lm_eval": "gsm8k"}
    assert len(task(tmp_path / "b", GAPS, **settings).train()) == 2
    shots = task(tmp_path / "c", GAPS, shots=1, **settings)
    assert refusal(shots.train).startswith("task.missing=skip: lm-eval reads train itself")


@pytest.mark.parametrize("label", ["", "  ", "\n"])
def test_an_empty_answer_is_refused_or_skipped(tmp_path, label):
    rows = [{"q": "one", "label": "x"}, {"q": "two", "label": label}]
    test = [{"q": "Which?", "label": "y"}]
    message = refusal(task(tmp_path / "a", rows, test=test).train)
    assert "1 of 2 rows of train have an empty text for task.target (the first is train/1)" in (
        message
    )
    skipped = task(tmp_path / "a", rows, test=test, missing="skip")
    assert pairs(skipped.train()) == [("one", "x")]


@pytest.mark.parametrize("question", [None, "", " "])
def test_a_row_without_a_prompt_is_no_plain_text(tmp_path, question):
    """The model would otherwise learn the label as a text of its own."""
    rows = [{"q": "one", "label": "x"}, {"q": question, "label": "y"}]
    assert "the first is train/1" in refusal(task(tmp_path / "a", rows).train)
    assert pairs(task(tmp_path / "a", rows, missing="skip").train()) == [("one", "x")]


def test_plain_texts_have_no_prompts(tmp_path):
    rows = [{"t": "first text"}, {"t": "second text"}]
    texts = task(tmp_path / "a", rows, test=rows[1:], prompt="", target="{{t}}")
    assert pairs(texts.train()) == [("", "first text")]


def test_every_lack_is_named_with_its_count(tmp_path):
    rows = [{"q": None, "label": "a"}, {"q": "x", "label": None}, {"q": None, "label": "c"}]
    message = refusal(task(tmp_path / "a", [{"q": "w", "label": "d"}, *rows]).train)
    assert "2 of 4 rows of train have no value in the column q, which task.prompt" in message
    assert "1 of 4 rows of train have no value in the column label" in message


def test_a_class_of_minus_one_is_no_class(tmp_path):
    features = datasets.Features({"q": datasets.Value("string"),
                                  "label": datasets.ClassLabel(names=["no", "yes"])})  # fmt: skip
    for split, labels in (("train", [0, 1]), ("test", [1, -1])):
        rows = {"q": [f"{split} {n}" for n in range(2)], "label": labels}
        file = tmp_path / f"{split}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    classes = TextTask(name="rows", path=str(tmp_path), train_split="train", eval_split="test",
                       prompt="{{q}}", target="{{label}}", metric="exact_match")  # fmt: skip
    assert "1 of 2 rows of test have no value in the column label" in refusal(
        classes.held_out, None
    )


def test_a_column_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    message = refusal(task(tmp_path / "a", GAPS, target="{{answer}}").train)
    assert message == (
        "task.target: 'answer' is undefined; the columns are q, label; correct task.target"
    )


def test_the_setting_is_checked_and_keeps_keys(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^task\.missing=drop is none of fail, skip; set task\.missing=fail$"
    ):
        task(tmp_path / "a", GAPS, missing="drop")
    failing, skipping = (task(tmp_path / "a", GAPS, missing=one) for one in ("fail", "skip"))
    assert "missing" not in failing.key
    assert skipping.key != failing.key


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_integers_that_are_stored_as_fractions_because_of_gaps_are_integers(tmp_path, kind):
    rows = [{"q": "one", "label": 1.0}, {"q": "two", "label": None}, {"q": "three", "label": -3.0}]
    kept = task(tmp_path / "a", rows, kind, missing="skip").train()
    assert pairs(kept) == [("one", "1"), ("three", "-3")]
    rows[0]["label"] = 0.5
    kept = task(tmp_path / "b", rows, kind, missing="skip").train()
    assert pairs(kept) == [("one", "0.5"), ("three", "-3.0")]
    whole = [{"q": "one", "label": 1.0}, {"q": "two", "label": 2.0}]
    assert pairs(task(tmp_path / "c", whole, kind).train()) == [("one", "1.0"), ("two", "2.0")]


# CSV files ---------------------------------------------------------------------------------------


def csv_task(folder: Path, lines: str, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "train.csv").write_text(lines)
    (folder / "test.csv").write_text("q,label\nheld out,1\n")
    values = {"prompt": "{{q}}", "target": "{{label}}", "metric": "exact_match"}
    splits = {"train_split": "train", "eval_split": "test"}
    return TextTask(name="rows", path=str(folder), **splits, **(values | settings))


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["None", "NA", "null", "nan"], ["None", "NA", "null", "nan"]),
        (["1", "", "-2"], ["1", "-2"]),
        (["1.0", "", "2.0"], ["1.0", "2.0"]),
        (["1", "", "2.5"], ["1", "2.5"]),
        (["1", "2", "3"], ["1", "2", "3"]),
        (["007", "0.50", "1e3"], ["007", "0.50", "1e3"]),
        (["007", "10"], ["007", "10"]),
        (["true", "false"], ["true", "false"]),
        (["TRUE", "", "FALSE"], ["TRUE", "FALSE"]),
    ],
    ids=str,
)
def test_labels_in_csv_files_are_those_that_are_written(tmp_path, cells, labels):
    lines = "q,label\n" + "".join(f"q{n},{cell}\n" for n, cell in enumerate(cells))
    rows = csv_task(tmp_path / "a", lines, missing="skip").train()
    assert [row.target for row in rows] == labels


def test_integers_with_gaps_are_still_numbers_in_templates(tmp_path):
    lines = "q,label\na,1\nb,\nc,3\n"
    template = (
        "{% if label is none %}none{% else %}{{ 'one' if label == 1 else label + 1 }}{% endif %}"
    )
    rows = csv_task(tmp_path / "a", lines, target=template).train()
    assert [row.target for row in rows] == ["one", "none", "4"]


def test_the_key_says_that_cells_keep_their_texts(tmp_path):
    """Results of earlier releases, which read `007` as 7, are not used again."""
    assert csv_task(tmp_path / "a", "q,label\na,007\n").key["written"] == ["label"]
    assert "written" not in csv_task(tmp_path / "b", "q,label\na,7\n").key


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", "q,label,label\na,1,2\n"),
        ("train.json", '[{"q": "a", "label": 1, "label": 2}]'),
    ],
)
def test_a_doubled_column_is_refused(tmp_path, name, content):
    copy = task(tmp_path / "a", HELD_OUT, Path(name).suffix[1:])
    (tmp_path / "a" / name).write_text(content)
    assert refusal(copy.train) == (
        f"task.path: {tmp_path / 'a' / name} has several columns with the name label; rename them"
    )


def test_a_doubled_column_in_lines_of_json_is_refused(tmp_path):
    copy = task(tmp_path / "a", HELD_OUT)
    (tmp_path / "a" / "train.jsonl").write_text('{"q": "a", "label": 1, "label": 2}\n')
    assert "label" in refusal(copy.train)


# Templates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    ["{{x}}", "{{x | trim}}", "a {{ 'b' ~ x }}", "{{x | int}}", "{{x | float}}", "{{x + 1}}",
     "{{'%s' | format(x)}}", "{{x | length}}", "{{x[0]}}", "{{x.name}}", "{{x | upper}}",
     "{% for one in x %}{{one}}{% endfor %}", "{{[x] | join}}", "{{x | default('d')}}",
     "{{'y' if x > 3 else 'n'}}", "{{row['x']}}", "{{row['x'] | trim}}", "{{x | string}}"],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, float("nan")], ids=["none", "nan"])
def test_no_template_writes_a_missing_value(template, value):
    with pytest.raises(MissingValueError) as caught:
        text_expression("target", template).evaluate({"x": value})
    assert caught.value.column == "x"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{x or 'unknown'}}", "unknown"),
        ("{% if x %}{{x}}{% else %}no{% endif %}", "no"),
        ("{{'no' if x is none else x}}", "no"),
        ("{{'yes' if x is not none}}", ""),
        ("{{'no' if x == none else x}}", "no"),
        ("{{x | default('d', true)}}", "d"),
        ("{{'defined' if x is defined}}", "defined"),
        ("{{y}}", "2"),
    ],
)
def test_a_template_can_test_for_a_missing_value(template, text):
    assert text_expression("target", template).evaluate({"x": None, "y": 2}) == text


def test_values_keep_their_types_and_gaps_in_lists():
    row = {"x": ["a", None, {"b": None}], "y": 1}
    assert value_expression("references", "x").evaluate(row) == ["a", None, {"b": None}]
    assert value_expression("references", "x[1]").evaluate_to_list(row) == []
    assert value_expression("references", "row").evaluate(row)["y"] == 1


# Other tasks -------------------------------------------------------------------------------------


def vqa(folder: Path, rows: list[dict], **settings) -> VqaTask:
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("question", "hint", "answer", "kind")}
        | {"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
    )
    for split in ("train", "test"):
        complete = [
            {"question": f"{split} {n}?", "hint": "h", "answer": "yes", "kind": "k"}
            | row
            | {"image": {"bytes": image_bytes(seed=n), "path": None}}
            for n, row in enumerate(rows)
        ]
        stored = datasets.Dataset.from_list(complete, features=features)
        stored.to_parquet(folder / f"{split}.parquet")
    values = {"prompt": "{{question}} {{hint}}", "target": "{{references[0]}}"}
    values |= {"image": "image", "references": "answer", "group": "kind", "scorer": "exact"}
    return VqaTask(name="pictures", path=str(folder), train_split="train", eval_split="test",
                   metric="accuracy", answer_tokens=4, **(values | settings))  # fmt: skip


@pytest.mark.parametrize(
    ("row", "lack"),
    [
        ({"hint": None}, "no value in the column hint, which task.prompt writes"),
        ({"kind": None}, "no value in the column kind, which task.group writes"),
    ],
)
def test_questions_about_images_that_lack_a_value_are_refused_or_skipped(tmp_path, row, lack):
    for call in (vqa(tmp_path, [{}, row]).train, lambda: vqa(tmp_path, [{}, row]).held_out(None)):
        message = refusal(call)
        assert f"1 of 2 rows of {'train' if 'train' in message else 'test'} have {lack}" in message
    skipping = vqa(tmp_path, [{}, row], missing="skip")
    assert [one.id for one in skipping.train()] == ["train/0"]
    assert [one.id for one in skipping.held_out(None)] == ["test/0"]


def test_an_empty_target_about_an_image_is_refused(tmp_path):
    message = refusal(vqa(tmp_path, [{}, {"hint": " "}], target="{{hint}}").train)
    assert "have an empty text for task.target (the first is train/1)" in message


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_an_answer_of_white_space_is_no_answer(tmp_path, answer, caplog):
    with caplog.at_level(logging.WARNING):
        rows = vqa(tmp_path, [{}, {"answer": answer}]).train()
    assert [one.id for one in rows] == ["train/0"]
    assert "(task.references), the first is train/1" in caplog.text


def mathqa(folder: Path, rows: list[dict]) -> MathQA:
    for split in ("train", "test"):
        problems = [{"Problem": f"{split} {n}"} | row for n, row in enumerate(rows)]
        write(folder / f"{split}.json", problems)
    return MathQA(name="mathqa", path=str(folder), train_split="train", eval_split="test",
                  prompt="{{Problem}}", target="{{answer}}", metric="exact_match")  # fmt: skip


CHOICES = "a ) 24 , b ) 120 , c ) 625 , d ) 720 , e ) 1024"


@pytest.mark.parametrize("letter", ["", "ab", None, "f"])
def test_a_letter_that_names_no_choice_is_no_answer(tmp_path, letter):
    rows = [{"options": CHOICES, "correct": "b"}, {"options": CHOICES, "correct": letter}]
    assert pairs(mathqa(tmp_path, rows).train()) == [("train 0", "120")]


def test_mathqa_without_choices_has_no_answer_and_without_columns_is_refused(tmp_path):
    rows = [{"options": CHOICES, "correct": "b"}, {"options": None, "correct": "a"}]
    assert pairs(mathqa(tmp_path, rows).train()) == [("train 0", "120")]
    (tmp_path / "b").mkdir()
    assert refusal(mathqa(tmp_path / "b", [{"correct": "a"}]).train).startswith(
        "task mathqa: the rows have no column options, but Problem, correct; set task.path"
    )


# Training and evaluation rows --------------------------------------------------------------------


def test_a_row_for_training_and_evaluation_is_refused():
    """Rows about different images are different rows, and so are those with other answers."""
    image, other = (lazy_image(name, b"") for name in "ab")
    rows = [
        Example("t/0", "a?", "x"),
        Example("t/1", "b?", "y", (image,)),
        Example("t/2", "c?", "z"),
    ]
    free = [
        Example("h/0", "a?", "y"),
        Example("h/1", "b?", "y", (other,)),
        Example("h/2", "d?", "z"),
    ]
    refuse_overlap(Examples("mine", tuple(rows)), Examples("mine", tuple(free)))
    held_out = (*free, Example("h/3", "c?", "z"), Example("h/4", "b?", "y", (image,)))
    assert refusal(refuse_overlap, Examples("mine", tuple(rows)), Examples("mine", held_out)) == (
        "task mine: 2 of 3 training rows are also evaluation rows, the first is t/1 (h/4); "
        "correct the data, or set task"
    )


def test_the_first_training_row_that_is_dropped_is_named(tmp_path, caplog):
    rows = [{"q": "one", "label": 1}, HELD_OUT[1]]
    with caplog.at_level(logging.WARNING):
        assert pairs(task(tmp_path / "a", rows).train()) == [("one", "1")]
    assert "dropped 1 of 2 training rows" in caplog.text
    assert "the first is train/1" in caplog.text
