"""Data sets of questions about images, read from rows with the columns of the published data."""

import base64
import io
import json
import logging
import os
import shutil
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import datasets
import pyarrow
import pytest
from omegaconf import OmegaConf
from PIL import Image

from emloc.errors import ConfigError
from emloc.tasks.images import ImageSource, NoImageError
from emloc.tasks.questions import ReadStats
from emloc.tasks.rows import Rows
from emloc.tasks.scorers import find_scorer
from emloc.tasks.vqa import VqaTask

CONF = Path(__file__).parents[2] / "conf" / "task"
TASKS = ["chartqa", "docvqa", "infovqa", "textvqa", "pmc_vqa", "websrc", "wc_vqa"]
SHORT = "\nAnswer the question using a single word or phrase."
BROKEN = b"\x89PNG\r\n\x1a\n and no more"


def png(shade: int, size: tuple[int, int] = (6, 4)) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(encoded, "PNG", compress_level=0)
    return encoded.getvalue()


def shade(picture) -> int:
    return picture.open().getpixel((0, 0))[0]


def build(name: str, **overrides) -> VqaTask:
    """Build a task from its YAML file, as the package does."""
    values = OmegaConf.load(CONF / f"{name}.yaml")
    module, _, cls = values.pop("_target_").rpartition(".")
    schema = OmegaConf.structured(getattr(import_module(module), cls))
    return OmegaConf.to_object(OmegaConf.merge(schema, values, overrides))


def stored(*images: bytes | None) -> list[dict | None]:
    """Return the values of an image column that holds one image per row."""
    return [None if one is None else {"bytes": one, "path": None} for one in images]


def parquet(file: Path, **columns: list) -> None:
    """Write a parquet file whose image columns are declared as images."""
    pictured = [
        name
        for name, values in columns.items()
        if any(isinstance(one, dict) and "bytes" in one for one in values)
    ]
    dataset = datasets.Dataset.from_dict(columns)
    for name in pictured:
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(file)


def charts(folder: Path, **splits: list[tuple[str, bytes | None, int]]) -> Path:
    """Write rows (question, image, asked by) in the columns of ChartQA.

    The last character of a question is its answer.
    """
    for split, rows in splits.items():
        parquet(
            folder / f"{split}.parquet",
            image=stored(*(image for _, image, _ in rows)),
            query=[question for question, _, _ in rows],
            label=[[question[-1]] for question, _, _ in rows],
            human_or_machine=[asker for _, _, asker in rows],
        )
    return folder


TRAIN, TEST = [("a1", png(1), 0)], [("b2", png(2), 1)]


@pytest.fixture
def chartqa(tmp_path):
    """Function that returns the ChartQA task on the rows of each split."""

    def make_task(train=TRAIN, test=TEST, **overrides) -> VqaTask:
        folder = charts(tmp_path / "charts", train=train, test=test)
        return build("chartqa", path=str(folder), **overrides)

    return make_task


def refusal_of(call, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Each data set -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_yaml_spells_out_every_field_and_is_named_after_itself(name):
    values = OmegaConf.load(CONF / f"{name}.yaml")
    task = build(name)
    assert set(values) - {"_target_"} == {field.name for field in fields(task)}
    assert task.name == name
    assert task.lm_eval is None
    assert "<image>" not in task.prompt


@pytest.mark.parametrize("name", TASKS)
def test_the_headline_metric_is_returned_by_the_scorer(name):
    task = build(name)
    label = "1" if name == "wc_vqa" else "B"
    assert task.score(label, [label] * 10)[task.metric] == 1.0


def test_chartqa(chartqa):
    (row,) = chartqa().train()
    assert (row.id, row.prompt, row.target) == ("train/0", f"a1{SHORT}", "1")
    assert (row.references, row.choices, row.group) == (("1",), (), "human")
    (picture,) = row.images
    assert picture.name == "chartqa train/0"
    assert picture.read() == png(1)
    assert (picture.size, shade(picture)) == ((6, 4), 1)
    (row,) = chartqa().held_out(None)
    assert (row.id, row.group, shade(row.images[0])) == ("test/0", "augmented", 2)


def test_docvqa_and_infovqa_score_with_all_answers_and_train_on_the_first(tmp_path):
    for split, number in (("train", 3), ("validation", 4)):
        parquet(
            tmp_path / f"{split}.parquet",
            question=[f"{split}?"],
            image=stored(png(number)),
            answers=[[f"{number}%", str(number)]],
        )
    for name in ("docvqa", "infovqa"):
        (row,) = build(name, path=str(tmp_path)).train()
        assert (row.prompt, row.target, row.references) == (f"train?{SHORT}", "3%", ("3%", "3"))
        (row,) = build(name, path=str(tmp_path)).held_out(None)
        assert (row.prompt, row.target, row.references) == (
            f"validation?{SHORT}",
            "4%",
            ("4%", "4"),
        )


def test_infovqa_reads_the_column_names_of_its_training_copy(tmp_path):
    parquet(tmp_path / "train.parquet", query=["q?"], answer=["blue"], image=stored(png(1)))
    validation = {"question": ["v?"], "answers": [["red"]], "image": stored(png(2))}
    parquet(tmp_path / "validation.parquet", **validation)
    questions = build("infovqa", path=str(tmp_path))._reader
    for split, prompt, answer in (("train", "q?", "blue"), ("validation", "v?", "red")):
        # On the hub these are two data sets; files of one folder must agree in their columns.
        rows = Rows(name="infovqa", id=None, path=str(tmp_path), splits={"train_split": split})
        ((example, _),) = questions.read(rows, split, ReadStats())
        assert (example.prompt, example.references) == (prompt + SHORT, (answer,))


def test_textvqa_trains_on_the_most_frequent_answer_and_keeps_all_ten(tmp_path):
    answers = ["nous", "dakota", "dakota digital", "dakota", "x", "dakota digital", "dakota"]
    answers += ["y", "z", "w"]
    for split, answers_of_row in (("train", answers), ("validation", answers[::-1])):
        parquet(
            tmp_path / f"{split}.parquet",
            question=[split],
            answers=[answers_of_row],
            image=stored(png(len(split))),
        )
    (row,) = build("textvqa", path=str(tmp_path)).train()
    assert row.target == "dakota"
    assert row.references == tuple(answers)


def test_websrc_reads_base64(tmp_path):
    long = png(7, (90, 90)) + b"\0" * 9000  # longer than any file name
    for split, image in (("train", png(3)), ("dev", long)):
        text = base64.b64encode(image).decode()
        columns = {"question": [f"{split}?"], "answer": ["63 inch"], "image": [text]}
        parquet(tmp_path / f"{split}.parquet", **columns)
    task = build("websrc", path=str(tmp_path))
    (row,) = task.train()
    assert (row.references, shade(row.images[0])) == (("63 inch",), 3)
    (row,) = task.held_out(None)
    assert (shade(row.images[0]), row.images[0].read()) == (7, long)


PMC = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"


def pmc(folder: Path, train: str = "train", test: str = "test_clean", *, images=True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, file, label in ((train, "a.png", "B"), (test, "b.png", "D")):
        row = f"{file},What is it?,Skin, A:Lung ,B:Skin,C:Liver,D:Bone,{label}\n"
        (folder / f"{split}.csv").write_text(PMC + row)
    if images:
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / "a.png").write_bytes(png(1))
        (folder / "images" / "b.png").write_bytes(png(2))
    return folder


def test_pmc_vqa_reads_images_from_the_folder_beside_its_files(tmp_path):
    task = build("pmc_vqa", path=str(pmc(tmp_path / "p")))
    (row,) = task.train()
    assert row.prompt == (
        "What is it?\nA:Lung\nB:Skin\nC:Liver\nD:Bone\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (row.target, row.references) == ("B", ("B",))
    assert row.choices == ("A:Lung", "B:Skin", "C:Liver", "D:Bone")
    assert (row.images[0].name, shade(row.images[0])) == ("pmc_vqa train/0 (a.png)", 1)
    assert [shade(one.images[0]) for one in task.held_out(None)] == [2]


def test_a_row_whose_label_is_no_choice_has_no_answer(tmp_path, caplog):
    folder = pmc(tmp_path / "p")
    with (folder / "train.csv").open("a") as file:
        file.write("a.png,Which?,E,A:1,B:2,C:3,D:4,E\n")
    assert len(build("pmc_vqa", path=str(folder)).train()) == 1
    assert caplog.messages == [
        "task pmc_vqa: left out 1 of 2 rows of train that have no usable answer "
        "(task.references), the first is train/1"
    ]


ADDRESS = "https://upload.org/thumb/3/{0}/873px-{0}?download"


def dishes(folder: Path, photos: dict[str, list[str]]) -> Path:
    for split, names in photos.items():
        options = ["1. Bialy\n2. Pistolet\n3. Knafeh\n4. Bublik", "1. a\n2. b\n3. c\n4. d\n5. e"]
        answers = [options[place % 2] for place in range(len(names))]
        instruction = "\n\nPrint only the answer with a single answer id (1,2,3,4,5)."
        parquet(
            folder / f"{split}.parquet",
            lang=["en"] * len(names),
            prompt_type=["1", "4", "3", "2"][: len(names)],
            multi_choice_prompt=[f"{split}?\n{one}{instruction}" for one in answers],
            image_url=[ADDRESS.format(name) for name in names],
            multi_choice_answer=[3] * len(names),
        )
    return folder


def test_wc_vqa_finds_photos_by_the_last_part_of_their_url(tmp_path):
    dishes(tmp_path / "w", {"train": ["Cr%C3%A8pe.jpg"], "test_large": ["x.jpg", "y.jpg"]})
    root = tmp_path / "photos"
    root.mkdir()
    for number, name in enumerate(("Crèpe", "x", "y")):
        (root / f"873px-{name}.jpg").write_bytes(png(number))
    task = build("wc_vqa", path=str(tmp_path / "w"), image_root=str(root))
    (row,) = task.train()
    assert (row.target, row.references, row.group) == ("3", ("3",), "en-1")
    assert row.choices == ("1. Bialy", "2. Pistolet", "3. Knafeh", "4. Bublik")
    assert row.images[0].read() == png(0)
    rows = task.held_out(None).rows
    assert rows[1].choices == ("1. a", "2. b", "3. c", "4. d", "5. e")
    assert [one.group for one in rows] == ["en-1", "en-4"]
    assert rows[1].prompt.startswith("test_large?\n1. a\n2. b")


def test_wc_vqa_without_a_folder_of_photos_is_refused(tmp_path):
    dishes(tmp_path / "w", {"train": ["a.jpg"], "test_large": ["x.jpg"]})
    assert refusal_of(build("wc_vqa", path=str(tmp_path / "w")).held_out, None) == (
        "task wc_vqa: task.image names files (such as 873px-x.jpg), but their folder is "
        "unknown; set task.image_root=/path/to/images"
    )
    task = build("wc_vqa", path=str(tmp_path / "w"), image_root=str(tmp_path / "no"))
    assert refusal_of(task.train) == (
        f"task.image_root: no folder {tmp_path / 'no'}; set task.image_root=/path/to/images"
    )


def test_one_error_names_all_missing_photos(tmp_path):
    dishes(tmp_path / "w", {"train": ["a.jpg", "b.jpg", "a.jpg"], "test_large": ["y.jpg", "x.jpg"]})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "873px-b.jpg").write_bytes(png(1))
    root = str(tmp_path / "photos")
    task = build("wc_vqa", path=str(tmp_path / "w"), image_root=root)
    assert refusal_of(task.train) == (
        f"task wc_vqa: 3 images are not in {root}: 873px-a.jpg, 873px-x.jpg, 873px-y.jpg; put them "
        "there, set task.image_root to their folder, or task.unreadable=skip to leave their rows "
        "out"
    )
    assert refusal_of(task.held_out, 1).startswith(
        f"task wc_vqa: 2 images are not in {root}: 873px-x.jpg, 873px-y.jpg; put"
    )
    # Only the rows that are trained on count, although more rows are missing photos.
    task = build("wc_vqa", path=str(tmp_path / "w"), image_root=root, limit=1)
    assert "3 images are not in" in refusal_of(task.train)


def test_rows_with_missing_photos_can_be_skipped(tmp_path, caplog):
    dishes(tmp_path / "w", {"train": ["a.jpg", "b.jpg"], "test_large": ["b.jpg"]})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "873px-b.jpg").write_bytes(png(1))
    root = str(tmp_path / "photos")
    task = build("wc_vqa", path=str(tmp_path / "w"), image_root=root, unreadable="skip")
    assert [row.id for row in task.train()] == ["train/1"]
    assert caplog.messages == [
        "task wc_vqa: left out 1 of 2 rows of train whose images cannot be read: "
        "train/0: there is no file 873px-a.jpg"
    ]


# Images ------------------------------------------------------------------------------------------


def test_the_images_of_a_data_set_are_not_held_in_memory(tmp_path):
    """The images stay in the memory-mapped file until one of them is read."""
    noise = [os.urandom(200_000) for _ in range(20)]
    rows = [(f"q{number}", image, 0) for number, image in enumerate(noise)]
    path = charts(tmp_path / "c", train=rows, test=[("b2", png(2), 1)])
    task = build("chartqa", path=str(path))
    assert len(task.held_out(None)) == 1
    before = pyarrow.total_allocated_bytes()
    examples = task.train().rows
    assert pyarrow.total_allocated_bytes() - before < 200_000
    assert [row.images[0].read() for row in examples] == noise


def test_a_broken_image_is_refused_by_name_when_it_is_opened(chartqa):
    rows = chartqa(test=[("b2", png(2), 1), ("c3", BROKEN, 1)]).held_out(None).rows
    assert shade(rows[0].images[0]) == 2
    message = refusal_of(rows[1].images[0].open)
    assert message.startswith("chartqa test/1: cannot read the image: ")
    assert message.endswith("or set task.unreadable=skip to leave such rows out")


def test_rows_with_broken_or_missing_images_can_be_skipped_and_are_logged(chartqa, caplog):
    line = png(1, (500, 4))
    test = [("a1", BROKEN, 0), ("b2", png(2), 0), ("c3", None, 0), ("d4", line, 1)]
    task = chartqa(test=test, unreadable="skip")
    assert [row.id for row in task.held_out(None)] == ["test/1"]
    (message,) = caplog.messages
    assert message.startswith(
        "task chartqa: left out 3 of 4 rows of test whose images cannot be read: "
        "test/0: cannot read the image: "
    )
    assert "; test/2: task.image gives no image; test/3: an image of 500 x 4 pixels has" in message
    assert "task.unreadable" not in message


def test_a_row_without_an_image_is_refused_by_its_name(chartqa):
    advice = "; correct task.image, or set task.unreadable=skip to leave such rows out"
    task = chartqa(test=[("b2", png(2), 1), ("c3", None, 1)])
    assert (
        refusal_of(task.held_out, 1) == f"task chartqa: test/1: task.image gives no image{advice}"
    )
    assert refusal_of(chartqa(image="[]").held_out, 1) == (
        f"task chartqa: test/0: task.image gives no image{advice}"
    )
    assert refusal_of(chartqa(image="human_or_machine").held_out, 1) == (
        f"task chartqa: test/0: task.image gives a value of type int{advice}"
    )


def test_a_split_without_any_readable_image_is_refused(chartqa):
    assert refusal_of(chartqa(test=[("b2", BROKEN, 1)], unreadable="skip").held_out, 1) == (
        "task chartqa: none of the 1 rows of test has an image that can be read; "
        "set task.eval_split to another split"
    )


def test_several_images_of_a_row_keep_their_order(tmp_path):
    for split, number in (("train", 1), ("test", 2)):
        parquet(
            tmp_path / f"{split}.parquet",
            query=[f"{split} {number}"],
            label=[["1"]],
            human_or_machine=[0],
            one=stored(png(number)),
            two=stored(png(10 * number)),
        )
    (row,) = build("chartqa", path=str(tmp_path), image="[two, one]").train()
    assert [shade(picture) for picture in row.images] == [10, 1]
    assert [picture.name for picture in row.images] == [
        "chartqa train/0 image 0",
        "chartqa train/0 image 1",
    ]
    assert row.images[0].key != row.images[1].key


def test_a_column_of_lists_of_images(tmp_path):
    for split, number in (("train", 1), ("test", 2)):
        parquet(
            tmp_path / f"{split}.parquet",
            query=["x", f"{split} {number}"],
            label=[["1"], ["2"]],
            human_or_machine=[0, 0],
            image=[stored(png(5 * number)), stored(png(number), png(number + 1))],
        )
    rows = build("chartqa", path=str(tmp_path)).train().rows
    assert [[shade(picture) for picture in row.images] for row in rows] == [[5], [1, 2]]


def test_accepted_forms_of_an_image(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "bare").write_bytes(png(2))
    source = ImageSource("t", tmp_path)
    text = base64.b64encode(png(3)).decode()
    ways = {
        "a.png": 1,
        "bare": 2,
        "https://host/x/a.png?size=1#top": 1,
        text: 3,
        f"data:image/png;base64,{text}": 3,
        str(tmp_path / "a.png"): 1,
    }
    for value, expected in ways.items():
        (picture,) = source.images([value], "train/0", 0)
        assert shade(picture) == expected, value
    (picture,) = source.images([{"bytes": None, "path": "a.png"}], "train/0", 0)
    assert shade(picture) == 1
    for value in ("../a.png", "b.png", "https://host/b.png"):
        with pytest.raises(NoImageError) as caught:
            source.images([value], "train/0", 0)
        assert caught.value.file == value.removeprefix("https://host/")


# Which rows train and which are held out ---------------------------------------------------------


def test_training_rows_that_are_also_held_out_are_dropped_and_counted(chartqa, caplog):
    task = chartqa(
        # An identical row; the same question with another image of the same size; another
        # question.
        train=[("b2", png(2), 0), ("b2", png(3), 0), ("c2", png(2), 0)],
        test=[("b2", png(2), 1), ("d4", png(4), 1)],
    )
    assert len(png(2)) == len(png(3))
    assert [row.id for row in task.train()] == ["train/1", "train/2"]
    assert caplog.messages == [
        "task chartqa: dropped 1 of 3 training rows that are also evaluation rows, the first is "
        "train/0"
    ]


def test_a_split_without_training_rows_left_is_refused(chartqa):
    task = chartqa(train=[("b2", png(2), 0)], test=[("b2", png(2), 1)])
    assert refusal_of(task.train) == (
        "task chartqa: every row of task.train_split=train is also in task.eval_split=test; set "
        "task.train_split to another split, or to test too, which is then divided by image"
    )


def test_two_copies_of_one_split_are_divided_by_image(chartqa):
    rows = [("a1", png(1), 0), ("b2", png(2), 1), ("c2", png(2), 0)]
    task = chartqa(train=rows, test=rows)
    assert [row.id for row in task.train()] == ["test/0"]
    assert [row.id for row in task.held_out(None)] == ["test/1", "test/2"]


def test_a_split_used_for_both_is_divided_by_image(chartqa, caplog):
    first, second, third, fourth = (png(number) for number in (1, 2, 3, 4))
    images = [first, second, first, third, fourth, second]
    rows = [(f"q{number}", image, 0) for number, image in enumerate(images)]
    task = chartqa(test=rows, train_split="test")
    with caplog.at_level(logging.INFO):
        assert [row.id for row in task.train()] == ["test/0", "test/1", "test/2", "test/5"]
    assert (
        "task chartqa: split test is divided by image: 4 training rows about 2 of the 4 images, "
        "2 held-out rows"
    ) in caplog.messages
    assert [row.id for row in task.held_out(None)] == ["test/3", "test/4"]
    assert [row.id for row in task.held_out(1)] == ["test/3"]
    assert len(chartqa(test=rows, train_split="test", limit=3).train()) == 3


def test_images_of_one_row_are_not_divided(tmp_path):
    pairs = [(1, 2), (3, 4), (5, 6), (4, 5), (7, 7)]
    parquet(
        tmp_path / "test.parquet",
        query=[f"q{number}" for number in range(5)],
        label=[["1"]] * 5,
        human_or_machine=[0] * 5,
        one=stored(*(png(one) for one, _ in pairs)),
        two=stored(*(png(two) for _, two in pairs)),
    )
    splits = {"train_split": "test", "eval_split": "test"}
    task = build("chartqa", path=str(tmp_path), image="[one, two]", **splits)
    # The rows connect the images to three sets: 1 2, 3 4 5 6, 7.
    assert [row.id for row in task.train()] == ["test/0"]
    assert [row.id for row in task.held_out(None)] == ["test/1", "test/2", "test/3", "test/4"]


def test_a_single_image_cannot_be_divided(chartqa):
    task = chartqa(test=[("a1", png(1), 0), ("b2", png(1), 0)], train_split="test")
    assert refusal_of(task.train) == (
        "task chartqa: split test cannot be divided by image, since all its rows show one image; "
        "set task.train_split to another split"
    )


def test_rows_without_an_answer_are_skipped_and_counted(tmp_path, caplog):
    for split in ("train", "validation"):
        parquet(
            tmp_path / f"{split}.parquet",
            question=[f"{split} {number}" for number in range(3)],
            answers=[None, ["yes"], [] if split == "train" else [""]],
            image=stored(png(1), png(2), png(3)),
        )
    task = build("docvqa", path=str(tmp_path))
    assert [row.id for row in task.held_out(None)] == ["validation/1"]
    assert [row.id for row in task.train()] == ["train/1"]
    assert caplog.messages == [
        f"task docvqa: left out 2 of 3 rows of {split} that have no usable answer "
        f"(task.references), the first is {split}/0"
        for split in ("validation", "train")
    ]


def test_a_split_without_any_answer_is_refused(tmp_path):
    for split, answers in (("train", ["yes"]), ("test", None)):
        parquet(
            tmp_path / f"{split}.parquet",
            question=["q?"],
            answers=datasets.Dataset.from_dict({"a": [answers]})["a"][:],
            image=stored(png(1)),
        )
    task = build("docvqa", path=str(tmp_path), eval_split="test")
    assert refusal_of(task.held_out, None) == (
        "task docvqa: none of the 1 rows of test has a usable answer, as in many published test "
        "splits; set task.eval_split to another split"
    )


def test_a_limit_reads_only_the_rows_that_it_needs(chartqa):
    train = [("a1", png(1), 0), ("e5", png(2), 0), ("c3", None, 0)]
    assert [row.id for row in chartqa(train=train, limit=2).train()] == ["train/0", "train/1"]
    assert "train/2: task.image gives no image" in refusal_of(chartqa(train=train, limit=3).train)


# Keys --------------------------------------------------------------------------------------------


def test_the_key_depends_on_the_held_out_rows_and_their_images(tmp_path):
    folder = charts(tmp_path / "a", train=[("a1", png(1), 0)], test=[("b2", png(2), 1)])
    task = build("chartqa", path=str(folder))
    moved = build("chartqa", path=str(shutil.copytree(folder, tmp_path / "b")))
    assert task.key == moved.key
    assert json.loads(json.dumps(task.key)) == task.key
    assert task.train().key == moved.train().key
    assert task.key == build("chartqa", path=str(folder), limit=1).key
    assert task.key != build("chartqa", path=str(folder), prompt="{{query}}").key
    assert task.key != build("chartqa", path=str(folder), answer_tokens=9).key
    charts(tmp_path / "b", test=[("b2", png(3), 1)])
    assert task.key != build("chartqa", path=str(tmp_path / "b")).key


def test_the_key_depends_on_the_contents_of_image_files(tmp_path):
    folder = pmc(tmp_path / "p")
    task = build("pmc_vqa", path=str(folder))
    held_out, trained = task.key, task.train().key
    # The key ignores an archive and images that no row names.
    (folder / "images.zip").write_bytes(b"large")
    (folder / "images" / "c.png").write_bytes(png(9))
    assert build("pmc_vqa", path=str(folder)).key == held_out
    (folder / "images" / "b.png").write_bytes(png(5, (7, 7)))
    changed = build("pmc_vqa", path=str(folder))
    assert changed.key != held_out
    assert changed.train().key == trained
    assert [shade(row.images[0]) for row in changed.held_out(None)] == [5]


# Where rows come from ----------------------------------------------------------------------------


def test_task_files_names_the_splits_of_a_data_set_without_declared_splits(tmp_path):
    folder = pmc(tmp_path / "p", "train_2", "test_2")
    files = {"train": "train_2.csv", "test": "test_2.csv", "test_clean": "none.csv"}
    task = build("pmc_vqa", path=str(folder), files=files, eval_split="test")
    assert [row.id for row in task.train()] == ["train/0"]
    assert [row.target for row in task.held_out(None)] == ["D"]
    assert refusal_of(build("pmc_vqa", path=str(folder), files=files).train) == (
        f"task.path: {folder} has no file none.csv with one of the formats "
        ".parquet, .jsonl, .json, .csv; correct task.files.test_clean or task.path"
    )
    assert refusal_of(build("pmc_vqa", path=str(folder), eval_split="test").held_out, 1) == (
        "task.eval_split: task.files names no file of the split test; "
        "set task.files.test=<file> or correct task.eval_split"
    )


def test_arguments_of_the_request_to_the_hub():
    rows = build("pmc_vqa")._stored["train_split"]
    assert rows.source() == {
        "path": "RadGenome/PMC-VQA",
        "name": None,
        "revision": None,
        "data_files": {"train": "train.csv", "test_clean": "test_clean.csv"},
    }
    both = build("docvqa", revision="abc")._stored
    assert both["eval_split"].source() == {
        "path": "lmms-lab/DocVQA",
        "name": "DocVQA",
        "revision": "abc",
    }
    assert both["train_split"].source() == {
        "path": "HuggingFaceM4/DocumentVQA",
        "name": None,
        "revision": None,
    }
    assert both["eval_split"].origin != build("infovqa")._stored["eval_split"].origin


def test_splits_of_two_data_sets_with_one_name_differ():
    task = build("docvqa", train_split="validation")
    assert refusal_of(task.train) == (
        "task.id: cannot reach the hub for lmms-lab/DocVQA; set task.path=/path/to/copy"
    )
    assert refusal_of(task._stored["train_split"].of, "validation") == (
        "task.train_id: cannot reach the hub for HuggingFaceM4/DocumentVQA; "
        "set task.path=/path/to/copy"
    )


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"id": None}, "task.id and task.path are both null; set task.path=/path/to/copy"),
        ({"limit": 0}, "task.limit must be at least 1 or null, got 0; set task.limit=null"),
        (
            {"answer_tokens": 0},
            "task.answer_tokens must be at least 1, got 0; set task.answer_tokens=32",
        ),
        (
            {"unreadable": "drop"},
            "task.unreadable=drop is none of fail, skip; set task.unreadable=fail",
        ),
        (
            {"references": "label["},
            "task.references: unexpected 'end of template' in 'label['; correct task.references",
        ),
        (
            {"prompt": "{{query"},
            "task.prompt: unexpected end of template, expected 'end of print statement'. in "
            "'{{query'; correct task.prompt",
        ),
    ],
)
def test_refused_without_reading_data(overrides, message):
    assert refusal_of(lambda: build("chartqa", **overrides)) == message


@pytest.mark.parametrize("field", ["image", "prompt", "target", "references", "choices", "group"])
def test_an_unknown_column_is_refused_with_the_setting_that_uses_it(chartqa, field):
    source = "{{colour}}" if field in ("prompt", "target") else "colour"
    assert refusal_of(chartqa(**{field: source}).held_out, None) == (
        f"task chartqa: test/0: task.{field}: 'colour' is undefined; the columns are image, "
        f"query, label, human_or_machine; correct task.{field}"
    )


def test_an_expression_that_fails_is_refused_with_its_setting(chartqa):
    assert refusal_of(chartqa(group="query + 1").held_out, None).startswith(
        "task chartqa: test/0: task.group: can only concatenate str"
    )
    assert refusal_of(chartqa(group="row['Asked by']").held_out, None).startswith(
        "task chartqa: test/0: task.group: "
    )
    assert [row.group for row in chartqa(group="row['query']").held_out(None)] == ["b2"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (
            "emloc.tasks.metrics.exact.scores",
            "module 'emloc.tasks.metrics.exact' has no attribute 'scores'",
        ),
        ("emloc.tasks.metrics.bleu.score", "No module named 'emloc.tasks.metrics.bleu'"),
        ("bleu", "No module named 'emloc.tasks.metrics.bleu'"),
        ("emloc.tasks.metrics.exact.__name__", "it is no function"),
    ],
)
def test_a_missing_scorer_is_refused_before_rows_are_read(chartqa, path, reason):
    message = f"task.scorer={path}: {reason}; set task.scorer=exact or another scorer"
    assert refusal_of(find_scorer, path) == message
    assert refusal_of(chartqa(scorer=path).held_out, 1) == message
